"""From a DP event to the distribution of its privacy loss."""

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..events import composed, parts
from ._allocation import allocation_scale, random_allocation
from ._correlated_bins import bins_scale, mixture_of_bins
from ._distributions import (
    Aim,
    LossDistribution,
    LossPmf,
    from_dp_accounting,
    gaussian_scale,
    laplace_epsilon,
    laplace_scale,
    mixture,
    nothing,
    poisson_gaussian,
    poisson_gaussian_replaced,
    poisson_laplace,
)
from ._fixed_size import fixed_size_gaussian, fixed_size_scale
from ._mixtures import mixture_gaussian, mixture_scale
from ._monte_carlo import min_sep_distribution, samples_for

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_POINTS = 100  # of the grid, in a standard deviation of one step's loss
_FEW = 16  # steps up to which a finer grid costs little
_LARGEST = 2**18  # points of the grid of one step
_WIDEST = 2.0**-6  # of the grid on which the losses of foreign events are measured

_MSG_PRESENCE = (
    "{name} can be accounted for only where one unit is added, removed or emptied: the pair of distributions that dominates it is known for "
    "`adjacency='add_or_remove_one'` and `'replace_special'`, not for {adjacency!r}."
)
MSG_FIXED_SIZE = (
    "Sampling of a fixed size can be accounted for with `adjacency='replace_one'` or `'replace_special'`: the batches of everybody depend on how "
    "many examples there are, so none can be added or removed."
)


def relation(adjacency: str) -> Any:
    """`dp_accounting`'s name for an adjacency."""
    from dp_accounting import NeighboringRelation

    return NeighboringRelation[adjacency.upper()]


def pure_epsilon(event: Any, adjacency: str) -> float:
    """The epsilon of pure differential privacy of a strict event, whatever its delta; infinite where it has none."""
    return math.fsum(count * _pure(part, adjacency) for part, count in parts(event))


def _pure(event: Any, adjacency: str) -> float:
    import dp_accounting as da

    is_replaced = adjacency == "replace_one"
    match event:
        case da.LaplaceDpEvent():
            # what is replaced moves a sum twice as far
            return laplace_epsilon(event.noise_multiplier / (2 if is_replaced else 1))
        case da.PoissonSampledDpEvent(event=da.LaplaceDpEvent(noise_multiplier=b)) if not is_replaced:
            return laplace_epsilon(b, event.sampling_probability)
        case da.dp_event.DiscreteLaplaceDpEvent() if not is_replaced:
            return event.noise_parameter * event.sensitivity * (1 + 1e-15)
        case da.RandomizedResponseDpEvent() if is_replaced:
            return math.log1p((1 - event.noise_parameter) * event.num_buckets / event.noise_parameter) * (1 + 1e-15)
    return math.inf


def surrogate(event: Any) -> Any:
    """An event without simulation that costs about as much, from which guesses are made of where to look."""
    import dp_accounting as da

    from .. import events

    def one(event: Any, count: int) -> list[Any]:
        match event:
            case events.CoupledDpEvent():
                return [da.SelfComposedDpEvent(surrogate(event.event), count)]
            case events.MinSepSampledDpEvent():
                share, turns = _turns(event)
                gaussian = da.GaussianDpEvent(event.noise_multiplier)
                once = da.PoissonSampledDpEvent(share, gaussian) if share < 1 else gaussian
                return [da.SelfComposedDpEvent(once, count * turns)]
        return [da.SelfComposedDpEvent(event, count)]

    found = [e for part, count in parts(event) for e in one(part, count)]
    return composed(parts(da.ComposedDpEvent(found)))


