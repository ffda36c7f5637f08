"""From a DP event to epsilon, delta and the privacy loss distribution, through `dp_accounting`.

`dp_accounting` takes two seconds to import, so it is imported when a question is asked.
"""

import contextlib
import functools
import logging
import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from .._checks import at_least_zero, described, probability
from ._distributions import LossDistribution, with_coupling
from ._event_tree import composed, parts
from ._fixed_size import gaussian_profile
from ._monte_carlo import SampledLosses, is_monte_carlo, samples_for
from ._pairs import distribution_of, has_truncation, relation as relation, strict, surrogate
from ._renyi_accountant import renyi_accountant

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Adjacency = Literal["add_or_remove_one", "replace_one", "replace_special"]
AccountantName = Literal["pld", "rdp"]

_FINEST = 1e-4
_SMALLEST_DELTA = 1e-12

# Enough orders to bracket a calibration; the reported RDP epsilon uses dp_accounting's own, finer orders.
# Integers have closed forms that always converge.
_COARSE_ORDERS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 128, 256)

NEIGHBOURS = {
    "add_or_remove_one": "one {unit} is added to or removed from the data",
    "replace_one": "one {unit} is replaced by any other",
    "replace_special": "one {unit} is replaced by an empty one, which contributes nothing (the size of the data is public)",
}


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


def check_adjacency(adjacency: str, call: str = "") -> None:
    """Raises unless `adjacency` is one that can be accounted for; `call` is what was typed."""
    if not isinstance(adjacency, str) or adjacency not in get_args(Adjacency):
        where = f"`{call}(adjacency=...)`: " if call else ""
        raise ValueError(
            f"{where}`adjacency` must be one of {', '.join(map(repr, get_args(Adjacency)))}; got {described(adjacency)}."
        )


def check_accountant(accountant: str, adjacency: str, call: str = "") -> None:
    """Raises unless `accountant` is known and proves its bound under `adjacency`; `call` is what was typed."""
    if not isinstance(accountant, str) or accountant not in get_args(AccountantName):
        where = f"`{call}(accountant=...)`: " if call else ""
        raise ValueError(f"{where}`accountant` must be 'pld' or 'rdp'; got {described(accountant)}.")
    if accountant == "rdp" and adjacency == "replace_one":
        raise ValueError(
            "`accountant='rdp'` cannot account for `adjacency='replace_one'`: Rényi accounting of dp_accounting takes the sensitivity of "
            "replacement for that of removal, half of what it is. Use `accountant='pld'`."
        )


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


def rough_epsilon(event: "DpEvent", delta: float) -> float:
    """A guess at epsilon in milliseconds, from a few Rényi orders; infinite where there is none. Never reported."""
    return _rough_epsilon(composed(parts(surrogate(composed(parts(strict(event)))))), delta)


@functools.lru_cache(maxsize=256)
def _rough_epsilon(event: "DpEvent", delta: float) -> float:
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=list(_COARSE_ORDERS))
    if not accountant.supports(event):
        return float("inf")
    with _quiet():
        return float(accountant.compose(event).get_epsilon(delta))


def discretisation(epsilon: float, count: int = 1) -> float:
    """Width of the grid of privacy losses: 1e-4, or 2e-5 of epsilon where that is more, so that huge epsilons cost no gigabytes; less
    where each of `count` steps loses so little that such a grid would not resolve it."""
    if epsilon == math.inf:
        return 10 * _FINEST  # no guess
    wide = max(_FINEST, 2e-5 * epsilon)
    # epsilon is a few standard deviations of the total loss, and a twentieth of one step's is fine enough; by halves, so that a search
    # that moves epsilon a little keeps its grid
    wanted = max(5e-6, epsilon / (100 * math.sqrt(count)))
    return wide / 2 ** max(0, math.ceil(math.log2(wide / wanted)))


