r"""Pairs of distributions that an attacker can reach: for an event, data sets and gradients that are neighbours, and what is then seen.

Each is an actual run of the mechanism that an event describes, so that what tells its two outputs apart is a lower bound on what the event costs,
and several events, attacked one after another with the same example, are independent given the data set. Where nothing else is said,
the example that differs has a gradient of the clip norm in one direction, and all others have none; noise in other directions says nothing.
"""

import abc
import functools
import math
from typing import NamedTuple

import equinox as eqx
import numpy as np

from ._connect import log_normal_mass

_CELLS = 300  # an attacker's outcomes, per standard deviation of the noise
_MOST_CELLS = 2**19
_REACH = 12.0  # standard deviations: a normal variable exceeds it with probability 2e-33
_ROUNDING = (
    2e-12  # relative, of the masses of one cell; cells are never narrower than a five-hundredth of a standard deviation
)
_LONGEST = 2**21
_MOST_OF_INTEGERS = 20_000
NEGLIGIBLE = 1e-60  # a probability that no factor e^epsilon makes matter
_CONTINUOUS = 5e4  # the scale above which integers are as good as real numbers


class Cells(NamedTuple):
    """Of the cells of a partition of the outcomes, in ascending order of `losses`: the logarithms of P's masses, and of their ratios to Q's."""

    losses: np.ndarray
    log_p: np.ndarray


class Grid(NamedTuple):
    """Losses that are multiples of `width`, of which those between `low` and `high` matter."""

    width: float
    low: float
    high: float


class AbstractPair(eqx.Module):
    r"""Two distributions $P$ and $Q$ of what an attacker sees, between whose privacy loss $\log dP/dQ$ and its cells we may choose."""

    @abc.abstractmethod
    def cells(self, grid: Grid | None) -> Cells:
        """The cells of the pair; about as wide as those of the grid, with masses that vary smoothly from one to the next, where that can be had."""

    @property
    @abc.abstractmethod
    def swapped(self) -> "AbstractPair":
        """What tells `Q` from `P`."""

    @property
    @abc.abstractmethod
    def lattice(self) -> float | None:
        """A distance in units of which losses with mass of their own are placed, if there is one: grids should be a multiple of it, or a part."""


Attacks = tuple[tuple[AbstractPair, ...], tuple[AbstractPair, ...]]
"""Where the example is in the first data set and, beyond that, in the second; of each, pairs to choose from."""

NOTHING: Attacks = ((), ())


def both(pair: AbstractPair) -> Attacks:
    """Where removing and adding are told apart alike."""
    return (pair,), (pair.swapped,)


class FixedPair(AbstractPair):
    """A pair whose outcomes are given.

    **Arguments:**

    - `log_p`, `log_q`: logarithms of the masses.
    - `lattice`: as for `AbstractPair`.
    """

    log_p: np.ndarray
    log_q: np.ndarray
    lattice: float | None = None

    def cells(self, grid: Grid | None) -> Cells:
        del grid
        return _cells(self.log_p, self.log_q)

    @property
    def swapped(self) -> "FixedPair":
        return FixedPair(self.log_q, self.log_p, self.lattice)


