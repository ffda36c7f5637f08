"""`Mechanism`: which parts go together, and what their numbers are together."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from .._types import Params, Participation, RealScalarLike
from ..clipping import AbstractClipping, AbstractSlackClipping, NoClipping
from ..metrics import AbstractMetric
from ..noise import AbstractIntegerNoise, AbstractNoise, Rounding
from ._budget_split import check_joint_noise, joint_scale, queries_per_event

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Sampled = Callable[..., Any]
"""How a sampler makes the event of a run of an event, the bands of the noise's matrix, a number of steps, and that matrix."""

_MSG_ORDER = "`{noise}` needs clipping in the l{order} norm; `{clipping}` bounds the l{other} norm. Use `FlatClipping(norm, order={order})`."
_MSG_INTEGERS = "`{noise}` cannot make room for the private counts of `{clipping}`. Use `IndependentGaussian`, or a clip norm that does not adapt."
_MSG_METRICS = (
    "Metrics add Gaussian noise, which cannot be accounted for together with `{noise}`. Use Gaussian noise for both."
)
_MSG_HORIZON = "`PrivateGradient(steps=...)` must be at most the horizon of `{noise}`, {horizon}; got {steps}."
_MSG_UNCALIBRATED = (
    "This plan has no noise multiplier yet, so nothing can be said about its privacy. Give the noise one, or call "
    "`plan = plan.calibrate(epsilon=..., delta=...)`."
)


