"""`PrivacyPlan`: sampling, clipping, noise and neighbours, and the arithmetic that binds them."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import equinox as eqx
import numpy as np

from . import accounting
from ._checks import positive_float, positive_int, probability
from ._types import RealScalarLike
from .accounting import NEIGHBOURS, AccountantName, Adjacency, TradeOffCurve
from .clipping import AbstractClipping, FlatClipping, NoClipping
from .noise import AbstractIntegerNoise, AbstractNoise, CorrelatedGaussian, IndependentGaussian
from .private_gradient import PrivateGradient
from .random import fresh_seed
from .sampling import (
    AbstractSampler,
    CyclicPoissonSampler,
    PoissonSampler,
    ShuffleSampler,
    check_seed,
    gather_batches,
)
from .strategies import AbstractStrategy, BandedToeplitz, SquareRootToeplitz

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
    - `clipping`: how much one of them may contribute.
    - `noise`: what is added; its multiplier may be left to `calibrate`.
    - `adjacency`: what neighbouring data sets are: `"add_or_remove_one"`, `"replace_one"`, or `"replace_special"` (one is replaced by
        an empty one).
    - `unit`: what is protected, for the statement: one row of the data is one such unit.
    - `accountant`: `"pld"` (tight) or `"rdp"`.
    """

    sampler: AbstractSampler
    clipping: AbstractClipping
    noise: AbstractNoise
    adjacency: Adjacency = eqx.field(static=True)
    unit: str = eqx.field(static=True)
    accountant: AccountantName = eqx.field(static=True)

    def __init__(
        self,
        sampler: AbstractSampler,
        clipping: AbstractClipping,
        noise: AbstractNoise,
        *,
        adjacency: str = "add_or_remove_one",
        unit: str = "example",
        accountant: str = "pld",
    ):
        accounting.check_adjacency(adjacency)
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
        accounting.check_accountant(accountant, adjacency)
        if adjacency not in sampler.adjacencies:
            raise ValueError(
                f"`{type(sampler).__name__}` needs `adjacency` to be one of {', '.join(map(repr, sampler.adjacencies))}: the batches of everybody "
                f"depend on how many examples there are, so none can be added or removed; got {adjacency!r}."
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
        self.unit = unit
        self.accountant = accountant  # pyright: ignore[reportAttributeAccessIssue]

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

    def epsilon(self, delta: RealScalarLike, steps: Any = None) -> float:
        r"""The $\varepsilon$ that the run has at `delta`, or that its first `steps` steps have spent.

        **Raises:** `ValueError` if delta is not in (0, 1), the plan is not calibrated, or nobody can account for it. Warns if delta is
        at least one over the number of examples, where publishing a random row would meet the definition.
        """
        delta = probability("PrivacyPlan.epsilon(delta=...)", delta)
        self._warn_about(delta)
        if steps is not None and steps == 0:
            return 0.0
        event = self._event(self._first(steps))
        if isinstance(self.clipping, NoClipping):
            return math.inf
        return accounting.epsilon(event, delta, adjacency=self.adjacency, accountant=self.accountant)

    def delta(self, epsilon: RealScalarLike, steps: Any = None) -> float:
        r"""The $\delta$ that the run, or its first `steps` steps, has at `epsilon`."""
        if isinstance(self.clipping, NoClipping):
            return 1.0
        return accounting.delta(
            self._event(self._first(steps)),
            float(np.asarray(epsilon)),
            adjacency=self.adjacency,
            accountant=self.accountant,
        )

    def trade_off(self) -> TradeOffCurve:
        """What any attacker who knows all but one unit can reach: error rates and advantage. Uses privacy loss distributions, or
        Rényi accounting for noise that has none."""
        event = self._event(self.steps)
        if isinstance(self.clipping, NoClipping):
            return TradeOffCurve((0.0,), (1.0,))
        epsilons = np.linspace(0.0, min(accounting.rough_epsilon(event, 1e-9), 50.0), 101)
        if isinstance(self.noise, AbstractIntegerNoise):
            deltas = np.array([self.delta(float(e)) for e in epsilons])
        else:
            distribution = accounting.loss_distribution(event, self.adjacency)
            deltas = np.clip([distribution.get_delta(float(e)) for e in epsilons], 0.0, 1.0)
        return TradeOffCurve(tuple(epsilons.tolist()), tuple(deltas.tolist()))

    def error(self, workload: Any = "prefix", kind: str = "mean") -> float:
        r"""Root-mean-square error, per coordinate, that the noise brings into sums of the normalised gradients.

        **Arguments:**

        - `workload`: `"prefix"` (sums of all gradients so far, which plain SGD follows), or another that
            `dpx.strategies.AbstractStrategy.error` takes, such as `dpx.strategies.momentum_workload` gives.
        - `kind`: the `"mean"` over steps or the `"max"`.

        **Returns:**

        The error in units of a gradient: of two plans with the same clip norm and budget, the one with the smaller error trains better, as
        a rule.
        """
        factor = self.noise.error(self.steps, self.sampler.participation_per_event, workload, kind)
        return self.noise_multiplier * float(self.clipping.sensitivity) * factor / self.sampler.batch_size

    def calibrate(
        self,
        epsilon: RealScalarLike,
        delta: RealScalarLike,
        parameter: str = "noise_multiplier",
    ) -> "PrivacyPlan":
        r"""The plan that just keeps a budget.

        **Arguments:**

        - `epsilon`, `delta`: the budget.
        - `parameter`: what to choose, given the rest: the least `"noise_multiplier"`, the most `"steps"`, or the largest
            `"batch_size"`.

        **Returns:**

        A new plan with `plan.epsilon(delta) <= epsilon`, its noise multiplier within a relative 2e-5 of the least.

        **Raises:** `ValueError` if no value meets the budget.
        """
        epsilon = positive_float("PrivacyPlan.calibrate(epsilon=...)", epsilon)
        delta = probability("PrivacyPlan.calibrate(delta=...)", delta)
        self._warn_about(delta)
        if isinstance(self.clipping, NoClipping):
            raise ValueError(
                "`NoClipping` bounds no contribution, so no noise meets a finite epsilon. Use `FlatClipping(norm)`."
            )
        if parameter == "noise_multiplier":
            return self._with_noise(self._least_noise(epsilon, delta))
        if parameter not in ("steps", "batch_size"):
            raise ValueError(f"`parameter` must be 'noise_multiplier', 'steps' or 'batch_size'; got {parameter!r}.")
        if not self.is_calibrated:
            raise ValueError(f"`calibrate(parameter={parameter!r})` needs a noise multiplier; this plan has none.")
        return self._largest(parameter, epsilon, delta)

    def private_gradient(self, loss: Callable[..., Any], **options: Any) -> PrivateGradient:
        """The `PrivateGradient` that this plan accounts for, which refuses to run for more steps than the plan has.

        **Arguments:**

        - `loss`: the loss of one example.
        - `options`: `method`, `filter_spec`, `has_aux`, as for `PrivateGradient`.
        """
        if not self.is_calibrated:
            raise ValueError(_MSG_UNCALIBRATED)
        fixed = {"normalizer", "steps", "participation"} & set(options)
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
            **options,
        )

    def batches(self, data: Any, *, seed: Any, start: int = 0) -> Iterator[tuple[Any, np.ndarray]]:
        """The run's batches from step `start` on: `(batch, mask)`, padded to one physical size so that a run compiles once.

        **Arguments:**

        - `data`: a tuple of PyTrees of arrays with `num_examples` rows each.
        - `seed`: the secret of the sampling, up to 128 bits; None draws one from the operating system (which cannot be resumed).
        - `start`: the step to start from; the batches are those of a run that was never stopped.
        """
        if seed is None and start != 0:
            raise ValueError(
                f"`PrivacyPlan.batches(seed=None, start={start})` would go on with another sampling than the run began with, where "
                "examples may take part more often than the plan accounts for. Begin with `seed=dpx.random.fresh_seed()`, keep it, and pass it again."
            )
        seed = fresh_seed() if seed is None else check_seed("PrivacyPlan.batches(seed=...)", seed)
        return gather_batches(self.sampler, data, seed=seed, start=start)

    def statement(self, delta: RealScalarLike) -> str:
        """The privacy statement, in plain English: mechanism, unit, adjacency, sampling, parameters, epsilon, and what is assumed."""
        delta = probability("PrivacyPlan.statement(delta=...)", delta)
        if isinstance(self.clipping, NoClipping):
            return (
                "This run is NOT differentially private: contributions are not clipped and no noise is added (epsilon is infinite). Nothing "
                "that depends on its result may be published as private."
            )
        epsilon = self.epsilon(delta)
        advantage = self.trade_off().advantage
        tool = {"pld": "privacy loss distributions", "rdp": "Rényi differential privacy"}[self.accountant]
        neighbours = NEIGHBOURS[self.adjacency].format(unit=self.unit)
        norm = f"{float(self.clipping.sensitivity):.6g}"
        scale = float(self.noise.scale(self.clipping.sensitivity, self.steps, self.sampler.participation_per_event))
        is_exact = isinstance(self.noise, AbstractIntegerNoise)
        unclaimed = (
            "; no amplification by sampling is claimed" if is_exact and "claimed" not in self.sampler.assumption else ""
        )
        ideal = (
            "the bits of its key's stream are random"
            if is_exact
            else "floating-point noise behaves like real-valued noise"
        )
        lines = [
            f"This run is ({_rounded_up(epsilon)}, {delta:g})-differentially private for one {self.unit}.",
            "",
            f"- Neighbouring data sets: {neighbours} (adjacency `{self.adjacency}`).",
            f"- Mechanism: {self.noise.description}, on sums of clipped per-{self.unit} gradients.",
            f"- Clipping: `{type(self.clipping).__name__}`, l{self.clipping.order} clip norm {norm}.",
            f"- Noise multiplier: {self.noise_multiplier:.6g}; noise of scale {scale:.6g} in every coordinate of the sum"
            f"{' before it is correlated' if self.noise.bands != 1 else ''}.",
            f"- Sampling: {self.sampler.assumption}{unclaimed}.",
            f"- Steps: {self.steps}. All intermediate models may be published.",
            f"- Epsilon: {_rounded_up(epsilon)} at delta {delta:g}, an upper bound computed with {tool} (dp_accounting {_version()}).",
            f"- Attack advantage: whoever knows all other {self.unit}s tells with true-positive rate minus false-positive rate at most "
            f"{math.ceil(advantage * 1e4) / 1e4:.4f} whether one was used.",
            f"- Assumed: batches are drawn as stated, with a secret seed; one row of the data is one {self.unit} and the loss sees one at "
            "a time; the noise key is secret and used once; choices made by looking at the data (architecture, hyperparameters, "
            f"preprocessing) are not counted; and {ideal}.",
        ]
        return "\n".join(lines)

    def _event(self, steps: int) -> "DpEvent":
        if isinstance(self.clipping, NoClipping):
            from dp_accounting import NonPrivateDpEvent

            return NonPrivateDpEvent()
        multiplier = self.noise_multiplier
        side = self.clipping.side_noise_multipliers
        if side:
            multiplier = (multiplier**-2 + sum(float(s) ** -2 for s in side)) ** -0.5
        return self.sampler.event(self.noise.event(multiplier), self.noise.bands, steps)

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

    def _with_noise(self, multiplier: float) -> "PrivacyPlan":
        return dataclasses.replace(self, noise=dataclasses.replace(self.noise, noise_multiplier=multiplier))

    def _searches(self, plan_with: Callable[[float], "PrivacyPlan"], epsilon: float, delta: float):
        """`log(epsilon of a plan / epsilon)`, by ever costlier accountants: guess, coarse grid, the one that is reported."""

        def excess(find):
            def of(x):
                value = find(plan_with(x).event)
                return math.log(value / epsilon) if value > 0 else -math.inf

            return of

        def exact(interval=None):
            options = {"adjacency": self.adjacency, "accountant": self.accountant, "interval": interval}
            return excess(lambda event: accounting.epsilon(event, delta, **options))

        rough = excess(lambda event: accounting.rough_epsilon(event, delta))
        if self.accountant == "rdp":
            return (rough, 1e-2), (exact(), 1e-3), exact()
        # a coarse grid costs a tenth of the reported one and lands within a per cent
        return (rough, 1e-2), (exact(10 * accounting.discretisation(epsilon)), 1e-3), exact()

    def _least_noise(self, epsilon: float, delta: float) -> float:
        *coarse, exact = self._searches(self._with_noise, epsilon, delta)
        guess = 1.0
        for search, tolerance in coarse:
            guess = accounting.least_feasible(search, guess, tolerance=tolerance)
        return accounting.least_feasible(exact, guess, tolerance=2e-5)

    def _largest(self, parameter: str, epsilon: float, delta: float) -> "PrivacyPlan":
        caps = [self.sampler.num_examples, getattr(self.sampler, "max_batch_size", None) or math.inf]
        most = int(min(caps)) if parameter == "batch_size" else 2**24

        def plan_with(number: int) -> "PrivacyPlan":
            return dataclasses.replace(self, sampler=dataclasses.replace(self.sampler, **{parameter: number}))

        def whole(x: float) -> int:
            return max(1, min(most, round(1 / x)))

        *coarse, exact = self._searches(lambda x: plan_with(whole(x)), epsilon, delta)
        guess = 1 / getattr(self.sampler, parameter)
        bounds = {"largest": 2.0, "smallest": 0.5 / most}
        try:
            for search, tolerance in coarse:
                guess = accounting.least_feasible(search, guess, tolerance=tolerance, **bounds)
            guess = accounting.least_feasible(exact, guess, tolerance=max(1e-4, 1.0 * guess), **bounds)
        except ValueError:
            guess = 1.0  # the searches are guides; the integers decide
        best = accounting.largest_integer(lambda number: exact(1 / number) <= 0, whole(guess), most)
        if best == 0:
            raise ValueError(
                f"Not even {parameter} = 1 keeps epsilon {epsilon:g} at delta {delta:g} with noise multiplier {self.noise_multiplier:g}."
            )
        return plan_with(best)


