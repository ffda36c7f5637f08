r"""Pairs of distributions that an attacker can reach: for every event, data sets and gradients that are neighbours, and what is then seen.

Each is an actual run of the mechanism that an event describes, so that what tells its two outputs apart is a lower bound on what the event costs,
and several events, attacked one after another with the same example, are independent given the data set. Where nothing else is said,
the example that differs has a gradient of the clip norm in one direction, and all others have none; noise in other directions says nothing.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..events import parts
from ._allocation_lower import average, directions, fits, largest_output, mean_ratio, times_shared, with_absent
from ._distributions import log_normal_mass
from ._optimistic import AbstractPair, FixedPair, GaussianMixturePair, LaplaceMixturePair

Attacks = tuple[tuple[AbstractPair, ...], tuple[AbstractPair, ...]]
"""Where the example is in the first data set and, beyond that, in the second; of each, pairs to choose from."""

NOTHING: Attacks = ((), ())
_CELLS = 20_000
_MOST_COMPONENTS = 300
_CONTINUOUS = 5e4  # the scale above which integers are as good as real numbers
_NEGLIGIBLE = 1e-60  # a probability that no factor e^epsilon makes matter


def attacks(event: Any, adjacency: str) -> Attacks:
    """The pairs that are known to be reached by one event that composes no others; none where none is known."""
    import dp_accounting as da

    from .. import events

    sign = -1.0 if adjacency == "replace_one" else 0.0
    match event:
        case da.GaussianDpEvent(noise_multiplier=multiplier) if multiplier > 0:
            return sampled_gaussian(multiplier, 1.0, sign)
        case da.dp_event.ZCDpEvent(rho=rho) if rho > 0:
            # whatever its mechanism is, one of that many Gaussian ones would do
            return sampled_gaussian((2 * rho) ** -0.5, 1.0, sign)
        case da.LaplaceDpEvent(noise_multiplier=multiplier) if multiplier > 0 and not sign:
            return _both(LaplaceMixturePair(multiplier, 1.0))
        case da.PoissonSampledDpEvent() if event.sampling_probability > 0:
            return _sampled(event, adjacency, sign)
        case da.TruncatedSubsampledGaussianDpEvent() if event.noise_multiplier > 0 and event.sampling_probability > 0:
            return _truncated(event, adjacency)
        case da.SampledWithoutReplacementDpEvent(event=da.GaussianDpEvent(noise_multiplier=multiplier)) if (
            multiplier > 0 and adjacency != "add_or_remove_one"
        ):
            size, sample = event.source_dataset_size, event.sample_size
            return _fixed_size(size, min(sample, size), multiplier, False, adjacency)
        case events.FixedSizeSampledGaussianDpEvent() if adjacency != "add_or_remove_one":
            return _fixed_size(event.num_examples, event.batch_size, event.noise_multiplier, event.replace, adjacency)
        case events.RandomAllocationDpEvent() if not sign:
            return allocation(event.noise_multiplier, event.bins)
        case events.GaussianMixtureOfBinsDpEvent() if not sign:
            return _bins(event.noise_multiplier, event.gram)
    return NOTHING


def _both(pair: AbstractPair) -> Attacks:
    return (pair,), (pair.swapped,)


def sampled_gaussian(multiplier: float, probability: float, other: float) -> Attacks:
    """The example takes part with that probability; it adds 1, and in the other data set `other`."""
    absent = ((1 - probability, 0.0),) if probability < 1 else ()
    first = (*absent, (probability, 1.0))
    second = (*absent, (probability, other)) if other else ((1.0, 0.0),)
    return _both(GaussianMixturePair(multiplier, first, second))


def sampled_discrete_gaussian(scale: float, shift: int, probability: float) -> FixedPair:
    r"""Integers $k$ of mass proportional to $e^{-k^2 / 2 s^2}$, and the same `shift` further, where the example takes part."""
    reach = math.ceil(12 * scale)
    if scale > _CONTINUOUS:
        # f'' is (z^2 - 1) f / s^2, so the sum over a cell between half-integers is its integral up to a relative (z^2 + 1) / 24 s^2 or so
        edges = np.unique(np.round(np.linspace(-reach, shift + reach, _CELLS))) + 0.5
        error = 1.1 * ((13 + shift / scale) ** 2 + 1) / (24 * scale**2)
        zero, one = (log_normal_mass((edges - mean) / scale)[1:-1] for mean in (0, shift))
        with np.errstate(divide="ignore"):
            absent = math.log1p(-probability) if probability < 1 else -np.inf
        return FixedPair(np.logaddexp(absent + zero, math.log(probability) + one) - error, zero + error)
    numbers = np.arange(-reach, shift + reach + 1, dtype=np.float64)
    # the sum over all integers: beyond twelve standard deviations lies less than rounding
    total = math.log(float(np.exp(-0.5 * (np.arange(-reach, reach + 1) / scale) ** 2).sum()))
    zero = -0.5 * (numbers / scale) ** 2 - total
    one = -0.5 * ((numbers - shift) / scale) ** 2 - total
    merged = max(1, len(numbers) // _CELLS)
    if merged > 1:
        starts = np.arange(0, len(numbers), merged)
        zero, one = np.logaddexp.reduceat(zero, starts), np.logaddexp.reduceat(one, starts)
    with np.errstate(divide="ignore"):
        absent = math.log1p(-probability) if probability < 1 else -np.inf
        return FixedPair(np.logaddexp(absent + zero, math.log(probability) + one), zero)


def _sampled(event: Any, adjacency: str, sign: float) -> Attacks:
    """Poisson sampling of Gaussians on one sample, together or alone, of Laplace noise, or of what costs as much as a Gaussian."""
    import dp_accounting as da

    probability = event.sampling_probability
    precision, others = 0.0, 0
    for part, count in parts(event.event):
        match part:
            case da.GaussianDpEvent() if part.noise_multiplier > 0:
                precision += count * part.noise_multiplier**-2
            case da.dp_event.ZCDpEvent():
                precision += count * 2 * part.rho
            case _:
                others += count
    if precision > 0:  # what else the sample is used for is not attacked
        return sampled_gaussian(precision**-0.5 * (1 + 1e-14), probability, sign)
    only = parts(event.event)
    if others == 1 and isinstance(only[0][0], da.LaplaceDpEvent) and only[0][0].noise_multiplier > 0 and not sign:
        return _both(LaplaceMixturePair(only[0][0].noise_multiplier, probability))
    return attacks(event.event, adjacency) if probability == 1 and others == 1 else NOTHING


def _truncated(event: Any, adjacency: str) -> Attacks:
    r"""Poisson batches of which at most $B$ are kept, drawn uniformly.

    Either all others have no gradient, so that all that matters is how often the example is kept; or theirs is opposite to its own, so that where
    a batch is cut it takes one of their places, at twice the distance, while how many they are blurs what is seen.
    """
    from scipy.stats import binom

    size, q, most, sigma = (
        event.dataset_size,
        event.sampling_probability,
        event.truncated_batch_size,
        event.noise_multiplier,
    )
    others = np.arange(size)
    weights = binom.pmf(others, size - 1, q)
    kept = float(np.dot(weights, np.minimum(1.0, most / (others + 1)))) * (1 - 1e-9)
    sign = -1.0 if adjacency == "replace_one" else 0.0
    plain = sampled_gaussian(sigma, min(1.0, q * kept), sign)
    likely = weights > _NEGLIGIBLE
    if min(int(likely.sum()), most) > _MOST_COMPONENTS:
        return plain

    def sums(value: float | None) -> tuple[tuple[float, float], ...]:
        """What is seen of a data set in which the example adds `value`, or is not there."""
        found: dict[float, float] = {}

        def put(weight: float, mean: float) -> None:
            found[mean] = found.get(mean, 0.0) + weight

        for k, weight in zip(others[likely].tolist(), weights[likely].tolist(), strict=True):
            sampled = q if value is not None else 0.0
            put(weight * (1 - sampled), -float(min(k, most)))
            if value is None:
                continue
            stays = min(1.0, most / (k + 1))
            put(weight * q * stays, value - min(k, most - 1))
            put(weight * q * (1 - stays), -float(most))
        return tuple((w, m) for m, w in sorted(found.items()) if w > 0)

    other = {"add_or_remove_one": None, "replace_one": -1.0, "replace_special": 0.0}[adjacency]
    cut = GaussianMixturePair(sigma, sums(1.0), sums(other))
    return (*plain[0], cut), (*plain[1], cut.swapped)


def _fixed_size(size: int, sample: int, multiplier: float, replace: bool, adjacency: str) -> Attacks:
    """Others without a gradient, or, where the example is replaced by any other, all with one like the other's."""
    if replace:
        from scipy.stats import binom

        times = np.arange(min(sample, 200) + 1)
        chances = binom.pmf(times, sample, 1 / size)
        first = tuple((float(w), float(k)) for k, w in zip(times, chances, strict=True) if w > _NEGLIGIBLE)
    else:
        first = ((1 - sample / size, 0.0), (sample / size, 1.0))
    far = tuple((w, 2 * m) for w, m in first)
    if adjacency == "replace_special":
        alone = GaussianMixturePair(multiplier, first, ((1.0, 0.0),))
        taken = GaussianMixturePair(
            multiplier, far, first
        )  # an example that is emptied takes the place of one that is not
        return (alone, alone.swapped, taken), (alone.swapped, alone, taken.swapped)
    second = tuple((w, -m) for w, m in first)
    opposite = GaussianMixturePair(multiplier, first, second)
    alike = GaussianMixturePair(multiplier, far, ((1.0, 0.0),))
    return (opposite, alike, alike.swapped), (opposite.swapped, alike.swapped, alike)


