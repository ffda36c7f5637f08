"""DP events that `dp_accounting` does not have.

An event class may have two methods, which `canonical` and `reduced` call: `check()` raises `ValueError` if there is no such mechanism, and
`reduced()` gives an event that costs the same, without what is degenerate.

Importing this file imports `dp_accounting`, which takes two seconds: do it inside the function that needs it.
"""

import math

import attr
import numpy as np
from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent, NoOpDpEvent


def check(holds: bool, event: DpEvent, message: str) -> None:
    """Raises `ValueError` about `event` unless that holds."""
    if not holds:
        raise ValueError(f"`{event}` is no mechanism: {message}.")


def with_noise(event: DpEvent, noise: float) -> DpEvent:
    """A mechanism without noise is not private, and one with infinite noise says nothing."""
    if noise == math.inf:
        return NoOpDpEvent()
    return NonPrivateDpEvent() if noise == 0 else event


@attr.s(frozen=True, slots=True, auto_attribs=True)
class RandomAllocationDpEvent(DpEvent):
    """Every unit takes part in exactly one of `bins` Gaussian mechanisms, picked uniformly; the outputs of all are released.

    `noise_multiplier` is that of one mechanism.
    """

    noise_multiplier: float
    bins: int

    def check(self) -> None:
        check(self.bins >= 1, self, "`bins` must be at least 1")

    def reduced(self) -> DpEvent:
        gaussian = GaussianDpEvent(self.noise_multiplier)
        return with_noise(self if self.bins > 1 else gaussian, self.noise_multiplier)


@attr.s(frozen=True, slots=True, auto_attribs=True)
class FixedSizeSampledGaussianDpEvent(DpEvent):
    """A Gaussian mechanism on a sample of exactly `batch_size` of `num_examples`, drawn uniformly, with or without replacement.

    `noise_multiplier` is standard deviation over the norm bound of one contribution.
    """

    num_examples: int
    batch_size: int
    noise_multiplier: float
    replace: bool

    def check(self) -> None:
        check(self.num_examples >= 1, self, "`num_examples` must be at least 1")
        check(self.replace or self.batch_size <= self.num_examples, self, "a batch has at most all examples")

    def reduced(self) -> DpEvent:
        return NoOpDpEvent() if self.batch_size == 0 else with_noise(self, self.noise_multiplier)


@attr.s(frozen=True, slots=True, auto_attribs=True)
class GaussianMixtureOfBinsDpEvent(DpEvent):
    r"""$\frac1b \sum_j N(m_j, \sigma^2 I)$ against $N(0, \sigma^2 I)$: balls-in-bins sampling of a matrix mechanism.

    `gram` holds the inner products $\langle m_i, m_j \rangle$ as a tuple of `b` tuples; its largest diagonal entry is 1.
    """

    noise_multiplier: float
    gram: tuple[tuple[float, ...], ...]

    def check(self) -> None:
        gram = np.asarray(self.gram)
        is_square = gram.ndim == 2 and 0 < len(gram) == gram.shape[1]
        check(is_square and bool(np.all(np.isfinite(gram))), self, "`gram` must be square and finite")
        is_gram = bool(gram.max() <= gram.diagonal().max() * (1 + 1e-9))
        check(is_gram, self, "the largest inner product is on the diagonal")

    def reduced(self) -> DpEvent:
        return with_noise(self, self.noise_multiplier)


@attr.s(frozen=True, slots=True, auto_attribs=True)
class MinSepSampledDpEvent(DpEvent):
    r"""b-min-sep sampling of a banded matrix mechanism of `steps` steps.

    A unit that is not resting takes part with `sampling_probability` and then rests for `min_separation` - 1 steps. A participation at step
    $i$ adds column $i$ of the strategy matrix, whose entries below the diagonal are `coefficients` (non-negative, at most `min_separation` of
    them, of norm 1), to noise of standard deviation `noise_multiplier`. `is_warm`: rests are stationary from the first step on.
    `side_precision` is the sum of the inverse squared noise multipliers of further Gaussian queries of every batch, such as metrics.
    """

    noise_multiplier: float
    coefficients: tuple[float, ...]
    steps: int
    min_separation: int
    sampling_probability: float
    is_warm: bool
    side_precision: float = 0.0

    def check(self) -> None:
        check(0 < self.sampling_probability <= 1, self, "`sampling_probability` must be above 0 and at most 1")
        check(0 < len(self.coefficients) <= self.min_separation, self, "at most `min_separation` coefficients")

    def reduced(self) -> DpEvent:
        return self if self.steps else NoOpDpEvent()


@attr.s(frozen=True, slots=True, auto_attribs=True)
class CoupledDpEvent(DpEvent):
    r"""A mechanism that differs from `event` with probability at most `failure_probability` $\tau$, on every data set.

    If `event` is $(\varepsilon, \delta)$-DP then this is $(\varepsilon, \delta + \tau (1 + e^\varepsilon))$-DP.
    """

    event: DpEvent
    failure_probability: float

    def check(self) -> None:
        check(self.failure_probability <= 1, self, "`failure_probability` must be at most 1")
