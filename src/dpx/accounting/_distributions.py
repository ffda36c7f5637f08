"""Privacy loss distributions on a grid: composition, and the delta and epsilon that they imply, all rounded against us."""

import functools
import math
from collections.abc import Callable

import equinox as eqx
import numpy as np

_TAIL = 1e-15
_ROUNDING = 2.0**-50
_REACH = 8.6  # a normal variable exceeds it with probability 4e-18
_MANY = 2**14
_RESOLUTION = (
    1 / 80
)  # of a block's standard deviation: the spread that rounding adds is a hundred-thousandth of the variance


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
        return float(self.infinity - np.dot(np.expm1(np.minimum(epsilon - losses, 0.0)), mass))

    def epsilon(self, delta: float) -> float:
        r"""The least $\varepsilon \ge 0$ with `delta(epsilon) <= delta`; infinite if there is none."""
        if self.infinity > delta:
            return math.inf
        start = max(0, -self.lowest)
        mass = self.mass[start:]
        if not len(mass):
            return 0.0
        losses = (np.arange(len(mass)) + self.lowest + start) * self.interval
        # at a loss l: P(L >= l), and the same under the other distribution times e^l; exponents are kept in range where they matter
        middle = min(losses[0] + 350.0, losses[-1])
        upper = self.infinity + np.cumsum(mass[::-1])[::-1]
        lower = np.cumsum((mass * np.exp(middle - losses))[::-1])[::-1]
        excess = upper - np.exp(np.minimum(losses - middle, 700.0)) * lower > delta
        # the last loss at which delta is exceeded, and the one above it, between which delta is affine in e^epsilon
        last = int(np.flatnonzero(excess)[-1]) if excess.any() else -1
        if last < 0 and losses[0] == 0:
            return 0.0
        high = min(last + 1, len(mass) - 1)
        if not (lower[high] > 0 and upper[high] > delta and losses[high] < 700):
            return float(losses[high])
        inside = middle + math.log((upper[high] - delta) / lower[high])
        return min(float(losses[high]), max(0.0, inside) * (1 + 1e-12))

    def coarsen(self, factor: int) -> "LossPmf":
        """On a grid `factor` times as wide: every loss is split between its neighbours so that both distributions keep their mass."""
        if factor == 1:
            return self
        index = np.arange(self.lowest, self.lowest + len(self.mass))
        whole = index // factor
        wide = factor * self.interval
        up = np.expm1((whole * factor - index) * self.interval) / math.expm1(-wide)
        lowest, size = int(whole[0]), int(whole[-1] - whole[0]) + 2
        mass = np.bincount(whole - lowest, (1 - up) * self.mass, size)
        mass += np.bincount(whole + 1 - lowest, up * self.mass, size)
        return LossPmf(wide, lowest, mass, self.infinity)

    def compose(self, other: "LossPmf") -> "LossPmf":
        """The loss of both mechanisms together, on the wider of their two grids."""
        first, second = (self, other) if self.interval >= other.interval else (other, self)
        factor = round(first.interval / second.interval)
        if abs(first.interval - factor * second.interval) > 1e-9 * first.interval:
            raise ValueError(f"Privacy losses on grids of {self.interval} and {other.interval} cannot be composed.")
        second = second.coarsen(factor)
        size = len(first.mass) + len(second.mass) - 1
        length = _fast_length(size)
        product = np.fft.rfft(first.mass, length) * np.fft.rfft(second.mass, length)
        mass = np.fft.irfft(product, length)[:size]
        infinity = self.infinity + other.infinity - self.infinity * other.infinity + 2 * _ROUNDING
        return _trimmed(LossPmf(first.interval, first.lowest + second.lowest, mass, infinity))

    def self_compose(self, count: int) -> "LossPmf":
        """The loss of `count` such mechanisms together. Many steps go in blocks, on a grid as wide as blocks allow, so that a
        million steps cost milliseconds."""
        if count < _MANY:
            return self._power(count)
        blocks = next((n for n in range(128, 512) if count % n == 0), 256)  # without a rest, if possible
        block = count // blocks
        first = self._power(block)
        factor = int(first.standard_deviation * _RESOLUTION / self.interval)
        if factor < 2:
            return self._power(count)
        total = first.coarsen(factor)._power(blocks)
        return total.compose(self._power(rest)) if (rest := count - block * blocks) else total

    @property
    def standard_deviation(self) -> float:
        """Of the finite losses."""
        index = np.arange(len(self.mass), dtype=np.float64)
        total = float(self.mass.sum())
        mean = float(np.dot(index, self.mass)) / total
        return self.interval * math.sqrt(max(0.0, float(np.dot((index - mean) ** 2, self.mass)) / total))

    def _power(self, count: int) -> "LossPmf":
        """By one FFT over a window that the tails leave with probability 1e-15 (Chernoff)."""
        if count == 1:
            return self
        first, last = self._window(count)
        length = _fast_length(last - first + 1)
        folded = np.bincount(np.arange(len(self.mass)) % length, self.mass, length)
        mass = np.fft.irfft(np.fft.rfft(folded) ** count, length)
        mass = np.roll(mass, -(first % length))[: last - first + 1]
        infinity = -math.expm1(count * math.log1p(-self.infinity)) if self.infinity < 1 else 1.0
        # a power of a number of modulus one, rounded: what the tails see of it is absolute
        infinity = min(1.0, infinity + _TAIL + count * _ROUNDING)
        return _trimmed(LossPmf(self.interval, self.lowest * count + first, mass, infinity))

    def _window(self, count: int) -> tuple[int, int]:
        """Between which sums of `count` indices, from the lowest, all but 1e-15 of the mass lies."""
        index = np.arange(len(self.mass), dtype=np.float64)
        mass = np.maximum(self.mass, 0.0)
        total = float(mass.sum())
        mean = float(np.dot(index, mass)) / total
        variance = max(float(np.dot((index - mean) ** 2, mass)) / total, 1e-6)
        room = math.log(2 / _TAIL)
        centered = index - mean

        def reach(order: float, sign: float) -> float:
            exponent = sign * order * centered
            top = float(exponent.max())
            moment = top + math.log(float(np.dot(np.exp(exponent - top), mass)))
            return (count * moment + room) / order

        def least(sign: float) -> float:
            # the best order if the sum were normal; heavy tails want a smaller one. The reach is quasi-convex in the order.
            order = math.sqrt(2 * room / (count * variance))
            best = reach(order, sign)
            while order > 1e-12 and (smaller := reach(order / 2, sign)) < best:
                order, best = order / 2, smaller
            return min(best, reach(1.4 * order, sign), reach(order / 1.4, sign))

        first = max(0, math.floor(count * mean - least(-1.0)))
        last = min((len(mass) - 1) * count, math.ceil(count * mean + least(1.0)))
        return first, max(first, last)


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


