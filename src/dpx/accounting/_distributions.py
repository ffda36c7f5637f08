"""Privacy loss distributions on a grid: composition, and the delta and epsilon that they imply, all rounded against us."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import numpy as np

_TAIL = 1e-15
_UNIT = 2.0**-53
_REACH = 10.0  # a normal variable exceeds it with probability 8e-24
_MANY = 2**11
_LONGEST = 2**17  # points of a transform
_RESOLUTION = (
    1 / 80
)  # of a block's standard deviation: the spread that rounding adds is a hundred-thousandth of the variance
_RELATIVE = 1 / 512  # distance between dots, over their distance from the mean


class Aim(NamedTuple):
    r"""Where a composed loss must be accurate.

    **Arguments:**

    - `order`: $\theta \ge 0$. Masses are computed a second time after a tilt by $e^{\theta L}$, which keeps the digits of tails that the
        rounding of one transform would drown.
    - `tail`: mass that may be counted as infinite.
    """

    order: float = 0.0
    tail: float = _TAIL


_PLAIN = Aim()


class LossPmf(eqx.Module):
    """Masses of the privacy loss at multiples of `interval`, from `lowest` on, and the mass at infinity.

    Pessimistic: its hockey-stick divergence is at least that of the pair of distributions that it stands for, at every order.

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
        return self.infinity - _sum(np.expm1(np.minimum(epsilon - losses, 0.0)), mass)

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
            return _sum(part, decay[: len(part)])

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

    def compose(self, other: "LossPmf", aim: Aim = _PLAIN) -> "LossPmf":
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

    def self_compose(self, count: int, aim: Aim = _PLAIN) -> "LossPmf":
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
        mean = _sum(index, mass) / total
        return self.interval * math.sqrt(max(0.0, _sum((index - mean) ** 2, mass) / total))

    def log_moment(self, order: float) -> tuple[float, float]:
        r"""$\log E[e^{\theta L}]$ over the finite losses and its derivative by $\theta$, $\theta$ the order."""
        support = np.flatnonzero(self.mass)
        losses = (support + self.lowest) * self.interval
        exponent = order * losses
        top = float(exponent.max(initial=-math.inf))
        weights = self.mass[support] * np.exp(exponent - top)
        total = float(weights.sum())
        return top + math.log(total), _sum(weights, losses) / total

    def _power(self, count: int, aim: Aim = _PLAIN) -> "LossPmf":
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

    def _window(self, count: int, tail: float = _TAIL) -> tuple[int, int]:
        """Between which sums of `count` indices, from the lowest, all but `tail` of the mass lies."""
        support = np.flatnonzero(self.mass > 0)  # elsewhere nothing is to be bounded, and exponents may be anything
        index, mass = support.astype(np.float64), self.mass[support]
        total = float(mass.sum())
        mean = _sum(index, mass) / total
        variance = max(_sum((index - mean) ** 2, mass) / total, 1e-6)
        room = math.log(2 / tail)
        centered = index - mean

        def reach(order: float, sign: float) -> float:
            exponent = sign * order * centered
            top = float(exponent.max())
            moment = top + math.log(_sum(np.exp(exponent - top), mass))
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


def _sum(values: np.ndarray, weights: np.ndarray) -> float:
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
    rounding = _UNIT * math.log2(length)  # of a transform, relative to the root of the sum of squares
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
    error += (rounding + 4 * _UNIT * sum(count for _, count in spectra)) * root(np.abs(product))
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


def _trimmed(pmf: LossPmf, tail: float = _TAIL) -> LossPmf:
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


