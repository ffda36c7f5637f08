"""`PrivacyPlan`: sampling, clipping, noise and neighbours, and the arithmetic that binds them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args

import equinox as eqx
import numpy as np
from jaxtyping import PyTree

from .. import accounting
from .._checks import choice, instance, integer, probability
from .._rounding_up import rounded_up
from .._types import FilePath, Integer, RealScalarLike, Unchecked, Unit
from ..accounting import AccountantName, Adjacency, Neighbours
from ..clipping import AbstractClipping, as_clipping
from ..data import Batches, Data, gather_batches
from ..gradients import AbstractGradientMethod
from ..mechanism import Mechanism
from ..metrics import AbstractMetric, check_metric, check_metrics
from ..noise import AbstractNoise, check_noise
from ..private_gradient import PrivateGradient, PrivateSum, Stated, stated_of
from ..problem import WithinUser
from ..random import fresh_seed
from ..sampling import AbstractSampler, check_seed
from . import _search
from ._compatible import check_accountable, mechanism_of, protected_unit
from ._facts import Facts, as_data, facts_of, milestones, versions
from ._plot import check_matplotlib, plot
from ._questions import AbstractQuestions
from ._statement import NOT_PRIVATE, statement


class SpeedOptions(TypedDict, total=False):
    """What a private gradient is told beside its plan: nothing that its privacy depends on."""

    method: AbstractGradientMethod
    filter_spec: PyTree
    has_aux: bool
    within_user: WithinUser


class PrivacyPlan(AbstractQuestions):
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
        adjacency: Neighbours = "add_or_remove_one",
        unit: str | None = None,
        accountant: Unchecked[AccountantName] = "pld",
        metrics: dict[str, Any] | None = None,
    ):
        instance("PrivacyPlan(sampler=...)", sampler, AbstractSampler, "PoissonSampler(60_000, 256, 5_000)")
        clipping = as_clipping("PrivacyPlan(clipping=...)", clipping)
        check_noise("PrivacyPlan(noise=...)", noise)
        adjacency = self.adjacency = accounting.check_adjacency(adjacency, "PrivacyPlan")
        accounting.check_accountant(accountant, "replace_special", "PrivacyPlan")
        metrics = check_metrics("PrivacyPlan(metrics=...)", metrics)
        mechanism = mechanism_of(sampler, clipping, noise, metrics)
        check_accountable(sampler, mechanism, adjacency, accountant)
        self.unit = protected_unit(sampler, unit)
        mechanism.check_budget()
        self.sampler = sampler
        self.clipping = clipping
        self.noise = noise
        self.metrics = metrics
        self.accountant = accountant

    @property
    def mechanism(self) -> Mechanism:
        """Clipping, noise and metrics in the plan's steps: all arithmetic of theirs is there."""
        return mechanism_of(self.sampler, self.clipping, self.noise, self.metrics)

    def calibrate(
        self,
        epsilon: RealScalarLike | None = None,
        delta: RealScalarLike | None = None,
        parameter: Unchecked[_search.Parameter] = "noise_multiplier",
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
        choice("PrivacyPlan.calibrate(parameter=...)", parameter, get_args(_search.Parameter))
        target = _search.target_of(
            epsilon,
            delta,
            advantage,
            true_positive_rate,
            false_positive_rate,
            adjacency=self.adjacency,
            accountant=self.accountant,
            num_examples=self.sampler.num_examples,
        )
        if delta is not None:
            self._warn_about(accounting.check_delta("PrivacyPlan.calibrate(delta=...)", delta))
        if not self.mechanism.is_private:
            raise ValueError(
                "`NoClipping` bounds no contribution, so no noise meets a finite epsilon. Use `FlatClipping(norm)`."
            )
        if parameter == "noise_multiplier":
            mechanism = self.mechanism
            candidate = lambda multiplier: self._candidate(noise=mechanism.with_noise_multiplier(multiplier).noise)
            plan = _search.least_noise(candidate, target)
        else:
            if not self.is_calibrated:
                raise ValueError(f"`calibrate(parameter={parameter!r})` needs a noise multiplier; this plan has none.")
            resized = lambda sampler: self._candidate(sampler=sampler)
            plan = _search.largest(resized, target, parameter, self.sampler, self.noise_multiplier)
        plan.mechanism.check_budget()
        return plan

    def _candidate(self, **changes: Any) -> "PrivacyPlan":
        """A plan on the way to an answer, which need not be one that could run: private counts may cost more than its noise allows."""
        candidate = object.__new__(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(candidate, field.name, changes.get(field.name, getattr(self, field.name)))
        return candidate

    def with_noise_multiplier(self, noise_multiplier: RealScalarLike) -> "PrivacyPlan":
        """The same plan with another noise multiplier."""
        return dataclasses.replace(self, noise=self.mechanism.with_noise_multiplier(noise_multiplier).noise)

    def with_metrics(self, **metrics: Unchecked[AbstractMetric]) -> "PrivacyPlan":
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

    def private_gradient(self, loss: Callable[..., Any], **options: Unpack[SpeedOptions]) -> PrivateGradient:
        """The `PrivateGradient` that this plan accounts for, which refuses to run for more steps than the plan has.

        The plan pays for ONE run: one state from `init`, one pass over `batches` with one seed. A second run needs a plan of its own, and both
        together cost what `dpx.accounting.PrivacyLedger` says. What is changed in the gradient afterwards (`eqx.tree_at`, `dataclasses.replace`) is
        refused: change the plan.

        **Arguments:**

        - `loss`: the loss of one example.
        - `options`: `method`, `filter_spec`, `has_aux`, `within_user`, as for `PrivateGradient`.
        """
        self.mechanism.check_calibrated()
        own = {"normalizer", "steps", "participation", "unit", "metrics", "stated", "physical_batch_size"}
        fixed = own & set(options)
        if fixed:
            raise ValueError(
                f"`private_gradient({fixed.pop()}=...)` is fixed by the plan, whose statement rests on it."
            )
        for name in options.keys() - SpeedOptions.__annotations__.keys():
            known = ", ".join(SpeedOptions.__annotations__)
            raise ValueError(f"`private_gradient({name}=...)`: there is no such option. There are: {known}.")
        unit: Unit = "user" if self.unit == "user" else "example"  # any other word is a name of what one row is
        return PrivateGradient(
            loss,
            self.clipping,
            self.noise,
            unit=unit,
            metrics=self.metrics,
            stated=self._stated(unit),
            **self._of_a_run(),
            **options,
        )

    def _stated(self, unit: Unit) -> Stated | None:
        rest = (self.steps, self.sampler.participation_per_event, unit)
        return stated_of(self.clipping, self.noise, rounded_up(float(self.sampler.batch_size)), self.metrics, *rest)

    def _of_a_run(self) -> dict[str, Any]:
        return {
            "normalizer": float(self.sampler.batch_size),
            "steps": self.steps,
            "participation": self.sampler.participation_per_event,
            # of a batch without a mask; nothing rests on the batches of a run that is not private
            "physical_batch_size": self.sampler.physical_batch_size if self.mechanism.is_private else None,
        }

    def private_sum(self, fn: Callable[..., Any], *, microbatch_size: Integer | None = None) -> PrivateSum:
        """The `PrivateSum` of `fn(model, *example)` that this plan accounts for: of model updates, or whatever else one example or user gives.

        **Arguments:**

        - `fn`: as for `PrivateSum`. With `unit="user"` its arguments are a user's examples, stacked.
        - `microbatch_size`: how many are computed at once.
        """
        self.mechanism.check_calibrated()
        if self.metrics:
            raise ValueError(
                "`PrivacyPlan.private_sum` releases no metrics, and this plan pays for some. Leave them out of the plan."
            )
        return PrivateSum(
            fn,
            self.clipping,
            self.noise,
            microbatch_size=microbatch_size,
            unit="user" if self.unit == "user" else "example",
            stated=self._stated("example"),
            **self._of_a_run(),
        )

    def batches(self, data: Data, *, seed: Integer | None, start: Integer = 0) -> Batches[np.ndarray]:
        """The run's batches from step `start` on, `(batch, mask)` in memory, padded to one physical size so that a run compiles once; with a `len`.
        For data that take time to read, several devices or several processes, `dpx.data.feed` gives the same batches ahead, where they belong.

        **Arguments:**

        - `data`: arrays or pandas tables in a tuple, which belong together by position, or whatever `dpx.data.as_source` takes.
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

    def statement(self, delta: RealScalarLike, *, in_clip_norms: bool = False, steps: Integer | None = None) -> str:
        r"""The privacy statement, in plain English: mechanism, unit, adjacency, sampling, parameters, epsilon, and what is assumed.

        Epsilon, delta, noise and rates of attacks are rounded up, so that what is read is a bound and what is run again keeps it.

        **Arguments:**

        - `delta`: $\delta$.
        - `in_clip_norms`: state the noise in units of the clip norm, where that is not chosen yet: privacy does not depend on it.
        - `steps`: of a run of the first `steps` steps alone, whose number was not chosen by looking at what the run released.
        """
        delta = probability("PrivacyPlan.statement(delta=...)", delta)
        facts = self._facts(delta, 0, steps, in_clip_norms=in_clip_norms)
        return NOT_PRIVATE if facts is None else statement(facts)

    def report(
        self, delta: RealScalarLike, *, in_clip_norms: bool = False, steps: Integer | None = None
    ) -> dict[str, Any]:
        """What the statement says, the event, curves and versions, as JSON-serialisable data; arguments as for `statement`."""
        delta = probability("PrivacyPlan.report(delta=...)", delta)
        facts = self._facts(delta, 8, steps, in_clip_norms=in_clip_norms)
        if facts is None:
            return {"is_private": False, "statement": NOT_PRIVATE, "versions": versions()}
        return {**as_data(facts), "statement": statement(facts), "versions": facts.versions}

    def plot(self, path: FilePath, delta: RealScalarLike) -> Path:
        """Writes the trade-off curve, epsilon over steps and delta against epsilon as one figure.

        **Arguments:**

        - `path`: of the image; its suffix says the format (`.png`, `.pdf`, `.svg`).
        - `delta`: for epsilon over steps.

        **Returns:** the path. Needs matplotlib (`pip install matplotlib`).
        """
        delta = probability("PrivacyPlan.plot(delta=...)", delta)
        if not self.mechanism.is_private:
            raise ValueError("A plan with `NoClipping` has no privacy to plot. Use `FlatClipping(norm)`.")
        check_matplotlib()
        facts: Any = self._facts(delta, 20, None, crowded=True)
        return plot(facts, path)

    def _facts(
        self, delta: float, number: int, steps: Integer | None, *, crowded: bool = False, in_clip_norms: bool = False
    ) -> Facts | None:
        """What the plan knows of its first `steps`, with epsilon after `number` numbers of them; None if it is not private."""
        if not self.mechanism.is_private:
            return None
        taken = self._first(steps)
        event = self._event(taken)
        after = milestones(event, taken, number, crowded) if number else []
        numbers: Any = {"adjacency": self.adjacency, "unit": self.unit, "accountant": self.accountant}
        numbers |= {"steps": taken, "epsilon": self.epsilon(delta, steps), "delta": delta}
        return facts_of(
            self.sampler,
            self.mechanism,
            event=event,
            curve=self.trade_off(steps),
            **numbers,
            epsilon_after_steps=tuple((n, self.epsilon(delta, n)) for n in after),
            in_clip_norms=in_clip_norms,
        )