def _trimmed(pmf: LossPmf) -> LossPmf:
    """Without the tails that weigh less than 1e-15: the lower one moves up to the first loss that is kept, the upper one to infinity."""
    below = np.cumsum(np.maximum(pmf.mass, 0.0))
    above = np.cumsum(np.maximum(pmf.mass[::-1], 0.0))
    first = int(np.searchsorted(below, _TAIL / 2))
    last = len(pmf.mass) - int(np.searchsorted(above, _TAIL / 2))
    if first >= last - 1:
        return pmf
    mass = pmf.mass[first:last].copy()
    mass[0] += float(np.sum(pmf.mass[:first]))
    return LossPmf(pmf.interval, pmf.lowest + first, mass, pmf.infinity + max(0.0, float(pmf.mass[last:].sum())))


class LossDistribution(eqx.Module):
    r"""The privacy loss of removing one unit and of adding one, and what coupling costs on top.

    **Arguments:**

    - `remove`, `add`: the losses; the same object where the relation is symmetric.
    - `coupling`: probability $\tau$ with which the mechanism differs from the one that the losses are those of; it adds
        $\tau (1 + e^\varepsilon)$ to $\delta$.
    """

    remove: LossPmf
    add: LossPmf
    coupling: float = 0.0

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
        return min(1.0, max(0.0, worst))

    def get_epsilon(self, delta: float) -> float:
        r"""An upper bound on the least $\varepsilon$ at `delta`; infinite if there is none."""

        def uncoupled(delta: float) -> float:
            if not delta > 0:
                return math.inf
            epsilon = self.remove.epsilon(delta)
            return epsilon if self.is_symmetric else max(epsilon, self.add.epsilon(delta))

        return with_coupling(uncoupled, delta, self.coupling)

    def compose(self, other: "LossDistribution") -> "LossDistribution":
        """Both mechanisms together."""
        remove = self.remove.compose(other.remove)
        add = remove if self.is_symmetric and other.is_symmetric else self.add.compose(other.add)
        return LossDistribution(remove, add, self.coupling + other.coupling)

    def self_compose(self, count: int) -> "LossDistribution":
        """`count` such mechanisms together."""
        remove = self.remove.self_compose(count)
        add = remove if self.is_symmetric else self.add.self_compose(count)
        return LossDistribution(remove, add, self.coupling * count)


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


