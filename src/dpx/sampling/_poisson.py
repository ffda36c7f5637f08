"""Poisson sampling: every example flips its own coin at every step."""

from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import numpy as np

from .._checks import positive_int
from .._round import round_up
from .._types import Participation
from ..random import Domain, generator
from ..strategies import AbstractStrategy
from ._base import ADJACENCIES, AbstractSampler, binomial_ceiling, check_batch_size, check_step

if TYPE_CHECKING:
    from dp_accounting import DpEvent


class PoissonSampler(AbstractSampler):
    r"""Takes every example into every batch independently, with probability $q$ = `batch_size` / `num_examples`.

    The size of a batch is binomial, and a secret. Time and memory of a batch are proportional to the batch, not to the data set: the
    size is drawn first, then that many distinct examples uniformly, which is the same distribution.

    !!! success "Guarantee"

        The batch has exactly the distribution of independent coins (in the precision of NumPy's binomial sampler), and is a pure
        function of `(seed, step)`.

    **Arguments:**

    - `num_examples`: size of the data set.
    - `batch_size`: EXPECTED batch size, at most `num_examples`.
    - `steps`: number of batches.
    - `max_batch_size`: where given, a larger batch is cut to a uniformly random subset of that size (truncated Poisson sampling, which
        costs extra privacy that is accounted for; the size of the data set is then public). Otherwise batches are padded to a size
        exceeded once in 10^9 batches, and the padding grows if that happens.

    ??? cite "Reference"

        Abadi et al., *Deep learning with differential privacy*, CCS 2016; truncation: Ganesh et al., *Scaling up DP-SGD*, 2025
        (arXiv:2508.15089).
    """

    num_examples: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    max_batch_size: int | None = eqx.field(static=True)
    unit: ClassVar[str] = "example"

    def __init__(self, num_examples: Any, batch_size: Any, steps: Any, max_batch_size: Any = None):
        self.num_examples = positive_int("PoissonSampler(num_examples=...)", num_examples)
        self.batch_size = positive_int("PoissonSampler(batch_size=...)", batch_size)
        self.steps = positive_int("PoissonSampler(steps=...)", steps)
        check_batch_size("PoissonSampler", self.batch_size, self.num_examples)
        self.max_batch_size = None
        if max_batch_size is not None:
            self.max_batch_size = positive_int("PoissonSampler(max_batch_size=...)", max_batch_size)
            if self.max_batch_size < self.batch_size:
                raise ValueError(
                    f"`PoissonSampler(max_batch_size=...)` must be at least `batch_size`, or most batches are cut; got {self.max_batch_size} "
                    f"for batches of {self.batch_size} on average."
                )

    @property
    def sampling_probability(self) -> float:
        """The probability with which an example is in a batch, before truncation."""
        return self.batch_size / self.num_examples

    @property
    def num_rows(self) -> int:
        return self.num_examples

    @property
    def participation(self) -> Participation:
        return Participation(1, self.steps)

    @property
    def participation_per_event(self) -> Participation:
        return Participation(1, 1)

    @property
    def adjacencies(self) -> tuple[str, ...]:
        return ADJACENCIES

    @property
    def physical_batch_size(self) -> int:
        if self.max_batch_size is not None:
            return min(self.max_batch_size, self.num_examples)
        return min(self.num_examples, binomial_ceiling(self.batch_size))

    @property
    def assumption(self) -> str:
        text = (
            f"every example is in every batch independently with probability {round_up(self.sampling_probability)} (Poisson sampling; "
            f"{self.batch_size} of {self.num_examples} expected)"
        )
        if self.max_batch_size is None:
            return text
        return f"{text}, and batches larger than {self.max_batch_size} are cut to a random subset of that size"

    def indices(self, seed: int, step: int) -> np.ndarray:
        check_step(self, step)
        rng = generator(seed, step, Domain.POISSON)
        size = int(rng.binomial(self.num_examples, self.sampling_probability))
        if self.max_batch_size is not None:
            size = min(size, self.max_batch_size)
        return np.sort(rng.choice(self.num_examples, size, replace=False, shuffle=False))

    def event(
        self, mechanism: "DpEvent", bands: int | None, steps: int, strategy: AbstractStrategy | None = None
    ) -> "DpEvent":
        import dp_accounting as da

        if bands != 1:
            raise ValueError(
                "Nobody can account for correlated noise under plain Poisson sampling, where an example may take part in neighbouring steps. "
                "Use `IndependentGaussian`, or a banded strategy with `CyclicPoissonSampler`, `BallsInBinsSampler` or `MinSepSampler`."
            )
        q = float(self.sampling_probability)
        if self.max_batch_size is None or self.max_batch_size > self.num_examples:
            once = mechanism if q == 1.0 else da.PoissonSampledDpEvent(q, mechanism)
        elif isinstance(mechanism, da.GaussianDpEvent):
            multiplier = float(mechanism.noise_multiplier)
            # of both neighbours, the one with an example more: where everybody fits, that one may be the first who does not
            once = da.TruncatedSubsampledGaussianDpEvent(self.num_examples + 1, q, self.max_batch_size, multiplier)
        else:
            raise ValueError(
                f"Truncated Poisson sampling can be accounted for with Gaussian noise only; got {type(mechanism).__name__}. Leave "
                "`max_batch_size` out."
            )
        return da.SelfComposedDpEvent(once, steps)
