r"""The optimistic side of privacy loss distributions: lower bounds on epsilon, all rounded in an attacker's disfavour.

Let $X = dP/dQ$ under $Q$, so that $\delta(\varepsilon) = E_Q[(X - e^\varepsilon)_+]$ is the mean of a convex, increasing function of $X$.
It does not grow

1. when the outcomes of a partition are merged, since that is post-processing,
2. when masses at $a < g < b$ are merged into one at $g$, at or below their mean (Jensen, and monotony), and
3. when mass is dropped.

All three stay true of one factor of a product $\prod_i X_i$ of independent ratios, with the others held fixed, hence of compositions. So the pair of
every step is merged into cells (1), the cells are moved to a grid of losses, each to its two neighbours such that what meets at a grid point has
a mean of at least that point (2), and tails are dropped (3). The error is of second order in the width of the grid: what moves up is balanced by
what moves down.

Powers are taken by FFT of the exponentially tilted masses $p(l) e^{\theta l} / M(\theta)$, with $\theta$ such that epsilon is about where they
are centred. Then errors of floating point and of the finite window are relative to delta, and a proven bound of both is subtracted.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ._pair import AbstractPair, Cells, Grid
from ._shares import up_shares

_DROPPED = 1e-5  # of delta, at either end of the losses of all steps together
_OUTSIDE = 1e-15
_LONGEST = 2**21
_FINEST = 2**18
_ASIDE = 1e-8
_FFT_ERROR = 2.5e-15  # relative, for every doubling of the length, in the 2-norm: Higham 2002, theorem 24.2, with room
Composition = Sequence[tuple[AbstractPair, int]]


def lower_epsilon(composition: Composition, delta: float, fineness: float = 1.0) -> float:
    r"""A lower bound on the least $\varepsilon \ge 0$ with $E_P[(1 - e^{\varepsilon - L})_+] \le \delta$, $L$ the loss of all together.

    **Arguments:**

    - `composition`: independent pairs and how often each occurs.
    - `delta`: strictly between 0 and 1.
    - `fineness`: divides the width of the grid.
    """
    pairs = [(pair, count) for pair, count in composition if count]
    total = sum(count for _, count in pairs)
    steps, ranges = [], []
    for pair, count in pairs:
        cells, low, high = _trimmed(pair.cells(None), _DROPPED * delta / total)
        steps.append((cells, count))
        ranges.append((low, high))
    if not steps:
        return 0.0
    guess, order = _guess(steps, delta)
    if not guess > 0:
        return 0.0
    if total == 1:
        return _of_one(steps[0][0], delta)
    # where losses are bounded, and delta asks for the bound, the order has no end
    order = min(order, 8 * math.log(1 / delta) / guess + 1)
    # what moving to a grid of width h takes from the logarithm of a moment of order 1 + theta is about theta (1 + theta) h^2 / 8 a step
    width = math.sqrt(0.008 * guess / (total * (1 + order)))
    width = min(width, max(width / 64, min(_bulk(cells, order) / 12 for cells, _ in steps))) / fineness
    width = max(width, max(high - low for low, high in ranges) / _FINEST)
    while True:
        lattices = [pair.lattice for pair, _ in pairs if pair.lattice]
        if lattices:
            lattice = min(lattices)
            width = lattice * round(width / lattice) if width > lattice else lattice / math.ceil(lattice / width - 1e-9)
        parts = [(pair.cells(Grid(width, *r)), count) for (pair, count), r in zip(pairs, ranges, strict=True)]
        found = _on_grid(parts, ranges, delta, guess, order, width)
        if found is not None:
            return found
        width *= 2


def _of_one(cells: Cells, delta: float) -> float:
    """Of a single pair, without a grid: delta is exceeded at a loss, or between two, where it is affine in the exponential of epsilon."""
    losses, log_p = cells
    p = np.cumsum(np.exp(log_p)[::-1])[::-1]
    log_q = np.logaddexp.accumulate((log_p - losses)[::-1])[::-1]
    excess = (
        np.log(np.maximum(p - delta * (1 + 1e-9), 1e-300)) - log_q
    )  # epsilon at which the outcomes from here on have delta
    return max(0.0, float(excess.max()) * (1 - 1e-11) - 1e-12)


def rough_epsilon(composition: Composition, delta: float) -> float:
    """An upper guess at the epsilon of such a composition, to choose between attacks."""
    total = sum(count for _, count in composition)
    steps = [(_trimmed(pair.cells(None), _DROPPED * delta / total)[0], count) for pair, count in composition if count]
    return _guess(steps, delta)[0] if steps else 0.0


def _trimmed(cells: Cells, room: float) -> tuple[Cells, float, float]:
    """Without tails of at most that mass under P, which are dropped, and between which losses the rest is."""
    mass = np.exp(cells.log_p)
    first = int(np.searchsorted(np.cumsum(mass), room))
    last = len(mass) - 1 - int(np.searchsorted(np.cumsum(mass[::-1]), room))
    last = max(first, last)
    kept = Cells(cells.losses[first : last + 1], cells.log_p[first : last + 1])
    return kept, float(kept.losses[0]), float(kept.losses[-1])


def _bulk(cells: Cells, order: float) -> float:
    """Half the distance of the losses between which two thirds of the tilted mass lies."""
    tilted = cells.log_p + order * cells.losses
    share = np.cumsum(np.exp(tilted - tilted.max()))
    places = np.searchsorted(share, np.array([1 / 6, 5 / 6]) * share[-1])
    low, high = cells.losses[np.minimum(places, len(share) - 1)]
    return float(high - low) / 2


def _log_moment(losses: np.ndarray, log_p: np.ndarray, order: float) -> float:
    exponent = log_p + order * losses
    top = float(exponent.max())
    return top + math.log(float(np.exp(exponent - top).sum()))


def _guess(steps: list[tuple[Cells, int]], delta: float) -> tuple[float, float]:
    r"""The least of $(K(\theta) + \log(1 / \delta)) / \theta$, which is Chernoff's bound on epsilon, and where it is attained."""

    def bound(log_order: float) -> float:
        order = math.exp(log_order)
        total = sum(count * _log_moment(*cells, order) for cells, count in steps)
        return (total - math.log(delta)) / order

    points = np.arange(-6.0, 18.0, 1.0)
    values = [bound(float(x)) for x in points]
    best = int(np.argmin(values))
    low, high = float(points[max(0, best - 1)]), float(points[min(len(points) - 1, best + 1)])
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = bound(left), bound(right)
    for _ in range(12):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = bound(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = bound(right)
    return min((at_left, math.exp(left)), (at_right, math.exp(right)), (values[best], math.exp(float(points[best]))))


class _Settled(NamedTuple):
    """Tilted masses at `origin` + (lowest + i) * width, which add up to one, and the logarithm of the moment they were divided by."""

    origin: float
    lowest: int
    mass: np.ndarray
    log_moment: float


def _on_grid(
    steps: list[tuple[Cells, int]],
    ranges: list[tuple[float, float]],
    delta: float,
    guess: float,
    order: float,
    width: float,
) -> float | None:
    """The bound from a grid of that width; None if it would take too long."""
    if any((high - low) / width > _LONGEST for low, high in ranges):
        return None
    parts = [(_settled(*cells, width, order, *r), count) for (cells, count), r in zip(steps, ranges, strict=True)]
    first, last = _window(parts)
    length = 1 << max(4, (last - first).bit_length())
    if length > _LONGEST:
        return None
    product = np.ones(length // 2 + 1, np.complex128)
    error = 0.0
    doublings = math.log2(length)
    for part, count in parts:
        folded = np.bincount(np.arange(len(part.mass)) % length, part.mass, length)
        # |F| <= 1 (and a little more as computed), so the error of a power is that of F, so many times
        error += count * (_FFT_ERROR * doublings * math.sqrt(length) * float(np.linalg.norm(folded)))
        product *= np.fft.rfft(folded) ** count
        error += count * 16 * 2.0**-53 * math.sqrt(length)
    mass = np.roll(np.fft.irfft(product, length), -(first % length))[: last - first + 1]
    error = (error + (_FFT_ERROR * doublings + 1e-14) * math.sqrt(length)) / math.sqrt(length)
    base = sum(count * part.lowest for part, count in parts) + first
    losses = math.fsum(count * part.origin for part, count in parts) + width * (base + np.arange(len(mass)))
    log_moment = math.fsum(count * part.log_moment for part, count in parts)

    def log_delta(epsilon: float) -> float:
        begin = int(np.searchsorted(losses, epsilon))
        end = begin + min(len(losses), math.ceil(45 / (order * width)))  # what is further up is dropped
        above = epsilon - losses[begin:end]
        weights = np.exp(order * above) * -np.expm1(above)
        # by Cauchy and Schwarz; what lies outside the window was added somewhere inside
        wrong = float(np.linalg.norm(weights)) * error + 4 * _OUTSIDE
        value = float(np.dot(weights, mass[begin:end])) * (1 - 1e-11) - wrong
        return log_moment - order * epsilon + math.log(value) if value > 0 else -math.inf

    goal = math.log(delta) + 1e-9
    low, high = 0.0, max(guess, float(losses[-1]) if losses[-1] < 2 * guess else guess)
    if log_delta(low) <= goal:
        # the tilt is for epsilons near the guess, and of no use far below: look there before giving up
        low = next((e for e in guess * np.linspace(0.98, 0.02, 49) if log_delta(float(e)) > goal), 0.0)
        if low == 0.0:
            return 0.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if log_delta(middle) > goal else (low, middle)
        if high - low < 1e-7 * high:
            break
    return max(0.0, low * (1 - 1e-9) - 1e-12)


def _window(parts: list[tuple[_Settled, int]]) -> tuple[int, int]:
    """Sums of indices, from the lowest, that tilted masses leave with probability 1e-15 at most (Chernoff)."""
    room = math.log(2 / _OUTSIDE)
    moments = []
    for part, count in parts:
        index = np.flatnonzero(part.mass).astype(np.float64)
        mass = part.mass[part.mass > 0]
        mean = float(np.dot(index, mass))
        moments.append((index - mean, mass, count, mean, float(np.dot((index - mean) ** 2, mass))))
    mean = math.fsum(count * mean for _, _, count, mean, _ in moments)
    variance = max(math.fsum(count * variance for *_, count, _, variance in moments), 1e-6)
    most = sum(count * (len(part.mass) - 1) for part, count in parts)

    def reach(rate: float, sign: float) -> float:
        total = room
        for centered, mass, count, _, _ in moments:
            exponent = sign * rate * centered
            top = float(exponent.max())
            total += count * (top + math.log(float(np.dot(np.exp(exponent - top), mass))))
        return total / rate

    normal = math.sqrt(2 * room / variance)
    left, right = (min(reach(normal * 2.0**k, sign) for k in range(-8, 3)) for sign in (-1.0, 1.0))
    first = max(0, math.floor(mean - left) - 1)
    return first, max(first, min(most, math.ceil(mean + right) + 1))


def _settled(losses: np.ndarray, log_p: np.ndarray, width: float, order: float, low: float, high: float) -> _Settled:
    """The best of two grids: one through 0, and one through the heaviest cell, which a narrow peak needs."""
    kept = (losses >= low - 2 * width) & (losses <= high + 2 * width)  # the rest is dropped
    losses, log_p = losses[kept], log_p[kept]
    # before and after cells are merged: what is merged with a peak moves it
    candidates = [_move(losses, log_p, width, order, 0.0, None)]
    for _ in range(2):
        heaviest = int(np.argmax(log_p + order * losses))
        origin = float(losses[heaviest]) - _ASIDE * width
        candidates.append(_move(losses, log_p, width, order, origin, heaviest))
        losses, log_p = _merged(losses, log_p, np.floor(losses / width).astype(np.int64))
    return max(candidates, key=lambda settled: settled.log_moment)


def _merged(losses: np.ndarray, log_p: np.ndarray, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours of one cell as one: the ratio of their masses."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(cells)) + 1])
    p, q = np.logaddexp.reduceat(log_p, starts), np.logaddexp.reduceat(log_p - losses, starts)
    return p - q, p


def _move(
    losses: np.ndarray, log_p: np.ndarray, width: float, order: float, origin: float, stays: int | None
) -> _Settled:
    """To a grid through `origin`, on which the cell number `stays` already is."""
    # lowered a little, so that others at a whole distance from it are not below the grid by rounding
    aside = [] if stays is None else [float(log_p[stays] + order * losses[stays]) - (1 + order) * _ASIDE * width]
    if stays is not None:
        losses, log_p = np.delete(losses, stays), np.delete(log_p, stays)
    targets, weights = np.zeros(0, np.int64), np.zeros(0)
    if len(losses):
        cells = np.floor((losses - origin) / width).astype(np.int64)
        losses, log_p = _merged(losses, log_p, cells)
        cells = np.floor((losses - origin) / width).astype(np.int64)
        up, above, below = up_shares(losses - origin, log_p - losses, width, cells + 1, is_lower=True)
        tilted = log_p + order * losses
        with np.errstate(divide="ignore"):
            weights = np.concatenate(
                [tilted + np.log(up) + (1 + order) * above, tilted + np.log1p(-up) - (1 + order) * below]
            )
        targets = np.concatenate([cells + 1, np.concatenate([cells[:1], cells[:-1] + 1])])
    weights = np.concatenate([weights, aside])
    targets = np.concatenate([targets, np.zeros(len(aside), np.int64)])
    top = float(weights.max())
    lowest = int(targets.min())
    mass = np.bincount(targets - lowest, np.exp(weights - top))
    total = float(mass.sum())
    return _Settled(origin, lowest, mass / total, top + math.log(total) - 1e-14)
