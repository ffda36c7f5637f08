"""A bar that shows how far a run is, where somebody can see it."""

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._round import round_up


class Progress:
    """A bar with the step, epsilon so far, the last released numbers, and the time left; nothing where there is no terminal, or no `rich` or `tqdm`.

    **Arguments:**

    - `is_wanted`: whether to show one.
    - `start`, `steps`: of the run.
    - `epsilon`: of a number of steps. It is asked for rarely, so that it takes at most a fiftieth of the time. None: not shown.
    """

    def __init__(self, is_wanted: bool, start: int, steps: int, epsilon: Any):
        self._bar = _bar(start, steps) if is_wanted and sys.stderr.isatty() else None
        self._epsilon, self._steps = epsilon, steps
        self._spent = ""
        self._next_epsilon = self._next_show = 0.0

    def show(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Shows the step, and what was released last."""
        now = time.monotonic()
        if self._bar is None or (now < self._next_show and step < self._steps):
            return
        if self._epsilon is not None and now >= self._next_epsilon:
            self._spent = f"epsilon {round_up(self._epsilon(step), 3)}"
            took = time.monotonic() - now
            self._next_epsilon = now + max(2.0, 50 * took)
        shown = [f"{name} {value:.4g}" for name, value in numbers.items() if np.ndim(value) == 0]
        self._bar(step, "  ".join([*shown, self._spent]))
        self._next_show = time.monotonic() + 0.1

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar(None, "")
            self._bar = None


def _bar(start: int, steps: int) -> Any:
    """A function of a step and a text that shows them, and ends with the step None; None if nothing is installed that could."""
    with contextlib.suppress(ImportError):
        from rich import progress as rich
        from rich.console import Console

        columns = [
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.description}", markup=False),
        ]
        bar = rich.Progress(*columns, console=Console(file=sys.stderr))
        task = bar.add_task("", total=steps, completed=start)
        bar.start()
        return lambda step, text: bar.stop() if step is None else bar.update(task, completed=step, description=text)
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        line = tqdm(total=steps, initial=start, file=sys.stderr)

        def show(step: int | None, text: str) -> None:
            if step is None:
                line.close()
                return
            line.set_postfix_str(text, refresh=False)
            line.update(step - line.n)

        return show
    return None
