"""Balls-in-bins sampling: every example draws its place in the cycle once."""

import math
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import numpy as np

from .._checks import positive_int
from .._types import Participation
from ..strategies import AbstractStrategy
from ._base import (
    PRESENCE,
    AbstractSampler,
    binomial_ceiling,
    check_batch_size,
    check_expected_size,
    check_step,
    gaussian_multiplier,
)
from ._gram import bins_gram
from ._groups import random_group

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_MOST_BINS = 2048


class BallsInBinsSampler(AbstractSampler):
    r"""Every example draws one of `bins` bins once and for all; step $t$ takes all examples of bin $t \bmod$ `bins`.

    An example takes part in exactly one step of every cycle, always the same, so that sums over a cycle see all of the data, as after
    shuffling, yet the randomness amplifies privacy about as Poisson sampling does. The noise may be correlated by any strategy matrix
    without negative entries, banded or not.

    !!! success "Guarantee"

        The batch is a pure function of `(seed, step)`; examples draw independently, so that nobody's batches depend on who else is there;
        time and memory are proportional to the batch.

    **Arguments:**

    - `num_examples`: size of the data set.
    - `batch_size`: EXPECTED batch size, `num_examples / bins` rounded.
    - `steps`: number of batches.
    - `bins`: number of bins; by default `num_examples / batch_size`, rounded.

    ??? cite "Reference"

        Chua et al., *Balls-and-bins sampling for DP-SGD*, AISTATS 2025 (arXiv:2412.16802). Choquette-Choo et al., *Near exact privacy
        amplification for matrix mechanisms*, ICLR 2025 (arXiv:2410.06266).
    """

    num_examples: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    bins: int = eqx.field(static=True)
    unit: ClassVar[str] = "example"

    def __init__(self, num_examples: Any, batch_size: Any, steps: Any, bins: Any = None):
        name = "BallsInBinsSampler"
        self.num_examples = positive_int(f"{name}(num_examples=...)", num_examples)
        self.batch_size = positive_int(f"{name}(batch_size=...)", batch_size)
        self.steps = positive_int(f"{name}(steps=...)", steps)
        check_batch_size(name, self.batch_size, self.num_examples)
        if bins is None:
            bins = max(1, round(self.num_examples / self.batch_size))
        self.bins = positive_int(f"{name}(bins=...)", bins)
        near = {max(1, self.num_examples // self.batch_size), math.ceil(self.num_examples / self.batch_size)}
        sizes = " or ".join(f"{round(self.num_examples / b)} ({b} bins)" for b in sorted(near))
        check_expected_size(name, self.batch_size, self.num_examples / self.bins, f"Nearest are {sizes}.")

    @property
    def num_rows(self) -> int:
        return self.num_examples

    @property
    def participation(self) -> Participation:
        return Participation(self.bins, math.ceil(self.steps / self.bins))

    @property
    def participation_per_event(self) -> Participation:
        return self.participation

    @property
    def adjacencies(self) -> tuple[str, ...]:
        return PRESENCE

    @property
    def physical_batch_size(self) -> int:
        return min(self.num_examples, binomial_ceiling(math.ceil(self.num_examples / self.bins)))

    @property
    def assumption(self) -> str:
        return (
            f"every example draws one of {self.bins} bins once, uniformly and independently, and batch t is all of bin t mod {self.bins} "
            f"(balls-in-bins sampling; {self.num_examples / self.bins:.6g} of {self.num_examples} expected)"
        )

    def indices(self, seed: int, step: int) -> np.ndarray:
        check_step(self, step)
        return random_group(self.num_examples, self.bins, step % self.bins, seed)

    def event(
        self, mechanism: "DpEvent", bands: int | None, steps: int, strategy: AbstractStrategy | None = None
    ) -> "DpEvent":
        import dp_accounting as da

        from ..events import GaussianMixtureOfBinsDpEvent, RandomAllocationDpEvent

        multiplier = gaussian_multiplier("BallsInBinsSampler", mechanism)
        if bands == 1:
            times = math.ceil(steps / self.bins)
            if self.bins == 1:
                return da.SelfComposedDpEvent(mechanism, times)
            # An example of bin j moves the steps of bin j, together by sqrt(times) or, for bins that come once less, not as far. Scaling bin j's
            # coordinate down and adding noise to restore its variance makes the latter out of the former whichever bin was drawn, so equal
            # distances are an upper bound. A strategy with one band has at least this much noise in every step.
            return RandomAllocationDpEvent(multiplier / math.sqrt(times), self.bins)
        if strategy is None:
            raise ValueError(
                "`BallsInBinsSampler` can account for correlated noise only if it is told the strategy matrix: `event(..., strategy=...)`."
            )
        if self.bins == 1:
            return mechanism  # everybody is in every batch
        if self.bins > _MOST_BINS:
            raise ValueError(
                f"`BallsInBinsSampler(bins={self.bins})` with correlated noise has no accountant beyond {_MOST_BINS} bins. Use a larger batch, "
                "`CyclicPoissonSampler` with a banded strategy, or `IndependentGaussian`."
            )
        separation, most = self.participation_per_event
        sensitivity = strategy.sensitivity(self.steps, separation, most)
        gram = bins_gram(strategy, steps, self.bins) / sensitivity**2
        # the noise's scale is rounded up by more than these products err
        return GaussianMixtureOfBinsDpEvent(multiplier, tuple(map(tuple, np.minimum(gram, 1.0).tolist())))
