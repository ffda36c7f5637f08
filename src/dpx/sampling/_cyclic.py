"""Cyclic Poisson sampling: an example flips coins in one step of every cycle."""

import functools
import math
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import numpy as np

from .._checks import choice, positive_int
from .._round import round_up
from .._types import Participation
from ..random import Domain, generator
from ..strategies import AbstractStrategy
from ._base import ADJACENCIES, AbstractSampler, binomial_ceiling, check_batch_size, check_step
from ._permutation import permuted

if TYPE_CHECKING:
    from dp_accounting import DpEvent


class CyclicPoissonSampler(AbstractSampler):
    r"""Deals the examples into `cycle_length` groups; step $t$ takes each of group $t \bmod$ `cycle_length` with probability $q$.

    $q$ = `batch_size` $\cdot$ `cycle_length` / `num_examples`. Two participations of an example are at least `cycle_length` steps apart, so
    noise with up to as many bands is amplified by sampling: a run is $\lceil \text{steps} / \text{cycle\_length} \rceil$ Poisson-sampled
    Gaussians.

    !!! success "Guarantee"

        The batch is a pure function of `(seed, step)`, and of distribution exactly as stated; its cost is proportional to its size.

    **Arguments:**

    - `num_examples`: size of the data set.
    - `batch_size`: EXPECTED batch size.
    - `steps`: number of batches.
    - `cycle_length`: number of groups, at most `num_examples / batch_size`.
    - `partition`: `"independent"` (every example draws its group, so that examples can be added and removed) or `"equal"` (groups of equal
        size, which makes the size of the data public).

    ??? cite "Reference"

        Choquette-Choo et al., *(Amplified) banded matrix factorization: a unified approach to private training*, NeurIPS 2023, theorem 4.
    """

    num_examples: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    cycle_length: int = eqx.field(static=True)
    partition: str = eqx.field(static=True)
    unit: ClassVar[str] = "example"

    def __init__(
        self, num_examples: Any, batch_size: Any, steps: Any, cycle_length: Any, partition: str = "independent"
    ):
        name = "CyclicPoissonSampler"
        self.num_examples = positive_int(f"{name}(num_examples=...)", num_examples)
        self.batch_size = positive_int(f"{name}(batch_size=...)", batch_size)
        self.steps = positive_int(f"{name}(steps=...)", steps)
        self.cycle_length = positive_int(f"{name}(cycle_length=...)", cycle_length)
        check_batch_size(name, self.batch_size, self.num_examples)
        if self.batch_size * self.cycle_length > self.num_examples:
            raise ValueError(
                f"`{name}(cycle_length=...)` must be at most `num_examples / batch_size` = {self.num_examples // self.batch_size}, or a group has "
                f"fewer examples than a batch; got {self.cycle_length}."
            )
        self.partition = choice(f"{name}(partition=...)", partition, ("independent", "equal"))

    @property
    def sampling_probability(self) -> float:
        """The probability with which an example is in a batch of its group."""
        return self.batch_size * self.cycle_length / self.num_examples

    @property
    def num_rows(self) -> int:
        return self.num_examples

    @property
    def participation(self) -> Participation:
        return Participation(self.cycle_length, math.ceil(self.steps / self.cycle_length))

    @property
    def participation_per_event(self) -> Participation:
        return Participation(self.cycle_length, 1)

    @property
    def adjacencies(self) -> tuple[str, ...]:
        return ADJACENCIES if self.partition == "independent" else ADJACENCIES[1:]

    @property
    def physical_batch_size(self) -> int:
        return min(self.num_examples, binomial_ceiling(self.batch_size))

    @property
    def assumption(self) -> str:
        how = "drawn at random" if self.partition == "independent" else "of equal size"
        return (
            f"the data is dealt into {self.cycle_length} groups {how}, and batch t takes every example of group t mod {self.cycle_length} "
            f"independently with probability {round_up(self.sampling_probability)} (cyclic Poisson sampling; {self.batch_size} of "
            f"{self.num_examples} expected)"
        )

    def indices(self, seed: int, step: int) -> np.ndarray:
        check_step(self, step)
        edges = _edges(self.num_examples, self.cycle_length, self.partition, seed)
        group = step % self.cycle_length
        begin, size = edges[group], edges[group + 1] - edges[group]
        rng = generator(seed, step, Domain.CYCLIC_COINS)
        taken = int(rng.binomial(size, self.sampling_probability)) if size else 0
        positions = begin + rng.choice(size, taken, replace=False, shuffle=False) if taken else np.zeros(0, np.int64)
        return np.sort(permuted(positions, self.num_examples, seed))

    def event(
        self, mechanism: "DpEvent", bands: int | None, steps: int, strategy: AbstractStrategy | None = None
    ) -> "DpEvent":
        import dp_accounting as da

        if bands is None or bands > self.cycle_length:
            raise ValueError(
                f"Under `CyclicPoissonSampler(cycle_length={self.cycle_length})` noise can be amplified with at most that many bands; this strategy "
                f"has {'no bands' if bands is None else bands}. Use a banded strategy, a longer cycle, or `ShuffleSampler` without amplification."
            )
        q = float(self.sampling_probability)
        once = mechanism if q == 1.0 else da.PoissonSampledDpEvent(q, mechanism)
        return da.SelfComposedDpEvent(once, math.ceil(steps / self.cycle_length))


@functools.lru_cache(maxsize=4)
def _edges(num_examples: int, groups: int, partition: str, seed: int) -> tuple[int, ...]:
    """Where the groups begin in the permuted data. Multinomial sizes of a random order are independent draws of every example."""
    if partition == "equal":
        return tuple(num_examples * g // groups for g in range(groups + 1))
    sizes = generator(seed, 0, Domain.CYCLIC_GROUP_SIZES).multinomial(num_examples, [1 / groups] * groups)
    return (0, *np.cumsum(sizes).tolist())
