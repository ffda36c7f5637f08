r"""Random allocation and its relatives from below: the mean of log-normal likelihood ratios, contracted to a grid instead of spread over it.

As in `_allocation` the ratio is $S = \frac1t \sum_j e^{u_j - a}$ under $Q$. Removing a unit has $\delta = E_Q[(S - e^\varepsilon)_+]$, which
grows in $S$ and in its spread, adding one $E_Q[(1 - e^\varepsilon S)_+]$, which falls in $S$ and grows in its spread. So masses that are
merged where two neighbours meet, at a point not above their mean (for removing; not below it for adding), bound delta from below, at every
level of the tree of averages; and so does dropping mass.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from ._connect import log_normal_mass
from ._log_normal import mean_by_halves, single_masses
from ._pair import FixedPair
from ._shares import up_shares

_REACH = 9.0
_DUST = 1e-20
_ROUNDING = 1e-11
_POINTS = 48  # per standard deviation of the logarithm of the ratio
_MOST_POINTS = 4_000
_LARGEST = 600.0  # logarithm of a ratio


class Ratio(NamedTuple):
    """A contraction of a likelihood ratio: masses under Q at exp(step * (lowest + i))."""

    step: float
    lowest: int
    mass: np.ndarray

    @property
    def losses(self) -> np.ndarray:
        """Logarithms of the ratio."""
        return (np.arange(len(self.mass)) + self.lowest) * self.step


def fits(noise_multiplier: float) -> bool:
    """Whether ratios of single bins stay within floating point."""
    return 0.5 / noise_multiplier**2 + _REACH / noise_multiplier < _LARGEST


def directions(ratio: Ratio, is_removed: bool) -> FixedPair:
    """The pair that tells the ratio's P from Q where a unit is removed, or Q from P where it is added."""
    kept = ratio.mass > 0
    log_q = np.log(ratio.mass[kept])
    log_p = log_q + ratio.losses[kept]
    # sums of thousands of terms, level upon level: whichever side is P gives way
    sign = 1.0 if is_removed else -1.0
    pair = FixedPair(log_p - sign * _ROUNDING, log_q + sign * _ROUNDING, ratio.step)
    return pair if is_removed else pair.swapped


@functools.lru_cache(maxsize=64)
def mean_ratio(noise_multiplier: float, bins: int, is_lower: bool) -> Ratio:
    """The mean of `bins` independent ratios."""
    sigma = noise_multiplier
    points = _POINTS if bins > 8 else 2 * _POINTS
    averaged = functools.partial(average, is_lower=is_lower)
    return mean_by_halves(sigma, bins, points, _MOST_POINTS, lambda step: single_ratio(sigma, step, is_lower), averaged)


def single_ratio(sigma: float, step: float, is_lower: bool) -> Ratio:
    """One log-normal ratio of mean one."""
    _, _, log_q, log_p = single_masses(sigma, step, _REACH)
    return moved((log_p - log_q)[1:-1], log_q[1:-1], step, is_lower)


def moved(losses: np.ndarray, log_q: np.ndarray, step: float, is_lower: bool) -> Ratio:
    """Masses at ascending losses, at most one between two points of the grid, contracted to the grid."""
    cells = np.floor(losses / step).astype(np.int64)
    up, _, _ = up_shares(losses, log_q, step, cells + 1, is_lower)
    mass = np.exp(log_q)
    lowest = int(cells[0])
    total = np.zeros(int(cells[-1]) + 2 - lowest)
    np.add.at(total, cells + 1 - lowest, up * mass)
    np.add.at(total, np.concatenate([cells[:1], cells[:-1] + 1]) - lowest, (1 - up) * mass)
    return _trimmed(Ratio(step, lowest, total))


