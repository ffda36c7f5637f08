"""Checks of what a caller typed: each raises `ValueError` quoting the call, the mistake and the remedy."""

import math
import operator
import sys
import threading
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from ._rounding_up import rounded_up
from ._types import RealScalarLike

T = TypeVar("T")

_LARGEST_INT = 2**53


def is_traced(value: Any) -> bool:
    """Whether `value` is a tracer, whose number cannot be looked at."""
    return isinstance(value, Tracer)


def _trace_state() -> Any:
    try:
        # the convention only names who asks; there is no other
        return jex.get_opaque_trace_state(convention="flax")
    except (AttributeError, TypeError):
        # a JAX that cannot be asked: no state equals another, so that nothing is drawn and keys must be given
        return object()


def _state_without_trace() -> Any:
    """JAX's trace state where no transformation is under way, whatever is under way where dpx is imported."""
    states = []
    # transformations belong to a thread, and a new one has none
    thread = threading.Thread(target=lambda: states.append(_trace_state()))
    thread.start()
    thread.join()
    return states[0]


_NO_TRACE = _state_without_trace()
# the parts of JAX that call the functions which it transforms
_TRACERS = ("jax._src.linear_util", "jax._src.interpreters.partial_eval")


def is_tracing() -> bool:
    """Whether this is called inside a JAX transformation, of anything and also of nothing.

    Randomness of the host would be baked into a compiled program there, or be the same in every lane of a `vmap`. To look whether a constant
    becomes a tracer is not enough: under `vmap` it does not, in none of the lanes.
    """
    if _trace_state() != _NO_TRACE:
        return True
    # The rules of a `custom_vjp` run outside its trace, and so does what is under `jax.core.eval_context`; but not without JAX as a caller.
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") in _TRACERS:
            return True
        frame = frame.f_back
    return False


def usable(x: Any, is_usable: Any = None) -> Float[Array, "..."]:
    """`x` where it is a number that the host would have taken, by default positive and finite; NaN where it would have refused it.

    For numbers that cannot be looked at: tracers, and leaves that were changed behind the constructor's back (`eqx.tree_at`). NaN reaches the
    scale of the noise and with it every gradient, whereas a zero or a negative number would remove noise without a trace.
    """
    x = jnp.asarray(x)
    ok = (x > 0) & (x < jnp.inf) if is_usable is None else is_usable
    return jnp.where(ok, x, jnp.full((), jnp.nan, x.dtype))


def described(value: Any) -> str:
    """What was given, in a few words: never the contents of an array or a table, which may be data."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if is_traced(value):
        return f"a value that JAX is tracing ({value.aval.str_short()})"
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return f"PRNG keys of shape {value.shape}" if value.shape else "a PRNG key"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        shape = tuple(value.shape)
        return f"an array of {value.dtype} and shape {shape}" if shape else str(value)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        text = repr(value)
    elif isinstance(value, tuple | list | dict | set | frozenset) and _is_plain(value) and len(repr(value)) <= 60:
        text = repr(value)
    elif callable(value) and hasattr(value, "__name__"):
        text = f"the function {value.__name__}"
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}... (a {type(value).__name__})"


def _is_plain(value: Any) -> bool:
    """Whether something is made of Python's own numbers and texts."""
    if isinstance(value, tuple | list | set | frozenset):
        return len(value) <= 20 and all(map(_is_plain, value))
    if isinstance(value, dict):
        return len(value) <= 20 and all(_is_plain(v) for pair in value.items() for v in pair)
    return (
        value is None
        or isinstance(value, bool | int | float | complex | str | bytes)
        and not isinstance(value, np.generic)
    )


