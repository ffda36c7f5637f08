"""From indices to padded batches of fixed size."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from .._tree import path_str
from ._base import AbstractSampler, check_step


def gather_batches(
    sampler: AbstractSampler, data: Any, *, seed: int, start: int = 0
) -> Iterator[tuple[tuple[PyTree, ...], np.ndarray]]:
    """The batches from step `start` on, each padded with zeros to the sampler's physical size, with their masks.

    **Arguments:**

    - `sampler`: who is in a batch.
    - `data`: a tuple of PyTrees of arrays (NumPy, JAX, or memory-mapped), with `sampler.num_examples` rows each.
    - `seed`: the secret of the sampling.
    - `start`: number of the first batch.

    **Returns:** an iterator of `(batch, mask)`.
    """
    if not isinstance(data, tuple):
        raise ValueError(
            f"`data` must be a tuple of the loss's arguments, such as `(x, y)`; got {type(data).__name__}. Write `(data,)`."
        )
    leaves, treedef = jax.tree.flatten(data)
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        rows = leaf.shape[0] if getattr(leaf, "ndim", 0) else None
        if rows != sampler.num_examples:
            raise ValueError(
                f"`data{path_str(path)}` must have `num_examples` = {sampler.num_examples} rows, which the privacy statement rests on; got "
                f"{'no array' if rows is None else rows}."
            )
    if start != sampler.steps:  # nothing left to do is no mistake: a finished run was resumed
        check_step(sampler, start)
    arrays = [np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]

    def batches():
        size = sampler.physical_batch_size
        for step in range(start, sampler.steps):
            rows = sampler.indices(seed, step)
            size = max(size, 8 * -(-len(rows) // 8))
            mask = np.arange(size) < len(rows)
            yield jax.tree.unflatten(treedef, [_padded(leaf[rows], size) for leaf in arrays]), mask

    return batches()


def _padded(rows: Any, size: int) -> np.ndarray:
    out = np.zeros((size, *rows.shape[1:]), rows.dtype)
    out[: len(rows)] = rows
    return out
