"""b-min-sep sampling: whoever took part rests for a while."""

import math
from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import numpy as np

from .._checks import choice, integer, positive_int
from .._round import round_up
from .._types import Adjacency, Integer, Participation, Unchecked
from ..random import Domain, check_seed, generator
from ..strategies import AbstractStrategy, BandedToeplitz
from ._base import (
    PRESENCE,
    AbstractSampler,
    binomial_ceiling,
    check_batch_size,
    check_step,
    gaussian_multiplier,
    largest_batch,
)
from ._renewal import Renewal

if TYPE_CHECKING:
    from dp_accounting import DpEvent


class MinSepSampler(AbstractSampler):
    r"""Takes every example that does not rest with probability $p$, after which it rests for `min_separation` $- 1$ steps.

    An example takes part in a share $1 / (b - 1 + 1/p)$ of all steps, $b$ = `min_separation`, which sets $p$ from the batch size. Between Poisson
    sampling ($b = 1$) and a random phase ($p \to 1$), it keeps participations as far apart as the noise has bands, without
    dealing the data into groups of which one sits out all other steps.

    !!! success "Guarantee"

        The batch is a pure function of `(seed, step)`, and of distribution exactly as stated. Taken in order, a batch costs time in proportion to its
        size and memory to the last $b + 8$. The first one asked for is replayed from step 0, unless `dpx.sampling.resume` hands over what
        `dpx.sampling.resume_state` gave, as checkpoints do.

    **Arguments:**

    - `num_examples`: size of the data set.
    - `batch_size`: EXPECTED batch size; less than `num_examples / min_separation`.
    - `steps`: number of batches.
    - `min_separation`: $b$, at least this many steps lie between two participations.
    - `start`: `"warm"` (rests are spread as after many steps, so that all batches are of equal size on average) or `"cold"` (nobody rests at
        first, so that the first batch has $p$ `num_examples` examples on average).
    - `max_batch_size`: where given, larger batches are cut to a uniformly random subset of that size, and delta grows by a bound on the
        probability that this ever happens. Otherwise batches are padded to a size exceeded once in 10^9 batches, and the padding
        grows if that happens.
    - `truncated_batch_size`: another name of it.

    ??? cite "Reference"

        Dong and Ganesh, *Privacy amplification for BandMF via b-min-sep subsampling*, 2026 (arXiv:2602.09338).
    """

    num_examples: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    min_separation: int = eqx.field(static=True)
    start: str = eqx.field(static=True)
    max_batch_size: int | None = eqx.field(static=True)
    unit: ClassVar[str] = "example"

    def __init__(
        self,
        num_examples: Integer,
        batch_size: Integer,
        steps: Integer,
        min_separation: Integer,
        start: str = "warm",
        max_batch_size: Integer | None = None,
        *,
        truncated_batch_size: Integer | None = None,
    ):
        name = "MinSepSampler"
        self.num_examples = positive_int(f"{name}(num_examples=...)", num_examples)
        self.batch_size = positive_int(f"{name}(batch_size=...)", batch_size)
        self.steps = positive_int(f"{name}(steps=...)", steps)
        self.min_separation = positive_int(f"{name}(min_separation=...)", min_separation)
        check_batch_size(name, self.batch_size, self.num_examples)
        if self.batch_size * self.min_separation >= self.num_examples:
            raise ValueError(
                f"`{name}(min_separation=...)` must be less than `num_examples / batch_size` = {self.num_examples / self.batch_size:.6g}, or too "
                f"many examples rest to fill a batch; got {self.min_separation}. Take smaller batches, or `BallsInBinsSampler`, in which everybody "
                "comes back as late as possible."
            )
        self.start = choice(f"{name}(start=...)", start, ("warm", "cold"))
        self.max_batch_size = largest_batch(name, self.batch_size, max_batch_size, truncated_batch_size)

    @property
    def sampling_probability(self) -> float:
        """The probability with which an example that does not rest takes part."""
        return self.batch_size / (self.num_examples - self.batch_size * (self.min_separation - 1))

    @property
    def num_rows(self) -> int:
        return self.num_examples

    @property
    def participation(self) -> Participation:
        return Participation(self.min_separation, math.ceil(self.steps / self.min_separation))

    @property
    def participation_per_event(self) -> Participation:
        return Participation(self.min_separation, 1)  # the event counts the participations of a run itself

    @property
    def adjacencies(self) -> tuple[Adjacency, ...]:
        return PRESENCE

    @property
    def physical_batch_size(self) -> int:
        if self.max_batch_size is not None:
            return min(self.max_batch_size, self.num_examples)
        return min(self.num_examples, binomial_ceiling(math.ceil(self.num_examples * self._largest_share)))

    @property
    def _largest_share(self) -> float:
        """At least the probability with which any one example is in any one batch: exact when warm; when cold it needs a coin, too."""
        return self.batch_size / self.num_examples if self.start == "warm" else self.sampling_probability

    @property
    def assumption(self) -> str:
        text = (
            f"every example that took part in none of the {self.min_separation - 1} batches before is in a batch independently with probability "
            f"{round_up(self.sampling_probability)} (b-min-sep sampling, {self.start} start; {self.batch_size} of {self.num_examples} expected)"
        )
        if self.max_batch_size is None:
            return text
        return f"{text}, and batches larger than {self.max_batch_size} are cut to a random subset of that size"

    def indices(self, seed: int, step: int) -> np.ndarray:
        check_step(self, step)
        rows = self._renewal(seed).batch(step)
        if self.max_batch_size is None or len(rows) <= self.max_batch_size:
            return rows
        # who is cut off rests all the same, so that later batches are those of a run in which nobody was
        rng = generator(seed, step, Domain.MIN_SEP_CUTS)
        return rows[np.sort(rng.choice(len(rows), self.max_batch_size, replace=False, shuffle=False))]

    def resume_state(self, seed: Integer, step: Integer) -> dict[str, np.ndarray]:
        """What batch `step` and those after it depend on: see `dpx.sampling.resume_state`."""
        return self._renewal(seed).state(_next_step(self, "resume_state", step))

    def resume(self, seed: Integer, step: Integer, state: Unchecked[dict[str, np.ndarray]]) -> None:
        """Spares the replay of the steps before `step`: see `dpx.sampling.resume`."""
        self._renewal(seed).resume(_next_step(self, "resume", step), state)

    def _renewal(self, seed: Integer) -> Renewal:
        share, is_warm = self.batch_size / self.num_examples, self.start == "warm"
        seed = check_seed("seed=...", seed)
        return Renewal(self.num_examples, self.sampling_probability, share, self.min_separation - 1, is_warm, seed)

    def event(
        self, mechanism: "DpEvent", bands: int | None, steps: int, strategy: AbstractStrategy | None = None
    ) -> "DpEvent":
        import dp_accounting as da

        from ..events import CoupledDpEvent, MinSepSampledDpEvent

        multiplier = gaussian_multiplier("MinSepSampler", mechanism)
        separation, p = self.min_separation, self.sampling_probability
        coefficients = self._unit_coefficients(bands, strategy)
        if separation == 1:
            event = da.SelfComposedDpEvent(da.PoissonSampledDpEvent(p, mechanism), steps)
        else:
            event = MinSepSampledDpEvent(multiplier, coefficients, steps, separation, p, self.start == "warm")
        if self.max_batch_size is None or self.max_batch_size > self.num_examples:
            return event
        # of both neighbours, the one with an example more: truncation is a union over steps of binomial tails, or of what they bound
        failure = steps * binomial_tail(self.num_examples + 1, self._largest_share, self.max_batch_size)
        if failure >= 1:
            least = binomial_ceiling(math.ceil(self.num_examples * self._largest_share))
            raise ValueError(
                f"`MinSepSampler(max_batch_size={self.max_batch_size})` cuts batches so often that nobody can account for it. Give {least}, which is "
                "exceeded once in 10^9 batches, or more, or leave it out."
            )
        return CoupledDpEvent(event, failure)

    def _unit_coefficients(self, bands: int | None, strategy: AbstractStrategy | None) -> tuple[float, ...]:
        """What one participation adds, over the sensitivity that the noise is scaled by."""
        if bands == 1:
            return (1.0,)
        if not isinstance(strategy, BandedToeplitz) or min(strategy.coefficients) < 0:
            raise ValueError(
                "b-min-sep sampling can be accounted for with independent noise, or with `BandedToeplitz` without negative coefficients; got "
                f"{'an unknown strategy' if strategy is None else type(strategy).__name__}. Use `BandedToeplitz.optimize(...)`, or "
                "`BallsInBinsSampler`, which goes with any matrix without negative entries."
            )
        if len(strategy.coefficients) > self.min_separation:
            raise ValueError(
                f"Under `MinSepSampler(min_separation={self.min_separation})` noise can be amplified with at most that many bands; this strategy "
                f"has {len(strategy.coefficients)}. Use fewer bands, a longer separation, or `BallsInBinsSampler`."
            )
        sensitivity = strategy.sensitivity(self.steps, *self.participation_per_event)
        return tuple((np.asarray(strategy.coefficients[: self.steps]) / sensitivity).tolist())


def _next_step(sampler: MinSepSampler, name: str, step: Integer) -> int:
    """The number of a step that is still to come, or of the one after the last."""
    number = integer(f"MinSepSampler.{name}(step=...)", step)
    if not 0 <= number <= sampler.steps:
        raise ValueError(f"`MinSepSampler.{name}(step=...)` must lie between 0 and {sampler.steps}; got {number}.")
    return number


def binomial_tail(trials: int, probability: float, most: int) -> float:
    r"""At least the probability that a binomial variable exceeds `most`, by Chernoff's bound $e^{-n \text{KL}(k/n, p)}$."""
    if most >= trials:
        return 0.0
    share = (most + 1) / trials
    if share <= probability:
        return 1.0
    exponent = share * math.log(share / probability)
    if share < 1:
        exponent += (1 - share) * (math.log1p(-share) - math.log1p(-probability))
    return min(1.0, math.exp(-trials * exponent) * (1 + 1e-6))
