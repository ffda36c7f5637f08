"""From the masses of a pair of distributions to its pessimistic privacy loss, and the normal distribution with all its digits."""

import math
from collections.abc import Callable

import numpy as np

from ._distribution import LossDistribution
from ._pmf import UNIT, LossPmf, sum_of_products

_RELATIVE = 1 / 512  # distance between dots, over their distance from the mean


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
        slack = slack + 4 * UNIT * np.abs(losses[:-1])
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


def spread_of(
    ratio: Callable[[np.ndarray], np.ndarray], sigma: float, components: list[tuple[float, float]]
) -> tuple[float, float]:
    """Mean and standard deviation of a loss under a mixture of normal distributions, by quadrature."""
    z = np.linspace(-9, 9, 361)
    normal = np.exp(-(z**2) / 2)
    normal /= normal.sum()
    weights = np.concatenate([weight * normal for weight, _ in components])
    losses = np.concatenate([ratio(place + sigma * z) for _, place in components])
    mean = sum_of_products(weights, losses)
    return mean, math.sqrt(sum_of_products(weights, (losses - mean) ** 2))


def log_sampled(q: float, loss: "np.ndarray | float") -> np.ndarray:
    r"""$\log(1 + q (e^l - 1))$ with all its digits."""
    loss = np.asarray(loss)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if q == 1:
            return loss
        large = loss + math.log(q) + np.log1p((1 - q) / q * np.exp(-np.maximum(loss, 1.0)))
        return np.where(loss > 1, large, np.log1p(q * np.expm1(np.minimum(loss, 1.0))))


def log_of_sampled(q: float, losses: np.ndarray) -> np.ndarray:
    r"""The inverse, $\log((e^l - 1 + q) / q)$, small differences kept; $-\infty$ below its range."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(
            losses < 1,
            np.log1p(np.maximum(np.expm1(np.minimum(losses, 1.0)) / q, -1.0)),
            losses + np.log1p((q - 1) * np.exp(-np.maximum(losses, 1.0))) - math.log(q),
        )


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return a - b


def slack_of_sampled(q: float) -> float:
    """Rounding of the log of a ratio: that of normal masses in a cell, of which sampling passes on its share."""
    return 2e-13 * q + 4 * UNIT


def gaussian_profile(epsilons: np.ndarray, noise_multiplier: float) -> np.ndarray:
    r"""$\delta(\varepsilon)$ of a Gaussian mechanism (Balle and Wang 2018), with the digits of its tail."""
    from scipy.special import log_ndtr

    middle = epsilons * noise_multiplier
    first = log_ndtr(0.5 / noise_multiplier - middle)
    second = epsilons + log_ndtr(-0.5 / noise_multiplier - middle)
    return np.exp(first) * -np.expm1(np.minimum(second - first, 0.0))
