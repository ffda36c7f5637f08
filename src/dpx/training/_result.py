"""What a run ends with."""

from pathlib import Path

import equinox as eqx
from jaxtyping import PyTree

from .._checks import probability
from .._types import FilePath, RealScalarLike
from ..plan import PrivacyPlan
from ._callbacks import Stop
from ._history import History
from ._publish import publish

_MSG_LOOKED = (
    "- Stopped after {steps} steps: {reason}. Whether to stop was decided by looking at what had been released, so what is stated is the cost of all "
    "{accounted} steps that might have been taken: which of them are taken is a choice made from their results (post-processing), and the number of "
    "steps taken alone is no bound."
)
_MSG_PUBLIC = "- Stopped after {steps} steps: {reason}. Assumed: this was decided without looking at anything that depends on the data."


class TrainResult(eqx.Module):
    r"""What a run ends with; it holds no key and no seed, and nothing that was not released.

    *What is stated of a run that was stopped.* Let $Y_1, Y_2, \ldots, Y_T$ be what the steps of the plan release, and $\tau$ the step after which the
    run ended.

    - Where $\tau$ is a number fixed before the run (`stop_at_epsilon`, from the plan alone) or depends on nothing that depends on the data
        (`Stop(is_public=True)`), $(Y_1, \ldots, Y_\tau)$ is a run of $\tau$ steps: `plan.epsilon(delta, steps=tau)`.
    - Where $\tau$ was decided from what was released, it is a stopping time. $(\tau, Y_1, \ldots, Y_\tau)$ is a function of
        $(Y_1, \ldots, Y_H)$, where $H$ is the step that the run would have ended at without being stopped: post-processing of it, hence private with
        `plan.epsilon(delta, steps=H)`. With `steps=tau` it need not be. The losses $L_t$ of privacy wander: a rule that stops whenever $L_t$ is
        large makes $P(L_\tau > \varepsilon_\tau)$ about the probability that $L_t > \varepsilon_t$ for ANY $t$, which can be more than $\delta$.
        What is known for stopping times bounds the sum of a quantity chosen beforehand (`dpx.accounting.PrivacyFilter`): a budget too, not
        what was spent.

    **Arguments:**

    - `model`: the trained model.
    - `averaged_model`: with averaged parameters; None without an average.
    - `history`: what was released, as a list of dictionaries: see `History`.
    - `steps`: number of steps taken.
    - `plan`: the plan.
    - `accounted_steps`: the number of steps that is paid for: $H$ above.
    - `stopped`: the `Stop` of the callback that ended the run; None if none did.
    - `delta`: that of `Trainer.fit`.
    - `remarks`: what somebody should know, such as arrays that never moved.
    - `trained`: how many parameters were trained.
    """

    model: PyTree
    averaged_model: PyTree | None
    history: History = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    plan: PrivacyPlan
    accounted_steps: int = eqx.field(static=True)
    stopped: Stop | None = eqx.field(static=True)
    delta: float = eqx.field(static=True)
    remarks: tuple[str, ...] = eqx.field(static=True)
    trained: int = eqx.field(static=True)

    @property
    def is_stopped_by_looking(self) -> bool:
        """Whether the run ended early for what it had released."""
        return self.stopped is not None and not self.stopped.is_public and self.steps < self.accounted_steps

    def epsilon(self, delta: RealScalarLike | None = None) -> float:
        """What the run has cost: of `accounted_steps`."""
        delta = self.delta if delta is None else probability("TrainResult.epsilon(delta=...)", delta)
        return self.plan.epsilon(delta, self.accounted_steps)

    def statement(self, delta: RealScalarLike | None = None) -> str:
        """The privacy statement of this run: of the steps really taken where their number is public, else of those that might have been.

        **Arguments:**

        - `delta`: $\\delta$, by default that of `Trainer.fit`.
        """
        delta = self.delta if delta is None else probability("TrainResult.statement(delta=...)", delta)
        text = self.plan.statement(delta, steps=self.accounted_steps)
        return text if self.note is None else f"{text}\n{self.note}"

    @property
    def note(self) -> str | None:
        """What the statement says of the end of the run; None if it ran to the end."""
        if self.stopped is None or not self.plan.mechanism.is_private:
            return None
        message = _MSG_LOOKED if self.is_stopped_by_looking else _MSG_PUBLIC
        reason = self.stopped.reason.rstrip(".")
        return message.format(steps=self.steps, accounted=self.accounted_steps, reason=reason)

    def publish(self, path: FilePath, *, delta: RealScalarLike | None = None) -> Path:
        """Writes a folder with what may be published, and nothing else: weights, the average's weights, history, `statement.txt`, `report.json`,
        `MODEL_CARD.md`. `dpx.load_published` reads it.

        The folder is there whole or not at all. If it is there already with the same contents, as after a crash, nothing is done.

        **Arguments:**

        - `path`: of the folder, which must not exist with other contents.
        - `delta`: $\\delta$ of statement and report, by default that of `Trainer.fit`.

        **Raises:** `ValueError` if something else is there, or the run is not private.
        """
        delta = self.delta if delta is None else probability("TrainResult.publish(delta=...)", delta)
        return publish(self, path, delta)


def ended(steps: int, horizon: int, stopped: Stop | None) -> int:
    """The number of steps that a run has to pay for that took `steps` and would have taken `horizon`."""
    return horizon if stopped is not None and not stopped.is_public else steps
