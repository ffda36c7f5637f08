"""Streams: the noise of one step from the last few, kept in a ring that is written once a step and never moved."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from .._checks import is_traced

_BLOCK = 16
# So many draws are unrolled and fused; more would be compiled one by one and run in a loop instead.
_UNROLL_REPLAY = 3


class Ring(eqx.Module):
    r"""The last `depth` trees of a stream: slot $t \bmod$ depth of every leaf holds the one of step $t$.

    **Arguments:**

    - `count`: number of steps taken.
    - `slots`: like the noise, with one more leading axis of length depth; at least float32.
    """

    count: Int[Array, ""]
    slots: PyTree[Array]


def init_ring(struct: PyTree[Any], depth: int) -> Ring:
    """An empty ring for trees like `struct`, laid out as it is."""
    return Ring(jnp.zeros((), jnp.int32), jax.tree.map(lambda x: _stacked_zeros(x, depth), struct))


def _wide(x: Any) -> Any:
    """The dtype in which noise like `x` is summed and kept."""
    # not `promote_types`, which refuses half precision under strict promotion
    return x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.dtype(jnp.float32)


def _stacked_zeros(x: Any, depth: int) -> Array:
    shape, dtype = (depth, *x.shape), _wide(x)
    sharding = jax.typeof(x).sharding if isinstance(x, jax.Array) else getattr(x, "sharding", None)
    if isinstance(x, jax.Array) and not is_traced(x):
        sharding = x.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return jnp.zeros(shape, dtype)
    stacked = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return jnp.zeros(shape, dtype, device=stacked)


def by_slot(weights: Float[Array, " depth"], count: Int[Array, ""]) -> Float[Array, " depth"]:
    """Reorders weights given by age (1, 2, ...) to the slots in which the trees of that age lie before step `count`."""
    depth = weights.shape[0]
    return weights[jnp.mod(count - 1 - jnp.arange(depth, dtype=jnp.int32), depth)]


def weighted_sum(
    weights: Float[Array, " depth"], slots: Float[Array, "depth ..."], filled: Int[Array, ""]
) -> Float[Array, "..."]:
    """`sum_s weights[s] slots[s]` over the first `filled` slots (those after them weigh nothing), as a loop over blocks; 0 if none.

    It takes one temporary and no more, whatever uses it: a fused sum that two results need is computed, or its slots copied,
    for both. Not a matrix product, whose order of summation may depend on how the noise is sharded.
    """
    depth = slots.shape[0]
    if depth == 0:
        return jnp.zeros((), slots.dtype)
    block = min(depth, _BLOCK)
    whole = depth // block * block
    overlap = jnp.zeros((-depth % block,), slots.dtype)
    weights = weights.astype(slots.dtype)
    # the last block ends with the last slot, and gives those that it has in common with the block before no weight
    weights = jnp.concatenate([weights[:whole], overlap, weights[whole:]])

    def add(i, total):
        # slot by slot, because XLA fuses these reads but would store the slice of a whole block
        start = jnp.minimum(i * block, depth - block)
        for j in range(block):
            total = total + weights[i * block + j] * jax.lax.dynamic_index_in_dim(slots, start + j, keepdims=False)
        return total

    # a number of blocks that is known only at run time also keeps XLA from unrolling the loop
    blocks = (jnp.minimum(filled, depth) + block - 1) // block
    return jax.lax.fori_loop(0, blocks, add, jnp.zeros_like(slots[0]))


def after(x: Array, kept: Array) -> Array:
    """`kept`, once `x` is there (NaN where `x` is, which poisons what follows).

    Without this dependency XLA copies the whole ring, so that `x` can still be read from it after the write; it may drop an
    `optimization_barrier`, but not this.
    """
    return jnp.where(jnp.isnan(x), x, kept)


def push(
    slots: Float[Array, "depth *shape"], x: Float[Array, "*shape"], slot: Int[Array, ""]
) -> Float[Array, "depth *shape"]:
    """Overwrites one slot: in place where the buffers are donated or carried by a `scan`."""
    return jax.lax.dynamic_update_index_in_dim(slots, x, slot, 0)


def map_pairs(function: Callable[[Array, Array], tuple[Array, Array]], z: PyTree[Array], slots: PyTree[Array]) -> Any:
    """Two trees from a function of the leaves of two that gives a pair."""
    leaves, treedef = jax.tree.flatten(z)
    pairs = [function(x, ring) for x, ring in zip(leaves, jax.tree.leaves(slots), strict=True)]
    return treedef.unflatten([x for x, _ in pairs]), treedef.unflatten([ring for _, ring in pairs])


def _scaled(x: Array, scale: Any) -> Array:
    return x if scale is None else jnp.asarray(scale, x.dtype) * x


def solve_step(
    z: PyTree[Array], ring: Ring, weights: np.ndarray | Array, scale: Any = 1.0, output_scale: Any = None
) -> tuple[PyTree[Array], Ring]:
    r"""$x_t = s (z_t - \sum_j w_j x_{t-j})$; gives $o\, x_t$, keeps $x_t$. The weights are those of ages 1, 2, ..."""

    def one(z, slots):
        past = weighted_sum(by_slot(jnp.asarray(weights, slots.dtype), ring.count), slots, ring.count)
        x = jnp.asarray(scale, slots.dtype) * (z.astype(slots.dtype) - past)
        kept = push(slots, x, jnp.mod(ring.count, slots.shape[0])) if slots.shape[0] else slots
        return _scaled(x, output_scale).astype(z.dtype), kept

    x, slots = map_pairs(one, z, ring.slots)
    return x, Ring(ring.count + 1, slots)


def filter_step(
    z: PyTree[Array], ring: Ring, weights: np.ndarray | Array, scale: Any = 1.0, output_scale: Any = None
) -> tuple[PyTree[Array], Ring]:
    r"""$x_t = o (s z_t + \sum_j w_j z_{t-j})$; keeps $z_t$."""

    def one(z, slots):
        wide = z.astype(slots.dtype)
        past = weighted_sum(by_slot(jnp.asarray(weights, slots.dtype), ring.count), slots, ring.count)
        x = _scaled(jnp.asarray(scale, slots.dtype) * wide + past, output_scale)
        wide = after(x, wide)
        kept = push(slots, wide, jnp.mod(ring.count, slots.shape[0])) if slots.shape[0] else slots
        return x.astype(z.dtype), kept

    x, slots = map_pairs(one, z, ring.slots)
    return x, Ring(ring.count + 1, slots)


def replay_step(
    regenerate: Callable[[Any], PyTree[Array]],
    step: Int[Array, ""],
    coefficients: tuple[float, ...],
    output_scale: Any = None,
) -> PyTree[Array]:
    r"""$x_t = o \sum_{j \le t} w_j z_{t-j}$ from regenerated noise, one draw in memory at a time."""
    table = np.asarray(coefficients)

    def accumulate(age, total):
        def one(a, z):
            # where, because the noise of a step before the first one is anything
            return a + jnp.where(
                age <= step, jnp.asarray(table, a.dtype)[age] * z.astype(a.dtype), jnp.zeros((), a.dtype)
            )

        return jax.tree.map(one, total, regenerate(age))

    current = regenerate(0)
    total = jax.tree.map(lambda z: jnp.asarray(table[0], _wide(z)) * z.astype(_wide(z)), current)
    if len(table) <= _UNROLL_REPLAY:
        for age in range(1, len(table)):
            total = accumulate(age, total)
    else:
        last = jnp.minimum(jnp.asarray(step, jnp.int32), len(table) - 1)
        total = jax.lax.fori_loop(1, last + 1, accumulate, total)
    return jax.tree.map(lambda x, z: _scaled(x, output_scale).astype(z.dtype), total, current)


def poison(count: Int[Array, ""], steps: int | None) -> Float[Array, ""]:
    """1 within the horizon, NaN past it: the noise of a bounded strategy must never repeat."""
    one = jnp.ones((), jnp.float32)
    return one if steps is None else jnp.where(count < steps, one, jnp.nan)