def dp_sgd(
    num_examples: Any,
    batch_size: Any,
    steps: Any,
    *,
    epsilon: RealScalarLike | None = None,
    delta: RealScalarLike | None = None,
    noise_multiplier: RealScalarLike | None = None,
    clipping: AbstractClipping | None = None,
    max_batch_size: Any = None,
    adjacency: str = "add_or_remove_one",
    unit: str = "example",
    accountant: str = "pld",
) -> PrivacyPlan:
    r"""The plan of DP-SGD: Poisson sampling, clipping, independent Gaussian noise.

    ```python
    plan = dpx.dp_sgd(num_examples=60_000, batch_size=256, steps=5_000, epsilon=1.0, delta=1e-5)
    ```

    **Arguments:**

    - `num_examples`, `batch_size`, `steps`, `max_batch_size`: as for `PoissonSampler`.
    - `epsilon`, `delta`: the budget that the noise is calibrated to, or
    - `noise_multiplier`: the noise itself.
    - `clipping`: how much one example may contribute; by default `FlatClipping(1.0)`.
    - `adjacency`, `unit`, `accountant`: as for `PrivacyPlan`.

    **Raises:** `ValueError` unless exactly one of the budget and the noise multiplier is given (neither with `NoClipping()`).

    ??? cite "Reference"

        Abadi et al., *Deep learning with differential privacy*, CCS 2016.
    """
    sampler = PoissonSampler(num_examples, batch_size, steps, max_batch_size)
    noise = IndependentGaussian(noise_multiplier)
    return _finished(
        "dp_sgd", sampler, clipping, noise, epsilon, delta, adjacency=adjacency, unit=unit, accountant=accountant
    )


