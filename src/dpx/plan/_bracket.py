r"""What an attacker reaches in a run of a plan: its parts, attacked as they are, rather than the event that covers them from above.

The example that differs has a contribution as long as its clipping allows, in one direction; others have none, or what
`dpx.accounting` says of the event. Where order or groups are no secret of the plan (its statement claims no amplification by
them), the attacker knows them, and the example is where it does most harm.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import accounting
from ..accounting import Adjacency
from ..mechanism import Mechanism
from ..metrics import Count, Histogram, Mean, Quantile, Sum
from ..noise import CorrelatedGaussian, DiscreteGaussian, IndependentGaussian, Laplace
from ..sampling import (
    AbstractSampler,
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedSizeSampler,
    MinSepSampler,
    PoissonSampler,
    RandomAllocationSampler,
    ShuffleSampler,
    UserSampler,
)
from ..strategies import BandedInverse, BandedToeplitz, BufferedToeplitz, Identity, SquareRootToeplitz

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_MOST_STEPS = 2048  # of a strategy matrix that is written out
_MOST_BINS = 1024
_OTHERS = (Count, Histogram, Mean, Quantile, Sum)


class Attacked(NamedTuple):
    """What is attacked.

    **Arguments:**

    - `sampler`, `mechanism`: the parts of a plan.
    - `event`: what its accountant goes by.
    - `adjacency`: the neighbours that the attacker tells apart.
    """

    sampler: AbstractSampler
    mechanism: Mechanism
    event: "DpEvent"
    adjacency: Adjacency

    @property
    def base(self) -> AbstractSampler:
        """Who draws: of users, the sampler of users."""
        return self.sampler.base if isinstance(self.sampler, UserSampler) else self.sampler


def lower_epsilon(run: Attacked, delta: float, upper: float) -> float:
    """The lower bound of `PrivacyPlan.epsilon_bracket`."""
    if isinstance(run.mechanism.noise, DiscreteGaussian):
        return _integer_epsilon(run, delta, upper)
    event = attained_event(run)
    if event is None:
        return 0.0
    return accounting.attained_epsilon(event, delta, adjacency=run.adjacency, upper=upper)


def attained_event(run: Attacked) -> "DpEvent | None":
    """An event of which the run is at least as revealing; None if none is known."""
    sampler, noise, steps = run.base, run.mechanism.noise, run.sampler.steps
    if isinstance(noise, Laplace):
        return run.event if isinstance(sampler, PoissonSampler | CyclicPoissonSampler | ShuffleSampler) else None
    if isinstance(noise, CorrelatedGaussian) and not isinstance(noise.strategy, Identity):
        return _correlated_event(run, noise)
    if not isinstance(noise, IndependentGaussian | CorrelatedGaussian):
        return None
    mechanism = noise.event((run.mechanism.noise_multiplier**-2 + _metric_cost(run)) ** -0.5)
    if isinstance(sampler, BallsInBinsSampler) and sampler.bins > 1 and steps % sampler.bins:
        return _unequal_bins(mechanism, steps, sampler.bins)
    known = (
        PoissonSampler
        | CyclicPoissonSampler
        | RandomAllocationSampler
        | FixedSizeSampler
        | ShuffleSampler
        | BallsInBinsSampler
        | MinSepSampler
    )
    return sampler.event(mechanism, 1, steps) if isinstance(sampler, known) else None


def _metric_cost(run: Attacked) -> float:
    """Inverse variance of the metrics that one participation moves by as much as their noise is measured against.

    An example whose loss and gradient are beyond all bounds does so when it comes or goes. To replace it moves some by less than twice that, and
    what a function of the user's reads is not ours to choose: those are left out, which is to look away.
    """
    if run.adjacency == "replace_one":
        return 0.0
    metrics = [m for m in run.mechanism.metrics.values() if isinstance(m, _OTHERS) and not callable(m.values)]
    return sum((float(m.noise_multiplier) ** -2 for m in metrics), 0.0)


def _unequal_bins(mechanism: Any, steps: int, bins: int) -> Any:
    """Bins that come once less than others: their example is moved less far."""
    from dp_accounting import SelfComposedDpEvent

    from ..events import GaussianMixtureOfBinsDpEvent, RandomAllocationDpEvent

    times = math.ceil(steps / bins)
    if bins > _MOST_BINS:  # the last cycle is not looked at
        return RandomAllocationDpEvent(mechanism.noise_multiplier / math.sqrt(times - 1), bins) if times > 1 else None
    often = np.where(np.arange(bins) < steps - (times - 1) * bins, 1.0, (times - 1) / times)
    gram = tuple(map(tuple, np.diag(often).tolist()))
    event = GaussianMixtureOfBinsDpEvent(mechanism.noise_multiplier / math.sqrt(times), gram)
    return SelfComposedDpEvent(event, 1)


def _correlated_event(run: Attacked, noise: CorrelatedGaussian) -> Any:
    import dp_accounting as da

    sampler: Any = run.base
    mechanism, strategy, steps = run.mechanism, noise.strategy, run.sampler.steps
    separation, most = sampler.participation_per_event
    if isinstance(sampler, BallsInBinsSampler | MinSepSampler) and noise.bands != 1:
        return run.event  # made of the very columns
    sensitivity = strategy.sensitivity(steps, separation, most)
    sides = sum((float(s) ** -2 for s in mechanism.clipping.side_noise_multipliers), 0.0)
    own = mechanism.noise_multiplier**-2 - mechanism.queries_per_event * sides
    if own <= 0:
        return None

    def gaussian(shift: float, times: int) -> Any:
        """What is seen of a gradient that takes part so often and moves the correlated sums by `shift` together."""
        # the strategy's own arithmetic is float64's
        precision = own * (shift / sensitivity * (1 - 1e-9)) ** 2 + times * (sides + _metric_cost(run))
        return da.GaussianDpEvent(precision**-0.5)

    if isinstance(sampler, ShuffleSampler):
        found = [(_shift(strategy, steps, pattern), len(pattern)) for pattern in _patterns(sampler, steps)]
        reached = [gaussian(shift, times) for shift, times in found if shift is not None]
        return min(reached, key=lambda event: event.noise_multiplier, default=None)
    if isinstance(sampler, CyclicPoissonSampler):
        turns, length, q = range(0, steps, sampler.cycle_length), steps, float(sampler.sampling_probability)
        norms = [_shift(strategy, length, [t]) for t in turns]
        if any(norm is None for norm in norms):
            return None
        once = [gaussian(norm, 1) for norm in norms if norm]
        return da.ComposedDpEvent([e if q == 1 else da.PoissonSampledDpEvent(q, e) for e in once])
    return None


def _patterns(sampler: ShuffleSampler, steps: int) -> list[list[int]]:
    """In which steps some of the places in the order take part."""
    epoch = sampler.num_examples // sampler.batch_size
    if sampler.reshuffle:
        firsts = range(0, steps, epoch)
        ends = [[begin + (epoch - 1 if i == 0 else 0) for i, begin in enumerate(firsts)]]
        same = [[begin + place for begin in firsts] for place in sorted({0, epoch // 2, epoch - 1})]
        return [[t for t in pattern if t < steps] for pattern in (*ends, *same)]
    places = range(0, sampler.num_examples, max(1, sampler.num_examples // 16))
    found = []
    for place in (*places, (steps * sampler.batch_size - 1) % sampler.num_examples):
        # batch t takes the places from t * batch_size on, around
        taken = range(place, steps * sampler.batch_size, sampler.num_examples)
        found.append([number // sampler.batch_size for number in taken])
    return [pattern for pattern in found if pattern]


def _shift(strategy: Any, steps: int, pattern: list[int]) -> float | None:
    """How far gradients of norm 1 in these steps move the sums: all alike, or all at right angles."""
    columns = _columns(strategy, steps, pattern)
    if columns is None:
        return None
    return max(float(np.linalg.norm(sum(columns))), math.sqrt(sum(float(np.dot(c, c)) for c in columns)))


def _columns(strategy: Any, steps: int, indices: list[int]) -> list[np.ndarray] | None:
    if steps <= _MOST_STEPS:
        matrix = _matrix(strategy, steps)
        return [matrix[:, i] for i in indices]
    if isinstance(strategy, BandedToeplitz):
        first = np.asarray(strategy.coefficients)
    elif isinstance(strategy, SquareRootToeplitz | BufferedToeplitz | BandedInverse):
        first = strategy.coefficients(steps)
    else:
        return None
    found = []
    for i in indices:
        column = np.zeros(steps)
        column[i : i + len(first)] = first[: steps - i]
        found.append(column)
    return found


def _matrix(strategy: Any, steps: int) -> np.ndarray:
    return np.asarray(strategy.materialize(steps), np.float64)


def _integer_epsilon(run: Attacked, delta: float, upper: float) -> float:
    """One parameter, whose gradient is clipped to half a step less than the radius and a little, and rounded to one step less."""
    noise = run.mechanism.noise
    assert isinstance(noise, DiscreteGaussian)
    sampler, steps = run.base, run.sampler.steps
    q = 1.0
    match sampler:
        case PoissonSampler() if sampler.max_batch_size is None:
            q, count = sampler.sampling_probability, steps
        case CyclicPoissonSampler():
            q, count = sampler.sampling_probability, math.ceil(steps / sampler.cycle_length)
        case ShuffleSampler():
            epoch = sampler.num_examples // sampler.batch_size
            times = steps / epoch if sampler.reshuffle else steps * sampler.batch_size / sampler.num_examples
            count = math.ceil(times)
        case _:
            return 0.0
    scale, shift = run.mechanism.noise_multiplier * noise.radius, noise.radius - 1
    if shift < 1 or run.adjacency == "replace_one":
        return 0.0
    return accounting.attained_discrete_gaussian(scale, shift, float(q), count, delta, upper)
