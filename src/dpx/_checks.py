"""Checks of what a caller typed: each raises `ValueError` quoting the call, the mistake and the remedy."""

import math
import operator
import sys
import threading
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from ._types import RealScalarLike


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
    number = float(np.asarray(value))
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"`{call}` must be positive and finite; got {number}.{' ' + why if why else ''}")
    rounded = rounded_up(number)
    if not np.isfinite(rounded):
        raise ValueError(f"`{call}` must fit into float32; got {number}.")
    return jnp.asarray(rounded)


def rounded_up(number: float) -> np.float32:
    """The least float32 that is not below `number`."""
    with np.errstate(over="ignore"):
        rounded = np.float32(number)
    return np.nextafter(rounded, np.float32(np.inf)) if float(rounded) < number else rounded


def positive_int(call: str, value: Any) -> int:
    """A positive integer."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"`{call}` must be an integer; got {value!r}.") from None
    if number < 1:
        raise ValueError(f"`{call}` must be at least 1; got {number}.")
    return number


def positive_float(call: str, value: RealScalarLike) -> float:
    """A positive finite Python float."""
    number = float(np.asarray(value))
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
    number = float(np.asarray(value))
    if not 0 < number < 1:
        raise ValueError(f"`{call}` must lie strictly between 0 and 1; got {number}.")
    return number
