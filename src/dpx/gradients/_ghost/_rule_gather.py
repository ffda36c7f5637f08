"""Table look-ups: embeddings."""

import jax.numpy as jnp
from jax import lax

from ._use import ScatterUse, Use, ghost_rule


@ghost_rule("gather")
def gather(use: Use) -> ScatterUse | None:
    """Rows along one axis, whole along the others. An index out of range reads and receives as JAX's own gradient does."""
    numbers, sizes = use.params["dimension_numbers"], use.params["slice_sizes"]
    shape = use.inputs[0].shape
    partial = [j for j, (size, full) in enumerate(zip(sizes, shape, strict=True)) if size != full]
    indexed = [j for j in numbers.start_index_map if sizes[j] == 1 and (j in partial or not partial)]
    if use.operand != 0 or numbers.operand_batching_dims or len(indexed) != 1 or any(j not in indexed for j in partial):
        return None
    axis = indexed[0]
    mode = use.params["mode"]
    clips = mode == lax.GatherScatterMode.CLIP
    if not clips and len(numbers.start_index_map) != 1:
        return None  # another index may push the row out of range
    column = numbers.start_index_map.index(axis)
    size = shape[axis]

    def capture(indices):
        ids = indices[..., column]
        return jnp.clip(ids, 0, size - 1) if clips else ids

    rank = len(use.output.shape)
    offset = iter(j for j in range(len(shape)) if j not in numbers.collapsed_slice_dims)
    sequence = iter(range(-1, -1 - rank, -1))
    axes = [next(offset) if j in numbers.offset_dims else next(sequence) for j in range(rank)]
    # a row axis that was not collapsed has length one in the output
    keep = [j for j in range(rank) if axes[j] != axis]
    return ScatterUse(capture, axis, tuple(axes[j] for j in keep), tuple(use.output.shape[j] for j in keep))


@ghost_rule("dynamic_slice")
def dynamic_slice(use: Use) -> ScatterUse | None:
    """One row along one axis, whole along the others; the start is clamped into range, as JAX does."""
    if use.operand != 0:
        return None
    shape, sizes = use.inputs[0].shape, use.params["slice_sizes"]
    partial = [j for j, (size, full) in enumerate(zip(sizes, shape, strict=True)) if size != full]
    if len(partial) != 1 or sizes[partial[0]] != 1:
        return None
    axis = partial[0]
    keep = tuple(j for j in range(len(shape)) if j != axis)

    def capture(*starts):
        return jnp.clip(jnp.asarray(starts[axis], jnp.int32), 0, shape[axis] - 1)

    return ScatterUse(capture, axis, keep, tuple(shape[j] for j in keep))
