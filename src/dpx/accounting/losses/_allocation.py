r"""Random allocation: a deterministic upper bound on the privacy loss of the mean of many log-normal likelihood ratios.

The ratio is $S = \frac1t \sum_j e^{u_j - a}$ with $u_j \sim N(0, 2a)$ independent under $Q$, and $2a = 1 / \sigma^2$. The deltas of both
directions, $E_Q[(S - e^\varepsilon)_+]$ for removing and $E_Q[(1 - e^\varepsilon S)_+]$ for adding, are expectations of convex functions of $S$.
So every replacement of a ratio by a spread of the same mean is an upper bound on both at once, and stays one when ratios are averaged: values
are kept on a grid, and one that falls between two points is split between them. Ratios near one (much noise) live on an even grid, where a sum
is a power of a Fourier transform; others on a geometric one.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from ...events import RandomAllocationDpEvent
from .._rules import loss_rule, unchanged
from ._allocation_lower import directions, fits, largest_output, mean_ratio, with_absent
from ._connect import log_normal_mass
from ._distribution import LossDistribution
from ._gaussian import poisson_gaussian
from ._log_normal import log_variance, mean_by_halves, single_masses
from ._pair import NOTHING, Attacks
from ._pmf import LossPmf, transformed

_REACH = 8.8  # standard deviations that a normal variable exceeds with probability 7e-19
_DUST = 1e-19
_POINTS = 40  # per standard deviation of the logarithm of the ratio
_MOST_POINTS = 2_000
_MUCH = 2.0  # noise from which on ratios are near enough to one for an even grid
_MOST_TRANSFORMED = 2**18
_ROUNDING = 2e-13  # of a ratio


class _Ratio(NamedTuple):
    """A spread of a likelihood ratio: masses under Q at exp(step * (lowest + i)) and at 0, and the part of the mean that sits at infinity."""

    step: float
    lowest: int
    mass: np.ndarray
    zero: float
    infinite: float


def random_allocation(noise_multiplier: float, bins: int, interval: float) -> LossDistribution:
    r"""$\frac1t \sum_j N(e_j, \sigma^2 I)$ against $N(0, \sigma^2 I)$, pessimistic, in both directions.

    ??? cite "Reference"

        Feldman and Shenfeld, *Privacy amplification by random allocation*, 2025 (arXiv:2502.08202), for the dominating pair; Chua et al.,
        *Balls-and-bins sampling for DP-SGD*, 2025 (arXiv:2412.16802).
    """
    if 0.5 / noise_multiplier**2 + _REACH / noise_multiplier > 600:
        return poisson_gaussian(noise_multiplier, 1.0, interval)  # ratios overflow; knowing the bin is an upper bound
    if noise_multiplier >= _MUCH:
        return _on_grid(*_even_mean(noise_multiplier, bins), interval)
    # guesses come with wide grids, and a guess may do with fewer points
    is_guess = interval > allocation_scale(noise_multiplier, bins)[0] / 40
    ratio = _mean_of(noise_multiplier, bins, _POINTS // 4 if is_guess else _POINTS)
    losses = (np.arange(len(ratio.mass)) + ratio.lowest) * ratio.step
    return _on_grid(losses, ratio.mass, ratio.zero, ratio.infinite, interval)


def allocation_scale(noise_multiplier: float, bins: int) -> tuple[float, float]:
    """Standard deviation and extent of the privacy loss, for its grid."""
    sigma = noise_multiplier
    spread = math.sqrt(log_variance(sigma, bins))
    single = 1 / sigma**2 + 2 * _REACH / sigma
    return min(spread, 1 / sigma), min(single, 60 * spread + 2 * math.log1p(math.exp(min(single, 700.0)) / bins))


@functools.lru_cache(maxsize=32)
def _even_mean(noise_multiplier: float, bins: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Losses, their masses under Q, and what sits at ratio 0 and at infinity, by one power of a transform."""
    sigma = noise_multiplier
    deviation = math.sqrt(math.expm1(sigma**-2))
    step = deviation / max(24.0, min(512.0, _MOST_TRANSFORMED / (30 * math.sqrt(bins))))
    shift, reach = 0.5 / sigma**2, 11.0
    lowest = math.floor(math.expm1(-shift - reach / sigma) / step)
    highest = math.ceil(math.expm1(reach / sigma - shift) / step)
    offsets = np.arange(lowest, highest + 1) * step  # of the ratio from one
    with np.errstate(divide="ignore", invalid="ignore"):
        edges = np.log1p(np.maximum(offsets, -1.0)) * sigma  # as standard deviations, but for the shift
        log_q, log_p = (log_normal_mass(edges + sign * shift * sigma) for sign in (1.0, -1.0))
        q = np.exp(log_q)
        up = np.clip(np.nan_to_num((np.expm1(log_p - log_q)[1:-1] - offsets[:-1]) / step), 0.0, 1.0)
    mass = np.zeros(len(offsets))
    mass[1:] += up * q[1:-1]
    mass[:-1] += (1 - up) * q[1:-1]
    mass[0] += q[0]
    mass[-1] += q[-1]
    pmf = LossPmf(step, lowest, mass, 0.0)
    first, last = pmf._window(bins, _DUST**1.2)
    size = last - first + 1
    # both tails keep their digits under a tilt of their own
    order = 6 / (deviation * math.sqrt(bins))
    total = np.minimum.reduce([transformed([(pmf, bins)], first, size, tilt) for tilt in (0.0, order, -order)])
    ratios = 1 + (np.arange(first, last + 1) + bins * lowest) * (step / bins)
    positive = ratios > 0
    zero = float(total[~positive].sum()) + _DUST
    # outside of the single ratios' grid, and of the window, where the mean counts
    return np.log(ratios[positive]), total[positive], zero, _DUST + bins * float(np.exp(log_p[-1]))


