"""From a DP event to epsilon, delta and the privacy loss distribution, through `dp_accounting`.

`dp_accounting` takes two seconds to import, so it is imported when a question is asked.
"""

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import at_least_zero
from ..events import composed, parts, reduced
from ._composition import distribution_of, guess, pure_epsilon
from ._neighbours import AccountantName, Adjacency, check_accountant, check_adjacency, check_delta
from ._renyi import renyi_curve
from ._rules import is_monte_carlo
from .losses._connect import gaussian_profile
from .losses._distribution import LossDistribution, with_coupling
from .losses._monte_carlo import SampledLosses, samples_for

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_SMALLEST_DELTA = 1e-12
# enough to come near; integers have closed forms that are quick, and large epsilons need orders near 1
_COARSE_ORDERS = (1.1, 1.2, 1.4, 1.7, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 256, 512, 1024)
_ROUGH = 8  # how many times coarser the grids of guesses are
_ROUNDED = 1e-4  # deltas below may have lost digits to the rounding of a transform
_MSG_PURE = (
    "`delta=0` is pure differential privacy, which this mechanism does not have, or not provably: Laplace noise has it, Gaussian noise and noise "
    "that is drawn anew for a random share of the data under replacement have not. Give a `delta` well below 1 / num_examples."
)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Rényi orders that do not converge count as infinite and need no word; neither does overflow at epsilons of hundreds."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _bare(event: Any, adjacency: str) -> Any:
    """The event of what says for whom it holds, which must be whom the question is about."""
    theirs = getattr(event, "adjacency", None)
    if theirs is None:
        return event
    if theirs != adjacency:
        raise ValueError(f"What is asked about is for `adjacency={theirs!r}`; got `adjacency={adjacency!r}`.")
    return event.event


def _as_one_gaussian(event: Any, adjacency: str) -> float | None:
    """The noise multiplier of the single Gaussian mechanism that `event` amounts to, if it is made of nothing else."""
    import dp_accounting as da

    only = composed(parts(event))
    if not isinstance(only, da.GaussianDpEvent | da.SelfComposedDpEvent) or not parts(only):
        return None
    (part, count), *others = parts(only)
    if others or not isinstance(part, da.GaussianDpEvent) or part.noise_multiplier == 0:
        return None
    return part.noise_multiplier / math.sqrt(count) / (2 if adjacency == "replace_one" else 1)


def rough_epsilon(event: "DpEvent", delta: float, adjacency: str = "add_or_remove_one") -> float:
    """A guess at epsilon in milliseconds. Never reported."""
    return rough_distribution(event, adjacency).get_epsilon(delta)


def rough_renyi_epsilon(event: "DpEvent", delta: float, adjacency: str) -> float:
    """A guess at the epsilon of Rényi accounting, from a few orders."""
    with _quiet():
        return max(0.0, renyi_curve(reduced(event), adjacency, _COARSE_ORDERS).epsilon(delta))


def rough_distribution(event: "DpEvent", adjacency: str) -> LossDistribution:
    """As `loss_distribution`, from a grid that is far too coarse, and by another event where the event is simulated. For guesses only."""
    event = guess(composed(parts(reduced(event))))
    with _quiet():
        return distribution_of(event, adjacency, coarser=_ROUGH)


@functools.lru_cache(maxsize=64)
def _composed(
    event: "DpEvent", adjacency: str, interval: float | None, delta: float | None, samples: int | None = None
) -> LossDistribution:
    with _quiet():
        return distribution_of(event, adjacency, interval, delta, samples=samples)


def loss_distribution(
    event: "DpEvent", adjacency: str, delta: float | None = None, interval: float | None = None
) -> LossDistribution | SampledLosses:
    r"""The privacy loss of `event`, with methods `get_epsilon(delta)` and `get_delta(epsilon)`: upper bounds.

    **Arguments:**

    - `event`, `adjacency`: as for `dpx.accounting.epsilon`.
    - `delta`: that questions will be about, whose digits are kept, or which decides how many samples are drawn.
    - `interval`: the width of the grid of losses; by default a hundredth of the standard deviation of each event's.
    """
    event = reduced(event)
    if is_monte_carlo(event):
        samples = samples_for(1e-4 if delta is None else delta)
        return SampledLosses(_composed(event, adjacency, interval, delta, samples), samples)
    return _composed(event, adjacency, interval, delta)


