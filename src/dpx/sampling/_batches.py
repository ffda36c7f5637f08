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

    Where a unit has several rows of the data (`UserSampler`), leaves have shape `(physical size, rows of a unit, ...)`, and the mask is of
    shape `(physical size, rows of a unit)`.

    **Arguments:**

    - `sampler`: who is in a batch.
    - `data`: a tuple of PyTrees of arrays (NumPy, JAX, or memory-mapped), with `sampler.num_rows` rows each.
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
        if rows != sampler.num_rows:
            name = "num_examples" if sampler.num_rows == sampler.num_examples else "num_rows"
            raise ValueError(
                f"`data{path_str(path)}` must have `{name}` = {sampler.num_rows} rows, which the privacy statement rests on; got "
                f"{'no array' if rows is None else rows}."
            )
    if start != sampler.steps:  # nothing left to do is no mistake: a finished run was resumed
        check_step(sampler, start)
    arrays = [np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]

    def batches():
        size = sampler.physical_batch_size
        for step in range(start, sampler.steps):
            rows = sampler.indices(seed, step)
            if len(rows) > size:
                size = 8 * -(-len(rows) // 8)
            mask = np.zeros((size, *rows.shape[1:]), bool)
            mask[: len(rows)] = rows >= 0
            yield jax.tree.unflatten(treedef, [_padded(leaf[rows[rows >= 0]], mask) for leaf in arrays]), mask

    return batches()


def _padded(rows: Any, mask: np.ndarray) -> np.ndarray:
    out = np.zeros((*mask.shape, *rows.shape[1:]), rows.dtype)
    out[mask] = rows
    return out