def dp_mf(
    num_examples: Any,
    batch_size: Any,
    steps: Any,
    *,
    strategy: AbstractStrategy | None = None,
    bands: Any = None,
    amplified: bool | None = None,
    replay: bool = False,
    epsilon: RealScalarLike | None = None,
    delta: RealScalarLike | None = None,
    noise_multiplier: RealScalarLike | None = None,
    clipping: AbstractClipping | None = None,
    adjacency: str | None = None,
    unit: str = "example",
    accountant: str = "pld",
) -> PrivacyPlan:
    r"""The plan of DP-FTRL by matrix factorization: clipping, and Gaussian noise that is correlated between steps.

    ```python
    plan = dpx.dp_mf(num_examples=60_000, batch_size=500, steps=1_000, bands=16, epsilon=1.0, delta=1e-6)
    ```

    Amplified, the data is dealt into as many groups as there are bands, which take turns and are Poisson-sampled; not amplified, the data
    passes in one fixed order, once or for several epochs, and the noise is scaled to the participations.

    **Arguments:**

    - `num_examples`, `batch_size`, `steps`: of the run.
    - `strategy`: the matrix, from `dpx.strategies`; by default the optimal banded Toeplitz matrix with `bands` bands.
    - `bands`: its number of bands.
    - `amplified`: whether to sample; by default if the strategy is banded and there is room for that many groups.
    - `replay`: as for `CorrelatedGaussian`.
    - `epsilon`, `delta` or `noise_multiplier`, `clipping`, `unit`, `accountant`: as for `dp_sgd`.
    - `adjacency`: by default `"add_or_remove_one"` amplified, else `"replace_special"`.

    **Raises:** `ValueError` where strategy and sampling do not fit.

    ??? cite "Reference"

        Denisov et al. 2022; Choquette-Choo et al., *(Amplified) banded matrix factorization*, NeurIPS 2023.
    """
    steps = positive_int("dp_mf(steps=...)", steps)
    if (strategy is None) == (bands is None):
        raise ValueError(
            "`dp_mf` needs a `strategy=`, or the number of `bands=` of one to optimise; got both or neither."
        )
    if strategy is None:
        strategy = BandedToeplitz.optimize(steps, bands)
    if isinstance(strategy, SquareRootToeplitz) and strategy.steps is None:
        strategy = SquareRootToeplitz(steps)  # its buffers are one for each step
    room = positive_int("dp_mf(num_examples=...)", num_examples) // positive_int("dp_mf(batch_size=...)", batch_size)
    if amplified is None:
        amplified = strategy.bands is not None and 1 <= strategy.bands <= room
    if amplified and strategy.bands is None:
        raise ValueError(
            f"`dp_mf(amplified=True)` needs a banded strategy; `{type(strategy).__name__}` is not. Use `bands=`, or `amplified=False`."
        )
    if amplified:
        sampler = CyclicPoissonSampler(num_examples, batch_size, steps, strategy.bands)
    else:
        sampler = ShuffleSampler(num_examples, batch_size, steps)
    if adjacency is None:
        adjacency = sampler.adjacencies[0] if amplified else "replace_special"
    noise = CorrelatedGaussian(strategy, noise_multiplier, replay)
    return _finished(
        "dp_mf", sampler, clipping, noise, epsilon, delta, adjacency=adjacency, unit=unit, accountant=accountant
    )