def allocation(multiplier: float, bins: int, present: float = 1.0) -> Attacks:
    """One of `bins` outputs, drawn uniformly, has the example, or, with probability 1 - `present`, none."""
    if not fits(multiplier):
        return ((largest_output(multiplier, bins),), ()) if present == 1 else NOTHING
    found = []
    for is_removed in (True, False):
        ratio = mean_ratio(multiplier, bins, is_removed)
        ratio = with_absent(ratio, present, is_removed) if present < 1 else ratio
        found.append((directions(ratio, is_removed),))
    return found[0], found[1]


@functools.lru_cache(maxsize=32)
def _bins(multiplier: float, gram: tuple[tuple[float, ...], ...]) -> Attacks:
    r"""Kahane's inequality from below: deltas fall where entries of the covariance do.

    The bins are dealt into blocks of neighbours. Of each block all inner products are lowered to the least, $\rho$, those between blocks to
    nothing, and all squared norms to the least, $d$. What is left is the mean over independent blocks of a ratio of variance $\rho$ that the block
    shares and the mean of independent ones of variance $d - \rho$.
    """
    matrix = np.array(gram, np.float64)
    bins = len(matrix)
    norms = np.diag(matrix)
    least, most = float(norms.min()), float(norms.max())
    if not most > 0 or not np.all(matrix >= 0) or not fits(multiplier / math.sqrt(most)):
        return NOTHING
    removed, added = [], []
    for size in sorted({1, 2, 4, 8, 16, 32, bins} & set(range(1, bins + 1))) if least > 0 else ():
        blocks = bins // size
        shared = min(
            float(matrix[i : i + size, i : i + size][~np.eye(size, dtype=bool)].min(initial=least))
            for i in range(0, blocks * size, size)
        )
        shared = 0.0 if size == 1 else min(shared, least)
        if size > 1 and shared < 1e-3:
            continue
        pairs = _blocks(multiplier, size, blocks, shared, least, blocks * size / bins)
        removed.append(pairs[0])
        added.append(pairs[1])
    if least < most:
        # or those of less than the largest norm count as if the unit were absent
        largest = norms >= (1 - 1e-12) * most
        number = int(largest.sum())
        pairs = _blocks(multiplier, 1, number, 0.0, most * (1 - 1e-12), number / bins)
        removed.append(pairs[0])
        added.append(pairs[1])
    return tuple(removed), tuple(added)