class LossDistribution(eqx.Module):
    r"""The privacy loss of removing one unit and of adding one, and what coupling costs on top.

    **Arguments:**

    - `remove`, `add`: the losses; the same object where the relation is symmetric.
    - `coupling`: probability $\tau$ with which the mechanism differs from the one that the losses are those of; it adds
        $\tau (1 + e^\varepsilon)$ to $\delta$.
    - `other`: the losses for a second kind of neighbours, of which none dominates the first; what holds must hold for both.
    """

    remove: LossPmf
    add: LossPmf
    coupling: float = 0.0
    other: "LossDistribution | None" = None

    @property
    def is_symmetric(self) -> bool:
        """Whether one loss serves both directions."""
        return self.add is self.remove

    def get_delta(self, epsilon: float) -> float:
        r"""An upper bound on $\delta$ at `epsilon`."""
        worst = self.remove.delta(epsilon)
        if not self.is_symmetric:
            worst = max(worst, self.add.delta(epsilon))
        if self.coupling:
            worst += self.coupling * (1 + math.exp(min(epsilon, 700.0)))
        if self.other is not None:
            worst = max(worst, self.other.get_delta(epsilon))
        return min(1.0, max(0.0, worst))

    def get_epsilon(self, delta: float) -> float:
        r"""An upper bound on the least $\varepsilon$ at `delta`; infinite if there is none."""

        def uncoupled(delta: float) -> float:
            if not delta > 0:
                return math.inf
            epsilon = self.remove.epsilon(delta)
            return epsilon if self.is_symmetric else max(epsilon, self.add.epsilon(delta))

        found = with_coupling(uncoupled, delta, self.coupling)
        return found if self.other is None else max(found, self.other.get_epsilon(delta))

    def compose(self, other: "LossDistribution", aim: Aim = _PLAIN) -> "LossDistribution":
        """Both mechanisms together."""
        remove = self.remove.compose(other.remove, aim)
        add = remove if self.is_symmetric and other.is_symmetric else self.add.compose(other.add, aim)
        second = None
        if self.other is not None or other.other is not None:
            # the second kind of neighbours is one, for all mechanisms of a run
            second = (self.other or self).compose(other.other or other, aim)
        return LossDistribution(remove, add, self.coupling + other.coupling, second)

    def self_compose(self, count: int, aim: Aim = _PLAIN) -> "LossDistribution":
        """`count` such mechanisms together."""
        remove = self.remove.self_compose(count, aim)
        add = remove if self.is_symmetric else self.add.self_compose(count, aim)
        second = None if self.other is None else self.other.self_compose(count, aim)
        return LossDistribution(remove, add, self.coupling * count, second)


def with_coupling(epsilon_of: Callable[[float], float], delta: float, coupling: float) -> float:
    r"""The least $\varepsilon$ with $\delta(\varepsilon) + \tau (1 + e^\varepsilon) \le \delta$, by iteration from below; infinite if none."""
    if not coupling:
        return epsilon_of(delta)
    epsilon = 0.0
    for _ in range(200):
        found = epsilon_of(delta - coupling * (1 + math.exp(min(epsilon, 700.0))))
        if found <= epsilon:
            return epsilon
        epsilon = (
            found * (1 + 1e-7) + 1e-12
        )  # a little beyond, so that the iteration ends at a number that has been checked
    return math.inf


def dots(lowest: int, highest: int, interval: float, center: float, widest: float = math.inf) -> np.ndarray:
    """Places on the grid, from `lowest` to `highest`, that lie close near the loss `center` and further apart with the distance from it, up
    to `widest`: splitting rare, large losses a little further costs nothing that can be seen."""
    reach = max(abs(lowest), abs(highest)) * interval + abs(center) + interval
    near = np.arange(0.0, 1 / _RELATIVE) * interval
    start = interval / _RELATIVE
    stop = max(start, min(reach, widest / _RELATIVE))
    middle = start * np.exp(np.arange(math.ceil(math.log(stop / start) / _RELATIVE) + 1) * _RELATIVE)
    far = np.arange(stop, reach + widest, max(widest, interval)) if widest < math.inf else np.zeros(0)
    distances = np.concatenate([near, middle, far])
    places = np.round(np.concatenate([center - distances, center + distances]) / interval)
    places = places[(places > lowest) & (places < highest)].astype(np.int64)
    return np.unique(np.concatenate([[lowest], places, [highest]]))


