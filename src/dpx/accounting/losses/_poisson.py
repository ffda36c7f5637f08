"""Poisson sampling of one mechanism: Gaussian, Laplace, zero-concentrated, or whatever `dp_accounting` knows."""

from typing import Any

import numpy as np
from dp_accounting import GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent
from dp_accounting.dp_event import ZCDpEvent

from ...events import parts
from .._rules import attacks_of, loss_rule, unchanged
from ._distribution import LossDistribution
from ._foreign import MSG_REPLACEMENT, their_divergences, their_loss
from ._gaussian import gaussian_scale, poisson_gaussian, poisson_gaussian_replaced, sampled_gaussian
from ._laplace import laplace_epsilon, laplace_scale, poisson_laplace
from ._pair import NOTHING, Attacks, LaplaceMixturePair, both
from ._zcdp import sampled_zcdp


def _attacks(event: Any, adjacency: str) -> Attacks:
    """Of Gaussians on one sample, together or alone, of Laplace noise, or of what costs as much as a Gaussian."""
    probability = event.sampling_probability
    if not probability > 0:
        return NOTHING
    sign = -1.0 if adjacency == "replace_one" else 0.0
    precision, others = 0.0, 0
    for part, count in parts(event.event):
        match part:
            case GaussianDpEvent() if part.noise_multiplier > 0:
                precision += count * part.noise_multiplier**-2
            case ZCDpEvent():
                precision += count * 2 * part.rho
            case _:
                others += count
    if precision > 0:  # what else the sample is used for is not attacked
        return sampled_gaussian(precision**-0.5 * (1 + 1e-14), probability, sign)
    only = parts(event.event)
    if others == 1 and isinstance(only[0][0], LaplaceDpEvent) and only[0][0].noise_multiplier > 0 and not sign:
        return both(LaplaceMixturePair(only[0][0].noise_multiplier, probability))
    return attacks_of(event.event, adjacency) if probability == 1 and others == 1 else NOTHING


def _gaussian_scale(event: Any, adjacency: str) -> tuple[float, float]:
    return gaussian_scale(event.event.noise_multiplier, event.sampling_probability, adjacency == "replace_one")


@loss_rule(
    PoissonSampledDpEvent,
    of=GaussianDpEvent,
    scale=_gaussian_scale,
    renyi=their_divergences,
    attacks=_attacks,
    with_side_queries=unchanged,
)
def _gaussian_loss(event: Any, adjacency: str, interval: float) -> LossDistribution:
    build = poisson_gaussian_replaced if adjacency == "replace_one" else poisson_gaussian
    return build(event.event.noise_multiplier, event.sampling_probability, interval)


def _laplace_scale(event: Any, adjacency: str) -> tuple[float, float]:
    del adjacency
    return laplace_scale(event.event.noise_multiplier, event.sampling_probability)


def _laplace_pure(event: Any, adjacency: str) -> float:
    if adjacency == "replace_one":
        return np.inf
    return laplace_epsilon(event.event.noise_multiplier, event.sampling_probability)


@loss_rule(
    PoissonSampledDpEvent,
    of=LaplaceDpEvent,
    scale=_laplace_scale,
    pure=_laplace_pure,
    renyi=their_divergences,
    attacks=_attacks,
    with_side_queries=unchanged,
)
def _laplace_loss(event: Any, adjacency: str, interval: float) -> LossDistribution:
    if adjacency == "replace_one":
        return their_loss(event, adjacency, interval)
    return poisson_laplace(event.event.noise_multiplier, event.sampling_probability, interval)


def _zcdp_renyi(event: Any, adjacency: str, orders: np.ndarray) -> np.ndarray:
    if adjacency == "replace_one":
        raise ValueError(MSG_REPLACEMENT.format(event=event))
    return sampled_zcdp(event, orders)  # dp_accounting has no amplification for it


loss_rule(PoissonSampledDpEvent, of=ZCDpEvent, renyi=_zcdp_renyi, attacks=_attacks, with_side_queries=unchanged)(
    their_loss
)


loss_rule(PoissonSampledDpEvent, renyi=their_divergences, attacks=_attacks, with_side_queries=unchanged)(their_loss)
