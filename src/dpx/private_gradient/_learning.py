"""What a clipping learns at a step: from questions of its own, or from the slack that it releases with the sum."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from .._norms import combined
from .._rounding_up import NORM_UP
from .._types import Params
from ..clipping import AbstractClipping, AbstractSlackClipping
from ..gradients import ClippedSum
from ._sums import struct_of_sum

_MSG_BOUNDS = (
    "`{name}` learns from the slack that gradients leave, for which the gradient method must return `bounds` of their norms. Use `Ghost()`, "
    "`Vectorized()` or `Auto()`."
)


def struct_of_query(clipping: AbstractClipping, params: Params) -> PyTree:
    """Shapes, dtypes and layout of what noise is added to."""
    struct = jax.tree.map(struct_of_sum, params)
    if not isinstance(clipping, AbstractSlackClipping):
        return struct
    return struct, jax.ShapeDtypeStruct((clipping.slack_size,), jnp.float32)


def query_of(clipping: AbstractClipping, out: ClippedSum, mask: Bool[Array, " batch"], state: PyTree) -> PyTree:
    """What noise is added to: the clipped sum, and beside it the sum of the slacks where the clipping asks for them."""
    if not isinstance(clipping, AbstractSlackClipping):
        return out.total
    if out.bounds is None:
        raise ValueError(_MSG_BOUNDS.format(name=type(clipping).__name__))
    norms = combined([out.bounds[:, k] for k in range(out.bounds.shape[1])], clipping.order) * NORM_UP
    # who contributes no gradient contributes no slack; 0 instead of infinity, since what is not selected must still be a number
    is_kept = mask & jnp.isfinite(norms)
    slack = clipping.slack(jnp.where(is_kept, norms, 0), state)
    return out.total, jnp.sum(jnp.where(is_kept[:, None], slack, 0), axis=0)


def learnt(
    clipping: AbstractClipping,
    noisy: PyTree,
    state: PyTree,
    out: ClippedSum,
    mask: Bool[Array, " batch"],
    expected_batch_size: Float[Array, ""],
    key: Key[Array, ""],
) -> tuple[Params, Any]:
    """The noisy clipped sum, and the clipping's state after the step."""
    if not isinstance(clipping, AbstractSlackClipping):
        return noisy, clipping.update(state, out.norms, mask, expected_batch_size, key)
    total, slack = noisy
    return total, clipping.learn(state, slack, expected_batch_size)
