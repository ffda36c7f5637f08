"""DP events that `dp_accounting` does not have.

Importing this file imports `dp_accounting`, which takes two seconds: do it inside the function that needs it.
"""

import attr
from dp_accounting import DpEvent


@attr.s(frozen=True, slots=True, auto_attribs=True)
class RandomAllocationDpEvent(DpEvent):
    """Every unit takes part in exactly one of `bins` Gaussian mechanisms, picked uniformly; the outputs of all are released.

    `noise_multiplier` is that of one mechanism.
    """

    noise_multiplier: float
    bins: int


@attr.s(frozen=True, slots=True, auto_attribs=True)
class FixedSizeSampledGaussianDpEvent(DpEvent):
    """A Gaussian mechanism on a sample of exactly `batch_size` of `num_examples`, drawn uniformly, with or without replacement.

    `noise_multiplier` is standard deviation over the norm bound of one contribution.
    """

    num_examples: int
    batch_size: int
    noise_multiplier: float
    replace: bool


@attr.s(frozen=True, slots=True, auto_attribs=True)
class GaussianMixtureOfBinsDpEvent(DpEvent):
    r"""$\frac1b \sum_j N(m_j, \sigma^2 I)$ against $N(0, \sigma^2 I)$: balls-in-bins sampling of a matrix mechanism.

    `gram` holds the inner products $\langle m_i, m_j \rangle$ as a tuple of `b` tuples; its largest diagonal entry is 1.
    """

    noise_multiplier: float
    gram: tuple[tuple[float, ...], ...]


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


@attr.s(frozen=True, slots=True, auto_attribs=True)
class CoupledDpEvent(DpEvent):
    r"""A mechanism that differs from `event` with probability at most `failure_probability` $\tau$, on every data set.

    If `event` is $(\varepsilon, \delta)$-DP then this is $(\varepsilon, \delta + \tau (1 + e^\varepsilon))$-DP.
    """

    event: DpEvent
    failure_probability: float
