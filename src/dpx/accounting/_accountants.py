"""From a DP event to epsilon, delta and the privacy loss distribution, through `dp_accounting`.

`dp_accounting` takes two seconds to import, so it is imported when a question is asked.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from .._checks import probability

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


def check_adjacency(adjacency: str) -> None:
    """Raises unless `adjacency` is one that can be accounted for."""
    if adjacency not in get_args(Adjacency):
        raise ValueError(f"`adjacency` must be one of {', '.join(map(repr, get_args(Adjacency)))}; got {adjacency!r}.")


def check_accountant(accountant: str, adjacency: str) -> None:
    """Raises unless `accountant` is known and proves its bound under `adjacency`."""
    if accountant not in get_args(AccountantName):
        raise ValueError(f"`accountant` must be 'pld' or 'rdp'; got {accountant!r}.")
    if accountant == "rdp" and adjacency == "replace_one":
        raise ValueError(
            "`accountant='rdp'` cannot account for `adjacency='replace_one'`: Rényi accounting of dp_accounting takes the sensitivity of "
            "replacement for that of removal, half of what it is. Use `accountant='pld'`."
        )


def relation(adjacency: str) -> Any:
    """`dp_accounting`'s name for an adjacency."""
    from dp_accounting import NeighboringRelation

    return NeighboringRelation[adjacency.upper()]


def _strict(event: Any) -> Any:
    """The same event with Python numbers throughout: RDP under-accounts nested Gaussians whose multiplier is not a `float`."""
    import dp_accounting as da

    match event:
        case da.GaussianDpEvent():
            return da.GaussianDpEvent(float(event.noise_multiplier))
        case da.LaplaceDpEvent():
            return da.LaplaceDpEvent(float(event.noise_multiplier))
        case da.dp_event.ZCDpEvent():
            return da.dp_event.ZCDpEvent(float(event.rho), float(event.xi))
        case da.PoissonSampledDpEvent(event=da.dp_event.ZCDpEvent()):
            # Rényi divergences are jointly quasi-convex, so that sampling, a mixture, cannot do worse than taking part surely
            return _strict(event.event)
        case da.PoissonSampledDpEvent():
            return da.PoissonSampledDpEvent(float(event.sampling_probability), _strict(event.event))
        case da.SelfComposedDpEvent():
            return da.SelfComposedDpEvent(_strict(event.event), int(event.count))
        case da.ComposedDpEvent():
            return da.ComposedDpEvent([_strict(e) for e in event.events])
        case da.TruncatedSubsampledGaussianDpEvent():
            return da.TruncatedSubsampledGaussianDpEvent(
                int(event.dataset_size),
                float(event.sampling_probability),
                int(event.truncated_batch_size),
                float(event.noise_multiplier),
            )
    return event


def _untruncated(event: Any) -> Any:
    """The event without truncation, which only guesses (where to look, how fine to discretise) are made from."""
    import dp_accounting as da

    if isinstance(event, da.SelfComposedDpEvent):
        return da.SelfComposedDpEvent(_untruncated(event.event), event.count)
    if isinstance(event, da.TruncatedSubsampledGaussianDpEvent):
        return da.PoissonSampledDpEvent(event.sampling_probability, da.GaussianDpEvent(event.noise_multiplier))
    return event


def _as_one_gaussian(event: Any, adjacency: str) -> float | None:
    """The noise multiplier of the single Gaussian mechanism that `event` amounts to, if it is made of nothing else."""
    import dp_accounting as da

    def inverse_variance(event: Any) -> float | None:
        match event:
            case da.GaussianDpEvent():
                return float(event.noise_multiplier) ** -2
            case da.SelfComposedDpEvent():
                inner = inverse_variance(event.event)
                return None if inner is None else inner * int(event.count)
        return None

    total = inverse_variance(event)
    if not total:
        return None
    return total**-0.5 / (2 if adjacency == "replace_one" else 1)


def rough_epsilon(event: "DpEvent", delta: float) -> float:
    """A guess at epsilon in milliseconds, from a few Rényi orders; infinite where there is none. Never reported."""
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(orders=list(_COARSE_ORDERS))
    event = _untruncated(_strict(event))
    if not accountant.supports(event):
        return float("inf")
    with _quiet():
        return float(accountant.compose(event).get_epsilon(delta))


def discretisation(epsilon: float) -> float:
    """Width of the grid of privacy losses: 1e-4, or 2e-5 of epsilon where that is more, so that huge epsilons cost no gigabytes."""
    return max(_FINEST, 2e-5 * min(epsilon, 1e6))


@functools.lru_cache(maxsize=64)
def _composed(event: "DpEvent", adjacency: str, interval: float) -> Any:
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(relation(adjacency), value_discretization_interval=interval)
    event = _strict(event)
    if not accountant.supports(event):
        raise ValueError(
            f"No privacy loss distribution is known for {event} under `adjacency={adjacency!r}`. Another adjacency, `accountant='rdp'`, or "
            "Poisson sampling with Gaussian noise may be."
        )
    return accountant.compose(event)


def loss_distribution(event: "DpEvent", adjacency: str, delta: float = 1e-6, interval: float | None = None) -> Any:
    """`dp_accounting`'s PLD accountant after `event`, pessimistic by connect-the-dots, on a grid that suits questions about `delta`."""
    if interval is None:
        interval = discretisation(rough_epsilon(event, delta))
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
    check_accountant(accountant, adjacency)
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
    with _quiet():
        return max(0.0, float(loss_distribution(event, adjacency, delta, interval).get_epsilon(delta)))


@functools.lru_cache(maxsize=256)
def _rdp_epsilon(event: "DpEvent", delta: float, adjacency: str) -> float:
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=relation(adjacency))
    event = _strict(event)
    if not accountant.supports(event):
        raise ValueError(
            f"Rényi accounting does not know {event} under `adjacency={adjacency!r}`. Use `accountant='pld'`."
        )
    with _quiet():
        return max(0.0, float(accountant.compose(event).get_epsilon(delta)))


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
    if not epsilon >= 0:
        raise ValueError(f"`epsilon` must be at least 0; got {epsilon}.")
    check_adjacency(adjacency)
    check_accountant(accountant, adjacency)
    if accountant == "rdp":
        from dp_accounting.rdp import RdpAccountant

        account = RdpAccountant(neighboring_relation=relation(adjacency))
        event = _strict(event)
        if not account.supports(event):
            raise ValueError(f"Rényi accounting does not know {event}. Use `accountant='pld'`.")
        value = account.compose(event).get_delta(float(epsilon))
    elif (multiplier := _as_one_gaussian(event, adjacency)) is not None:
        from scipy.stats import norm

        multiplier *= 1 - 1e-9
        middle = float(epsilon) * multiplier
        value = norm.cdf(0.5 / multiplier - middle) - np.exp(float(epsilon) + norm.logcdf(-0.5 / multiplier - middle))
    else:
        with _quiet():
            value = loss_distribution(event, adjacency).get_delta(float(epsilon))
    return min(1.0, max(0.0, float(value)))
