"""The interface of sources: rows of data by number, many at once."""

import abc
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._checks import check_numbers
from .._tree import path_str
from ..sampling import AbstractSampler

Rows = tuple[PyTree[np.ndarray], ...]

_MSG_CHANGED = (
    "The source changed between steps: {what}. The privacy statement rests on one data set, and a run on one shape; give the steps of a run the same "
    "rows."
)


class AbstractSource(eqx.Module):
    """Rows of data by number. What is read for a row may depend on its number alone, so that a run that is resumed reads what it would have read.

    ```python
    class Tokens(dpx.data.AbstractSource):
        paths: tuple[str, ...]
        num_rows: int

        def rows(self, indices):
            return (np.stack([read(self.paths, int(i)) for i in indices]),)
    ```
    """

    num_rows: eqx.AbstractVar[int]
    """How many rows there are; the same in every step."""

    @abc.abstractmethod
    def rows(self, indices: np.ndarray) -> Rows:
        """The rows with these numbers: ONE call for all of a batch's rows that this process loads.

        It may be called from another thread, by one at a time, and not for no rows at all.

        **Arguments:**

        - `indices`: int64, of shape `(rows,)`, between 0 and `num_rows` - 1; not always sorted, and a number may come twice.

        **Returns:**

        A tuple of the loss's arguments: PyTrees of NumPy arrays of numbers or booleans, all of shape `(rows, ...)`, of the same structure, dtypes
        and shapes (but for `rows`) in every call.
        """


def required_rows(sampler: AbstractSampler) -> str:
    """How many rows a sampler's data must have, under the name that its user knows."""
    name = "num_examples" if sampler.num_rows == sampler.num_examples else "num_rows"
    return f"`{name}` = {sampler.num_rows}"


class Reader:
    """Reads a source for a sampler, and believes nothing: what comes is what was asked for, and of one kind in all steps.

    **Arguments:**

    - `source`: the source. Its first row is read here, to know what rows look like before a batch is drawn, which may be empty.
    - `sampler`: who is in a batch.
    """

    def __init__(self, source: AbstractSource, sampler: AbstractSampler):
        self.source = source
        self.num_rows = _length(source)
        rows = source.rows(np.zeros(1, np.int64))
        pairs, self.treedef = _flat(source, rows)
        if not pairs:
            raise ValueError("`data` contains no array.")
        self.where = [f"data{path_str(path)}" for path, _ in pairs]
        self.struct: list[tuple[tuple[int, ...], np.dtype]] = []
        for where, (_, leaf) in zip(self.where, pairs, strict=True):
            check_leaf(where, leaf, 1, type(source).__name__)
            self.struct.append((leaf.shape[1:], leaf.dtype))
        if self.num_rows != sampler.num_rows:
            raise ValueError(
                f"`{self.where[0]}` must have {required_rows(sampler)} rows, which the privacy statement rests on; got {self.num_rows}."
            )

    def rows(self, indices: np.ndarray) -> list[np.ndarray]:
        """The leaves of these rows."""
        self.check_length()
        if len(indices) == 0:
            return [np.zeros((0, *shape), dtype) for shape, dtype in self.struct]
        return self.checked(self.source.rows(indices), len(indices))

    def check_length(self) -> None:
        """Raises if the source has another number of rows than at first."""
        if (number := _length(self.source)) != self.num_rows:
            raise ValueError(_MSG_CHANGED.format(what=f"it had {self.num_rows} rows, and has {number}"))

    def checked(self, rows: Any, number: int) -> list[np.ndarray]:
        """The leaves of `number` rows that the source gave, which are as at first."""
        pairs, treedef = _flat(self.source, rows)
        if treedef != self.treedef:
            raise ValueError(_MSG_CHANGED.format(what=f"rows were {self.treedef}, and are {treedef}"))
        for where, (shape, dtype), (_, leaf) in zip(self.where, self.struct, pairs, strict=True):
            check_leaf(where, leaf, number, type(self.source).__name__)
            if leaf.dtype != dtype:
                raise ValueError(_MSG_CHANGED.format(what=f"`{where}` was {dtype}, and is {leaf.dtype}"))
            if leaf.shape[1:] != shape:
                what = f"a row of `{where}` had shape {shape}, and has {leaf.shape[1:]}"
                raise ValueError(_MSG_CHANGED.format(what=what))
        return [leaf for _, leaf in pairs]


def check_leaf(where: str, leaf: Any, number: int, kind: str) -> None:
    """Raises unless a leaf that a source gave is a NumPy array of so many rows of numbers."""
    if not isinstance(leaf, np.ndarray):
        raise ValueError(
            f"`{where}`: `{kind}.rows` must give NumPy arrays; got a {type(leaf).__name__}. Write `np.asarray(...)` around it."
        )
    check_numbers(where, leaf.dtype)
    if leaf.ndim == 0 or leaf.shape[0] != number:
        raise ValueError(
            f"`{where}`: `{kind}.rows` must give one row for each of the numbers that it is asked for, in their order; got shape {leaf.shape} for "
            f"{number} of them."
        )


def _length(source: AbstractSource) -> int:
    number: Any = source.num_rows
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
        raise ValueError(f"`{type(source).__name__}.num_rows` must be an integer of at least 1; got {number!r}.")
    return int(number)


def _flat(source: AbstractSource, rows: Any) -> tuple[list[tuple[Any, Any]], Any]:
    if not isinstance(rows, tuple):
        raise ValueError(
            f"`{type(source).__name__}.rows` must give a tuple of the loss's arguments, such as `(x, y)`; got {type(rows).__name__}. Write "
            "`(rows,)` for one argument."
        )
    return jax.tree_util.tree_flatten_with_path(rows)
