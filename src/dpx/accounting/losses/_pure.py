"""Purely private mechanisms of `dp_accounting`, which computes their losses, and mechanisms that are not private at all."""

import math
from typing import Any

from dp_accounting import NonPrivateDpEvent, RandomizedResponseDpEvent
from dp_accounting.dp_event import DiscreteLaplaceDpEvent

from .._rules import loss_rule, unchanged
from ._distribution import LossDistribution, infinite
from ._foreign import their_divergences, their_loss


def _discrete_laplace(event: Any, adjacency: str) -> float:
    return math.inf if adjacency == "replace_one" else event.noise_parameter * event.sensitivity * (1 + 1e-15)


loss_rule(DiscreteLaplaceDpEvent, pure=_discrete_laplace, renyi=their_divergences, with_side_queries=unchanged)(
    their_loss
)


def _randomized_response(event: Any, adjacency: str) -> float:
    if adjacency != "replace_one":
        return math.inf
    return math.log1p((1 - event.noise_parameter) * event.num_buckets / event.noise_parameter) * (1 + 1e-15)


loss_rule(RandomizedResponseDpEvent, pure=_randomized_response, renyi=their_divergences, with_side_queries=unchanged)(
    their_loss
)


@loss_rule(NonPrivateDpEvent, renyi=their_divergences, with_side_queries=unchanged)
def _no_privacy(event: Any, adjacency: str, interval: float) -> LossDistribution:
    del event, adjacency
    return infinite(interval)
