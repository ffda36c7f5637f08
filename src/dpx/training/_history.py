"""What a run has released, step by step."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._checks import described


class History(list):
    """What was released, a dictionary for every step that released something: `history[-1]["loss"]`, `pandas.DataFrame(history)`.

    Each has its `"step"`, the plan's private metrics of that step, and what `evaluate` returned for it. `history["loss"]` is a column: an array with
    a number for each row, NaN where there is none.
    """

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, str):
            return super().__getitem__(index)
        if not any(index in row for row in self):
            known = ", ".join(map(repr, dict.fromkeys(name for row in self for name in row)))
            raise KeyError(f"{index!r} was not released; there are {known or 'no rows'}")
        return np.array([row.get(index, np.nan) for row in self])


class Recorder:
    """Collects what a run releases: metrics of every step as columns, evaluations as rows.

    **Arguments:**

    - `columns`: metrics of the steps so far by name, the first axis steps.
    - `rows`: evaluations so far, each with its `"step"`.
    """

    def __init__(self, columns: Mapping[str, np.ndarray] | None = None, rows: list[dict[str, Any]] | None = None):
        self._parts = {name: [column] for name, column in (columns or {}).items()}
        self.rows = list(rows or [])

    def add(self, metrics: Mapping[str, np.ndarray]) -> None:
        """The metrics of the next steps, the first axis steps."""
        for name, values in metrics.items():
            self._parts.setdefault(name, []).append(np.asarray(values))

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Metrics by name, the first axis steps."""
        for name, parts in self._parts.items():
            if len(parts) > 1:
                self._parts[name] = [np.concatenate(parts)]
        return {name: parts[0] for name, parts in self._parts.items()}

    def history(self) -> History:
        """Rows, in the order of their steps."""
        evaluated = {row["step"]: row for row in self.rows}
        columns = self.columns
        number = max((len(column) for column in columns.values()), default=0)
        steps = sorted({*range(1, number + 1), *evaluated})
        measured = lambda step: {name: plain(column[step - 1]) for name, column in columns.items()}
        return History({"step": step, **measured(step), **evaluated.get(step, {})} for step in steps)


def plain(value: Any) -> Any:
    """A number, or a list of numbers, of Python's own."""
    return np.asarray(value).tolist()


def check_evaluation(answer: Any, taken: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation returned, as numbers by name; raises for anything else, and for the names of the plan's metrics."""
    if not isinstance(answer, Mapping):
        answer = {"evaluation": answer}
    found = {}
    for name, value in answer.items():
        array = np.asarray(value) if value is not None else np.array(None)
        if not isinstance(name, str) or array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
            raise ValueError(
                f"`Trainer.fit(evaluate=...)` must return a number, or numbers by name, such as {{'accuracy': 0.9}}; got {described(value)} for "
                f"{name!r}."
            )
        if name == "step" or name in taken:
            raise ValueError(
                f"`Trainer.fit(evaluate=...)` returned {name!r}, which is {'the number of the step' if name == 'step' else 'a metric of the plan'}. "
                "Choose another name."
            )
        found[name] = plain(array)
    return found
