"""Random allocation: every example draws the steps that it takes part in."""

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
from ._groups import random_group

if TYPE_CHECKING:
    from dp_accounting import DpEvent


class RandomAllocationSampler(AbstractSampler):
    r"""Every example takes part in `participations` of the `steps` steps: in one, drawn uniformly, of every block of equal length.

    The blocks have $L$ = `steps / participations` steps, and draws are independent of each other. Unlike under Poisson sampling everybody
    takes part equally often. Drawing one step of every block rather than any `participations` of all steps is what the accounting covers;
    Feldman and Shenfeld bound the latter by the former.

    !!! success "Guarantee"

        The batch is a pure function of `(seed, step)`; examples draw independently, so that nobody's batches depend on who else is there;
        time and memory are proportional to the batch.

    **Arguments:**

    - `num_examples`: size of the data set.
    - `batch_size`: EXPECTED batch size, `num_examples * participations / steps` rounded.
    - `steps`: number of batches.
    - `participations`: how often every example takes part; divides `steps`.

    ??? cite "Reference"

        Feldman and Shenfeld, *Privacy amplification by random allocation*, 2025 (arXiv:2502.08202).
    """

    num_examples: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    participations: int = eqx.field(static=True)
    unit: ClassVar[str] = "example"

    def __init__(self, num_examples: Any, batch_size: Any, steps: Any, participations: Any = 1):
        name = "RandomAllocationSampler"
        self.num_examples = positive_int(f"{name}(num_examples=...)", num_examples)
        self.batch_size = positive_int(f"{name}(batch_size=...)", batch_size)
        self.steps = positive_int(f"{name}(steps=...)", steps)
        self.participations = positive_int(f"{name}(participations=...)", participations)
        check_batch_size(name, self.batch_size, self.num_examples)
        if self.steps % self.participations:
            near = self.steps - self.steps % self.participations
            raise ValueError(
                f"`{name}(participations=...)` must divide `steps`, so that blocks have equal length; got {self.participations} of {self.steps}. "
                f"Take {near + self.participations} steps{f', or {near}' if near else ''}."
            )
        wanted = max(1, round(self.batch_size * self.steps / self.num_examples))
        expected = self.num_examples * self.participations / self.steps
        remedy = f"With batches of {self.batch_size}, {self.steps} steps are about {wanted} participations."
        check_expected_size(name, self.batch_size, expected, remedy)

    @property
    def block(self) -> int:
        """Number of steps of which every example takes part in one."""
        return self.steps // self.participations

    @property
    def num_rows(self) -> int:
        return self.num_examples

    @property
    def participation(self) -> Participation:
        return Participation(1, self.participations)

    @property
    def participation_per_event(self) -> Participation:
        return Participation(1, 1)

    @property
    def adjacencies(self) -> tuple[str, ...]:
        return PRESENCE

    @property
    def physical_batch_size(self) -> int:
        return min(self.num_examples, binomial_ceiling(math.ceil(self.num_examples / self.block)))

    @property
    def assumption(self) -> str:
        return (
            f"in every block of {self.block} steps every example takes part in exactly one, drawn uniformly and independently (random "
            f"allocation of {self.participations} participations; {self.num_examples / self.block:.6g} of {self.num_examples} expected in a batch)"
        )

    def indices(self, seed: int, step: int) -> np.ndarray:
        check_step(self, step)
        number, place = divmod(step, self.block)
        return random_group(self.num_examples, self.block, place, seed, number)

    def event(
        self, mechanism: "DpEvent", bands: int | None, steps: int, strategy: AbstractStrategy | None = None
    ) -> "DpEvent":
        import dp_accounting as da

        from ..events import RandomAllocationDpEvent

        multiplier = gaussian_multiplier("RandomAllocationSampler", mechanism)
        if bands != 1:
            raise ValueError(
                "Random allocation can be accounted for with independent noise only. Use `IndependentGaussian`, or `BallsInBinsSampler`, in which "
                "every example keeps its place, with correlated noise."
            )
        once = mechanism if self.block == 1 else RandomAllocationDpEvent(multiplier, self.block)
        # a block that was begun counts as a whole one: what was published of it is a part of what it would have been
        return da.SelfComposedDpEvent(once, math.ceil(steps / self.block))
