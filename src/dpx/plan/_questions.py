"""What can be asked of a plan: its event, what that costs, and what its noise does."""

import abc
import dataclasses
import math
import warnings
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .. import accounting
from .._checks import at_least_zero, integer, positive_int, probability
from .._types import Integer, RealScalarLike
from ..accounting import AccountantName, Adjacency, TradeOffCurve
from ..mechanism import Mechanism
from ..sampling import AbstractSampler
from ._bracket import Attacked, lower_epsilon
from ._compatible import with_side_queries

if TYPE_CHECKING:
    from dp_accounting import DpEvent


class AbstractQuestions(eqx.Module):
    """A sampler and a mechanism, and the neighbours and the accountant for whom they can be asked what they cost."""

    sampler: eqx.AbstractVar[AbstractSampler]
    adjacency: eqx.AbstractVar[Adjacency]
    unit: eqx.AbstractVar[str]
    accountant: eqx.AbstractVar[AccountantName]

    @property
    @abc.abstractmethod
    def mechanism(self) -> Mechanism:
        """Clipping, noise and metrics in the sampler's steps: all arithmetic of theirs is there."""

    @property
    def is_calibrated(self) -> bool:
        """Whether the noise multiplier is known, so that there is something to account for."""
        return self.mechanism.is_calibrated

    @property
    def steps(self) -> int:
        """Number of steps that the budget covers."""
        return self.sampler.steps

    @property
    def noise_multiplier(self) -> float:
        """Ratio of the noise's standard deviation to the sensitivity, as the float32 that it is used as; 0 if not private."""
        return self.mechanism.noise_multiplier

    @property
    def event(self) -> "DpEvent":
        """The DP event of the whole run, derived from the parts."""
        return self._event(self.steps)

    def event_after(self, steps: Integer) -> "DpEvent":
        """The DP event of the first `steps` steps."""
        return self._event(self._first(positive_int("PrivacyPlan.event_after(steps=...)", steps)))

    def epsilon(self, delta: RealScalarLike, steps: Integer | None = None) -> float:
        r"""The $\varepsilon$ that the run has at `delta`, or that its first `steps` steps have spent.

        `delta=0` asks for pure differential privacy, which plans with Laplace noise have.

        **Raises:** `ValueError` if delta is not in [0, 1), or 0 where there is no pure
        differential privacy, the plan is not calibrated, or nobody can account for it. Warns if delta is
        at least one over the number of examples, where publishing a random row would meet the definition.
        """
        delta = accounting.check_delta("PrivacyPlan.epsilon(delta=...)", delta)
        self._warn_about(delta)
        if steps is not None and integer("PrivacyPlan.epsilon(steps=...)", steps) == 0:
            return 0.0
        event = self._event(self._first(steps))
        if not self.mechanism.is_private:
            return math.inf
        return accounting.epsilon(event, delta, adjacency=self.adjacency, accountant=self.accountant)

    def delta(self, epsilon: RealScalarLike, steps: Integer | None = None) -> float:
        r"""The $\delta$ that the run, or its first `steps` steps, has at `epsilon`."""
        epsilon = at_least_zero("PrivacyPlan.delta(epsilon=...)", epsilon)
        if not self.mechanism.is_private:
            return 1.0
        return accounting.delta(
            self._event(self._first(steps)),
            epsilon,
            adjacency=self.adjacency,
            accountant=self.accountant,
        )

    def epsilon_bracket(self, delta: RealScalarLike) -> tuple[float, float]:
        r"""A proven lower and a proven upper bound on the least $\varepsilon$ that the run has at `delta` in the worst case.

        The upper one is `epsilon(delta)`. The lower one is what some attacker reaches who picks neighbouring data sets, the loss and all
        gradients, and knows what the plan counts as no secret: the order of a `ShuffleSampler`, the groups of a `CyclicPoissonSampler`. How
        far apart the two are says how much of epsilon may be the accounting's fault.

        | plan | apart |
        |---|---|
        | `ShuffleSampler` or no sampling, Gaussian noise | rounding; with correlated noise as far as its sensitivity is not reached |
        | `PoissonSampler`, `CyclicPoissonSampler` with Gaussian or Laplace noise; `RandomAllocationSampler` | less than 1 % |
        | `BallsInBinsSampler`, independent noise, whole cycles | less than 1 % |
        | `BallsInBinsSampler` otherwise, `MinSepSampler`, `FixedSizeSampler`, `max_batch_size` | more: see the docs on accounting |
        | `DiscreteGaussian`, `accountant="rdp"` | as far as Rényi accounting is loose |
        | samplers and noise that are not dpx's own | the lower bound is 0 |

        !!! success "Guarantee"

            For the mechanism with exactly the plan's parameters, `lower <= least epsilon <= upper`. What runs has a little more noise (the scale is
            rounded up by $2^{-22}$) and slightly shorter contributions. The lower bound of `MinSepSampler` is from samples, and too large
            with probability 1e-8. A clipping of your own is taken to reach its sensitivity.

        **Raises:** as `epsilon` does, and `ArithmeticError` if the bounds contradict each other, which would be a fault of dpx.
        """
        delta = probability("PrivacyPlan.epsilon_bracket(delta=...)", delta)
        upper = self.epsilon(delta)
        if not self.mechanism.is_private:
            return math.inf, upper
        event = self.event
        run = Attacked(self.sampler, self.mechanism, event, self.adjacency)
        return accounting.check_bracket(lower_epsilon(run, delta, upper), upper, event, delta, self.adjacency)

    def epsilon_by_adjacency(self, delta: RealScalarLike) -> dict[str, float]:
        r"""$\varepsilon$ of the same run for each notion of neighbours that can be accounted for. The same noise hides less where more may
        change."""
        found = {}
        for adjacency in self.sampler.adjacencies:
            try:
                found[adjacency] = dataclasses.replace(self, adjacency=adjacency).epsilon(delta)
            except ValueError:
                continue  # nobody can account for it
        return found

    def trade_off(self, steps: Integer | None = None) -> TradeOffCurve:
        """What any attacker who knows all but one unit can reach who sees the run, or its first `steps` steps: error rates and advantage. Uses
        privacy loss distributions, or Rényi accounting for noise that has none."""
        event = self._event(self._first(steps))
        if not self.mechanism.is_private:
            return TradeOffCurve((0.0,), (1.0,))
        if self.mechanism.noise.is_integer:
            by, top = "rdp", accounting.epsilon(event, 1e-9, adjacency=self.adjacency, accountant="rdp")
        else:
            by, top = "pld", accounting.rough_epsilon(event, 1e-9, self.adjacency)
        # from 0 to where delta is of no interest
        epsilons = np.linspace(0.0, min(top, 50.0), 101)
        deltas = accounting.deltas(event, epsilons, self.adjacency, by)
        return TradeOffCurve(tuple(epsilons.tolist()), tuple(deltas.tolist()))

    def error(self, workload: Any = "prefix", kind: str = "mean") -> float:
        r"""Root-mean-square error, per coordinate, that the noise brings into sums of the normalised gradients.

        **Arguments:**

        - `workload`: `"prefix"` (sums of all gradients so far, which plain SGD follows), or another that
            `dpx.strategies.AbstractStrategy.error` takes, such as `dpx.strategies.momentum_workload` gives.
        - `kind`: the `"mean"` over steps or the `"max"`.

        **Returns:**

        The error in units of a gradient: of two plans with the same clip norm and budget, the one with the smaller error trains better, as
        a rule, and with a learning rate that is tuned for it: its single steps may be the noisier ones (`step_error`).
        """
        mechanism = self.mechanism
        factor = mechanism.noise.error(self.steps, mechanism.participation, workload, kind)
        return mechanism.noise_multiplier * float(mechanism.sensitivity) * factor / self.sampler.batch_size

    def step_error(self) -> float:
        r"""Root-mean-square noise, per coordinate, in ONE normalised gradient, over the steps of the run.

        What an optimiser sees that looks at single gradients: Adam's second moment, a learning rate that is as large as one step bears. Noise that
        cancels in sums (`error`) is larger in each step, so that a learning rate tuned for independent noise is too large for it.

        **Returns:** the noise's standard deviation in units of a gradient; 0 if the run is not private.
        """
        mechanism = self.mechanism
        mechanism.check_calibrated()
        variances = jax.vmap(mechanism.variance)(jnp.arange(self.steps))
        return math.sqrt(float(jnp.mean(variances))) / self.sampler.batch_size

    # Helpers

    def _event(self, steps: int) -> "DpEvent":
        mechanism = self.mechanism
        return with_side_queries(mechanism.event(steps, self.sampler.event), mechanism)

    def _first(self, steps: Integer | None) -> int:
        if steps is None:
            return self.steps
        steps = positive_int("PrivacyPlan.epsilon(steps=...)", steps)
        if steps > self.steps:
            raise ValueError(
                f"`steps` = {steps} is past the plan's end, {self.steps}: there are no such steps to account for."
            )
        return steps

    def _warn_about(self, delta: float) -> None:
        if delta * self.sampler.num_examples >= 1:
            warnings.warn(
                f"delta = {delta:g} is at least 1 / num_examples = {1 / self.sampler.num_examples:g}: publishing one {self.unit} picked at random "
                "would meet such a guarantee. Choose delta well below.",
                stacklevel=3,
            )
