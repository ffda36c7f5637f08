"""From indices to padded batches of fixed size."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._checks import check_numbers, check_tuple, described, integer
from .._tree import path_str
from ..random import check_seed
from ._base import AbstractSampler, check_step


def gather_batches(
    sampler: AbstractSampler, data: Any, *, seed: int, start: int = 0
) -> Iterator[tuple[tuple[PyTree, ...], np.ndarray]]:
    """The batches from step `start` on, each padded with zeros to the sampler's physical size, with their masks.

    Where a unit has several rows of the data (`UserSampler`), leaves have shape `(physical size, rows of a unit, ...)`, and the mask is of
    shape `(physical size, rows of a unit)`.

    **Arguments:**

    - `sampler`: who is in a batch.
    - `data`: a tuple of PyTrees of arrays (NumPy, JAX, or memory-mapped) or pandas tables, with `sampler.num_rows` rows each. Rows are taken by their
        position, and what is in the same position belongs together: labels of a pandas index play no part.
    - `seed`: the secret of the sampling.
    - `start`: number of the first batch.

    **Returns:** an iterator of `(batch, mask)`.
    """
    check_tuple("data", data)
    pairs, treedef = jax.tree_util.tree_flatten_with_path(data)
    if not pairs:
        raise ValueError("`data` contains no array.")
    arrays = [_rows_of(f"data{path_str(path)}", data[path[0].idx], leaf, sampler) for path, leaf in pairs]
    seed = check_seed("seed=...", seed)
    start = integer("start=...", start)
    if start != sampler.steps:  # nothing left to do is no mistake: a finished run was resumed
        check_step(sampler, start)

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


def _rows_of(where: str, argument: Any, leaf: Any, sampler: AbstractSampler) -> Any:
    """One leaf of the data as something that NumPy's integers index by position; raises unless it is numbers with the right number of rows."""
    # pandas, whose own brackets go by label, so that rows of tables with different labels would not belong together
    if hasattr(leaf, "iloc"):
        leaf = _table(where, leaf)
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"`{where}` must hold numbers or booleans; got PRNG keys. A loss that takes `key` gets one."
            )
        leaf = np.asarray(leaf)
    # others, such as HDF5's, are arrays if they have a dtype of NumPy's
    is_scalar: bool = np.isscalar(leaf)
    if is_scalar or not (isinstance(getattr(leaf, "dtype", None), np.dtype) and hasattr(leaf, "shape")):
        given = "a list" if isinstance(argument, list) else described(leaf) if is_scalar else f"a {type(leaf).__name__}"
        remedy = "Write `np.asarray(...)` around it."
        if hasattr(leaf, "to_numpy"):
            remedy = "Write `.to_numpy()` after it."
        elif not (isinstance(argument, list) or hasattr(leaf, "shape") or is_scalar):
            remedy = "Of data that are not in memory load the rows `plan.sampler.indices(seed, step)` yourself."
        raise ValueError(
            f"`{where}` must have {_required(sampler)} rows, which the privacy statement rests on; got no array but {given}. {remedy}"
        )
    rows = leaf.shape[0] if leaf.shape else "a single number"
    if rows != sampler.num_rows:
        raise ValueError(
            f"`{where}` must have {_required(sampler)} rows, which the privacy statement rests on; got {rows}."
        )
    check_numbers(where, leaf.dtype)
    return leaf


def _required(sampler: AbstractSampler) -> str:
    name = "num_examples" if sampler.num_rows == sampler.num_examples else "num_rows"
    return f"`{name}` = {sampler.num_rows}"


def _table(where: str, table: Any) -> np.ndarray:
    """A pandas DataFrame, Series or Index as an array, its rows in their order whatever their labels are."""
    columns = table.dtypes.items() if getattr(table, "ndim", 1) == 2 else [(getattr(table, "name", None), table.dtype)]
    for name, dtype in columns:
        if not isinstance(dtype, np.dtype) or dtype.kind not in "biufc":
            column = "" if name is None else f", column {name!r},"
            raise ValueError(
                f"`{where}`{column} must hold numbers or booleans; got {dtype}. Encode texts and categories as numbers, such as "
                "`column.astype('category').cat.codes`, fill in what is missing, and convert with `.astype('float32')`."
            )
    return table.to_numpy()


def _padded(rows: Any, mask: np.ndarray) -> np.ndarray:
    out = np.zeros((*mask.shape, *rows.shape[1:]), rows.dtype)
    out[mask] = rows
    return out
