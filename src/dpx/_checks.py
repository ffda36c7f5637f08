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


def positive_scalar(call: str, value: RealScalarLike, why: str = "") -> Float[Array, ""]:
    """A positive finite number as a float32 scalar, rounded UP, so that a noise or a bound is never understated."""
    if is_traced(value):
        return jnp.asarray(value, jnp.float32)
    number = float(np.asarray(value))
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"`{call}` must be positive and finite; got {number}.{' ' + why if why else ''}")
    rounded = np.float32(number)
    if float(rounded) < number:
        rounded = np.nextafter(rounded, np.float32(np.inf))
    if not np.isfinite(rounded):
        raise ValueError(f"`{call}` must fit into float32; got {number}.")
    return jnp.asarray(rounded)


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


def probability(call: str, value: RealScalarLike) -> float:
    """A number strictly between 0 and 1, as a Python float."""
    number = float(np.asarray(value))
    if not 0 < number < 1:
        raise ValueError(f"`{call}` must lie strictly between 0 and 1; got {number}.")
    return number
