"""The Laplace mechanism, and its losses on Poisson samples."""

import math
from typing import Any

import numpy as np
from dp_accounting import LaplaceDpEvent

from .._rules import loss_rule, unchanged
from ._connect import connect, difference, dots, log_mix, log_of_sampled, log_sampled, slack_of_sampled
from ._distribution import LossDistribution, symmetric
from ._foreign import their_divergences
from ._gaussian import own_multiplier
from ._pair import NOTHING, Attacks, LaplaceMixturePair, both
from ._pmf import sum_of_products


def poisson_laplace(noise_multiplier: float, sampling_probability: float, interval: float) -> LossDistribution:
    r"""$(1 - q) L(0, b) + q L(1, b)$ against $L(0, b)$, Laplace distributions of scale $b$.

    Before sampling the loss is $1 / b$ with probability 1/2, $-1 / b$ with probability $e^{-1 / b} / 2$, and what lies between has density
    $e^{(l - 1 / b) / 2} / 4$: all under $P$; under $Q$ the other way round.
    """
    b, q = noise_multiplier, sampling_probability
    most = 1 / b
    above, below = (float(log_sampled(q, l)) for l in (most, -most))
    lowest, highest = math.floor(below / interval), math.ceil(above / interval)

    def masses(losses):
        # dots as losses before sampling; the atoms lie at the ends, in the cells that reach them
        edges = np.clip(log_of_sampled(q, losses), -most, most)
        edges = np.where(losses >= above, most, np.where(losses <= below, -most, edges))
        with np.errstate(divide="ignore"):
            width = np.log(-np.expm1(-np.diff(edges) / 2) / 2)
        log_p = np.concatenate([[-np.inf], (edges[1:] - most) / 2 + width, [-np.inf]])
        log_q = np.concatenate([[-np.inf], -(edges[:-1] + most) / 2 + width, [-np.inf]])
        low, high = -most - math.log(2), -math.log(2)
        for log_mass, first, last in ((log_p, low, high), (log_q, high, low)):
            log_mass[1] = np.logaddexp(log_mass[1], first)
            log_mass[-2] = np.logaddexp(log_mass[-2], last)
        return log_mix(log_q, log_p, q), log_q, log_sampled(q, difference(log_p, log_q))

    # the atoms sit in cells of their own width
    places = (
        np.union1d(dots(lowest, highest, interval, 0.0), [lowest + 1, highest - 1]) if highest - lowest > 2 else None
    )
    return connect(masses, lowest, highest, interval, places, slack_of_sampled(q))


def laplace_epsilon(noise_multiplier: float, sampling_probability: float = 1.0) -> float:
    r"""The largest loss, $\log(1 + q (e^{1 / b} - 1))$: removing a unit is the worse direction."""
    return float(log_sampled(sampling_probability, 1 / noise_multiplier)) * (1 + 1e-15)


def laplace_scale(noise_multiplier: float, sampling_probability: float) -> tuple[float, float]:
    """As `gaussian_scale`, of Laplace noise."""
    q, most = sampling_probability, 1 / noise_multiplier
    losses = np.linspace(-most, most, 201)
    mass = np.exp((losses - most) / 2) * (most / 400)
    mass[[0, -1]] += math.exp(-most) / 2, 0.5
    sampled, mass = log_sampled(q, losses), (1 - q) * mass[::-1] + q * mass
    mean = sum_of_products(sampled, mass) / float(mass.sum())
    spread = math.sqrt(sum_of_products((sampled - mean) ** 2, mass) / float(mass.sum()))
    return spread, float(sampled[-1] - sampled[0])


def _scale(event: Any, adjacency: str) -> tuple[float, float]:
    return laplace_scale(own_multiplier(event, adjacency), 1.0)


def _pure(event: Any, adjacency: str) -> float:
    return laplace_epsilon(own_multiplier(event, adjacency))


def _attacks(event: Any, adjacency: str) -> Attacks:
    if not event.noise_multiplier > 0 or adjacency == "replace_one":
        return NOTHING
    return both(LaplaceMixturePair(event.noise_multiplier, 1.0))


@loss_rule(
    LaplaceDpEvent,
    scale=_scale,
    pure=_pure,
    renyi=their_divergences,
    attacks=_attacks,
    with_side_queries=unchanged,
)
def _loss(event: Any, adjacency: str, interval: float) -> LossDistribution:
    return symmetric(poisson_laplace(own_multiplier(event, adjacency), 1.0, interval))
