"""Arrays in memory, on disk or in files of arrays, and tables: what can be indexed by row."""

import mmap
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._checks import check_numbers, check_tuple, described
from .._tree import path_str
from ._base import AbstractSource, Rows

_MSG_KEYS = "`{where}` must hold numbers or booleans; got PRNG keys. A loss that takes `key` gets one."


class ArraySource(AbstractSource):
    """The rows of a tuple of PyTrees of arrays.

    Rows are taken by their position, and what is in the same position belongs together: labels of a pandas index play no part. Only the rows asked
    for are read, of memory maps and of arrays in files such as HDF5's.

    **Arguments:**

    - `data`: a tuple of the loss's arguments, PyTrees of arrays (NumPy, JAX, memory-mapped, or whatever has `shape` and a NumPy `dtype` and is
        indexed by row numbers) or pandas tables, of numbers or booleans, with as many rows each.

    **Raises:** `ValueError` that names the leaf.
    """

    leaves: tuple[Any, ...]
    treedef: Any = eqx.field(static=True)
    num_rows: int = eqx.field(static=True)

    def __init__(self, data: Any):
        self.leaves, self.treedef, self.num_rows = _leaves(data)

    def rows(self, indices: np.ndarray) -> Rows:
        return jax.tree.unflatten(self.treedef, [_taken(leaf, indices) for leaf in self.leaves])

    def __getstate__(self) -> dict[str, Any]:
        # a memory map would be copied into every worker: its file is opened there instead
        packed = tuple(_File(x) if _is_whole_map(x) else x for x in self.leaves)
        return {"leaves": packed, "treedef": self.treedef, "num_rows": self.num_rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["leaves"] = tuple(x.opened() if isinstance(x, _File) else x for x in state["leaves"])
        for name, value in state.items():
            object.__setattr__(self, name, value)


def _leaves(data: Any) -> tuple[tuple[Any, ...], Any, int]:
    check_tuple("data", data)
    pairs, treedef = jax.tree_util.tree_flatten_with_path(data)
    if not pairs:
        raise ValueError("`data` contains no array.")
    leaves = [_checked(f"data{path_str(path)}", data[path[0].idx], leaf) for path, leaf in pairs]
    number = leaves[0].shape[0]
    for (path, _), leaf in zip(pairs, leaves, strict=True):
        if leaf.shape[0] != number:
            raise ValueError(
                f"`data{path_str(path)}` must have as many rows as `data{path_str(pairs[0][0])}`, {number}, since what is in the same position "
                f"belongs together; got {leaf.shape[0]}."
            )
    if number == 0:
        raise ValueError("`data` has no rows.")
    return tuple(leaves), treedef, number


def _checked(where: str, argument: Any, leaf: Any) -> Any:
    """One leaf of the data as something that NumPy's integers index by position; raises unless it is rows of numbers."""
    # pandas, whose own brackets go by label, so that rows of tables with different labels would not belong together
    if hasattr(leaf, "iloc"):
        leaf = _table(where, leaf)
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(_MSG_KEYS.format(where=where))
        leaf = np.asarray(leaf)
    # others, such as HDF5's, are arrays if they have a dtype of NumPy's
    is_scalar: bool = np.isscalar(leaf)
    if is_scalar or not (isinstance(getattr(leaf, "dtype", None), np.dtype) and hasattr(leaf, "shape")):
        given = "a list" if isinstance(argument, list) else described(leaf) if is_scalar else f"a {type(leaf).__name__}"
        remedy = "Write `np.asarray(...)` around it."
        if hasattr(leaf, "to_numpy"):
            remedy = "Write `.to_numpy()` after it."
        elif hasattr(leaf, "__getitem__") and hasattr(leaf, "__len__") and not isinstance(leaf, str | bytes):
            remedy = "A data set is no leaf of a tuple: give it alone, so that its rows are the loss's arguments."
        elif not (isinstance(argument, list) or hasattr(leaf, "shape") or is_scalar):
            remedy = "Of data that are not in memory write a source: `dpx.data.AbstractSource`."
        raise ValueError(f"`{where}` must be rows of numbers; got no array but {given}. {remedy}")
    if hasattr(leaf, "toarray"):
        raise ValueError(
            f"`{where}` must be a dense array; got a {type(leaf).__name__}. Write `.toarray()` after it, or a source of your own that makes the rows "
            "of a batch dense: `dpx.data.AbstractSource`."
        )
    if not leaf.shape:
        raise ValueError(f"`{where}` must be rows of numbers; got a single number.")
    check_numbers(where, leaf.dtype)
    return leaf


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


def _taken(leaf: Any, indices: np.ndarray) -> np.ndarray:
    """The rows with these numbers, as an array in memory."""
    if isinstance(leaf, np.ndarray):
        return np.asarray(leaf[indices])
    # files of arrays want numbers that increase, each once
    numbers, inverse = np.unique(indices, return_inverse=True)
    if len(numbers) == 0:
        return np.zeros((0, *leaf.shape[1:]), leaf.dtype)
    rows = np.asarray(leaf[numbers])
    return rows if len(numbers) == len(indices) and np.array_equal(numbers, indices) else rows[inverse]


def _is_whole_map(leaf: Any) -> bool:
    """Whether this is a memory map of a file as it was opened: of views NumPy does not know where they begin."""
    is_map = isinstance(leaf, np.memmap) and isinstance(leaf.base, mmap.mmap) and leaf.filename is not None
    return is_map and leaf.flags.c_contiguous


class _File:
    """A memory map, by what it takes to open it again.

    **Arguments:**

    - `leaf`: the map.
    """

    def __init__(self, leaf: np.memmap):
        self.path, self.dtype, self.shape, self.offset = str(leaf.filename), leaf.dtype, leaf.shape, leaf.offset

    def opened(self) -> np.memmap:
        """The map, read-only."""
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
