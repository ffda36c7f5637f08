"""Passes over the data in a random order: what most training code does, and what no amplification is proven for."""

import math
from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import numpy as np

from .._checks import flag, positive_int
from .._types import Adjacency, Integer, Participation
from ..strategies import AbstractStrategy
from ._base import ADJACENCIES, AbstractSampler, check_batch_size, check_step
from ._permutation import permuted

if TYPE_CHECKING:
    from dp_accounting import DpEvent


class ShuffleSampler(AbstractSampler):
    r"""Goes through the data in a random order, `batch_size` examples at a time, again and again in the same order.

    Every batch has exactly `batch_size` examples, and an example comes back after `num_examples / batch_size` steps, rounded down or up: that
    separation is what correlated noise over several epochs lives on. With `reshuffle` every epoch has an order of its own, and examples may
    come back after one step; a last batch that the epoch does not fill is then left out.

    No privacy amplification is claimed for the random order, since none is proven that would be worth having.

    !!! success "Guarantee"

        The batch is a pure function of `(seed, step)`, and costs time and memory in proportion to its size.

    **Arguments:**

    - `num_examples`: size of the data set, which is public.
    - `batch_size`: number of examples in every batch.
    - `steps`: number of batches.
    - `reshuffle`: whether every epoch has a new order.

    ??? cite "Reference"

        Chua et al., *How private are DP-SGD implementations?*, ICML 2024, on what shuffling does not give.
    """

    num_examples: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    reshuffle: bool = eqx.field(static=True)
    unit: ClassVar[str] = "example"

    def __init__(self, num_examples: Integer, batch_size: Integer, steps: Integer, reshuffle: bool = False):
        self.num_examples = positive_int("ShuffleSampler(num_examples=...)", num_examples)
        self.batch_size = positive_int("ShuffleSampler(batch_size=...)", batch_size)
        self.steps = positive_int("ShuffleSampler(steps=...)", steps)
        check_batch_size("ShuffleSampler", self.batch_size, self.num_examples)
        self.reshuffle = flag("ShuffleSampler(reshuffle=...)", reshuffle)

    @property
    def num_rows(self) -> int:
        return self.num_examples

    @property
    def participation(self) -> Participation:
        batches = self.num_examples // self.batch_size
        if self.reshuffle:
            return Participation(1, math.ceil(self.steps / batches))
        return Participation(batches, math.ceil(self.steps * self.batch_size / self.num_examples))

    @property
    def participation_per_event(self) -> Participation:
        return self.participation

    @property
    def adjacencies(self) -> tuple[Adjacency, ...]:
        return ADJACENCIES[1:]

    @property
    def physical_batch_size(self) -> int:
        return self.batch_size

    @property
    def assumption(self) -> str:
        order = "a new random order every epoch" if self.reshuffle else "one fixed order"
        return (
            f"batches of exactly {self.batch_size} of {self.num_examples} examples, in {order}; every example takes part at most "
            f"{self.participation.max_participations} times, and no amplification by sampling is claimed"
        )

    def indices(self, seed: int, step: int) -> np.ndarray:
        check_step(self, step)
        rows = np.arange(self.batch_size, dtype=np.int64)
        if self.reshuffle:
            epoch, batch = divmod(step, self.num_examples // self.batch_size)
            return np.sort(permuted(batch * self.batch_size + rows, self.num_examples, seed, epoch))
        positions = (step * self.batch_size + rows) % self.num_examples
        return np.sort(permuted(positions, self.num_examples, seed))

    def event(
        self, mechanism: "DpEvent", bands: int | None, steps: int, strategy: AbstractStrategy | None = None
    ) -> "DpEvent":
        import dp_accounting as da

        if bands != 1:
            return mechanism  # the noise is scaled to the participations: the run is one Gaussian
        batches = self.num_examples // self.batch_size
        times = steps / batches if self.reshuffle else steps * self.batch_size / self.num_examples
        return da.SelfComposedDpEvent(mechanism, math.ceil(times))