@functools.lru_cache(maxsize=32)
def _mean_of(noise_multiplier: float, bins: int, points: int) -> _Ratio:
    """The mean of `bins` independent ratios."""
    sigma = noise_multiplier
    points = points if bins > 8 else 6 * points
    most = _MOST_POINTS * points // _POINTS
    averaged = lambda *halves: _trim(_average(*halves))
    return mean_by_halves(sigma, bins, points, most, lambda step: _single(sigma, step), averaged)


def _single(sigma: float, step: float) -> _Ratio:
    """One log-normal ratio of mean one."""
    lowest, losses, log_q, log_p = single_masses(sigma, step, _REACH)
    q = np.exp(log_q)
    with np.errstate(invalid="ignore", under="ignore"):
        up = np.nan_to_num(-np.expm1(log_q[1:-1] + losses[:-1] - log_p[1:-1]) / math.expm1(step), nan=0.0)
        up = np.clip(
            up * np.exp(log_p[1:-1] - log_q[1:-1] - losses[:-1]), 0.0, 1.0
        )  # share of Q's mass for the upper end
    mass = np.zeros(len(losses))
    mass[1:] += up * q[1:-1]
    mass[:-1] += (1 - up) * q[1:-1]
    bottom = min(float(q[0]), math.exp(log_p[0] - losses[0]))
    mass[0] += bottom
    mass[-1] += q[-1]
    excess = math.exp(log_p[-1]) - math.exp(log_q[-1] + losses[-1])
    return _trim(_Ratio(step, lowest, mass, float(q[0]) - bottom, max(0.0, excess)))


