"""From whatever somebody has to a source of rows."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import PyTree

from .._checks import described
from .._types import Unchecked
from ._arrays import ArraySource
from ._base import AbstractSource
from ._examples import ExampleSource
from ._hugging_face import HuggingFaceSource

_MSG = "`data` must be a tuple of the loss's arguments, such as `(x, y)`, or a source of rows by number; got {given}. {remedy}"


class DataSet(Protocol):
    """A data set that gives an example for its number, as torch's map-style data sets, Grain's and Hugging Face's do."""

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def __getitem__(self, number: int, /) -> tuple[Any, ...] | dict[str, Any]:
        """The loss's arguments, or its one argument."""
        ...


Data = Unchecked[tuple[PyTree, ...] | AbstractSource | DataSet]
"""What becomes a source."""


def as_source(data: Data) -> AbstractSource:
    """Data as a source of rows by number.

    **Arguments:**

    - `data`: a tuple of PyTrees of arrays (NumPy, JAX, memory-mapped, HDF5's) or pandas tables, which belong together by position
        (`ArraySource`); a Grain `RandomAccessDataSource` or `MapDataset`, a map-style data set of torch, or anything with `__len__` and `__getitem__`
        for a number or a list of numbers (`ExampleSource`); a Hugging Face `Dataset` (`HuggingFaceSource`); or any `AbstractSource`, as it is.

    **Raises:** `ValueError` that says what to write instead, for all else.
    """
    if isinstance(data, AbstractSource):
        return data
    if isinstance(data, tuple):
        return ArraySource(data)
    remedy = _remedy(data)
    if remedy is not None:
        raise ValueError(_MSG.format(given=described(data), remedy=remedy))
    if _comes_from(data, "datasets") and hasattr(data, "column_names"):
        return HuggingFaceSource(data)
    return ExampleSource(data)


def _comes_from(data: Any, package: str) -> bool:
    """Whether the class of something, or one that it inherits from, is of a package, which is not imported for that."""
    return any(cls.__module__.split(".")[0] == package for cls in type(data).__mro__)


def _remedy(data: Any) -> str | None:
    """What to write instead of data that are no source; None for those that can be asked by number."""
    has_rows = callable(getattr(type(data), "__getitem__", None)) and callable(getattr(type(data), "__len__", None))
    if isinstance(data, type):
        return "Make one of that class."
    if isinstance(data, AbstractSource | tuple) or data is None:
        return "There is nothing to read."
    if isinstance(data, str | bytes | os.PathLike):
        return "Open the file: `(np.load(path, mmap_mode='r'),)` reads the rows of a batch alone."
    if isinstance(data, Mapping):
        if isinstance(data, dict) and not _comes_from(data, "datasets"):
            return "Write `(data,)` for a loss of one argument, or `(data['x'], data['y'])`."
        if _comes_from(data, "datasets"):
            return "Choose one of its splits, such as `data['train']`."
        return f"Name its arrays, such as `({', '.join(f'data[{name!r}]' for name in list(data)[:2])},)`."
    if isinstance(data, list):
        return "Write `tuple(data)` for one argument each, or `(np.asarray(data),)`."
    if hasattr(data, "iloc") or (hasattr(data, "shape") and hasattr(data, "dtype")):
        return "Write `(data,)`."
    if _comes_from(data, "datasets") and not hasattr(data, "num_rows"):
        return "Load it without `streaming=True`: batches are drawn from anywhere in the data."
    if not has_rows and isinstance(data, Iterable):
        return (
            "Who is in a batch is drawn at random from all of the data, so rows must be read by number, not in turn: give what has `__len__` and "
            "`__getitem__` (of Grain a `MapDataset`, of torch a map-style `Dataset`), or write a `dpx.data.AbstractSource`."
        )
    if not has_rows:
        return "Anything with `__len__` and `__getitem__` for a list of numbers will do, and so does a `dpx.data.AbstractSource`."
    return _unusable_length(data)


def _unusable_length(data: Any) -> str | None:
    try:
        number = len(data)
    except (TypeError, NotImplementedError, OverflowError) as error:
        return f"Its length is unknown ({error}): the privacy statement rests on it."
    if not 0 < number < np.iinfo(np.int64).max:
        return (
            f"It has {number} rows."
            if number <= 0
            else "It repeats without end: leave `.repeat()` out, since the sampler draws the epochs."
        )
    return None
