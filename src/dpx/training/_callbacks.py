"""What callbacks get to see, and how they stop a run."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx

from .._checks import at_least_zero, described, flag, nonempty_text, positive_int, probability, real_number


class StepInfo(eqx.Module):
    """What a callback sees of a step: numbers that were released, and nothing else of the data.

    **Arguments:**

    - `step`: number of steps taken, from 1.
    - `epsilon`: what these steps have spent at `delta`: a number, or a function that computes it, when somebody asks. (It takes from a hundredth of a
        second to seconds, which most callbacks need not wait for.)
    - `seconds`: since the run began, or went on after a restart.
    - `metrics`: the plan's private metrics of this step, and what `evaluate` returned, by name.
    - `delta`: the delta of epsilon.
    """

    step: int
    seconds: float
    metrics: dict[str, Any]
    delta: float | None
    _epsilon: Any

    def __init__(
        self,
        step: int,
        epsilon: float | Callable[[], float],
        seconds: float,
        metrics: Mapping[str, Any],
        delta: float | None = None,
    ):
        self.step = positive_int("StepInfo(step=...)", step)
        spent: Any = epsilon
        is_function = callable(spent) and not isinstance(spent, type | eqx.Module)
        self._epsilon = spent if is_function else at_least_zero("StepInfo(epsilon=...)", spent)
        self.seconds = real_number("StepInfo(seconds=...)", seconds)
        if not isinstance(metrics, Mapping):
            raise ValueError(f"`StepInfo(metrics=...)` must be numbers by name; got {described(metrics)}.")
        self.metrics = dict(metrics)
        self.delta = None if delta is None else probability("StepInfo(delta=...)", delta)

    @property
    def epsilon(self) -> float:
        """What the steps so far have spent. That a run may be stopped by looking at it costs more: see `Stop`."""
        found: Any = self._epsilon
        return float(found()) if callable(found) else found


class Stop(eqx.Module):
    """What a callback returns to end the run after the step that it saw.

    A stop that depends on what was released depends on the data. The steps up to it are then a part, chosen by looking, of the run that was planned:
    whatever is decided from what a run has released is post-processing of that run, and costs what the WHOLE run costs. What fewer steps would
    have cost had their number been fixed beforehand is no bound here: see `TrainResult.statement`.

    **Arguments:**

    - `reason`: why; it is recorded and published.
    - `is_public`: True if the decision depended on nothing that depends on the data, such as the time that has passed. Only then is the epsilon
        of the steps taken stated, and that it rests on this.
    """

    reason: str = eqx.field(static=True)
    is_public: bool = eqx.field(static=True)

    def __init__(self, reason: str, *, is_public: bool = False):
        self.reason = nonempty_text("Stop(reason=...)", reason)
        self.is_public = flag("Stop(is_public=...)", is_public)


def called(callbacks: tuple[Callable[[StepInfo], Any], ...], info: StepInfo) -> Stop | None:
    """Calls all callbacks; the first `Stop` that one returned."""
    stop = None
    for callback in callbacks:
        answer = callback(info)
        if isinstance(answer, Stop):
            stop = stop or answer
        elif answer is Stop or answer is True:
            # what somebody returns who wants to stop; anything else is what the last call of a lambda gave
            name = getattr(callback, "__name__", type(callback).__name__)
            raise ValueError(
                f"`Trainer.fit(callbacks=...)`: {name} returned {described(answer)}. To end the run return `dpx.Stop(reason)`."
            )
    return stop


def check_callbacks(callbacks: Any) -> tuple[Callable[[StepInfo], Any], ...]:
    """Functions of one argument, as a tuple."""
    if callable(callbacks) or not isinstance(callbacks, tuple | list) or not all(map(callable, callbacks)):
        raise ValueError(
            "`Trainer.fit(callbacks=...)` must be a list of functions of one `StepInfo`, such as `[lambda info: print(info.step)]`."
        )
    return tuple(callbacks)
