"""Checks of what a caller typed: each raises `ValueError` quoting the call, the mistake and the remedy."""

import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from ._types import RealScalarLike


def is_traced(value: Any) -> bool:
    """Whether `value` is a tracer, whose number cannot be looked at."""
    return isinstance(value, Tracer)


def is_tracing() -> bool:
    """Whether a transformation such as `jit` is being traced, so that host randomness would be baked in as a constant."""
    return is_traced(jnp.add(0, 0))


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
