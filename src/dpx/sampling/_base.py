"""The interface of samplers: who is in a batch."""

import abc
import math
from typing import TYPE_CHECKING, Any

import equinox as eqx
import numpy as np

from .._checks import integer, positive_int
from .._types import Adjacency, Participation
from ..strategies import AbstractStrategy

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
    unit: eqx.AbstractClassVar[str]
    """What is sampled, clipped and protected: an `"example"`, or a `"user"` with all of theirs."""

    @property
    @abc.abstractmethod
    def num_rows(self) -> int:
        """Number of rows of the data: `num_examples`, or more where a unit has several."""

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
    def adjacencies(self) -> tuple[Adjacency, ...]:
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
        """The examples of batch number `step` (from 0), as sorted int64, each at most once unless the scheme draws with replacement.

        Where a unit has several rows of the data, the shape is `(units, rows)`, filled up with -1 where a unit has fewer.
        """

    @abc.abstractmethod
    def event(
        self, mechanism: "DpEvent", bands: int | None, steps: int, strategy: AbstractStrategy | None = None
    ) -> "DpEvent":
        """The DP event of the first `steps` steps, each a `mechanism` (which accounts for the sum of a whole batch) on a sample.

        `bands` is the number of bands of the noise's strategy matrix: 1 if steps are independent, None if it is dense. `strategy` is that
        matrix, where the noise is correlated; its scale covers `participation_per_event` in all of the sampler's steps. Raises
        `ValueError`, naming what can be accounted for, where no bound is known.
        """


ADJACENCIES: tuple[Adjacency, ...] = ("add_or_remove_one", "replace_one", "replace_special")
PRESENCE: tuple[Adjacency, ...] = ("add_or_remove_one", "replace_special")
"""Where a unit is there or contributes nothing: what the dominating pairs of random allocation and its relatives are about."""

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


def largest_batch(name: str, batch_size: int, max_batch_size: Any, truncated_batch_size: Any) -> int | None:
    """The size to which batches are cut, under whichever of its two names it was given."""
    if max_batch_size is not None and truncated_batch_size is not None:
        raise ValueError(
            f"`{name}(max_batch_size=..., truncated_batch_size=...)`: both name the size to which batches are cut. Give one of them."
        )
    given = "max_batch_size" if truncated_batch_size is None else "truncated_batch_size"
    size = max_batch_size if truncated_batch_size is None else truncated_batch_size
    if size is None:
        return None
    size = positive_int(f"{name}({given}=...)", size)
    if size < batch_size:
        raise ValueError(
            f"`{name}({given}=...)` must be at least `batch_size`, or most batches are cut; got {size} for batches of {batch_size} on average."
        )
    return size


def check_step(sampler: AbstractSampler, step: int) -> None:
    """Raises if `step` is not one of the sampler's: batches past the plan's end have no budget."""
    step = integer(f"{type(sampler).__name__}.indices(step=...)", step)
    if not 0 <= step < sampler.steps:
        raise ValueError(
            f"`{type(sampler).__name__}` has {sampler.steps} steps, numbered from 0; batch {step} was asked for, which no budget covers."
        )


def check_expected_size(name: str, batch_size: int, expected: float, remedy: str) -> None:
    """Raises unless `batch_size`, by which sums are divided, is the expected size of a batch, rounded."""
    if abs(batch_size - expected) > 0.5:
        raise ValueError(
            f"`{name}(batch_size=...)` must be the expected size of a batch, {expected:.6g}, rounded; got {batch_size}. {remedy}"
        )


def gaussian_multiplier(name: str, mechanism: "DpEvent") -> float:
    """The noise multiplier of Gaussian noise; raises for any other."""
    import dp_accounting as da

    if not isinstance(mechanism, da.GaussianDpEvent):
        raise ValueError(
            f"`{name}` can be accounted for with Gaussian noise only; got {type(mechanism).__name__}. Use `IndependentGaussian`, or "
            "`PoissonSampler` or `ShuffleSampler`."
        )
    return float(mechanism.noise_multiplier)