def connect(
    losses_to_masses: Callable[[np.ndarray], tuple[np.ndarray, ...]],
    lowest: int,
    highest: int,
    interval: float,
    places: np.ndarray | None = None,
    slack: float | np.ndarray = 1e-13,
) -> LossDistribution:
    r"""The pessimistic distributions of a pair $(P, Q)$, given the logarithms of the masses that $P$ and $Q$ put between neighbouring losses.

    The ratio $v = dP/dQ$ within a cell is moved to the cell's two ends, so that its mean under $Q$ stays. Both
    $\delta_\text{remove} = E_Q[(v - e^\varepsilon)_+]$ and $\delta_\text{add} = E_Q[(1 - e^\varepsilon v)_+]$ are convex in $v$, hence grow,
    whichever dots are connected.

    **Arguments:**

    - `losses_to_masses`: takes the `n` losses at the dots and gives the log masses of `P` and of `Q` in the `n + 1` cells that they make, and,
        if it has more digits of it, the log of their ratio.
    - `lowest`, `highest`: the grid, in units of `interval`.
    - `places`: which points of the grid are connected, both ends among them; by default all.
    - `slack`: a bound on the rounding error of the log of the ratio.
    """
    places = np.arange(lowest, highest + 1) if places is None else places
    losses = places * interval
    log_p, log_q, *rest = losses_to_masses(losses)
    p, q = np.exp(log_p), np.exp(log_q)
    widths = np.diff(losses)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        slack = slack + 4 * _UNIT * np.abs(losses[:-1])
        log_ratio = (rest[0] if rest else log_p - log_q)[1:-1] + slack
        up = -np.expm1(losses[:-1] - log_ratio) / -np.expm1(-widths)
        up = np.clip(np.nan_to_num(up, nan=1.0), 0.0, 1.0)  # share of P's mass that goes to the upper end
        # where P has lost its digits, the mass counts at the upper end; Q's share follows from the same split, its rounding against us
        reached = log_ratio - 2 * slack - losses[:-1]
        above_q = np.exp(np.minimum(reached - widths, 0.0)) * np.expm1(-reached) / np.expm1(-widths)
        above_q = np.where(q[1:-1] > 0, np.clip(np.nan_to_num(above_q, nan=0.0), 0.0, 1.0) * q[1:-1], 0.0)
        bottom = min(float(q[0]), float(np.exp(log_p[0] - losses[0])))
        top = min(float(p[-1]), float(np.exp(log_q[-1] + losses[-1])))
    at = places - lowest
    mass_p, mass_q = np.zeros(highest - lowest + 1), np.zeros(highest - lowest + 1)
    mass_p[at[1:]] += up * p[1:-1]
    mass_p[at[:-1]] += (1 - up) * p[1:-1]
    mass_q[at[1:]] += above_q
    mass_q[at[:-1]] += q[1:-1] - above_q
    mass_p[0] += p[0]
    mass_p[-1] += top
    mass_q[0] += bottom
    mass_q[-1] += q[-1]
    remove = LossPmf(interval, lowest, mass_p, max(0.0, float(p[-1]) - top))
    add = LossPmf(interval, -highest, mass_q[::-1], max(0.0, float(q[0]) - bottom))
    return LossDistribution(remove, add)


def log_normal_mass(edges: np.ndarray) -> np.ndarray:
    """Logarithms of the masses of a standard normal variable in the cells between ascending edges, with the two tails outside."""
    from scipy.special import log_ndtr

    with np.errstate(divide="ignore", invalid="ignore"):
        below, above = log_ndtr(edges), log_ndtr(-edges)
        # of the two tails, the one that is small keeps the digits of the difference
        is_left = edges[1:] + edges[:-1] < 0
        large = np.where(is_left, below[1:], above[:-1])
        small = np.where(is_left, below[:-1], above[1:])
        cells = large + np.log(-np.expm1(np.minimum(small - large, 0.0)))
    return np.concatenate([below[:1], np.nan_to_num(cells, nan=-np.inf), above[-1:]])