class Mechanism(eqx.Module):
    r"""Clipping, noise and metrics in a run of so many steps: the one place where their numbers meet.

    Private gradients, private sums and plans make one of their parts. It knows nothing of sampling.

    !!! success "Guarantee"

        `scale()` is the noise multiplier times the sensitivities of clipping and strategy, raised for what the clipping asks of its own, rounding
        included; it is NaN unless it is positive and finite, whatever the numbers in it are.

    **Arguments:**

    - `clipping`: how much one example may contribute. `NoClipping` makes the mechanism non-private: `step` adds nothing.
    - `noise`: what is added.
    - `metrics`: by name, what is released besides at every step.
    - `steps`: number of steps; None where nothing bounds it, and by default the noise's horizon.
    - `participation`: in which of them an example may take part, within one event of the accountant.

    **Raises:** `ValueError` for parts that do not go together. Their numbers are looked at by `check_budget`.
    """

    clipping: AbstractClipping
    noise: AbstractNoise
    metrics: dict[str, AbstractMetric]
    steps: int | None = eqx.field(static=True)
    participation: Participation = eqx.field(static=True)

    def __init__(
        self,
        clipping: AbstractClipping,
        noise: AbstractNoise,
        metrics: dict[str, AbstractMetric],
        steps: int | None,
        participation: Participation,
    ):
        names = {"noise": type(noise).__name__, "clipping": type(clipping).__name__}
        if clipping.order != noise.order:
            raise ValueError(_MSG_ORDER.format(order=noise.order, other=clipping.order, **names))
        is_curious = bool(clipping.side_noise_multipliers) or isinstance(clipping, AbstractSlackClipping)
        if is_curious and noise.is_integer:
            # its scale only says what one step of the grid is worth
            raise ValueError(_MSG_INTEGERS.format(**names))
        if metrics and noise.order != 2:
            raise ValueError(_MSG_METRICS.format(**names))
        if noise.horizon is not None and steps is not None and steps > noise.horizon:
            raise ValueError(_MSG_HORIZON.format(horizon=noise.horizon, steps=steps, **names))
        self.clipping = clipping
        self.noise = noise
        self.metrics = metrics
        self.steps = noise.horizon if steps is None else steps
        self.participation = participation

    # What it is

    @property
    def is_private(self) -> bool:
        """Whether contributions are bounded and hidden: not so with `NoClipping`, on which no noise is wasted."""
        return not isinstance(self.clipping, NoClipping)

    @property
    def is_calibrated(self) -> bool:
        """Whether the noise multiplier is known, or none is needed."""
        return self.noise.noise_multiplier is not None or not self.is_private

    @property
    def noise_multiplier(self) -> float:
        """Ratio of the noise's standard deviation to the sensitivity, of the gradient and the clipping's questions together; 0 if not private.

        **Raises:** `ValueError` if it is not known.
        """
        self.check_calibrated()
        if self.noise.noise_multiplier is None or not self.is_private:
            return 0.0
        return float(self.noise.noise_multiplier)

    @property
    def sensitivity(self) -> Float[Array, ""]:
        """How far one example, added or removed, can move the sum before noise."""
        return self.clipping.sensitivity

    def with_noise_multiplier(self, noise_multiplier: RealScalarLike) -> "Mechanism":
        """The same mechanism with another noise multiplier."""
        noise: Any = self.noise
        return dataclasses.replace(self, noise=dataclasses.replace(noise, noise_multiplier=noise_multiplier))

    def check_calibrated(self) -> None:
        """Raises if the noise multiplier is needed and not known."""
        if not self.is_calibrated:
            raise ValueError(_MSG_UNCALIBRATED)

    def check_budget(self) -> None:
        """Raises if the clipping's own questions cost more than the noise multiplier allows in total.

        Not a part of the constructor: a search looks at multipliers that no run could use.
        """
        check_joint_noise(self.clipping, self.noise, self.steps, self.participation)

    # What it costs

    @property
    def queries_per_event(self) -> int:
        """How often an example is seen within one event of the accountant, at most."""
        return queries_per_event(self.noise, self.steps, self.participation)

    @property
    def side_precision(self) -> float:
        """Of one participation, the inverse variance of what is seen beside the gradient: the clipping's questions and the metrics."""
        return sum(_precisions(self.clipping.side_noise_multipliers)) + sum(self._metric_costs())

    @property
    def raised_noise_multiplier(self) -> float:
        """The noise multiplier that the gradient alone gets, so that it and the clipping's questions have the stated one together."""
        plain = float(self.noise.scale(self.sensitivity, self.steps, self.participation))
        return float(self.scale()) / plain * self.noise_multiplier

    @property
    def gradient_noise_multiplier(self) -> float:
        """What of the noise multiplier is left to the gradient alone, if one participation pays for one set of the clipping's questions."""
        sides = _precisions(self.clipping.side_noise_multipliers)
        rest = self.noise_multiplier**-2 - sum(sides)
        # nothing left: no plan, but a step of a search
        return rest**-0.5 if sides and rest > 0 else self.noise_multiplier

    def event(self, steps: int, sampled: Sampled | None = None) -> "DpEvent":
        """The DP event of the first `steps` steps.

        **Arguments:**

        - `steps`: how many.
        - `sampled`: how a sampler samples and composes events, `AbstractSampler.event`. Without one everybody may be in every batch; correlated
            noise then covers examples that take part no more often than `participation` says.

        **Raises:** `ValueError` for more steps than the mechanism has, for which its noise is not made.
        """
        if self.steps is not None and steps > self.steps:
            raise ValueError(f"`Mechanism.event(steps={steps})` is past the mechanism's end, {self.steps} steps.")
        if not self.is_private:
            from dp_accounting import NonPrivateDpEvent

            return NonPrivateDpEvent()
        # the clipping's own queries are covered by the stated multiplier; metrics come on top
        costs = self._metric_costs()
        multiplier = self.noise_multiplier
        if costs:
            multiplier = (multiplier**-2 + sum(costs)) ** -0.5
        event = self.noise.event(multiplier)
        if sampled is not None:
            return sampled(event, self.noise.bands, steps, self.noise.strategy)
        if self.noise.bands != 1:
            return event  # the noise is scaled to the participations: the run is one event
        from dp_accounting import SelfComposedDpEvent

        return SelfComposedDpEvent(event, steps)

    def _metric_costs(self) -> list[float]:
        return [
            self.queries_per_event * cost for cost in _precisions(m.noise_multiplier for m in self.metrics.values())
        ]

    # What it does

    def scale(self) -> Float[Array, ""]:
        """The scale of the noise on the sum; 0 if not private."""
        if not self.is_private:
            return jnp.zeros(())
        return joint_scale(self.clipping, self.noise, self.steps, self.participation)

    def variance(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """The variance of the noise in every coordinate of the sum at step number `step`, from 0. It is public."""
        if not self.is_private:
            return jnp.zeros(())
        return jnp.broadcast_to(self.noise.variance(self.scale(), self.steps, step), ())

    def rounding(self, params: Params, batch_size: int = 1) -> Rounding | None:
        """How contributions shaped like `params` are rounded to integers before so many are added up; None if they are not."""
        if not self.is_private or not isinstance(self.noise, AbstractIntegerNoise):
            return None
        return self.noise.rounding(self.sensitivity, sum(x.size for x in jax.tree.leaves(params)), batch_size)

    def step(self, total: Params, key: Key[Array, ""], t: Int[Array, ""], state: PyTree) -> tuple[Params, PyTree]:
        """The noisy sum of step number `t` (from 0), and the noise's buffers after it; the sum itself if not private.

        **Arguments:**

        - `total`: the sum of clipped contributions; of integers, where `rounding` says so.
        - `key`: that of the run's noise, used for nothing else.
        - `t`: the number of the step.
        - `state`: the noise's buffers.
        """
        if not self.is_private:
            return total, state
        return self.noise.step(total, self.scale(), key, t, state)


def _precisions(multipliers: Any) -> list[float]:
    return [float(multiplier) ** -2 for multiplier in multipliers]
