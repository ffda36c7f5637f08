"""The interface of samplers: who is in a batch."""

import abc
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


def check_step(sampler: AbstractSampler, step: int) -> None:
    """Raises if `step` is not one of the sampler's: batches past the plan's end have no budget."""
    if not 0 <= step < sampler.steps:
        raise ValueError(
            f"`{type(sampler).__name__}` has {sampler.steps} steps, numbered from 0; batch {step} was asked for, which no budget covers."
        )