@functools.lru_cache(maxsize=64)
def _composed(event: "DpEvent", adjacency: str, interval: float, samples: int | None = None) -> LossDistribution:
    with _quiet():
        return distribution_of(event, adjacency, interval, samples)


def loss_distribution(
    event: "DpEvent", adjacency: str, delta: float | None = None, interval: float | None = None
) -> LossDistribution | SampledLosses:
    r"""The privacy loss of `event`, with methods `get_epsilon(delta)` and `get_delta(epsilon)`: upper bounds.

    **Arguments:**

    - `event`, `adjacency`: as for `dpx.accounting.epsilon`.
    - `delta`: that questions will be about, which decides how fine the grid of losses is, or how many samples are drawn.
    - `interval`: the width of the grid, instead.
    """
    event = strict(event)
    if interval is None:
        rough, count = rough_epsilon(event, delta or 1e-6), sum(count for _, count in parts(event))
        interval = discretisation(rough, count)
        if has_truncation(event) and rough < math.inf:
            # losses of batches that are cut reach far; a fiftieth of a step's standard deviation is fine enough
            interval *= max(1.0, min(4.0, rough / (100 * math.sqrt(count) * interval)))
    if is_monte_carlo(event):
        samples = samples_for(1e-4 if delta is None else delta)
        return SampledLosses(_composed(event, adjacency, interval, samples), samples)
    return _composed(event, adjacency, interval)


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
    - `delta`: $\delta$, strictly between 0 and 1.
    - `adjacency`: what neighbouring data sets are.
    - `accountant`: `"pld"` (privacy loss distributions, tight) or `"rdp"` (Rényi, looser).
    - `interval`: width of the grid of privacy losses; by default from a guess at epsilon.

    **Returns:**

    $\varepsilon \ge 0$; infinite if there is no bound.

    **Raises:**

    - `ValueError` where the accountant's bound is not proven: an event or adjacency it does not know, or delta below 1e-12 with PLD.
    """
    delta = probability("delta", delta)
    check_adjacency(adjacency)
    check_accountant(accountant, "replace_special")
    event = _bare(event, adjacency)
    if accountant != "rdp":  # which of its events hold under replacement, Rényi accounting decides itself
        check_accountant(accountant, adjacency)
    event = strict(event)
    if accountant == "rdp":
        return _rdp_epsilon(event, delta, adjacency)
    if (multiplier := _as_one_gaussian(event, adjacency)) is not None:
        from dp_accounting import get_epsilon_gaussian

        # exact (Balle and Wang 2018), but for its own tolerance of 1e-12
        return max(0.0, float(get_epsilon_gaussian(multiplier * (1 - 1e-9), delta)))
    if delta < _SMALLEST_DELTA:
        raise ValueError(
            f"`delta` = {delta:g} is below {_SMALLEST_DELTA:g}, where the truncated tails of privacy loss distributions inflate epsilon. Use "
            "`accountant='rdp'`, or a larger delta."
        )
    return max(0.0, float(loss_distribution(event, adjacency, delta, interval).get_epsilon(delta)))


@functools.lru_cache(maxsize=256)
def _rdp_epsilon(event: "DpEvent", delta: float, adjacency: str) -> float:
    account, coupling = renyi_accountant(event, adjacency)
    with _quiet():
        return max(0.0, with_coupling(lambda d: float(account.get_epsilon(d)) if d > 0 else math.inf, delta, coupling))


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
    event = strict(event)
    if accountant == "rdp":
        account, coupling = renyi_accountant(event, adjacency)
        with _quiet():
            value = float(account.get_delta(epsilon)) + coupling * (1 + math.exp(min(epsilon, 700.0)))
    elif (multiplier := _as_one_gaussian(event, adjacency)) is not None:
        value = float(gaussian_profile(np.array([epsilon]), multiplier * (1 - 1e-9))[0])
    else:
        value = loss_distribution(event, adjacency).get_delta(epsilon)
    return min(1.0, max(0.0, value))
