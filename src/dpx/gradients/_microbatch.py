"""Splitting a physical batch, to bound memory and to skip padding."""

from collections.abc import Callable

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from .._types import Examples
from ..sharding import axis_size, batch_axis
from ._base import ClippedSum


def in_microbatches(
    compute: Callable[[Examples, Bool[Array, " batch"]], ClippedSum],
    examples: Examples,
    mask: Bool[Array, " batch"],
    size: int | None,
) -> ClippedSum:
    """`compute`, applied to microbatches of at most `size` examples, one at a time, and added up.

    A batch that `size` does not divide is padded, with masked copies of its first example. A microbatch without a single real
    example is skipped at run time, so that a batch padded to a fixed physical size costs no more than the examples in it.
    """
    batch = mask.shape[0]
    if size is None or size >= batch:
        return compute(examples, mask)
    axis = batch_axis(examples)
    is_sharded = axis is not None
    number = microbatch_count(batch, size, axis_size(axis) if is_sharded else None)
    per = -(-batch // number)
    padding = per * number - batch

    def split(x: Array) -> Array:
        if is_sharded:
            return x.reshape(per, number, *x.shape[1:]).swapaxes(0, 1)
        if padding:
            x = jnp.concatenate([x, jnp.broadcast_to(x[:1], (padding, *x.shape[1:]))])
        return x.reshape(number, per, *x.shape[1:])

    def merge(x: Array) -> Array:
        if is_sharded:
            return x.swapaxes(0, 1).reshape(batch, *x.shape[2:])
        return x.reshape(per * number, *x.shape[2:])[:batch]

    stacked = jax.tree.map(split, examples)
    is_real = jnp.concatenate([mask, jnp.zeros(padding, bool)]) if padding else mask
    masks = split(is_real) if is_sharded else is_real.reshape(number, per)

    # one trace of the loss serves both the shapes and the loop
    first = jax.tree.map(lambda x: x[0], (stacked, masks))
    closed, struct = jax.make_jaxpr(compute, return_shape=True)(*first)
    treedef = jax.tree.structure(struct)
    run = jex.jaxpr_as_fun(closed)

    def body(total, xs):
        def real(total):
            out = jax.tree.unflatten(treedef, run(*jax.tree.leaves(xs)))
            return jax.tree.map(jnp.add, total, out.total), (out.norms, out.losses, out.aux, out.bounds)

        def padding_only(total):
            out = jax.tree.unflatten(
                treedef, [jnp.zeros(v.shape, v.dtype, out_sharding=_sharding(v)) for v in closed.out_avals]
            )
            return total, (out.norms, out.losses, out.aux, out.bounds)

        return lax.cond(jnp.any(xs[1]), real, padding_only, total)

    avals = jax.tree.unflatten(treedef, closed.out_avals).total
    zero = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype, out_sharding=_sharding(v)), avals)
    total, rows = lax.scan(body, zero, (stacked, masks))
    return ClippedSum(total, *jax.tree.map(merge, rows))


def microbatch_count(batch: int, size: int, devices: int | None) -> int:
    """Into how many microbatches of at most `size` examples a batch is cut.

    Over `devices`, all of a sharded batch's, it is cut so that every device keeps its own examples, without padding or communication: row `r` of a
    device's share is in microbatch `r` modulo their number. Otherwise (None) examples in a row are together.
    """
    number = -(-batch // size)
    if devices is None:
        return number
    share = batch // devices
    return next((n for n in range(number, share) if share % n == 0), share)


def _sharding(aval):
    return None if aval.sharding.mesh.empty else aval.sharding