def real_number(call: str, value: Any) -> float:
    """Any real number, infinite or NaN too, as a Python float; `ValueError` for everything else."""
    if isinstance(value, bool | np.bool_ | str | bytes):
        raise ValueError(f"`{call}` must be a number; got {described(value)}.")
    try:
        array = np.asarray(value)
        is_number = array.dtype != bool and (array.dtype == object or jnp.issubdtype(array.dtype, jnp.number))
        if array.shape == () and is_number and not jnp.issubdtype(array.dtype, jnp.complexfloating):
            # object: Python's own large integers, fractions and decimals
            return float(value) if array.dtype == object else float(array)
    except OverflowError:
        raise ValueError(f"`{call}` is too large for a floating-point number.") from None
    except (TypeError, ValueError):
        raise ValueError(f"`{call}` must be a number; got {described(value)}.") from None
    remedy = ""
    if array.shape != () and is_number:
        remedy = " Give one number; for several, use `jax.vmap`, or build one for each."
    raise ValueError(f"`{call}` must be a number; got {described(value)}.{remedy}")


def positive_scalar(call: str, value: RealScalarLike, why: str = "") -> Float[Array, ""]:
    """A positive finite number as a float32 scalar, rounded UP, so that a noise or a bound is never understated.

    A traced one that is not is NaN: see `usable`.
    """
    if is_traced(value):
        traced: Any = value
        rounded = jnp.asarray(traced, jnp.float32)
        if rounded.dtype != traced.dtype:
            is_below = rounded.astype(traced.dtype) < traced
            rounded = jnp.where(is_below, jnp.nextafter(rounded, jnp.full((), jnp.inf, jnp.float32)), rounded)
        return usable(rounded)
    number = real_number(call, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"`{call}` must be positive and finite; got {number}.{' ' + why if why else ''}")
    rounded = rounded_up(number)
    if not np.isfinite(rounded):
        raise ValueError(f"`{call}` must fit into float32; got {number}.")
    return jnp.asarray(rounded)


def integer(call: str, value: Any) -> int:
    """An integer, as a Python one; booleans are none."""
    if not isinstance(value, bool | np.bool_):
        try:
            return operator.index(value)
        except TypeError:
            pass
    remedy = ""
    if isinstance(value, float | np.floating):
        remedy = " Divide with `//`, or round it."
    raise ValueError(f"`{call}` must be an integer; got {described(value)}.{remedy}")


def positive_int(call: str, value: Any) -> int:
    """A positive integer."""
    number = integer(call, value)
    if number < 1:
        raise ValueError(f"`{call}` must be at least 1; got {number}.")
    if number > _LARGEST_INT:
        raise ValueError(f"`{call}` must be at most 2**53, beyond which floating-point numbers skip integers.")
    return number


def positive_float(call: str, value: RealScalarLike) -> float:
    """A positive finite Python float."""
    number = real_number(call, value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"`{call}` must be positive and finite; got {number}.")
    return number


def probability_scalar(call: str, value: RealScalarLike) -> Float[Array, ""]:
    """A number strictly between 0 and 1 as a float32 scalar; NaN where a traced one is not."""
    if is_traced(value):
        number = jnp.asarray(value, jnp.float32)
        return usable(number, is_probability(number))
    return jnp.asarray(probability(call, value), jnp.float32)


def is_probability(x: Any) -> Any:
    """Whether a number lies strictly between 0 and 1."""
    return (x > 0) & (x < 1)


def probability(call: str, value: RealScalarLike) -> float:
    """A number strictly between 0 and 1, as a Python float."""
    number = real_number(call, value)
    if not 0 < number < 1:
        raise ValueError(f"`{call}` must lie strictly between 0 and 1; got {number}.")
    return number


def at_least_zero(call: str, value: RealScalarLike) -> float:
    """A number of at least 0, which may be infinite."""
    number = real_number(call, value)
    if not number >= 0:
        raise ValueError(f"`{call}` must be at least 0; got {number}.")
    return number


