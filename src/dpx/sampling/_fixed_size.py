"""Batches of one fixed size, drawn afresh at every step."""

from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import numpy as np

from .._checks import flag, positive_int
from .._types import Participation
from ..random import Domain, generator
from ..strategies import AbstractStrategy
from ._base import ADJACENCIES, AbstractSampler, check_batch_size, check_step, gaussian_multiplier

if TYPE_CHECKING:
    from dp_accounting import DpEvent


class FixedSizeSampler(AbstractSampler):
    r"""Every batch is `batch_size` examples drawn uniformly, independently of other batches, without or with replacement.

    No batch is padded or cut. The price is that the size of the data is public, since everybody's chance depends on it, and that replacing an
    example exchanges two contributions instead of adding one.

    !!! success "Guarantee"

        The batch is a pure function of `(seed, step)`, has exactly `batch_size` entries, and costs time and memory in proportion to them.
        Without replacement they are distinct.

    **Arguments:**

    - `num_examples`: size of the data set, which is public.
    - `batch_size`: number of examples in every batch.
    - `steps`: number of batches.
    - `replace`: whether draws within a batch are with replacement. One example may then appear, and contribute, several times in a batch.

    ??? cite "Reference"

        Wang, Balle and Kasiviswanathan, *Subsampled Rényi differential privacy and analytical moments accountant*, AISTATS 2019.
    """

    num_examples: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    replace: bool = eqx.field(static=True)
    unit: ClassVar[str] = "example"

    def __init__(self, num_examples: Any, batch_size: Any, steps: Any, replace: bool = False):
        name = "FixedSizeSampler"
        self.num_examples = positive_int(f"{name}(num_examples=...)", num_examples)
        self.batch_size = positive_int(f"{name}(batch_size=...)", batch_size)
        self.steps = positive_int(f"{name}(steps=...)", steps)
        self.replace = flag(f"{name}(replace=...)", replace)
        check_batch_size(name, self.batch_size, self.num_examples)

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
        return ADJACENCIES[1:]

    @property
    def physical_batch_size(self) -> int:
        return self.batch_size

    @property
    def assumption(self) -> str:
        return (
            f"every batch is exactly {self.batch_size} of {self.num_examples} examples, drawn uniformly "
            f"{'with' if self.replace else 'without'} replacement and independently of other batches"
        )

    def indices(self, seed: int, step: int) -> np.ndarray:
        check_step(self, step)
        rng = generator(seed, step, Domain.FIXED_SIZE)
        return np.sort(rng.choice(self.num_examples, self.batch_size, replace=self.replace, shuffle=False))

    def event(
        self, mechanism: "DpEvent", bands: int | None, steps: int, strategy: AbstractStrategy | None = None
    ) -> "DpEvent":
        import dp_accounting as da

        from ..events import FixedSizeSampledGaussianDpEvent

        multiplier = gaussian_multiplier("FixedSizeSampler", mechanism)
        if bands != 1:
            raise ValueError(
                "Nobody can account for correlated noise when batches of fixed size are drawn afresh. Use `IndependentGaussian`, or "
                "`CyclicPoissonSampler`, `BallsInBinsSampler` or `MinSepSampler` with a banded strategy, or `ShuffleSampler`."
            )
        if self.batch_size == self.num_examples and not self.replace:
            return da.SelfComposedDpEvent(mechanism, steps)
        once = FixedSizeSampledGaussianDpEvent(self.num_examples, self.batch_size, multiplier, self.replace)
        return da.SelfComposedDpEvent(once, steps)