def _average(a: _Ratio, weight_a: int, b: _Ratio, weight_b: int, finer: int) -> _Ratio:
    """The weighted average of two independent ratios on grids of one step, on a grid `finer` times as fine."""
    step = a.step / finer
    alpha, beta = weight_a / (weight_a + weight_b), weight_b / (weight_a + weight_b)
    size_a, size_b = len(a.mass), len(b.mass)
    lowest = finer * a.lowest + math.floor(math.log(alpha) / step) - 1
    lowest = min(lowest, finer * b.lowest + math.floor(math.log(beta) / step) - 1)
    highest = finer * max(a.lowest + size_a, b.lowest + size_b) + 1
    mass = np.zeros(highest - lowest + 1)

    def places(log_factors: np.ndarray) -> tuple[list[int], list[float]]:
        """By how many points of the fine grid each factor moves, and the share that goes one further so that the mean stays."""
        positions = log_factors / step
        whole = np.floor(positions)
        up = np.clip(np.expm1((positions - whole) * step) / math.expm1(step), 0.0, 1.0)
        return whole.astype(np.int64).tolist(), up.tolist()

    def put(values: np.ndarray, first: int, whole: int, up: float) -> None:
        """Adds masses at exp(a.step * (first + i)) times a factor."""
        begin = finer * first + whole - lowest
        end = begin + finer * (len(values) - 1) + 1
        further = up * values
        mass[begin:end:finer] += values - further
        mass[begin + 1 : end + 1 : finer] += further

    is_same = a is b
    offset = b.lowest - a.lowest
    shifts = range(0 if is_same else 1 - size_a, size_b)
    steps, ups = places(np.logaddexp(math.log(alpha), math.log(beta) + (offset + np.array(shifts)) * a.step))
    double = 2 * a.mass if is_same else a.mass
    for shift, whole, up in zip(shifts, steps, ups, strict=True):
        # pairs (i, i + shift), whose average is a's value times one factor
        begin, end = max(0, -shift), min(size_a, size_b - shift)
        left = double if shift else a.mass
        put(left[begin:end] * b.mass[begin + shift : end + shift], a.lowest + begin, whole, up)
    (alone_a, alone_b), (up_a, up_b) = places(np.log([alpha, beta]))
    put(a.mass * b.zero, a.lowest, alone_a, up_a)
    put(b.mass * a.zero, b.lowest, alone_b, up_b)
    return _Ratio(step, lowest, mass, a.zero * b.zero, alpha * a.infinite + beta * b.infinite)


def _trim(ratio: _Ratio) -> _Ratio:
    """Without tails of next to no mass: the lower one goes to 0 and the first value that is kept, the upper one to the last and to infinity."""
    values = np.exp((np.arange(len(ratio.mass)) + ratio.lowest) * ratio.step)
    first = int(np.searchsorted(np.cumsum(ratio.mass), _DUST))
    last = len(values) - int(np.searchsorted(np.cumsum((ratio.mass * values)[::-1]), _DUST))
    mass = ratio.mass[first:last].copy()
    below, above = ratio.mass[:first], ratio.mass[last:]
    lifted = float(np.dot(below, values[:first])) / values[first]
    mass[0] += lifted
    mass[-1] += float(above.sum())
    zero = ratio.zero + float(below.sum()) - lifted
    infinite = ratio.infinite + float(np.dot(above, values[last:] - values[last - 1]))
    # what rounding lost of total and mean goes where it counts most
    zero, infinite = max(zero, 1 - float(mass.sum())), max(infinite, 1 - float(np.dot(mass, values[first:last])))
    return _Ratio(ratio.step, ratio.lowest + first, mass, zero, infinite)


def _on_grid(losses: np.ndarray, masses: np.ndarray, zero: float, infinite: float, interval: float) -> LossDistribution:
    """The privacy losses of the two directions, each value split once more between multiples of `interval`."""
    directions = []
    for sign in (1.0, -1.0):
        shifted = losses + sign * _ROUNDING
        whole = np.floor(shifted / interval).astype(np.int64)
        up = np.clip(np.expm1(shifted - whole * interval) / math.expm1(interval), 0.0, 1.0)
        lowest, highest = int(whole[0]), int(whole[-1]) + 1
        mass = np.bincount(whole - lowest, (1 - up) * masses, highest - lowest + 1)
        mass += np.bincount(whole + 1 - lowest, up * masses, highest - lowest + 1)
        directions.append((lowest, highest, mass))
    (lowest, highest, mass), (_, _, other) = directions
    removed = mass * np.exp(np.arange(lowest, highest + 1) * interval)
    # what rounding lost of the total counts as infinite
    remove = LossPmf(interval, lowest, removed, max(infinite, 1 - float(removed.sum())))
    return LossDistribution(
        remove, LossPmf(interval, -directions[1][1], other[::-1].copy(), max(zero, 1 - float(other.sum())))
    )


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


def _scale(event: Any, adjacency: str) -> tuple[float, float]:
    del adjacency
    return allocation_scale(event.noise_multiplier, event.bins)


def _attacks(event: Any, adjacency: str) -> Attacks:
    del adjacency
    return allocation(event.noise_multiplier, event.bins)


@loss_rule(
    RandomAllocationDpEvent,
    scale=_scale,
    attacks=_attacks,
    only_presence="Random allocation",
    with_side_queries=unchanged,
)
def _loss(event: Any, adjacency: str, interval: float) -> LossDistribution:
    del adjacency
    return random_allocation(event.noise_multiplier, event.bins, interval)