def _blocks(
    multiplier: float, size: int, blocks: int, shared: float, norm: float, present: float
) -> tuple[FixedPair, FixedPair]:
    found = []
    own = norm - shared
    for is_removed in (True, False):
        if shared == 0:
            ratio = mean_ratio(multiplier / math.sqrt(norm), size * blocks, is_removed)
        else:
            # of a block that shares all, a tenth of a per cent is left, so that the grid of its own part is not infinitely fine
            inner = mean_ratio(multiplier / math.sqrt(max(own, 1e-3 * norm)), size, is_removed)
            rest = min(shared, norm - max(own, 1e-3 * norm))
            ratio = times_shared(inner, multiplier / math.sqrt(rest), is_removed)
            ratio = repeated(lambda a, m, b, n, low=is_removed: average(a, m, b, n, 1, low), ratio, blocks)
        if present < 1:
            ratio = with_absent(ratio, present, is_removed)
        found.append(directions(ratio, is_removed))
    return found[0], found[1]


def repeated(mean: Callable[..., Any], ratio: Any, count: int) -> Any:
    """The mean of `count` independent copies, by halves."""
    if count == 1:
        return ratio
    half = repeated(mean, ratio, count // 2)
    other = half if count % 2 == 0 else mean(half, count // 2, ratio, 1)
    return mean(half, count // 2, other, count - count // 2)