def connect(
    losses_to_masses: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], lowest: int, highest: int, interval: float
) -> LossDistribution:
    r"""The pessimistic distributions of a pair $(P, Q)$, given the logarithms of the masses that $P$ and $Q$ put between neighbouring losses.

    The ratio $v = dP/dQ$ within a cell is moved to the cell's two ends, so that its mean under $Q$ stays. Both
    $\delta_\text{remove} = E_Q[(v - e^\varepsilon)_+]$ and $\delta_\text{add} = E_Q[(1 - e^\varepsilon v)_+]$ are convex in $v$, hence grow.

    **Arguments:**

    - `losses_to_masses`: takes the `n` losses of the grid and gives the log masses of `P` and of `Q` in the `n + 1` cells that they make.
    - `lowest`, `highest`: the grid, in units of `interval`.
    """
    losses = np.arange(lowest, highest + 1) * interval
    log_p, log_q = losses_to_masses(losses)
    p, q = np.exp(log_p), np.exp(log_q)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        up = -np.expm1(log_q[1:-1] + losses[:-1] - log_p[1:-1]) / -math.expm1(-interval)
        up = np.clip(np.nan_to_num(up, nan=1.0), 0.0, 1.0)  # share of P's mass that goes to the upper end
        # where P has lost its digits, the mass counts at the upper end; Q's share follows from the same split
        above_q = np.where(q[1:-1] > 0, np.clip(up * p[1:-1] * np.exp(-losses[1:]), 0.0, q[1:-1]), 0.0)
        bottom = min(float(q[0]), float(np.exp(log_p[0] - losses[0])))
        top = min(float(p[-1]), float(np.exp(log_q[-1] + losses[-1])))
    mass_p, mass_q = np.zeros(len(losses)), np.zeros(len(losses))
    mass_p[1:] += up * p[1:-1]
    mass_p[:-1] += (1 - up) * p[1:-1]
    mass_q[1:] += above_q
    mass_q[:-1] += q[1:-1] - above_q
    mass_p[0] += p[0]
    mass_p[-1] += top
    mass_q[0] += bottom
    mass_q[-1] += q[-1]
    remove = LossPmf(interval, lowest, mass_p, float(p[-1]) - top)
    add = LossPmf(interval, -highest, mass_q[::-1], float(q[0]) - bottom)
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
    ratio = lambda x: np.logaddexp(math.log1p(-q) if q < 1 else -np.inf, math.log(q) + (2 * x - 1) / (2 * sigma**2))
    highest = math.ceil(float(ratio(1 + _REACH * sigma)) / interval)
    # no loss is below log(1 - q), so that nothing lies outside the grid there
    lowest = math.floor(max(float(ratio(-_REACH * sigma)), math.log1p(-q) if q < 1 else -math.inf) / interval)

    def masses(losses):
        with np.errstate(divide="ignore", invalid="ignore"):
            # (e^l - 1 + q) / q, small differences kept
            excess = np.where(
                losses < 1,
                np.log1p(np.maximum(np.expm1(losses) / q, -1.0)),
                losses + np.log1p((q - 1) * np.exp(-losses)) - math.log(q),
            )
        edges = sigma**2 * excess + 0.5
        log_q = log_normal_mass(edges / sigma)
        return log_mix(log_q, log_normal_mass((edges - 1) / sigma), q), log_q

    return connect(masses, lowest, highest, interval)


def poisson_gaussian_replaced(
    noise_multiplier: float, sampling_probability: float, interval: float
) -> LossDistribution:
    r"""$(1 - q) N(0, \sigma^2) + q N(1, \sigma^2)$ against $(1 - q) N(0, \sigma^2) + q N(-1, \sigma^2)$.

    ??? cite "Reference"

        Lebeda et al., *Avoiding pitfalls for privacy accounting of subsampled mechanisms under composition*, 2024 (arXiv:2405.20769).
    """
    sigma, q = noise_multiplier, sampling_probability
    log_odds = math.log(q) - math.log1p(-q) - 0.5 / sigma**2
    top = (1 + _REACH * sigma) / sigma**2
    highest = math.ceil(float(np.logaddexp(0, log_odds + top) - np.logaddexp(0, log_odds - top)) / interval)

    def masses(losses):
        half = np.abs(losses) / 2
        with np.errstate(divide="ignore"):
            log_ratio = half + np.log(-np.expm1(-2 * half) / 2) - log_odds  # of sinh(half) over the odds
        inverse = np.where(log_ratio > 20, log_ratio + math.log(2), np.arcsinh(np.exp(np.minimum(log_ratio, 20))))
        edges = sigma**2 * np.sign(losses) * (half + inverse)
        zero, right, left = (log_normal_mass((edges + shift) / sigma) for shift in (0.0, -1.0, 1.0))
        return log_mix(zero, right, q), log_mix(zero, left, q)

    pmf = connect(masses, -highest, highest, interval).remove
    return LossDistribution(pmf, pmf)


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
