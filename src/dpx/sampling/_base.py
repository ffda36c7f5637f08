"""The interface of samplers: who is in a batch."""

import abc
import math
from typing import TYPE_CHECKING

import equinox as eqx
import numpy as np

from .._types import Participation

if TYPE_CHECKING:
    from dp_accounting import DpEvent


class AbstractSampler(eqx.Module):
    """Chooses, on the host, which examples take part in each step.

    Batch `t` is a pure function of `(seed, t)`: to resume is to go on counting. Seeds are secrets.
    """

    num_examples: eqx.AbstractVar[int]
    batch_size: eqx.AbstractVar[int]
    """The EXPECTED number of examples in a batch, which is public and normalises the sum."""
    steps: eqx.AbstractVar[int]

    @property
    @abc.abstractmethod
    def participation(self) -> Participation:
        """In which of the steps one example may take part, whatever the randomness."""

    @property
    @abc.abstractmethod
    def participation_per_event(self) -> Participation:
        """The same within one of the events that `event` composes: the noise's scale must cover these participations, and the accountant
        covers their repetition."""

    @property
    @abc.abstractmethod
    def adjacencies(self) -> tuple[str, ...]:
        """The adjacencies under which `event` is right. Adding and removing is among them only if nobody's batches depend on how many
        examples there are."""

    @property
    @abc.abstractmethod
    def physical_batch_size(self) -> int:
        """The fixed size to which batches are padded, exceeded at most once in 10^9 batches."""

    @property
    @abc.abstractmethod
    def assumption(self) -> str:
        """What the privacy statement says about sampling, as a sentence."""

    @abc.abstractmethod
    def indices(self, seed: int, step: int) -> np.ndarray:
        """The examples of batch number `step` (from 0), as sorted int64, each at most once."""

    @abc.abstractmethod
    def event(self, mechanism: "DpEvent", bands: int | None, steps: int) -> "DpEvent":
        """The DP event of `steps` steps, each a `mechanism` (which accounts for the sum of a whole batch) on a sample.

        `bands` is the number of bands of the noise's strategy matrix: 1 if steps are independent, None if it is dense. Raises
        `ValueError`, naming what can be accounted for, where no bound is known.
        """


ADJACENCIES = ("add_or_remove_one", "replace_one", "replace_special")

_LOG_TAIL = math.log(1e9)


def binomial_ceiling(mean: int) -> int:
    """A multiple of 8 that a binomial variable of that mean exceeds at most once in 10^9 draws, by Bernstein's inequality."""
    margin = _LOG_TAIL / 3 + math.sqrt(_LOG_TAIL**2 / 9 + 2 * mean * _LOG_TAIL)
    return 8 * math.ceil((mean + margin) / 8)


def check_batch_size(name: str, batch_size: int, num_examples: int) -> None:
    """Raises if a batch is larger than the data set."""
    if batch_size > num_examples:
        raise ValueError(
            f"`{name}(batch_size=...)` must be at most `num_examples`; got {batch_size} of {num_examples}."
        )


def check_step(sampler: AbstractSampler, step: int) -> None:
    """Raises if `step` is not one of the sampler's: batches past the plan's end have no budget."""
    if not 0 <= step < sampler.steps:
        raise ValueError(
            f"`{type(sampler).__name__}` has {sampler.steps} steps, numbered from 0; batch {step} was asked for, which no budget covers."
        )
