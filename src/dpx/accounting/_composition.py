"""From a DP event to the distribution of its privacy loss: every part's by its rule, on grids that fit, composed."""

import functools
import math
from typing import TYPE_CHECKING, Any

from ..events import composed, parts
from ._rules import loss_of, pure_of, rule_of
from .losses._distribution import LossDistribution, infinite, nothing
from .losses._pmf import Aim

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_POINTS = 100  # of the grid, in a standard deviation of one step's loss
_FEW = 16  # steps up to which a finer grid costs little
_LARGEST = 2**18  # points of the grid of one step
_WIDEST = 2.0**-6  # of the grid on which the losses of foreign events are measured


def pure_epsilon(event: Any, adjacency: str) -> float:
    """The epsilon of pure differential privacy of a reduced event, whatever its delta; infinite where it has none."""
    return math.fsum(count * pure_of(part, adjacency) for part, count in parts(event))


def guess(event: Any) -> Any:
    """An event without simulation that costs about as much, from which guesses are made of where to look."""
    import dp_accounting as da

    def one(event: Any) -> Any:
        rule = rule_of(event)
        if rule.wraps is not None:
            return guess(rule.wraps(event))
        return event if rule.guess is None else rule.guess(event)

    found: list[Any] = [da.SelfComposedDpEvent(one(part), count) for part, count in parts(event)]
    return composed(parts(da.ComposedDpEvent(found)))


def distribution_of(
    event: "DpEvent",
    adjacency: str,
    interval: float | None = None,
    aim: float | None = None,
    coarser: int = 1,
    samples: int | None = None,
) -> LossDistribution:
    r"""The pessimistic privacy loss of a reduced `event`; raises `ValueError` where none is known.

    **Arguments:**

    - `interval`: width of the grid of all losses, instead of a hundredth of each one's standard deviation.
    - `aim`: the delta that questions will be about, whose digits must survive composition.
    - `coarser`: a factor on the width of the grid, for guesses.
    - `samples`: how many are drawn of what is simulated; by default enough for a delta of 1e-4.
    """
    pairs = parts(composed(parts(event)))
    width = lambda part, count: interval or coarser * _width(part, count, adjacency)
    leaves = [(single_loss(part, adjacency, width(part, count), samples), count) for part, count in pairs]
    if any(leaf.remove.infinity >= 1 for leaf, _ in leaves):
        return infinite(interval or _WIDEST)
    where = _aim(leaves, aim)
    total = None
    # the finest grids first: every one is widened once
    for leaf, count in sorted(leaves, key=lambda pair: pair[0].remove.interval):
        run = leaf.self_compose(count, where)
        total = run if total is None else total.compose(run, where)
    return nothing(interval or _WIDEST) if total is None else total


def _aim(leaves: list[tuple[LossDistribution, int]], delta: float | None) -> Aim:
    r"""The tilt under which Chernoff's bound on the tail, $e^{K(\theta) - \theta K'(\theta)}$, is `delta`."""
    count = sum(count for _, count in leaves)
    if delta is None or not delta > 0:
        return Aim()
    tail = min(1e-15, 1e-6 * delta)
    # a single transform keeps about this much
    if len(leaves) == count == 1 or 1e-11 * count < 1e-6 * delta:
        return Aim(0.0, tail)

    def bound(order: float) -> float:
        total = 0.0
        for leaf, count in leaves:
            moment, mean = leaf.remove.log_moment(order)
            total += count * (moment - order * mean)
        return total

    low, high = 0.0, 1e-6
    while bound(high) > math.log(delta) and high < 1e12:
        low, high = high, 4 * high
    for _ in range(6):  # roughly is enough
        middle = math.sqrt(low * high) if low else high / 2
        low, high = (middle, high) if bound(middle) > math.log(delta) else (low, middle)
    return Aim(high, tail)


def _width(event: Any, count: int, adjacency: str) -> float:
    """The width of the grid for so many of one event; of what is coupled, that of what it is coupled to."""
    wraps = rule_of(event).wraps
    if wraps is not None:
        inner = parts(wraps(event))
        return min((_width(part, count * times, adjacency) for part, times in inner), default=_WIDEST)
    return interval_of(event, adjacency) / (4 if count <= _FEW else 1)


@functools.lru_cache(maxsize=512)
def interval_of(event: Any, adjacency: str) -> float:
    """The width of the grid for the losses of one event: a power of two, so that all grids fit each other."""
    scale = rule_of(event).scale
    if scale is None:
        return _measured_interval(event, adjacency)
    spread, extent = scale(event, adjacency)
    return _power_of_two(max(spread / _POINTS, extent / _LARGEST))


def _power_of_two(width: float) -> float:
    return 2.0 ** math.floor(math.log2(width)) if 0 < width < math.inf else _WIDEST


def _measured_interval(event: Any, adjacency: str) -> float:
    """The width of the grid for an event without a formula: finer until it resolves what it measures."""
    interval = _WIDEST
    while interval > 1e-9:
        found = single_loss(event, adjacency, interval)
        spread = min(found.remove.standard_deviation, found.add.standard_deviation)
        # dp_accounting's grids are dense
        if interval * 20 <= spread or not spread > 0 or len(found.remove.mass) > 5e4:
            break
        interval /= 4
    return interval


@functools.lru_cache(maxsize=32)
def single_loss(event: Any, adjacency: str, interval: float, samples: int | None = None) -> LossDistribution:
    """The privacy loss of an event that composes no others, remembered."""
    return loss_of(event, adjacency, interval, samples)
