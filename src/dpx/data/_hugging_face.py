"""Hugging Face data sets: columns of a table, read many rows at once."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import numpy as np

from .._checks import described
from .._types import Unchecked
from ._base import AbstractSource, Rows


class HuggingFaceSource(AbstractSource):
    """The rows of a Hugging Face `Dataset`.

    Integers keep the type that the data set says they have, which `with_format("numpy")` makes int64; floating-point numbers come as float32, and
    whatever else as NumPy's format of the data set gives it (images, say). Lists of unequal length are refused: pad them with `dataset.map`.

    **Arguments:**

    - `dataset`: a `datasets.Dataset`: a split, neither a dictionary of them nor a stream.
    - `columns`: which columns the loss gets, as one argument each; by default one argument, a dictionary of all of them.
    """

    dataset: Any = eqx.field(static=True)
    columns: tuple[str, ...] | None = eqx.field(static=True)

    def __init__(self, dataset: Any, columns: Unchecked[Sequence[str] | None] = None):
        known = list(dataset.column_names)
        if columns is not None:
            is_list = isinstance(columns, list | tuple) and len(columns) > 0
            if not is_list or any(name not in known for name in columns):
                raise ValueError(
                    f"`HuggingFaceSource(columns=...)` must be a list of some of the columns {', '.join(map(repr, known))}; got {described(columns)}."
                )
            columns = tuple(columns)
        self.dataset = dataset.with_format("numpy", columns=list(columns or known))
        self.columns = columns

    @property
    def num_rows(self) -> int:
        return len(self.dataset)

    def rows(self, indices: np.ndarray) -> Rows:
        table = self.dataset[indices.tolist()]
        columns = {name: _as_declared(name, table[name], self.dataset.features[name]) for name in table}
        return (columns,) if self.columns is None else tuple(columns[name] for name in self.columns)


def _as_declared(name: str, values: Any, feature: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype == object or array.dtype.kind in "US":
        raise ValueError(
            f"Column {name!r} of `data` must hold numbers, of one shape in all rows; it is {feature}. Tokenize, encode or pad it with `dataset.map`, "
            "or leave it out: `dpx.data.HuggingFaceSource(dataset, columns=[...])`."
        )
    while not isinstance(getattr(feature, "dtype", None), str) or feature.dtype == "list":
        inner = getattr(feature, "feature", None)
        if inner is None:
            return array
        feature = inner
    is_integer = array.dtype.kind in "iu" and feature.dtype.startswith(("int", "uint"))
    return array.astype(feature.dtype) if is_integer else array
