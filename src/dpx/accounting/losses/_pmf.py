"""Privacy losses on a grid: composition, and the delta and epsilon that they imply, all rounded against us."""

import math
from typing import NamedTuple

import equinox as eqx
import numpy as np

TAIL = 1e-15
UNIT = 2.0**-53
_MANY = 2**11
_LONGEST = 2**17  # points of a transform
_RESOLUTION = (
    1 / 80
)  # of a block's standard deviation: the spread that rounding adds is a hundred-thousandth of the variance


class Aim(NamedTuple):
    r"""Where a composed loss must be accurate.

    **Arguments:**

    - `order`: $\theta \ge 0$. Masses are computed a second time after a tilt by $e^{\theta L}$, which keeps the digits of tails that the
        rounding of one transform would drown.
    - `tail`: mass that may be counted as infinite.
    """

    order: float = 0.0
    tail: float = TAIL


PLAIN = Aim()


class LossPmf(eqx.Module):
    """Masses of the privacy loss at multiples of `interval`, from `lowest` on, and the mass at infinity.

    Pessimistic: its hockey-stick divergence is at least that of the pair of distributions that it stands for, at every order.

    **Arguments:**

    - `interval`: the width of the grid.
    - `lowest`: the first loss, in units of `interval`.
    - `mass`: the masses, under the distribution in the ratio's numerator.
    - `infinity`: the mass of outcomes that the other distribution does not have.

    ??? cite "Reference"

        Doroshenko et al., *Connect the dots*, PETS 2022; Zhu, Dong and Wang, *Optimal accounting of differential privacy via
        characteristic function*, AISTATS 2022 (dominating pairs compose).
    """

    interval: float
    lowest: int
    mass: np.ndarray
    infinity: float

    def delta(self, epsilon: float) -> float:
        r"""$E[(1 - e^{\varepsilon - L})_+]$."""
        first = max(0, math.floor(epsilon / self.interval) + 1 - self.lowest)
        mass = self.mass[first:]
        losses = (np.arange(first, first + len(mass)) + self.lowest) * self.interval
        return self.infinity - sum_of_products(np.expm1(np.minimum(epsilon - losses, 0.0)), mass)

    def epsilon(self, delta: float) -> float:
        r"""The least $\varepsilon \ge 0$ with `delta(epsilon) <= delta`; infinite if there is none."""
        if self.infinity > delta:
            return math.inf
        start = max(0, -self.lowest)  # of the losses from 0 on
        mass = self.mass[start:]
        if not len(mass):
            return 0.0
        offset = (self.lowest + start) * self.interval
        above = self.infinity + np.append(np.cumsum(mass[::-1])[::-1], 0.0)
        near = math.ceil(min(40.0 / self.interval, len(mass)))  # beyond, e^-40 is nothing
        decay = np.exp(-self.interval * np.arange(near))

        def under_other(place: int) -> float:
            """The mass from this loss on under the other distribution, times e to the loss; without what is far above."""
            part = mass[place : place + near]
            return sum_of_products(part, decay[: len(part)])

        exceeds = lambda place: above[place] - under_other(place) > delta  # at the loss of that place
        if self.lowest <= 0 and not exceeds(0):
            return 0.0
        # between two dots delta is affine in e^epsilon; the first may lie above 0
        low, high = -1 if self.lowest > 0 else 0, len(mass) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if exceeds(middle) else (low, middle)
        rest, top = under_other(high), offset + high * self.interval
        if not (rest > 0 and above[high] > delta):
            return top if above[high] > delta else 0.0
        inside = top + math.log((above[high] - delta) / rest)
        return min(top, max(0.0, inside) * (1 + 1e-12))

    def coarsen(self, factor: int) -> "LossPmf":
        """On a grid `factor` times as wide: every loss is split between its neighbours so that both distributions keep their mass."""
        if factor == 1:
            return self
        support = np.flatnonzero(self.mass)
        values = self.mass[support]
        index = support + self.lowest
        whole = index // factor
        wide = factor * self.interval
        up = np.expm1((whole * factor - index) * self.interval) / math.expm1(-wide)
        lowest = self.lowest // factor
        size = (self.lowest + len(self.mass) - 1) // factor - lowest + 2
        mass = np.bincount(whole - lowest, (1 - up) * values, size)
        mass += np.bincount(whole + 1 - lowest, up * values, size)
        return LossPmf(wide, lowest, mass, self.infinity)

    def compose(self, other: "LossPmf", aim: Aim = PLAIN) -> "LossPmf":
        """The loss of both mechanisms together, on the wider of their two grids."""
        first, second = (self, other) if self.interval >= other.interval else (other, self)
        factor = round(first.interval / second.interval)
        if abs(first.interval - factor * second.interval) > 1e-9 * first.interval:
            raise ValueError(f"Privacy losses on grids of {self.interval} and {other.interval} cannot be composed.")
        second = second.coarsen(factor)
        size = len(first.mass) + len(second.mass) - 1
        if size > _LONGEST:
            return first.coarsen(2).compose(second.coarsen(2), aim)
        mass = _convolved([(first, 1), (second, 1)], 0, size, aim.order)
        infinity = self.infinity + other.infinity - self.infinity * other.infinity
        return _trimmed(LossPmf(first.interval, first.lowest + second.lowest, mass, infinity), aim.tail)

    def self_compose(self, count: int, aim: Aim = PLAIN) -> "LossPmf":
        """The loss of `count` such mechanisms together. Many steps go in blocks, on a grid as wide as blocks allow, so that a
        million steps cost milliseconds."""
        if count == 1:
            return self
        # the rarest and largest losses of one step would only widen the window
        trimmed = _trimmed(self, aim.tail / count)
        return trimmed._power(count, aim) if count < _MANY else trimmed._blocks(count, aim)

    def _blocks(self, count: int, aim: Aim) -> "LossPmf":
        blocks = next((n for n in range(128, 512) if count % n == 0), 256)  # without a rest, if possible
        block = count // blocks
        first = self._power(block, aim._replace(tail=aim.tail / 512))
        factor = int(first.standard_deviation * _RESOLUTION / self.interval)
        if factor < 2:
            return self._power(count, aim)
        # by powers of two, so that grids of other mechanisms fit
        total = first.coarsen(1 << (factor.bit_length() - 1))._power(blocks, aim)
        return total.compose(self._power(rest, aim), aim) if (rest := count - block * blocks) else total

    @property
    def standard_deviation(self) -> float:
        """Of the finite losses."""
        index = np.flatnonzero(self.mass).astype(np.float64)
        mass = self.mass[self.mass != 0]
        total = float(mass.sum())
        if not total > 0:
            return 0.0
        mean = sum_of_products(index, mass) / total
        return self.interval * math.sqrt(max(0.0, sum_of_products((index - mean) ** 2, mass) / total))

    def log_moment(self, order: float) -> tuple[float, float]:
        r"""$\log E[e^{\theta L}]$ over the finite losses and its derivative by $\theta$, $\theta$ the order."""
        support = np.flatnonzero(self.mass)
        losses = (support + self.lowest) * self.interval
        exponent = order * losses
        top = float(exponent.max(initial=-math.inf))
        weights = self.mass[support] * np.exp(exponent - top)
        total = float(weights.sum())
        return top + math.log(total), sum_of_products(weights, losses) / total

    def _power(self, count: int, aim: Aim = PLAIN) -> "LossPmf":
        """By one FFT over a window that the tails leave with next to no probability (Chernoff)."""
        if count == 1 or not self.mass.any():
            infinity = -math.expm1(count * math.log1p(-self.infinity)) if self.infinity < 1 else 1.0
            return LossPmf(self.interval, self.lowest * count, self.mass, infinity)
        first, last = self._window(count, aim.tail)
        if last - first + 1 > _LONGEST and len(self.mass) > 2:
            return self.coarsen(2)._power(count, aim)
        mass = _convolved([(self, count)], first, last - first + 1, aim.order)
        mass[0] += aim.tail  # what lies below
        infinity = -math.expm1(count * math.log1p(-self.infinity)) if self.infinity < 1 else 1.0
        infinity = min(1.0, infinity + aim.tail)
        return _trimmed(LossPmf(self.interval, self.lowest * count + first, mass, infinity), aim.tail)

    def _window(self, count: int, tail: float = TAIL) -> tuple[int, int]:
        """Between which sums of `count` indices, from the lowest, all but `tail` of the mass lies."""
        support = np.flatnonzero(self.mass > 0)  # elsewhere nothing is to be bounded, and exponents may be anything
        index, mass = support.astype(np.float64), self.mass[support]
        total = float(mass.sum())
        mean = sum_of_products(index, mass) / total
        variance = max(sum_of_products((index - mean) ** 2, mass) / total, 1e-6)
        room = math.log(2 / tail)
        centered = index - mean

        def reach(order: float, sign: float) -> float:
            exponent = sign * order * centered
            top = float(exponent.max())
            moment = top + math.log(sum_of_products(np.exp(exponent - top), mass))
            return (count * moment + room) / order

        def least(sign: float) -> float:
            # the best order if the sum were normal; heavy tails want a smaller one. The reach is quasi-convex in the order.
            order = math.sqrt(2 * room / (count * variance))
            best = reach(order, sign)
            while order > 1e-12 and (smaller := reach(order / 2, sign)) < best:
                order, best = order / 2, smaller
            return min(best, reach(1.4 * order, sign), reach(order / 1.4, sign))

        largest = (len(self.mass) - 1) * count
        first = min(max(0, math.floor(count * mean - least(-1.0))), largest)
        last = min(largest, math.ceil(count * mean + least(1.0)))
        return first, max(first, last)