def log_mix(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """The logarithm of (1 - weight) exp(first) + weight exp(second)."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(
            first + math.log1p(-weight) if weight < 1 else np.full_like(first, -np.inf), second + math.log(weight)
        )


def poisson_gaussian(noise_multiplier: float, sampling_probability: float, interval: float) -> LossDistribution:
    r"""$(1 - q) N(0, \sigma^2) + q N(1, \sigma^2)$ against $N(0, \sigma^2)$."""
    sigma, q = noise_multiplier, sampling_probability
    ratio = lambda x: _log_sampled(q, (2 * x - 1) / (2 * sigma**2))
    highest = math.ceil(float(ratio(1 + _REACH * sigma)) / interval)
    # no loss is below log(1 - q), so that nothing lies outside the grid there
    lowest = math.floor(max(float(ratio(-_REACH * sigma)), math.log1p(-q) if q < 1 else -math.inf) / interval)

    def masses(losses):
        edges = sigma**2 * _log_of_sampled(q, losses) + 0.5
        log_q, log_p = log_normal_mass(edges / sigma), log_normal_mass((edges - 1) / sigma)
        return log_mix(log_q, log_p, q), log_q, _log_sampled(q, _difference(log_p, log_q))

    center = spread_of(lambda x: ratio(x), sigma, [(1 - q, 0.0), (q, 1.0)])[0]
    places = dots(lowest, highest, interval, center, 1 / (80 * sigma))
    return connect(masses, lowest, highest, interval, places, _slack(q))


def poisson_gaussian_replaced(
    noise_multiplier: float, sampling_probability: float, interval: float
) -> LossDistribution:
    r"""$(1 - q) N(0, \sigma^2) + q N(1, \sigma^2)$ against $(1 - q) N(0, \sigma^2) + q N(-1, \sigma^2)$.

    ??? cite "Reference"

        Lebeda et al., *Avoiding pitfalls for privacy accounting of subsampled mechanisms under composition*, 2024 (arXiv:2405.20769).
    """
    sigma, q = noise_multiplier, sampling_probability
    if q == 1:
        return poisson_gaussian(sigma / 2, 1.0, interval)
    log_odds = math.log(q) - math.log1p(-q) - 0.5 / sigma**2
    highest = math.ceil(float(_replaced_ratio(sigma, q)(np.array(1 + _REACH * sigma))) / interval)

    def masses(losses):
        half = np.abs(losses) / 2
        with np.errstate(divide="ignore"):
            # log of sinh(half) over the odds
            log_ratio = half + np.log(-np.expm1(-2 * half) / 2) - log_odds
        inverse = np.where(log_ratio > 20, log_ratio + math.log(2), np.arcsinh(np.exp(np.minimum(log_ratio, 20))))
        edges = sigma**2 * np.sign(losses) * (half + inverse)
        zero, right, left = (log_normal_mass((edges + shift) / sigma) for shift in (0.0, -1.0, 1.0))
        gains = (_log_sampled(q, _difference(moved, zero)) for moved in (right, left))
        return log_mix(zero, right, q), log_mix(zero, left, q), _difference(*gains)

    places = dots(-highest, highest, interval, 0.0, 1 / (80 * sigma))
    pmf = connect(masses, -highest, highest, interval, places, 2 * _slack(q)).remove
    return LossDistribution(pmf, pmf)


def poisson_laplace(noise_multiplier: float, sampling_probability: float, interval: float) -> LossDistribution:
    r"""$(1 - q) L(0, b) + q L(1, b)$ against $L(0, b)$, Laplace distributions of scale $b$.

    Before sampling the loss is $1 / b$ with probability 1/2, $-1 / b$ with probability $e^{-1 / b} / 2$, and what lies between has density
    $e^{(l - 1 / b) / 2} / 4$: all under $P$; under $Q$ the other way round.
    """
    b, q = noise_multiplier, sampling_probability
    most = 1 / b
    above, below = (float(_log_sampled(q, l)) for l in (most, -most))
    lowest, highest = math.floor(below / interval), math.ceil(above / interval)

    def masses(losses):
        # dots as losses before sampling; the atoms lie at the ends, in the cells that reach them
        edges = np.clip(_log_of_sampled(q, losses), -most, most)
        edges = np.where(losses >= above, most, np.where(losses <= below, -most, edges))
        with np.errstate(divide="ignore"):
            width = np.log(-np.expm1(-np.diff(edges) / 2) / 2)
        log_p = np.concatenate([[-np.inf], (edges[1:] - most) / 2 + width, [-np.inf]])
        log_q = np.concatenate([[-np.inf], -(edges[:-1] + most) / 2 + width, [-np.inf]])
        low, high = -most - math.log(2), -math.log(2)
        for log_mass, first, last in ((log_p, low, high), (log_q, high, low)):
            log_mass[1] = np.logaddexp(log_mass[1], first)
            log_mass[-2] = np.logaddexp(log_mass[-2], last)
        return log_mix(log_q, log_p, q), log_q, _log_sampled(q, _difference(log_p, log_q))

    # the atoms sit in cells of their own width
    places = (
        np.union1d(dots(lowest, highest, interval, 0.0), [lowest + 1, highest - 1]) if highest - lowest > 2 else None
    )
    return connect(masses, lowest, highest, interval, places, _slack(q))


def laplace_epsilon(noise_multiplier: float, sampling_probability: float = 1.0) -> float:
    r"""The largest loss, $\log(1 + q (e^{1 / b} - 1))$: removing a unit is the worse direction."""
    return float(_log_sampled(sampling_probability, 1 / noise_multiplier)) * (1 + 1e-15)


def gaussian_scale(noise_multiplier: float, sampling_probability: float, is_replaced: bool) -> tuple[float, float]:
    """Standard deviation of the privacy loss, of the worse direction, and the extent of its support; by quadrature, for grids."""
    sigma, q = noise_multiplier, sampling_probability
    if is_replaced:
        ratio = _replaced_ratio(sigma, q)
        spread = spread_of(ratio, sigma, [(1 - q, 0.0), (q, 1.0)])[1]
        return min(spread, 2 / sigma), 2 * float(ratio(np.array(1 + 8.5 * sigma)))
    ratio = lambda x: _log_sampled(q, (2 * x - 1) / (2 * sigma**2))
    spread = max(spread_of(ratio, sigma, side)[1] for side in ([(1 - q, 0.0), (q, 1.0)], [(1.0, 0.0)]))
    # with little noise, those who are sampled and those who are not lie further apart than either is wide
    return min(spread, 2 / sigma), float(ratio(1 + 8.5 * sigma) - ratio(-8.5 * sigma))


def _replaced_ratio(sigma: float, q: float) -> Callable[[np.ndarray], np.ndarray]:
    """The loss of a replaced example, as a function of the output."""

    def ratio(x):
        right, left = ((sign * 2 * x - 1) / (2 * sigma**2) for sign in (1, -1))
        return _log_sampled(q, right) - _log_sampled(q, left)

    return ratio


def laplace_scale(noise_multiplier: float, sampling_probability: float) -> tuple[float, float]:
    """As `gaussian_scale`, of Laplace noise."""
    q, most = sampling_probability, 1 / noise_multiplier
    losses = np.linspace(-most, most, 201)
    mass = np.exp((losses - most) / 2) * (most / 400)
    mass[[0, -1]] += math.exp(-most) / 2, 0.5
    sampled, mass = _log_sampled(q, losses), (1 - q) * mass[::-1] + q * mass
    mean = _sum(sampled, mass) / float(mass.sum())
    spread = math.sqrt(_sum((sampled - mean) ** 2, mass) / float(mass.sum()))
    return spread, float(sampled[-1] - sampled[0])


def spread_of(
    ratio: Callable[[np.ndarray], np.ndarray], sigma: float, components: list[tuple[float, float]]
) -> tuple[float, float]:
    """Mean and standard deviation of a loss under a mixture of normal distributions, by quadrature."""
    z = np.linspace(-9, 9, 361)
    normal = np.exp(-(z**2) / 2)
    normal /= normal.sum()
    weights = np.concatenate([weight * normal for weight, _ in components])
    losses = np.concatenate([ratio(place + sigma * z) for _, place in components])
    mean = _sum(weights, losses)
    return mean, math.sqrt(_sum(weights, (losses - mean) ** 2))


def _log_sampled(q: float, loss: "np.ndarray | float") -> np.ndarray:
    r"""$\log(1 + q (e^l - 1))$ with all its digits."""
    loss = np.asarray(loss)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if q == 1:
            return loss
        large = loss + math.log(q) + np.log1p((1 - q) / q * np.exp(-np.maximum(loss, 1.0)))
        return np.where(loss > 1, large, np.log1p(q * np.expm1(np.minimum(loss, 1.0))))


def _log_of_sampled(q: float, losses: np.ndarray) -> np.ndarray:
    r"""The inverse, $\log((e^l - 1 + q) / q)$, small differences kept; $-\infty$ below its range."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(
            losses < 1,
            np.log1p(np.maximum(np.expm1(np.minimum(losses, 1.0)) / q, -1.0)),
            losses + np.log1p((q - 1) * np.exp(-np.maximum(losses, 1.0))) - math.log(q),
        )


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return a - b