def epsilon(
    event: "DpEvent",
    delta: float,
    *,
    adjacency: Adjacency = "add_or_remove_one",
    accountant: AccountantName = "pld",
    interval: float | None = None,
) -> float:
    r"""An upper bound on the $\varepsilon$ at which `event` is $(\varepsilon, \delta)$-DP.

    **Arguments:**

    - `event`: a DP event of `dp_accounting`.
    - `delta`: $\delta$, below 1; 0 where the event is purely differentially private, as Laplace noise is.
    - `adjacency`: what neighbouring data sets are.
    - `accountant`: `"pld"` (privacy loss distributions, tight) or `"rdp"` (Rényi, looser).
    - `interval`: width of the grid of privacy losses; by default a hundredth of the standard deviation of each event's.

    **Returns:**

    $\varepsilon \ge 0$; infinite if there is no bound.

    **Raises:**

    - `ValueError` where the accountant's bound is not proven: an event or adjacency it does not know, or delta below 1e-12 with PLD.
    """
    delta = check_delta("delta", delta)
    check_adjacency(adjacency)
    check_accountant(accountant, "replace_special")
    event = _bare(event, adjacency)
    if accountant != "rdp":  # which of its events hold under replacement, Rényi accounting decides itself
        check_accountant(accountant, adjacency)
    event = reduced(event)
    pure = pure_epsilon(event, adjacency)
    if delta == 0:
        if pure == math.inf:
            raise ValueError(_MSG_PURE)
        return pure
    if accountant == "rdp":
        return min(pure, _rdp_epsilon(event, delta, adjacency))
    if (multiplier := _as_one_gaussian(event, adjacency)) is not None:
        from dp_accounting import get_epsilon_gaussian

        # exact (Balle and Wang 2018), but for its own tolerance of 1e-12
        with _quiet():
            found = float(get_epsilon_gaussian(multiplier * (1 - 1e-9), delta))
        return found * (1 + 1e-11) + 4e-12 if found > 0 else 0.0
    if delta < _SMALLEST_DELTA:
        if pure < math.inf:
            return pure
        raise ValueError(
            f"`delta` = {delta:g} is below {_SMALLEST_DELTA:g}, where the truncated tails of privacy loss distributions inflate epsilon. Use "
            "`accountant='rdp'`, or a larger delta."
        )
    # a hair more, so that delta at the answer, whose digits may be kept by another tilt, is no larger
    found = float(loss_distribution(event, adjacency, delta, interval).get_epsilon(delta)) * (1 + 1e-9)
    return min(pure, max(0.0, found))


@functools.lru_cache(maxsize=256)
def _rdp_epsilon(event: "DpEvent", delta: float, adjacency: str) -> float:
    with _quiet():
        curve = renyi_curve(event, adjacency)
        return max(0.0, with_coupling(lambda d: curve.epsilon(d) if d > 0 else math.inf, delta, curve.coupling))


def delta(
    event: "DpEvent",
    epsilon: float,
    *,
    adjacency: Adjacency = "add_or_remove_one",
    accountant: AccountantName = "pld",
) -> float:
    r"""An upper bound on the $\delta$ at which `event` is $(\varepsilon, \delta)$-DP.

    **Arguments:**

    - `event`, `adjacency`, `accountant`: as for `dpx.accounting.epsilon`.
    - `epsilon`: $\varepsilon \ge 0$.

    **Returns:**

    $\delta$ in [0, 1].
    """
    epsilon = at_least_zero("epsilon", epsilon)
    if epsilon == math.inf:
        raise ValueError(
            "`epsilon` must be finite: no delta is too small for what may lose any amount of privacy; got inf."
        )
    check_adjacency(adjacency)
    check_accountant(accountant, "replace_special")
    event = _bare(event, adjacency)
    if accountant != "rdp":
        check_accountant(accountant, adjacency)
    event = reduced(event)
    if epsilon >= pure_epsilon(event, adjacency):
        return 0.0
    if accountant == "rdp":
        with _quiet():
            curve = renyi_curve(event, adjacency)
            value = curve.delta(epsilon) + curve.coupling * (1 + math.exp(min(epsilon, 700.0)))
    elif (multiplier := _as_one_gaussian(event, adjacency)) is not None:
        value = float(gaussian_profile(np.array([epsilon]), multiplier * (1 - 1e-9))[0])
    else:
        value = loss_distribution(event, adjacency).get_delta(epsilon)
        for _ in range(3):  # the digits of small ones, once it is known how small
            if is_monte_carlo(event) or not 0 < value < _ROUNDED:
                break
            last, value = value, min(value, loss_distribution(event, adjacency, value).get_delta(epsilon))
            if value > 0.1 * last:
                break
    return min(1.0, max(0.0, value))


def deltas(event: "DpEvent", epsilons: np.ndarray, adjacency: Adjacency, accountant: AccountantName) -> np.ndarray:
    r"""Upper bounds on $\delta$ at many $\varepsilon$, by one composition: without the digits of very small ones."""
    event = reduced(event)
    if accountant == "rdp":
        return np.array([delta(event, float(e), adjacency=adjacency, accountant=accountant) for e in epsilons])
    if (multiplier := _as_one_gaussian(event, adjacency)) is not None:
        return np.clip(gaussian_profile(epsilons, multiplier * (1 - 1e-9)), 0.0, 1.0)
    distribution, pure = loss_distribution(event, adjacency), pure_epsilon(event, adjacency)
    return np.array([0.0 if e >= pure else min(1.0, max(0.0, distribution.get_delta(float(e)))) for e in epsilons])