def sum_of_products(values: np.ndarray, weights: np.ndarray) -> float:
    """The sum of products: pairwise, and without the threads of a linear algebra library, whose start costs more than the sum."""
    return float((values * weights).sum())


def _convolved(terms: list[tuple[LossPmf, int]], first: int, size: int, order: float) -> np.ndarray:
    """At least the masses of sums of indices, so many from each distribution, from `first` on; mass outside wraps around.

    What wraps adds to what is there, and what transforms may have lost to rounding is added to every mass. The transform of tilted masses keeps
    the digits of the tail that the tilt favours; of both results, each an upper bound, the less counts.
    """
    plain = transformed(terms, first, size, 0.0)
    return np.minimum(plain, transformed(terms, first, size, order)) if order > 0 else plain


def transformed(terms: list[tuple[LossPmf, int]], first: int, size: int, order: float) -> np.ndarray:
    """As `_convolved`, under one tilt."""
    length = _fast_length(size)
    rounding = UNIT * math.log2(length)  # of a transform, relative to the root of the sum of squares
    root = lambda values: math.sqrt(float(np.mean(np.square(values))))
    spectra, log_scale = [], 0.0
    for pmf, count in terms:
        support = np.flatnonzero(pmf.mass > 0)
        exponent = order * pmf.interval * support
        top = float(exponent.max())
        weights = pmf.mass[support] * np.exp(exponent - top)
        total = float(weights.sum())
        log_scale += count * (top + math.log(total))
        spectra.append((np.fft.rfft(np.bincount(support % length, weights / total, length)), count))
    product, error = np.ones(1), 0.0
    for i, (spectrum, count) in enumerate(spectra):
        product = product * _to_the(spectrum, count)
        others = [np.abs(f) ** (n - (i == j)) for j, (f, n) in enumerate(spectra)]
        error += count * rounding * root(np.abs(spectrum)) * root(np.prod(others, axis=0))
    error += (rounding + 4 * UNIT * sum(count for _, count in spectra)) * root(np.abs(product))
    mass = np.roll(np.fft.irfft(product, length), -(first % length))[:size]
    # `error` bounds the root of the sum of the errors' squares, and they are spread over all masses alike
    mass = np.maximum(mass, 0.0) + 4 * error / math.sqrt(length)
    with np.errstate(over="ignore"):
        return mass * np.exp(log_scale - order * terms[0][0].interval * np.arange(first, first + size))