def _finished(
    name: str,
    sampler: AbstractSampler,
    clipping: AbstractClipping | None,
    noise: AbstractNoise,
    epsilon: RealScalarLike | None,
    delta: RealScalarLike | None,
    **options: str,
) -> PrivacyPlan:
    """A plan with a given noise multiplier, or calibrated to a given budget: one of the two."""
    # not a default argument: importing dpx must not start JAX's devices
    clipping = FlatClipping(1.0) if clipping is None else clipping
    plan = PrivacyPlan(sampler, clipping, noise, **options)
    if epsilon is None:
        if not plan.is_calibrated:
            raise ValueError(
                f"`{name}` needs a budget, `epsilon=` and `delta=`, or a `noise_multiplier=`; got neither."
            )
        return plan
    if noise.noise_multiplier is not None:
        raise ValueError(f"`{name}` takes a budget, `epsilon=` and `delta=`, or a `noise_multiplier=`, not both.")
    if delta is None:
        raise ValueError(
            f"`{name}(epsilon={epsilon})` needs a `delta=` too, well below 1 / num_examples = {1 / sampler.num_examples:g}."
        )
    return plan.calibrate(epsilon, delta)


def _rounded_up(epsilon: float) -> str:
    """Four decimals, never rounded down: what is stated must be a bound."""
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}" if math.isfinite(epsilon) else "infinity"


def _version() -> str:
    from importlib.metadata import version

    return version("dp-accounting")
