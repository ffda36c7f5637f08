"""Couplings: the losses are those of the event that a mechanism is coupled to, and its failures come on top."""

from typing import Any

import attr

from ...events import CoupledDpEvent
from .._composition import distribution_of
from .._rules import loss_rule, with_side_queries
from ._distribution import LossDistribution


def _with_side_queries(event: Any, noise_multiplier: float, side_precision: float) -> Any:
    return attr.evolve(event, event=with_side_queries(event.event, noise_multiplier, side_precision))


@loss_rule(CoupledDpEvent, wraps=lambda event: event.event, with_side_queries=_with_side_queries)
def _loss(event: Any, adjacency: str, interval: float, samples: int | None) -> LossDistribution:
    inner = distribution_of(event.event, adjacency, interval, samples=samples)
    failure = inner.coupling + event.failure_probability
    return LossDistribution(inner.remove, inner.add, failure, inner.other)
