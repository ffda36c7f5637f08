"""Mixtures of Gaussians."""

import math
from typing import Any

import numpy as np
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent

from .._rules import loss_rule, unchanged
from ._connect import connect, dots, log_normal_mass, spread_of
from ._distribution import LossDistribution
from ._foreign import their_divergences, their_loss

_DUST = 4e-18


def mixture_scale(standard_deviation: float, places: np.ndarray, log_weights: np.ndarray) -> tuple[float, float]:
    """Standard deviation and extent of the privacy loss, for its grid."""
    sigma = standard_deviation
    ratio = lambda x: np.logaddexp.reduce(
        log_weights[:, None] + places[:, None] * (2 * x - places[:, None]) / (2 * sigma**2)
    )
    sides = (list(zip(np.exp(log_weights).tolist(), places.tolist(), strict=True)), [(1.0, 0.0)])
    low, high = ratio(np.array([-8.5 * sigma, float(places.max()) + 8.5 * sigma])).tolist()
    return max(spread_of(ratio, sigma, side)[1] for side in sides), high - low


def mixture_gaussian(
    standard_deviation: float, places: np.ndarray, log_weights: np.ndarray, interval: float
) -> LossDistribution:
    r"""$\sum_k w_k N(c_k, \sigma^2)$ against $N(0, \sigma^2)$, for ascending $c_k \ge 0$."""
    from scipy.stats import norm

    sigma = standard_deviation
    present, log_weights = places[np.isfinite(log_weights)], log_weights[np.isfinite(log_weights)]

    def log_terms(x: np.ndarray) -> np.ndarray:
        return log_weights[:, None] + present[:, None] * (2 * x - present[:, None]) / (2 * sigma**2)

    ratio = lambda x: float(np.logaddexp.reduce(log_terms(np.array([x]))[:, 0]))
    tail = lambda x: float(np.dot(np.exp(log_weights), norm.sf((x - present) / sigma)))
    low, high = 0.0, float(present[-1]) + 10 * sigma
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle) > _DUST else (low, middle)
    floor = float(log_weights[0]) if present[0] == 0 else -math.inf  # no loss is below
    highest = math.ceil(ratio(high) / interval)
    lowest = math.floor(max(floor, ratio(-8.6 * sigma)) / interval)

    def edges_of(losses: np.ndarray) -> np.ndarray:
        """Where the likelihood ratio is e^loss: Newton's method on a convex increasing function, from the right, where it cannot overshoot."""
        reachable = losses > floor
        wanted = losses[reachable]
        excess = wanted + np.log(-np.expm1(floor - wanted))  # of e^loss over the mass of those who are absent
        ks, ws = present[present > 0, None], log_weights[present > 0, None]
        x = np.min((excess - ws) * sigma**2 / ks + ks / 2, axis=0)
        for _ in range(100):
            terms = log_terms(x)
            value = np.logaddexp.reduce(terms, axis=0)
            slope = np.exp(terms - value).T @ present / sigma**2
            step = np.maximum(value - wanted, 0.0) / slope
            x = x - step
            if np.all(step <= 1e-13 * (1 + np.abs(x))):
                break
        return np.concatenate([np.full(len(losses) - len(wanted), -np.inf), x])

    def masses(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        edges = edges_of(losses)
        log_p = np.full(len(losses) + 1, -np.inf)
        for k, log_weight in zip(present, log_weights, strict=True):
            log_p = np.logaddexp(log_p, log_weight + log_normal_mass((edges - k) / sigma))
        return log_p, log_normal_mass(edges / sigma)

    with np.errstate(all="ignore"):
        # the loss is no steeper than that of the farthest place alone
        widest = float(present[-1]) / (80 * sigma)
        return connect(masses, lowest, highest, interval, dots(lowest, highest, interval, 0.0, widest))


def _mixture(event: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ascending places and the logarithms of their weights."""
    places, index = np.unique(np.asarray(event.sensitivities, np.float64), return_inverse=True)
    weights = np.bincount(index, event.sampling_probs, len(places))
    return places[weights > 0], np.log(weights[weights > 0] / weights.sum())


def _scale(event: Any, adjacency: str) -> tuple[float, float]:
    del adjacency
    return mixture_scale(event.standard_deviation, *_mixture(event))


@loss_rule(MixtureOfGaussiansDpEvent, scale=_scale, renyi=their_divergences, with_side_queries=unchanged)
def _loss(event: Any, adjacency: str, interval: float) -> LossDistribution:
    if adjacency == "replace_one":
        return their_loss(event, adjacency, interval)
    return mixture_gaussian(event.standard_deviation, *_mixture(event), interval)
