"""The Gaussian mechanism, and its losses on Poisson samples."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from dp_accounting import GaussianDpEvent, get_epsilon_gaussian

from .._rules import loss_rule, unchanged
from ._connect import (
    connect,
    difference,
    dots,
    gaussian_profile,
    log_mix,
    log_normal_mass,
    log_of_sampled,
    log_sampled,
    slack_of_sampled,
    spread_of,
)
from ._distribution import LossDistribution, symmetric
from ._foreign import divergences_at_one
from ._pair import NOTHING, Attacks, GaussianMixturePair, both

_REACH = 10.0  # a normal variable exceeds it with probability 8e-24


def poisson_gaussian(noise_multiplier: float, sampling_probability: float, interval: float) -> LossDistribution:
    r"""$(1 - q) N(0, \sigma^2) + q N(1, \sigma^2)$ against $N(0, \sigma^2)$."""
    sigma, q = noise_multiplier, sampling_probability
    ratio = lambda x: log_sampled(q, (2 * x - 1) / (2 * sigma**2))
    highest = math.ceil(float(ratio(1 + _REACH * sigma)) / interval)
    # no loss is below log(1 - q), so that nothing lies outside the grid there
    lowest = math.floor(max(float(ratio(-_REACH * sigma)), math.log1p(-q) if q < 1 else -math.inf) / interval)

    def masses(losses):
        edges = sigma**2 * log_of_sampled(q, losses) + 0.5
        log_q, log_p = log_normal_mass(edges / sigma), log_normal_mass((edges - 1) / sigma)
        return log_mix(log_q, log_p, q), log_q, log_sampled(q, difference(log_p, log_q))

    center = spread_of(lambda x: ratio(x), sigma, [(1 - q, 0.0), (q, 1.0)])[0]
    places = dots(lowest, highest, interval, center, 1 / (80 * sigma))
    return connect(masses, lowest, highest, interval, places, slack_of_sampled(q))


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
        gains = (log_sampled(q, difference(moved, zero)) for moved in (right, left))
        return log_mix(zero, right, q), log_mix(zero, left, q), difference(*gains)

    places = dots(-highest, highest, interval, 0.0, 1 / (80 * sigma))
    pmf = connect(masses, -highest, highest, interval, places, 2 * slack_of_sampled(q)).remove
    return LossDistribution(pmf, pmf)


def gaussian_scale(noise_multiplier: float, sampling_probability: float, is_replaced: bool) -> tuple[float, float]:
    """Standard deviation of the privacy loss, of the worse direction, and the extent of its support; by quadrature, for grids."""
    sigma, q = noise_multiplier, sampling_probability
    if is_replaced:
        ratio = _replaced_ratio(sigma, q)
        spread = spread_of(ratio, sigma, [(1 - q, 0.0), (q, 1.0)])[1]
        return min(spread, 2 / sigma), 2 * float(ratio(np.array(1 + 8.5 * sigma)))
    ratio = lambda x: log_sampled(q, (2 * x - 1) / (2 * sigma**2))
    spread = max(spread_of(ratio, sigma, side)[1] for side in ([(1 - q, 0.0), (q, 1.0)], [(1.0, 0.0)]))
    # with little noise, those who are sampled and those who are not lie further apart than either is wide
    return min(spread, 2 / sigma), float(ratio(1 + 8.5 * sigma) - ratio(-8.5 * sigma))


def _replaced_ratio(sigma: float, q: float) -> Callable[[np.ndarray], np.ndarray]:
    """The loss of a replaced example, as a function of the output."""

    def ratio(x):
        right, left = ((sign * 2 * x - 1) / (2 * sigma**2) for sign in (1, -1))
        return log_sampled(q, right) - log_sampled(q, left)

    return ratio


def sampled_gaussian(multiplier: float, probability: float, other: float) -> Attacks:
    """The example takes part with that probability; it adds 1, and in the other data set `other`."""
    absent = ((1 - probability, 0.0),) if probability < 1 else ()
    first = (*absent, (probability, 1.0))
    second = (*absent, (probability, other)) if other else ((1.0, 0.0),)
    return both(GaussianMixturePair(multiplier, first, second))


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """From below, by the exact formula (Balle and Wang 2018)."""
    multiplier = noise_multiplier * (1 + 1e-9)
    found = max(0.0, float(get_epsilon_gaussian(multiplier, delta)) * (1 - 1e-9) - 1e-12)
    # its own tolerance is absolute: what it finds is checked, and lowered if need be
    for _ in range(60):
        if found == 0 or gaussian_profile(np.array([found]), multiplier)[0] > delta * (1 + 1e-11):
            return found
        found = max(0.0, found * (1 - 1e-7) - 1e-12)
    return 0.0


def own_multiplier(event: Any, adjacency: str) -> float:
    """The noise multiplier, for what a neighbour moves: what is replaced moves a sum twice as far."""
    return event.noise_multiplier / (2 if adjacency == "replace_one" else 1)


def _scale(event: Any, adjacency: str) -> tuple[float, float]:
    return gaussian_scale(own_multiplier(event, adjacency), 1.0, False)


def _renyi(event: Any, adjacency: str, orders: np.ndarray) -> np.ndarray:
    return divergences_at_one(GaussianDpEvent(own_multiplier(event, adjacency)), adjacency, orders)


def _attacks(event: Any, adjacency: str) -> Attacks:
    if not event.noise_multiplier > 0:
        return NOTHING
    return sampled_gaussian(event.noise_multiplier, 1.0, -1.0 if adjacency == "replace_one" else 0.0)


def _attained(event: Any, count: int, adjacency: str, delta: float) -> float:
    return gaussian_epsilon(event.noise_multiplier / math.sqrt(count) / (2 if adjacency == "replace_one" else 1), delta)


@loss_rule(
    GaussianDpEvent, scale=_scale, renyi=_renyi, attacks=_attacks, attained=_attained, with_side_queries=unchanged
)
def _loss(event: Any, adjacency: str, interval: float) -> LossDistribution:
    # a Gaussian's losses in either direction have one distribution
    return symmetric(poisson_gaussian(own_multiplier(event, adjacency), 1.0, interval))