def average(a: Ratio, weight_a: int, b: Ratio, weight_b: int, finer: int, is_lower: bool) -> Ratio:
    """The weighted average of two independent ratios on grids of one step, on a grid `finer` times as fine."""
    step = a.step / finer
    alpha, beta = weight_a / (weight_a + weight_b), weight_b / (weight_a + weight_b)
    size_a, size_b = len(a.mass), len(b.mass)
    lowest = finer * min(
        a.lowest + math.floor(math.log(alpha) / a.step), b.lowest + math.floor(math.log(beta) / a.step)
    )
    lowest -= 2 * finer
    highest = finer * max(a.lowest + size_a, b.lowest + size_b) + 2 * finer
    mass = np.zeros(highest - lowest + 1)
    is_same = a is b
    offset = b.lowest - a.lowest
    for shift in range(0 if is_same else 1 - size_a, size_b):
        # pairs (i, i + shift), whose average is a's value times one factor
        begin, end = max(0, -shift), min(size_a, size_b - shift)
        product = a.mass[begin:end] * b.mass[begin + shift : end + shift]
        if is_same and shift:
            product *= 2
        position = float(np.logaddexp(math.log(alpha), math.log(beta) + (offset + shift) * a.step)) / step
        whole = math.floor(position)
        up = _even_shares(product, (whole + 1 - position) * step, a.step, is_lower)
        up *= product
        product -= up
        first = finer * (a.lowest + begin) + whole - lowest
        mass[first + 1 : first + 1 + finer * len(up) : finer] += up
        mass[first] += product[0]
        if len(product) > 1:
            mass[first + 1 : first + 1 + finer * (len(up) - 1) : finer] += product[1:]
    return _trimmed(Ratio(step, lowest, mass))


def _even_shares(mass: np.ndarray, above: float, spacing: float, is_lower: bool) -> np.ndarray:
    """`up_shares` for masses that are `spacing` apart, each `above` below its target."""
    up = np.empty(len(mass))
    up[-1] = 0.0 if is_lower else 1.0
    if len(mass) > 1:
        kappa = -math.expm1(-above) / math.expm1(max(spacing - above, 1e-300))
        lower = kappa * mass[:-1]
        natural = mass[1:] / np.maximum(mass[1:] + lower, 1e-300)
        up[:-1] = natural
        up[:-2] = np.clip(natural[:-1] * (1 - natural[1:] + natural[:-1]), 0.0, 1.0)
        if is_lower:
            up[:-1] = np.minimum(up[:-1], (1 - up[1:]) * mass[1:] / np.maximum(lower * (1 + 1e-10), 1e-300))
        else:
            up[-1] = natural[-1]  # before it is raised as needed
            up[1:] = np.maximum(up[1:], 1 - lower * (1 - 1e-10) * up[:-1] / np.maximum(mass[1:], 1e-300))
            up[0] = 1.0
    return up


def with_absent(ratio: Ratio, present: float, is_lower: bool) -> Ratio:
    """Where the unit takes part with that probability only: `present` times the ratio, and one else."""
    losses = ratio.losses
    values = np.logaddexp(math.log(present) + losses, math.log1p(-present))
    cells = np.floor(values / ratio.step)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(cells)) + 1])
    kept = np.add.reduceat(ratio.mass, starts)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.log(np.add.reduceat(ratio.mass * np.exp(values), starts) / kept)
    return moved(means[kept > 0], np.log(kept[kept > 0]), ratio.step, is_lower)


def times_shared(ratio: Ratio, sigma: float, is_lower: bool) -> Ratio:
    """The ratio times an independent log-normal one, which all of its bins share."""
    shared = single_ratio(sigma, ratio.step, is_lower)
    mass = np.convolve(ratio.mass, shared.mass)
    return _trimmed(Ratio(ratio.step, ratio.lowest + shared.lowest, mass))


def _trimmed(ratio: Ratio) -> Ratio:
    """Without tails that weigh next to nothing under Q (below) and under P (above), which are dropped."""
    with np.errstate(over="ignore"):
        weighted = ratio.mass * np.exp(np.maximum(ratio.losses, 0.0))
    first = int(np.searchsorted(np.cumsum(ratio.mass), _DUST))
    last = len(ratio.mass) - int(np.searchsorted(np.cumsum(weighted[::-1]), _DUST))
    return Ratio(ratio.step, ratio.lowest + first, ratio.mass[first:last].copy())


def largest_output(noise_multiplier: float, bins: int) -> FixedPair:
    r"""What the largest output $y$ tells when a unit is removed, for noise so small that ratios of all outputs are beyond floating point.

    With the unit, it is in $[a, b)$ at least if the output that has it is, and all others are below $a$; without, at most if any of them is.
    """
    from scipy.special import log_ndtr

    sigma = noise_multiplier
    high = 1 + 12 * sigma + sigma * math.sqrt(2 * math.log(bins))
    edges = np.linspace(-2 * sigma, high, min(2**18, math.ceil(200 * (high + 2 * sigma) / sigma)))
    log_p = log_normal_mass((edges - 1) / sigma)[1:] + (bins - 1) * log_ndtr(edges / sigma)
    return FixedPair(log_p, math.log(bins) + log_normal_mass(edges / sigma)[1:])