def flag(call: str, value: Any) -> bool:
    """True or False, and not what Python takes for it, such as the text "no"."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise ValueError(f"`{call}` must be True or False; got {described(value)}.")


def choice(call: str, value: Any, choices: Sequence[Any]) -> Any:
    """One of a few words or numbers."""
    for option in choices:
        kinds = str if isinstance(option, str) else (int, np.integer)
        if isinstance(value, kinds) and not isinstance(value, bool) and value == option:
            return option
    listed = [repr(option) for option in choices]
    raise ValueError(f"`{call}` must be {', '.join(listed[:-1])} or {listed[-1]}; got {described(value)}.")


def nonempty_text(call: str, value: Any) -> str:
    """A text that is not empty."""
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"`{call}` must be a text; got {described(value)}.")


def function(call: str, value: Any, signature: str) -> Any:
    """Something that can be called, and is no class, as `signature` shows."""
    if callable(value) and not isinstance(value, type):
        return value
    raise ValueError(f"`{call}` must be a function, `{signature}`; got {described(value)}.")


def instance(call: str, value: Any, kind: type[T], example: str) -> T:
    """An object of that kind; `example` is one, as it would be typed."""
    if isinstance(value, kind):
        return value
    if isinstance(value, type) and issubclass(value, kind):
        raise ValueError(f"`{call}` must be made, such as `{example}`; got the class itself, {value.__name__}.")
    raise ValueError(f"`{call}` must be such as `{example}`; got {described(value)}.")


def real_array(call: str, value: Any, what: str) -> np.ndarray:
    """Real numbers as a float64 array of any shape; `what` says what should have been given."""
    if value is not None and not isinstance(value, str | bytes | dict | set):
        try:
            array = np.asarray(value)
            if array.dtype != bool and jnp.issubdtype(array.dtype, jnp.number) and not np.iscomplexobj(array):
                return array.astype(np.float64)
        except (TypeError, ValueError, OverflowError):
            pass  # ragged, or made of other things
    raise ValueError(f"`{call}` must be {what}; got {described(value)}.")


def as_array(call: str, value: Any, what: str) -> Array:
    """What JAX makes an array of numbers or booleans of, tracers too, as one; `what` says what should have been given."""
    if value is not None and not isinstance(value, str | bytes | dict | set):
        try:
            array = value if isinstance(value, jax.Array) else np.asarray(value)
            if jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool:
                return jnp.asarray(array)
        except (TypeError, ValueError, OverflowError):
            pass
    raise ValueError(f"`{call}` must be {what}; got {described(value)}.")


def check_tuple(name: str, value: Any) -> None:
    """Raises unless a batch, or the data of batches, is a tuple of the loss's arguments."""
    if isinstance(value, tuple):
        return
    remedy = f"Write `({name},)`."
    if isinstance(value, list):
        remedy = f"Write `tuple({name})` for one argument each."
    elif not (isinstance(value, dict) or hasattr(value, "shape")):
        remedy = "Its leaves must be arrays in memory."
        if name == "data":
            remedy = "Its leaves must be arrays in memory; to load rows yourself, ask `plan.sampler.indices(seed, step)` for those of each step."
    raise ValueError(
        f"`{name}` must be a tuple of the loss's arguments, such as `(x, y)`; got {type(value).__name__}. {remedy}"
    )


def check_numbers(where: str, dtype: Any) -> None:
    """Raises unless a dtype is one that JAX computes with."""
    if (
        jnp.issubdtype(dtype, jnp.bool_)
        or jnp.issubdtype(dtype, jnp.number)
        or jnp.issubdtype(dtype, jax.dtypes.prng_key)
    ):
        return
    remedy = "Encode it as numbers, such as `np.unique(values, return_inverse=True)[1]`."
    kind = getattr(dtype, "kind", "")
    if kind in "mM":
        remedy = "Make numbers of times, such as seconds: `(times - start) / np.timedelta64(1, 's')`."
    elif kind == "O":
        remedy = (
            "Arrays of objects are texts, rows of unequal length, or columns of several types: encode, pad or select them, and "
            "convert with `.astype(np.float32)`."
        )
    raise ValueError(f"`{where}` must hold numbers or booleans; got dtype {dtype}. {remedy}")
