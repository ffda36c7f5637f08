"""Data sets of which one example is read at a time, or a list of them: Grain's, torch's, and one's own."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._checks import described, positive_int
from .._tree import path_str
from .._types import Integer
from ._base import AbstractSource, Rows


class ExampleSource(AbstractSource):
    """The examples of a data set that is asked by number: Grain's, torch's map-style data sets, or anything with `__len__` and `__getitem__`.

    An example that is a tuple is the loss's arguments; anything else is its one argument. Examples are asked for together where the data set can do
    that: by `__getitems__(numbers)`, which gives a list of examples, or by `__getitem__(numbers)` of a list, where that gives the stack of the same
    examples as one by one. Otherwise they are read one by one, several at the same time.

    **Arguments:**

    - `dataset`: the data set. What it gives for a number may depend on nothing else: random augmentation belongs into the loss
        (`dpx.augment`), where it is a function of the run's key.
    - `threads`: how many examples are read at the same time, where they are read one by one.
    """

    dataset: Any = eqx.field(static=True)
    threads: int = eqx.field(static=True)
    _way: str = eqx.field(static=True)

    def __init__(self, dataset: Any, threads: Integer = 8):
        self.dataset = dataset
        self.threads = positive_int("ExampleSource(threads=...)", threads)
        if len(dataset) < 1:
            raise ValueError("`data` has no rows.")
        self._way = _way(dataset)

    @property
    def num_rows(self) -> int:
        return len(self.dataset)

    def rows(self, indices: np.ndarray) -> Rows:
        numbers = indices.tolist()
        if self._way == "stack":
            return _arguments(jax.tree.map(_array, self.dataset[numbers]))
        if self._way == "list":
            examples = self.dataset.__getitems__(numbers)
            if not isinstance(examples, Sequence) or len(examples) != len(numbers):
                raise ValueError(
                    f"`{type(self.dataset).__name__}.__getitems__` must give a list of as many examples as numbers; got {described(examples)} for "
                    f"{len(numbers)} numbers."
                )
        else:
            examples = list(_pool(self.threads).map(self.dataset.__getitem__, numbers))
        return _arguments(_stacked(numbers, examples))


def _way(dataset: Any) -> str:
    """How examples are asked for together."""
    if callable(getattr(dataset, "__getitems__", None)):
        return "list"
    numbers = [0, len(dataset) - 1, 0]  # neither sorted nor each once, and of no other length than that
    try:
        many = _leaves_of(jax.tree.map(_array, dataset[numbers]))
    except Exception:  # whatever it raises where it reads one at a time
        return "one"
    try:
        single = _leaves_of(_stacked(numbers, [dataset[i] for i in numbers]))
    except Exception:  # it takes nothing but lists
        return "stack"
    same = [a[0] == b[0] and a[1].dtype == b[1].dtype for a, b in zip(many, single, strict=False)]
    same += [np.array_equal(a[1], b[1], equal_nan=a[1].dtype.kind in "fc") for a, b in zip(many, single, strict=False)]
    return "stack" if len(many) == len(single) and all(same) else "one"


def _leaves_of(tree: PyTree) -> list[tuple[str, np.ndarray]]:
    return [(path_str(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _arguments(rows: PyTree) -> Rows:
    """What one example is, as the loss's arguments."""
    if isinstance(rows, list):
        return tuple(rows)  # torch's own way to say (x, y)
    return tuple(rows) if isinstance(rows, tuple) else (rows,)


def _array(x: Any) -> np.ndarray:
    """An array, a tensor of torch's or TensorFlow's, or a number, as NumPy's."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
    if isinstance(x, bytes):
        raise ValueError(
            "`data` must hold numbers or booleans; got bytes, as of records that nobody decoded. Decode them where they are read: of Grain, "
            "`MapDataset.source(data).map(decode)`."
        )
    return np.asarray(x)


def _stacked(numbers: Sequence[int], examples: Sequence[Any]) -> PyTree[np.ndarray]:
    """Examples as one tree of arrays with one more axis."""
    flat = [jax.tree.flatten(example, is_leaf=lambda x: x is None) for example in examples]
    treedef = flat[0][1]
    for number, (leaves, other) in zip(numbers, flat, strict=True):
        if any(leaf is None for leaf in leaves):
            raise ValueError(
                f"Row {number} of `data` is None, or has a None in it, as of a Grain data set that is filtered. Every row belongs to somebody "
                "whom the privacy statement counts: filter the data before, and give those that are left."
            )
        if other != treedef:
            raise ValueError(
                f"Rows of `data` must be alike; row {numbers[0]} is {treedef}, and row {number} is {other}."
            )
    paths = [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(examples[0])]
    columns = [
        _column(path, numbers, column) for path, *column in zip(paths, *(leaves for leaves, _ in flat), strict=True)
    ]
    return jax.tree.unflatten(treedef, columns)


def _column(path: str, numbers: Sequence[int], column: Sequence[Any]) -> np.ndarray:
    arrays, name = [_array(x) for x in column], path.removeprefix("(the model itself)") or "it"
    for number, x in zip(numbers, arrays, strict=True):
        for what, mine, first in (("shape", x.shape, arrays[0].shape), ("dtype", x.dtype, arrays[0].dtype)):
            if mine != first and not (what == "dtype" and x.dtype.kind in "US"):
                raise ValueError(
                    f"Rows of `data` must be alike; of row {numbers[0]}, `{name}` has {what} {first}, and of row {number} {mine}. Pad, crop or "
                    "convert them where they are read."
                )
    return np.stack(arrays)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for all sources of a process: they wait for disks, and hold nothing."""
    return ThreadPoolExecutor(threads, "dpx-rows")
