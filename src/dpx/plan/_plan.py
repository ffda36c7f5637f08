"""`PrivacyPlan`: sampling, clipping, noise and neighbours, and the arithmetic that binds them."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .. import accounting
from .._checks import at_least_zero, choice, instance, integer, nonempty_text, positive_int, probability, rounded_up
from .._types import RealScalarLike
from ..accounting import AccountantName, Adjacency, TradeOffCurve
from ..clipping import AbstractClipping, NoClipping, as_clipping
from ..mechanism import Mechanism
from ..metrics import AbstractMetric, check_metric, check_metrics
from ..noise import (
    AbstractIntegerNoise,
    AbstractNoise,
    check_noise,
)
from ..private_gradient import PrivateGradient, PrivateSum, Stated, stated_of
from ..random import fresh_seed
from ..sampling import AbstractSampler, check_seed, gather_batches
from . import _bracket, _facts, _search

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_MSG_UNCALIBRATED = (
    "This plan has no noise multiplier yet, so nothing can be said about its privacy. Give the noise one, or call "
    "`plan = plan.calibrate(epsilon=..., delta=...)`."
)


class PrivacyPlan(eqx.Module):
    r"""How a run samples, clips and adds noise, and who its neighbours are: all that its privacy depends on.

    ```python
    plan = dpx.PrivacyPlan(dpx.PoissonSampler(60_000, 256, 5_000), dpx.FlatClipping(1.0), dpx.IndependentGaussian())
    plan = plan.calibrate(epsilon=1.0, delta=1e-5)
    ```

    !!! success "Guarantee"

        Every epsilon and delta is a proven upper bound for a run that takes its batches from `batches` and its gradients from
        `private_gradient`; a combination for which none is known raises.

    **Arguments:**

    - `sampler`: who is in a batch.
    - `clipping`: how much one of them may contribute; a number $C$ stands for `FlatClipping(C)`.
    - `noise`: what is added; its multiplier may be left to `calibrate`.
    - `adjacency`: what neighbouring data sets are: `"add_or_remove_one"`, `"replace_one"`, or `"replace_special"` (one is replaced by
        an empty one).
    - `unit`: what is protected, by default what the sampler draws. `"user"`: the leaves of a batch have two leading axes, (users, examples of a
        user), and it is users' gradients that are clipped. Any other word is a name for the statement: one row of the data is one such unit.
    - `accountant`: `"pld"` (tight) or `"rdp"`.
    - `metrics`: private statistics to release at every step; see `with_metrics`.
    """

    sampler: AbstractSampler
    clipping: AbstractClipping
    noise: AbstractNoise
    adjacency: Adjacency = eqx.field(static=True)
    unit: str = eqx.field(static=True)
    accountant: AccountantName = eqx.field(static=True)
    metrics: dict[str, AbstractMetric]

    def __init__(
        self,
        sampler: AbstractSampler,
        clipping: AbstractClipping | RealScalarLike,
        noise: AbstractNoise,
        *,
        adjacency: str = "add_or_remove_one",
        unit: str | None = None,
        accountant: str = "pld",
        metrics: dict[str, Any] | None = None,
    ):
        instance("PrivacyPlan(sampler=...)", sampler, AbstractSampler, "PoissonSampler(60_000, 256, 5_000)")
        clipping = as_clipping("PrivacyPlan(clipping=...)", clipping)
        check_noise("PrivacyPlan(noise=...)", noise)
        accounting.check_adjacency(adjacency, "PrivacyPlan")
        accounting.check_accountant(accountant, "replace_special", "PrivacyPlan")
        metrics = check_metrics("PrivacyPlan(metrics=...)", metrics)
        if isinstance(noise, AbstractIntegerNoise):
            if adjacency == "replace_one":
                raise ValueError(
                    f"Nobody can account for `{type(noise).__name__}` under `adjacency='replace_one'`. Use 'add_or_remove_one' or "
                    "'replace_special', or `IndependentGaussian`."
                )
            if accountant != "rdp" and not isinstance(clipping, NoClipping):
                raise ValueError(
                    f"`{type(noise).__name__}` in many dimensions has no privacy loss distribution: give `PrivacyPlan(..., accountant='rdp')`."
                )
        if (
            "add_or_remove_one" in sampler.adjacencies
        ):  # which events hold under replacement too, Rényi accounting decides itself
            accounting.check_accountant(accountant, adjacency)
        else:
            accounting.check_accountant(accountant, "replace_special")
        if adjacency not in sampler.adjacencies:
            reason = "the batches of everybody depend on how many examples there are, so none can be added or removed"
            if adjacency == "replace_one":
                reason = "what dominates it is known only for an example that is there or contributes nothing"
            raise ValueError(
                f"`{type(sampler).__name__}` needs `adjacency` to be one of {', '.join(map(repr, sampler.adjacencies))}: {reason}; got {adjacency!r}."
            )
        if clipping.order != noise.order:
            raise ValueError(
                f"`{type(noise).__name__}` needs clipping in the l{noise.order} norm; `{type(clipping).__name__}` bounds the "
                f"l{clipping.order} norm. Use `FlatClipping(norm, order={noise.order})`."
            )
        if noise.horizon is not None and noise.horizon != sampler.steps:
            raise ValueError(
                f"The noise was made for {noise.horizon} steps and the sampler for {sampler.steps}; they must agree."
            )
        self.sampler = sampler
        self.clipping = clipping
        self.noise = noise
        self.adjacency = adjacency  # pyright: ignore[reportAttributeAccessIssue]
        unit = sampler.unit if unit is None else nonempty_text("PrivacyPlan(unit=...)", unit)
        if sampler.unit != "example" and unit != sampler.unit:
            raise ValueError(
                f"`{type(sampler).__name__}` draws {sampler.unit}s, so `PrivacyPlan(unit=...)` must be {sampler.unit!r}; got {unit!r}."
            )
        self.metrics = metrics
        if self.metrics and noise.order != 2:
            raise ValueError(
                f"Metrics add Gaussian noise, which cannot be accounted for together with `{type(noise).__name__}`. Use Gaussian noise for both."
            )
        self.unit = unit
        self.accountant = accountant  # pyright: ignore[reportAttributeAccessIssue]
        self.mechanism.check_budget()

    @property
    def mechanism(self) -> Mechanism:
        """Clipping, noise and metrics in the plan's steps: all arithmetic of theirs is there."""
        return Mechanism(
            self.clipping, self.noise, self.metrics, self.sampler.steps, self.sampler.participation_per_event
        )

    @property
    def is_calibrated(self) -> bool:
        """Whether the noise multiplier is known, so that there is something to account for."""
        return self.noise.noise_multiplier is not None or isinstance(self.clipping, NoClipping)

    @property
    def steps(self) -> int:
        """Number of steps that the budget covers."""
        return self.sampler.steps

    @property
    def noise_multiplier(self) -> float:
        """Ratio of the noise's standard deviation to the sensitivity, as the float32 that it is used as; 0 if not private."""
        if isinstance(self.clipping, NoClipping):
            return 0.0
        if self.noise.noise_multiplier is None:
            raise ValueError(_MSG_UNCALIBRATED)
        return float(self.noise.noise_multiplier)

    @property
    def event(self) -> "DpEvent":
        """The DP event of the whole run, derived from the parts."""
        return self._event(self.steps)

    def event_after(self, steps: Any) -> "DpEvent":
        """The DP event of the first `steps` steps."""
        return self._event(self._first(positive_int("PrivacyPlan.event_after(steps=...)", steps)))

    def epsilon(self, delta: RealScalarLike, steps: Any = None) -> float:
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
        if isinstance(self.clipping, NoClipping):
            return math.inf
        return accounting.epsilon(event, delta, adjacency=self.adjacency, accountant=self.accountant)

    def delta(self, epsilon: RealScalarLike, steps: Any = None) -> float:
        r"""The $\delta$ that the run, or its first `steps` steps, has at `epsilon`."""
        epsilon = at_least_zero("PrivacyPlan.delta(epsilon=...)", epsilon)
        if isinstance(self.clipping, NoClipping):
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
        if isinstance(self.clipping, NoClipping):
            return math.inf, upper
        lower = _bracket.lower_epsilon(self, delta, upper)
        return accounting.check_bracket(lower, upper, self.event, delta, self.adjacency)

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

    def trade_off(self) -> TradeOffCurve:
        """What any attacker who knows all but one unit can reach: error rates and advantage. Uses privacy loss distributions, or
        Rényi accounting for noise that has none."""
        event = self._event(self.steps)
        if isinstance(self.clipping, NoClipping):
            return TradeOffCurve((0.0,), (1.0,))
        if isinstance(self.noise, AbstractIntegerNoise):
            top = accounting.epsilon(event, 1e-9, adjacency=self.adjacency, accountant="rdp")
        else:
            top = accounting.rough_epsilon(event, 1e-9, self.adjacency)
        epsilons = _search.trade_off_epsilons(top)
        by = "rdp" if isinstance(self.noise, AbstractIntegerNoise) else "pld"
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
        factor = self.noise.error(self.steps, self.sampler.participation_per_event, workload, kind)
        return self.noise_multiplier * float(self.clipping.sensitivity) * factor / self.sampler.batch_size

    def step_error(self) -> float:
        r"""Root-mean-square noise, per coordinate, in ONE normalised gradient, over the steps of the run.

        What an optimiser sees that looks at single gradients: Adam's second moment, a learning rate that is as large as one step bears. Noise that
        cancels in sums (`error`) is larger in each step, so that a learning rate tuned for independent noise is too large for it.

        **Returns:** the noise's standard deviation in units of a gradient; 0 if the run is not private.
        """
        if isinstance(self.clipping, NoClipping):
            return 0.0
        if self.noise.noise_multiplier is None:
            raise ValueError(_MSG_UNCALIBRATED)
        scale = jnp.asarray(_facts.noise_scale(self), jnp.float32)
        variances = jax.vmap(lambda t: jnp.broadcast_to(self.noise.variance(scale, self.steps, t), ()))(
            jnp.arange(self.steps)
        )
        return math.sqrt(float(jnp.mean(variances))) / self.sampler.batch_size

    def calibrate(
        self,
        epsilon: RealScalarLike | None = None,
        delta: RealScalarLike | None = None,
        parameter: str = "noise_multiplier",
        *,
        advantage: RealScalarLike | None = None,
        true_positive_rate: RealScalarLike | None = None,
        false_positive_rate: RealScalarLike | None = None,
    ) -> "PrivacyPlan":
        r"""The plan that just keeps a budget.

        **Arguments:**

        - `epsilon`, `delta`: the budget; or
        - `advantage`: the largest difference between true-positive and false-positive rate that an attack may reach; or
        - `true_positive_rate`, `false_positive_rate`: the largest true-positive rate that an attack may reach at that false-positive rate.
        - `parameter`: what to choose, given the rest: the least `"noise_multiplier"`, the most `"steps"`, or the largest
            `"batch_size"`.

        **Returns:**

        A new plan with `plan.epsilon(delta) <= epsilon` (or the same for the other budgets), its noise multiplier within a relative 2e-5 of the
        least.

        **Raises:** `ValueError` if no value meets the budget.
        """
        choice("PrivacyPlan.calibrate(parameter=...)", parameter, ("noise_multiplier", "steps", "batch_size"))
        target = self._target(epsilon, delta, advantage, true_positive_rate, false_positive_rate)
        if isinstance(self.clipping, NoClipping):
            raise ValueError(
                "`NoClipping` bounds no contribution, so no noise meets a finite epsilon. Use `FlatClipping(norm)`."
            )
        if parameter == "noise_multiplier":
            plan = _search.least_noise(self, target)
            plan.mechanism.check_budget()
            return plan
        if not self.is_calibrated:
            raise ValueError(f"`calibrate(parameter={parameter!r})` needs a noise multiplier; this plan has none.")
        plan = _search.largest(self, parameter, target)
        plan.mechanism.check_budget()
        return plan

    def _target(
        self, epsilon: Any, delta: Any, advantage: Any, true_positive_rate: Any, false_positive_rate: Any
    ) -> "_search.Target":
        is_epsilon, is_advantage = epsilon is not None, advantage is not None
        is_rate = true_positive_rate is not None or false_positive_rate is not None
        if is_epsilon + is_advantage + is_rate != 1:
            raise ValueError(
                "`PrivacyPlan.calibrate` takes one budget: `epsilon=` with `delta=`, or `advantage=`, or `true_positive_rate=` with "
                "`false_positive_rate=`."
            )
        if is_epsilon:
            if delta is None:
                raise ValueError(
                    f"`PrivacyPlan.calibrate(epsilon={epsilon})` needs a `delta=` too, well below 1 / num_examples = "
                    f"{1 / self.sampler.num_examples:g}."
                )
            self._warn_about(accounting.check_delta("PrivacyPlan.calibrate(delta=...)", delta))
            return _search.epsilon_target(self, epsilon, delta)
        if delta is not None:
            raise ValueError("`delta=` goes with `epsilon=`; an attack's advantage or rates need none.")
        if is_rate and (true_positive_rate is None or false_positive_rate is None):
            raise ValueError("`true_positive_rate=` and `false_positive_rate=` go together.")
        return _search.attack_target(advantage, true_positive_rate, false_positive_rate)

    def with_metrics(self, **metrics: Any) -> "PrivacyPlan":
        """The same plan that also releases private statistics of every batch, and accounts for them.

        ```python
        plan = plan.with_metrics(loss=dpx.metrics.Mean("losses", low=0.0, high=5.0, noise_multiplier=10.0))
        ```

        `private_grad.metric_values(state)` has the values after each step. Noise of the gradient stays as it is, so epsilon grows: calibrate
        afterwards, or again.
        Statistics of public data need no plan.

        **Arguments:**

        - `metrics`: by name, modules of `dpx.metrics` with a noise multiplier; they replace those of that name.
        """
        for name, metric in metrics.items():
            check_metric(f"PrivacyPlan.with_metrics({name}=...)", metric)
        return dataclasses.replace(self, metrics={**self.metrics, **metrics})

    def private_gradient(self, loss: Callable[..., Any], **options: Any) -> PrivateGradient:
        """The `PrivateGradient` that this plan accounts for, which refuses to run for more steps than the plan has.

        The plan pays for ONE run: one state from `init`, one pass over `batches` with one seed. A second run needs a plan of its own, and both
        together cost what `dpx.accounting.PrivacyLedger` says. What is changed in the gradient afterwards (`eqx.tree_at`, `dataclasses.replace`) is
        refused: change the plan.

        **Arguments:**

        - `loss`: the loss of one example.
        - `options`: `method`, `filter_spec`, `has_aux`, `within_user`, as for `PrivateGradient`.
        """
        if not self.is_calibrated:
            raise ValueError(_MSG_UNCALIBRATED)
        own = {"normalizer", "steps", "participation", "unit", "metrics", "stated", "physical_batch_size"}
        fixed = own & set(options)
        if fixed:
            raise ValueError(
                f"`private_gradient({fixed.pop()}=...)` is fixed by the plan, whose statement rests on it."
            )
        return PrivateGradient(
            loss,
            self.clipping,
            self.noise,
            normalizer=float(self.sampler.batch_size),
            steps=self.steps,
            participation=self.sampler.participation_per_event,
            unit="user" if self.unit == "user" else "example",
            metrics=self.metrics,
            stated=self._stated("user" if self.unit == "user" else "example"),
            physical_batch_size=self._expected_size(),
            **options,
        )

    def _stated(self, unit: str) -> Stated | None:
        rest = (self.steps, self.sampler.participation_per_event, unit)
        return stated_of(self.clipping, self.noise, rounded_up(float(self.sampler.batch_size)), self.metrics, *rest)

    def _expected_size(self) -> int | None:
        # of a batch without a mask; nothing rests on the batches of a run that is not private
        return None if isinstance(self.clipping, NoClipping) else self.sampler.physical_batch_size

    def private_sum(self, fn: Callable[..., Any], *, microbatch_size: Any = None) -> PrivateSum:
        """The `PrivateSum` of `fn(model, *example)` that this plan accounts for: of model updates, or whatever else one example or user gives.

        **Arguments:**

        - `fn`: as for `PrivateSum`. With `unit="user"` its arguments are a user's examples, stacked.
        - `microbatch_size`: how many are computed at once.
        """
        if not self.is_calibrated:
            raise ValueError(_MSG_UNCALIBRATED)
        if self.metrics:
            raise ValueError(
                "`PrivacyPlan.private_sum` releases no metrics, and this plan pays for some. Leave them out of the plan."
            )
        return PrivateSum(
            fn,
            self.clipping,
            self.noise,
            normalizer=float(self.sampler.batch_size),
            microbatch_size=microbatch_size,
            steps=self.steps,
            participation=self.sampler.participation_per_event,
            stated=self._stated("example"),
            unit="user" if self.unit == "user" else "example",
            physical_batch_size=self._expected_size(),
        )

    def batches(self, data: Any, *, seed: Any, start: int = 0) -> Iterator[tuple[Any, np.ndarray]]:
        """The run's batches from step `start` on: `(batch, mask)`, padded to one physical size so that a run compiles once.

        **Arguments:**

        - `data`: a tuple of PyTrees of arrays, or pandas tables, with `num_examples` rows each, which belong together by position.
        - `seed`: the secret of the sampling, up to 128 bits; None draws one from the operating system (which cannot be resumed, and is refused in a
            run of several processes, which must share one: `dpx.random.shared_seed()`).
        - `start`: the step to start from; the batches are those of a run that was never stopped.
        """
        if not 0 <= integer("PrivacyPlan.batches(start=...)", start) <= self.steps:
            raise ValueError(
                f"`PrivacyPlan.batches(start=...)` must lie between 0 and {self.steps}, the plan's steps: no budget covers more; got {start}."
            )
        if seed is None and start != 0:
            raise ValueError(
                f"`PrivacyPlan.batches(seed=None, start={start})` would go on with another sampling than the run began with, where "
                "examples may take part more often than the plan accounts for. Begin with `seed=dpx.random.fresh_seed()`, keep it, and pass it again."
            )
        seed = fresh_seed() if seed is None else check_seed("PrivacyPlan.batches(seed=...)", seed)
        return gather_batches(self.sampler, data, seed=seed, start=start)

    def statement(self, delta: RealScalarLike, *, in_clip_norms: bool = False) -> str:
        r"""The privacy statement, in plain English: mechanism, unit, adjacency, sampling, parameters, epsilon, and what is assumed.

        Epsilon, delta, noise and rates of attacks are rounded up, so that what is read is a bound and what is run again keeps it.

        **Arguments:**

        - `delta`: $\delta$.
        - `in_clip_norms`: state the noise in units of the clip norm, where that is not chosen yet: privacy does not depend on it.
        """
        delta = probability("PrivacyPlan.statement(delta=...)", delta)
        return _facts.statement(self, delta, in_clip_norms)

    def report(self, delta: RealScalarLike, *, in_clip_norms: bool = False) -> dict[str, Any]:
        """What the statement says, the event, curves and versions, as JSON-serialisable data; arguments as for `statement`."""
        delta = probability("PrivacyPlan.report(delta=...)", delta)
        return _facts.report(self, delta, in_clip_norms)

    def plot(self, path: Any, delta: RealScalarLike) -> Path:
        """Writes the trade-off curve, epsilon over steps and delta against epsilon as one figure.

        **Arguments:**

        - `path`: of the image; its suffix says the format (`.png`, `.pdf`, `.svg`).
        - `delta`: for epsilon over steps.

        **Returns:** the path. Needs matplotlib (`pip install matplotlib`).
        """
        delta = probability("PrivacyPlan.plot(delta=...)", delta)
        if isinstance(self.clipping, NoClipping):
            raise ValueError("A plan with `NoClipping` has no privacy to plot. Use `FlatClipping(norm)`.")
        return _facts.plot(self, path, delta)

    def _event(self, steps: int) -> "DpEvent":
        if isinstance(self.clipping, NoClipping):
            from dp_accounting import NonPrivateDpEvent

            return NonPrivateDpEvent()
        # the clipping's own queries are covered by the stated multiplier; metrics come on top
        times = self.mechanism.queries_per_event
        costs = [times * float(metric.noise_multiplier) ** -2 for metric in self.metrics.values()]
        multiplier = self.noise_multiplier
        if costs:
            multiplier = (multiplier**-2 + sum(costs)) ** -0.5
        noise: Any = self.noise
        strategy = getattr(noise, "strategy", None)
        event = self.sampler.event(self.noise.event(multiplier), self.noise.bands, steps, strategy)
        if self.noise.bands != 1 and (costs or self.clipping.side_noise_multipliers):
            # those of a banded matrix and of single steps are not one Gaussian mechanism if who takes part is drawn
            sides = [float(side) ** -2 for side in self.clipping.side_noise_multipliers]
            rest = self.noise_multiplier**-2 - sum(sides)
            own = (
                rest**-0.5 if sides and rest > 0 else self.noise_multiplier
            )  # nothing left: no plan, but a step of a search
            event = _with_side_queries(event, own, sum(sides) + sum(costs))
        return event

    def _first(self, steps: Any) -> int:
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

    def with_noise_multiplier(self, noise_multiplier: RealScalarLike) -> "PrivacyPlan":
        """The same plan with another noise multiplier."""
        noise: Any = self.noise
        return dataclasses.replace(self, noise=dataclasses.replace(noise, noise_multiplier=noise_multiplier))


def _with_side_queries(event: "DpEvent", noise_multiplier: float, side_precision: float) -> "DpEvent":
    """The event where simulation must know the gradient's own noise multiplier and what else a participation is seen in; raises where nobody
    knows how to account for that."""
    import attr

    from .._events import CoupledDpEvent, GaussianMixtureOfBinsDpEvent, MinSepSampledDpEvent

    match event:
        case CoupledDpEvent():
            return attr.evolve(event, event=_with_side_queries(event.event, noise_multiplier, side_precision))
        case MinSepSampledDpEvent():
            return attr.evolve(event, noise_multiplier=noise_multiplier, side_precision=side_precision)
        case GaussianMixtureOfBinsDpEvent():
            raise ValueError(
                "Nobody can account for adaptive clipping or metrics next to correlated noise under balls-in-bins sampling. Use "
                "`CyclicPoissonSampler` or `MinSepSampler`, independent noise, or a clip norm that is fixed and no metrics."
            )
    return event