class GaussianMixturePair(AbstractPair):
    """Two mixtures of Gaussians of one standard deviation on a line.

    **Arguments:**

    - `noise_multiplier`: the standard deviation.
    - `first`, `second`: `(weight, mean)` of the components of `P` and of `Q`.
    """

    noise_multiplier: float
    first: tuple[tuple[float, float], ...]
    second: tuple[tuple[float, float], ...]

    @property
    def lattice(self) -> None:
        return None

    @property
    def swapped(self) -> "GaussianMixturePair":
        return GaussianMixturePair(self.noise_multiplier, self.second, self.first)

    def cells(self, grid: Grid | None) -> Cells:
        edges = _even_edges(self.noise_multiplier, self.first, self.second)
        if grid is not None:
            losses, _ = self._loss(edges)
            is_rising = losses[-1] >= losses[0]
            ordered = losses if is_rising else losses[::-1]
            if np.all(np.diff(ordered) > -1e-12) and (grid.high - grid.low) / grid.width <= _LONGEST:
                edges = self._edges_at(edges if is_rising else edges[::-1], np.maximum.accumulate(ordered), grid)
        return _cells(*(_log_masses(self.noise_multiplier, side, edges) for side in (self.first, self.second)))

    def _loss(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The loss at `x`, and its slope."""
        total, slope = np.zeros(len(x)), np.zeros(len(x))
        for side, sign in ((self.first, 1.0), (self.second, -1.0)):
            terms = [
                math.log(weight) + mean * (2 * x - mean) / (2 * self.noise_multiplier**2)
                for weight, mean in side
                if weight > 0
            ]
            means = [mean for weight, mean in side if weight > 0]
            whole = functools.reduce(np.logaddexp, terms)
            total += sign * whole
            slope += sign * sum(mean * np.exp(term - whole) for mean, term in zip(means, terms, strict=True))
        return total, slope / self.noise_multiplier**2

    def _edges_at(self, x: np.ndarray, losses: np.ndarray, grid: Grid) -> np.ndarray:
        """Where the loss is on the grid: any edges are right, but masses between them should not jump."""
        low, high = max(losses[0], grid.low), min(losses[-1], grid.high)
        wanted = np.arange(math.floor(low / grid.width) + 1, math.ceil(high / grid.width)) * grid.width
        if not len(wanted):
            return np.sort(x[[0, -1]])
        after = np.clip(np.searchsorted(losses, wanted), 1, len(x) - 1)
        left, right = np.minimum(x[after - 1], x[after]), np.maximum(x[after - 1], x[after])
        found = np.interp(wanted, losses, x)
        for _ in range(3):
            value, slope = self._loss(found)
            with np.errstate(divide="ignore", invalid="ignore"):
                step = np.nan_to_num((value - wanted) / slope)
            found = np.clip(found - step, left, right)
        return np.unique(found)


class LaplaceMixturePair(AbstractPair):
    r"""$(1 - q) \text{Lap}(0, b) + q \text{Lap}(1, b)$ and $\text{Lap}(0, b)$, or the other way round. Beyond both centres the ratio is constant.

    **Arguments:**

    - `scale`: $b$.
    - `probability`: $q$.
    - `is_swapped`: whether the mixture is `Q`.
    """

    scale: float
    probability: float
    is_swapped: bool = False

    @property
    def swapped(self) -> "LaplaceMixturePair":
        return LaplaceMixturePair(self.scale, self.probability, not self.is_swapped)

    @property
    def lattice(self) -> float:
        """The distance of the two losses that have mass of their own."""
        low, high = self._loss(np.array([0.0, 1.0]))
        return float(high - low)

    def _loss(self, x: np.ndarray) -> np.ndarray:
        return np.log1p(self.probability * np.expm1((2 * x - 1) / self.scale))

    def cells(self, grid: Grid | None) -> Cells:
        b, q = self.scale, self.probability
        x = np.linspace(0.0, 1.0, 20_001)
        if grid is not None and 64 < self.lattice / grid.width < _LONGEST:
            low, high = np.sort(self._loss(np.array([0.0, 1.0])) * (-1 if self.is_swapped else 1))
            multiples = np.arange(math.floor(low / grid.width) + 1, math.ceil(high / grid.width)) * grid.width
            excess = np.maximum(np.expm1(multiples * (-1 if self.is_swapped else 1)) / q, -1 + 1e-15)
            x = np.unique(np.concatenate([[0.0], np.clip(0.5 * (1 + b * np.log1p(excess)), 0.0, 1.0), [1.0]]))
        widths = np.diff(x)
        with np.errstate(divide="ignore"):
            share = np.log(-np.expm1(-widths / b)) + math.log(0.5)
            absent = math.log1p(-q) if q < 1 else -np.inf
        zero = np.concatenate([[math.log(0.5)], share - x[:-1] / b, [math.log(0.5) - 1 / b]])
        one = np.concatenate([[math.log(0.5) - 1 / b], share - (1 - x[1:]) / b, [math.log(0.5)]])
        mixed = np.logaddexp(absent + zero, math.log(q) + one)
        return _cells(zero, mixed) if self.is_swapped else _cells(mixed, zero)


def _even_edges(sigma: float, *sides: tuple[tuple[float, float], ...]) -> np.ndarray:
    means = [mean for side in sides for _, mean in side]
    low, high = min(means) - _REACH * sigma, max(means) + _REACH * sigma
    return np.linspace(low, high, min(_MOST_CELLS, max(64, math.ceil(_CELLS * (high - low) / sigma))))


def _log_masses(sigma: float, components: tuple[tuple[float, float], ...], edges: np.ndarray) -> np.ndarray:
    terms = [math.log(weight) + log_normal_mass((edges - mean) / sigma) for weight, mean in components if weight > 0]
    return functools.reduce(np.logaddexp, terms)


def _cells(log_p: np.ndarray, log_q: np.ndarray) -> Cells:
    """Ascending, and less what rounding may have added."""
    kept = np.isfinite(log_p) & np.isfinite(log_q)
    log_p, log_q = log_p[kept] - _ROUNDING, log_q[kept] + _ROUNDING
    losses = log_p - log_q
    if np.any(np.diff(losses) < 0):
        order = np.argsort(losses, kind="stable")
        losses, log_p = losses[order], log_p[order]
    return Cells(losses, log_p)


def sampled_discrete_gaussian(scale: float, shift: int, probability: float) -> FixedPair:
    r"""Integers $k$ of mass proportional to $e^{-k^2 / 2 s^2}$, and the same `shift` further, where the example takes part."""
    reach = math.ceil(12 * scale)
    if scale > _CONTINUOUS:
        # f'' is (z^2 - 1) f / s^2, so the sum over a cell between half-integers is its integral up to a relative (z^2 + 1) / 24 s^2 or so
        edges = np.unique(np.round(np.linspace(-reach, shift + reach, _MOST_OF_INTEGERS))) + 0.5
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
    merged = max(1, len(numbers) // _MOST_OF_INTEGERS)
    if merged > 1:
        starts = np.arange(0, len(numbers), merged)
        zero, one = np.logaddexp.reduceat(zero, starts), np.logaddexp.reduceat(one, starts)
    with np.errstate(divide="ignore"):
        absent = math.log1p(-probability) if probability < 1 else -np.inf
        return FixedPair(np.logaddexp(absent + zero, math.log(probability) + one), zero)