def _slack(q: float) -> float:
    """Rounding of the log of a ratio: that of normal masses in a cell, of which sampling passes on its share."""
    return 2e-13 * q + 4 * _UNIT


def from_profile(profile: Callable[[np.ndarray], np.ndarray], highest: float, interval: float) -> LossDistribution:
    r"""The symmetric distribution whose $\delta(\varepsilon)$ connects the dots of a profile given for $\varepsilon \ge 0$.

    The profile must be that of a symmetric relation, or a bound with the shape of one: convex in $e^\varepsilon$. For negative arguments it is
    $\delta(-\varepsilon) = 1 - e^{-\varepsilon} + e^{-\varepsilon} \delta(\varepsilon)$.
    """
    top = math.ceil(highest / interval)
    epsilons = np.arange(top + 1) * interval
    deltas = np.minimum.accumulate(np.clip(profile(epsilons), 0.0, 1.0))
    # mass between neighbouring dots: the slopes of delta in e^epsilon, and differences of slopes are masses under Q
    slopes = np.diff(deltas) / -(np.exp(epsilons[:-1]) * math.expm1(interval))  # Q(loss > dots), at epsilon >= 0
    slopes = np.maximum.accumulate(slopes[::-1])[::-1]  # rounding makes them wiggle by 1e-12: up
    q_above = np.concatenate([slopes, [0.0]])
    mass = np.zeros(2 * top + 1)
    mass[top + 1 :] = -np.diff(q_above) * np.exp(epsilons[1:])
    # by symmetry, P's mass at -epsilon is Q's at epsilon
    mass[:top] = (mass[top + 1 :] * np.exp(-epsilons[1:]))[::-1]
    infinity = float(deltas[-1])
    mass[top] = max(0.0, 1.0 - infinity - float(mass.sum()))
    pmf = LossPmf(interval, -top, mass, infinity)
    return LossDistribution(pmf, pmf)


def from_dp_accounting(distribution: "object") -> LossDistribution:
    """The same numbers as a `PrivacyLossDistribution` of `dp_accounting`."""

    def pmf(theirs) -> LossPmf:
        dense = theirs.to_dense_pmf()
        return LossPmf(
            dense._discretization, int(dense._lower_loss), np.array(dense._probs), float(dense._infinity_mass)
        )

    remove = pmf(distribution._pmf_remove)  # pyright: ignore[reportAttributeAccessIssue]
    if distribution._symmetric:  # pyright: ignore[reportAttributeAccessIssue]
        return LossDistribution(remove, remove)
    return LossDistribution(remove, pmf(distribution._pmf_add))  # pyright: ignore[reportAttributeAccessIssue]


@functools.lru_cache(maxsize=8)
def nothing(interval: float) -> LossDistribution:
    """The loss of a mechanism that says nothing."""
    pmf = LossPmf(interval, 0, np.ones(1), 0.0)
    return LossDistribution(pmf, pmf)