def _turns(event: Any) -> tuple[float, int]:
    """In how many turns, and with what probability in each, b-min-sep sampling takes a unit, about."""
    p, separation = event.sampling_probability, event.min_separation
    return separation * p / (1 + (separation - 1) * p), -(-event.steps // separation)


def distribution_of(
    event: "DpEvent",
    adjacency: str,
    interval: float | None = None,
    aim: float | None = None,
    coarser: int = 1,
    samples: int | None = None,
) -> LossDistribution:
    r"""The pessimistic privacy loss of a strict `event`; raises `ValueError` where none is known.

    **Arguments:**

    - `interval`: width of the grid of all losses, instead of a hundredth of each one's standard deviation.
    - `aim`: the delta that questions will be about, whose digits must survive composition.
    - `coarser`: a factor on the width of the grid, for guesses.
    - `samples`: how many are drawn of what is simulated; by default enough for a delta of 1e-4.
    """
    pairs = parts(composed(parts(event)))
    width = lambda part, count: interval or coarser * _width(part, count, adjacency)
    leaves = [(_one(part, adjacency, width(part, count), samples), count) for part, count in pairs]
    if any(leaf.remove.infinity >= 1 for leaf, _ in leaves):
        return _infinite(interval or _WIDEST)
    where = _aim(leaves, aim)
    total = None
    # the finest grids first: every one is widened once
    for leaf, count in sorted(leaves, key=lambda pair: pair[0].remove.interval):
        run = leaf.self_compose(count, where)
        total = run if total is None else total.compose(run, where)
    return nothing(interval or _WIDEST) if total is None else total


def _aim(leaves: list[tuple[LossDistribution, int]], delta: float | None) -> Aim:
    r"""The tilt under which Chernoff's bound on the tail, $e^{K(\theta) - \theta K'(\theta)}$, is `delta`."""
    count = sum(count for _, count in leaves)
    if delta is None or not delta > 0:
        return Aim()
    tail = min(1e-15, 1e-6 * delta)
    # a single transform keeps about this much
    if len(leaves) == count == 1 or 1e-11 * count < 1e-6 * delta:
        return Aim(0.0, tail)

    def bound(order: float) -> float:
        total = 0.0
        for leaf, count in leaves:
            moment, mean = leaf.remove.log_moment(order)
            total += count * (moment - order * mean)
        return total

    low, high = 0.0, 1e-6
    while bound(high) > math.log(delta) and high < 1e12:
        low, high = high, 4 * high
    for _ in range(6):  # roughly is enough
        middle = math.sqrt(low * high) if low else high / 2
        low, high = (middle, high) if bound(middle) > math.log(delta) else (low, middle)
    return Aim(high, tail)


def _width(event: Any, count: int, adjacency: str) -> float:
    """The width of the grid for so many of one event; of what is coupled, that of what it is coupled to."""
    from ..events import CoupledDpEvent

    if isinstance(event, CoupledDpEvent):
        return min((_width(part, count * times, adjacency) for part, times in parts(event.event)), default=_WIDEST)
    return interval_of(event, adjacency) / (4 if count <= _FEW else 1)


@functools.lru_cache(maxsize=512)
def interval_of(event: Any, adjacency: str) -> float:
    """The width of the grid for the losses of one event: a power of two, so that all grids fit each other."""
    scale = _scale(event, adjacency)
    if scale is None:
        return _measured_interval(event, adjacency)
    spread, extent = scale
    return _power_of_two(max(spread / _POINTS, extent / _LARGEST))


def _power_of_two(width: float) -> float:
    return 2.0 ** math.floor(math.log2(width)) if 0 < width < math.inf else _WIDEST


def _scale(event: Any, adjacency: str) -> tuple[float, float] | None:
    """Standard deviation and extent of the losses of an event, by formula; None where it must be measured."""
    import dp_accounting as da

    from .. import events

    is_replaced = adjacency == "replace_one"
    match event:
        case da.GaussianDpEvent():
            return gaussian_scale(event.noise_multiplier / (2 if is_replaced else 1), 1.0, False)
        case da.PoissonSampledDpEvent(event=da.GaussianDpEvent(noise_multiplier=multiplier)):
            return gaussian_scale(multiplier, event.sampling_probability, is_replaced)
        case da.LaplaceDpEvent():
            return laplace_scale(event.noise_multiplier / (2 if is_replaced else 1), 1.0)
        case da.PoissonSampledDpEvent(event=da.LaplaceDpEvent(noise_multiplier=b)):
            return laplace_scale(b, event.sampling_probability)
        case da.dp_event.MixtureOfGaussiansDpEvent():
            return mixture_scale(event.standard_deviation, *_mixture(event))
        case da.TruncatedSubsampledGaussianDpEvent():
            q, multiplier = event.sampling_probability, event.noise_multiplier
            spread, extent = gaussian_scale(multiplier, q, is_replaced)
            for size in _sizes(event):
                cut, kept = _cut(event, size)
                if cut > 0:
                    wide, reach = gaussian_scale(multiplier / 2, kept, adjacency != "add_or_remove_one")
                    spread, extent = max(spread, math.hypot(spread, math.sqrt(cut) * wide)), max(extent, reach)
            return spread, extent
        case events.RandomAllocationDpEvent():
            return allocation_scale(event.noise_multiplier, event.bins)
        case events.GaussianMixtureOfBinsDpEvent():
            return bins_scale(event.noise_multiplier, event.gram)
        case events.MinSepSampledDpEvent():
            share, turns = _turns(event)
            spread, extent = gaussian_scale(event.noise_multiplier, share, False)
            return spread * math.sqrt(turns), min(extent * turns, 2048.0)
        case events.FixedSizeSampledGaussianDpEvent():
            return fixed_size_scale(event.num_examples, event.batch_size, event.noise_multiplier, event.replace)
    return None


def _measured_interval(event: Any, adjacency: str) -> float:
    """The width of the grid for an event without a formula: finer until it resolves what it measures."""
    interval = _WIDEST
    while interval > 1e-9:
        found = _one(event, adjacency, interval)
        spread = min(found.remove.standard_deviation, found.add.standard_deviation)
        # dp_accounting's grids are dense
        if interval * 20 <= spread or not spread > 0 or len(found.remove.mass) > 5e4:
            break
        interval /= 4
    return interval


@functools.lru_cache(maxsize=32)
def _one(event: Any, adjacency: str, interval: float, samples: int | None = None) -> LossDistribution:
    import dp_accounting as da

    from .. import events

    is_replaced = adjacency == "replace_one"
    match event:
        case da.NonPrivateDpEvent():
            return _infinite(interval)
        case da.GaussianDpEvent():
            # a Gaussian's losses in either direction have one distribution
            return _symmetric(poisson_gaussian(event.noise_multiplier / (2 if is_replaced else 1), 1.0, interval))
        case da.PoissonSampledDpEvent(event=da.GaussianDpEvent(noise_multiplier=multiplier)):
            build = poisson_gaussian_replaced if is_replaced else poisson_gaussian
            return build(multiplier, event.sampling_probability, interval)
        case da.LaplaceDpEvent():
            return _symmetric(poisson_laplace(event.noise_multiplier / (2 if is_replaced else 1), 1.0, interval))
        case da.PoissonSampledDpEvent(event=da.LaplaceDpEvent(noise_multiplier=b)) if not is_replaced:
            return poisson_laplace(b, event.sampling_probability, interval)
        case da.dp_event.MixtureOfGaussiansDpEvent() if not is_replaced:
            return mixture_gaussian(event.standard_deviation, *_mixture(event), interval)
        case da.TruncatedSubsampledGaussianDpEvent():
            larger, smaller = (_truncated(event, size, adjacency, interval) for size in _sizes(event))
            return larger if smaller is larger else LossDistribution(larger.remove, larger.add, 0.0, smaller)
        case events.RandomAllocationDpEvent():
            _need_presence("Random allocation", adjacency)
            return random_allocation(event.noise_multiplier, event.bins, interval)
        case events.GaussianMixtureOfBinsDpEvent():
            _need_presence("Balls-in-bins sampling", adjacency)
            return mixture_of_bins(float(event.noise_multiplier), event.gram, interval)
        case events.FixedSizeSampledGaussianDpEvent():
            if adjacency == "add_or_remove_one":
                raise ValueError(MSG_FIXED_SIZE)
            return fixed_size_gaussian(
                event.num_examples, event.batch_size, event.noise_multiplier, event.replace, interval
            )
        case events.CoupledDpEvent():
            inner = distribution_of(event.event, adjacency, interval, samples=samples)
            failure = inner.coupling + event.failure_probability
            return LossDistribution(inner.remove, inner.add, failure, inner.other)
        case events.MinSepSampledDpEvent():
            return min_sep_distribution(event, adjacency, interval, samples or samples_for(1e-4))
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(relation(adjacency), value_discretization_interval=interval)
    if not accountant.supports(event):
        raise ValueError(
            f"No privacy loss distribution is known for {event} under `adjacency={adjacency!r}`. Another adjacency, `accountant='rdp'`, or "
            "Poisson sampling with Gaussian noise may be."
        )
    accountant.compose(event)
    return _infinite(interval) if accountant._contains_non_dp_event else from_dp_accounting(accountant._pld)


def _need_presence(name: str, adjacency: str) -> None:
    if adjacency == "replace_one":
        raise ValueError(_MSG_PRESENCE.format(name=name, adjacency=adjacency))


def _infinite(interval: float) -> LossDistribution:
    return _symmetric(LossDistribution(pmf := LossPmf(interval, 0, np.zeros(1), 1.0), pmf))


def _symmetric(distribution: LossDistribution) -> LossDistribution:
    return LossDistribution(distribution.remove, distribution.remove)


def _mixture(event: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ascending places and the logarithms of their weights."""
    places, index = np.unique(np.asarray(event.sensitivities, np.float64), return_inverse=True)
    weights = np.bincount(index, event.sampling_probs, len(places))
    return places[weights > 0], np.log(weights[weights > 0] / weights.sum())


def _sizes(event: Any) -> tuple[int, int]:
    """Sizes of the larger of two neighbouring data sets: that of the event, which counts who is added, and without."""
    return event.dataset_size, max(1, event.dataset_size - 1)


def _cut(event: Any, size: int) -> tuple[float, float]:
    """The probability that a batch is cut, given that the example was sampled, and that it is sampled and kept, given that it is cut."""
    from scipy.stats import binom

    most, q = event.truncated_batch_size, event.sampling_probability
    cut = float(binom.sf(most - 1, size - 1, q))
    if cut == 0:
        return 0.0, 0.0
    kept = float(binom.sf(most, size, q)) * most / cut / size
    # less than with the fewest others, even where both probabilities are too small for floats
    return cut, min(kept or 1.0, q * most / (most + 1))


def _truncated(event: Any, size: int, adjacency: str, interval: float) -> LossDistribution:
    r"""Poisson sampling where the batch is not cut, and where it is, at worst an exchange for another example at twice the distance.

    `size` examples are in the larger of two neighbouring data sets. Of the others $Y \sim \text{Bin}(\text{size} - 1, q)$ are sampled, whatever
    the example does. If $Y$ is less than the largest batch $B$, nothing is cut. Otherwise the batch is full with or without the example. With
    probability $q B / (Y + 1)$ the example is in it, in the place of another, drawn at random: a mixture of $N(0)$ and $N(u)$, $|u| \le 2$, against
    $N(0)$ if the example is not there at all, and against a mixture of $N(0)$ and $N(w)$, $|w| \le 2$, if it is another. More examples are cut
    more often, but keep a place less often: neither of two sizes dominates the other, so that both must be asked.

    ??? cite "Reference"

        Ganesh et al., *Scaling up DP-SGD*, 2025 (arXiv:2508.15089).
    """
    import dp_accounting as da

    sampled = lambda q, sigma: (
        da.GaussianDpEvent(sigma) if q == 1 else da.PoissonSampledDpEvent(q, da.GaussianDpEvent(sigma))
    )
    multiplier = event.noise_multiplier
    uncut = _one(sampled(event.sampling_probability, multiplier), adjacency, interval)
    cut, kept = _cut(event, size)
    if cut == 0:
        return uncut
    moved = "add_or_remove_one" if adjacency == "add_or_remove_one" else "replace_one"
    wide = _one(sampled(kept, multiplier / 2), moved, interval)
    return LossDistribution(
        mixture([(1 - cut, uncut.remove), (cut, wide.remove)]), mixture([(1 - cut, uncut.add), (cut, wide.add)])
    )