def _to_the(values: np.ndarray, count: int) -> np.ndarray:
    """A power by squaring, which is many times quicker than by complex logarithms."""
    result = None
    while count:
        if count & 1:
            result = values if result is None else result * values
        values, count = values * values if count > 1 else values, count >> 1
    assert result is not None
    return result


def _fast_length(least: int) -> int:
    """A product of powers of 2, 3 and 5, of which FFTs are fast."""
    return min(odd << max(1, (-(-least // odd) - 1).bit_length()) for odd in (1, 3, 5, 9, 15))


def mixture(parts: list[tuple[float, LossPmf]]) -> LossPmf:
    """The loss of a mechanism that is one of several, at random with these weights, and says which."""
    lowest = min(pmf.lowest for _, pmf in parts)
    highest = max(pmf.lowest + len(pmf.mass) for _, pmf in parts)
    mass = np.zeros(highest - lowest)
    for weight, pmf in parts:
        begin = pmf.lowest - lowest
        mass[begin : begin + len(pmf.mass)] += weight * pmf.mass
    return LossPmf(parts[0][1].interval, lowest, mass, sum(weight * pmf.infinity for weight, pmf in parts))


def _trimmed(pmf: LossPmf, tail: float = TAIL) -> LossPmf:
    """Without the tails that weigh less than `tail`: the lower one moves up to the first loss that is kept, the upper one to infinity."""
    support = np.flatnonzero(pmf.mass > 0)
    values = pmf.mass[support]
    first = int(np.searchsorted(np.cumsum(values), tail / 2))
    last = len(values) - int(np.searchsorted(np.cumsum(values[::-1]), tail / 2))
    if first >= last - 1:
        return pmf
    begin, end = int(support[first]), int(support[last - 1]) + 1
    mass = pmf.mass[begin:end].copy()
    mass[0] += float(values[:first].sum())
    return LossPmf(pmf.interval, pmf.lowest + begin, mass, pmf.infinity + float(values[last:].sum()))
