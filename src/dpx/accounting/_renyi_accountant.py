"""Rényi accounting by `dp_accounting`, with the sensitivity of replacement in our own hands."""

import functools
from typing import Any, NamedTuple

import numpy as np

from ..events import uncoupled
from ._pairs import MSG_FIXED_SIZE, relation
from ._poisson_renyi import is_sampled_zcdp, sampled_zcdp

_MSG_REPLACEMENT = (
    "`accountant='rdp'` cannot account for {event} under `adjacency='replace_one'`: Rényi accounting of dp_accounting takes the sensitivity of "
    "replacement for that of removal, half of what it is. Use `accountant='pld'`."
)
_MSG_UNKNOWN = "Rényi accounting does not know {event} under `adjacency={adjacency!r}`. Use `accountant='pld'`."
_MSG_NO_FORMULA = (
    "Rényi accounting does not know {event}: its divergences have a formula in one direction only, and privacy losses are computed to within "
    "less than Rényi accounting would give away. Use `accountant='pld'`."
)


class RenyiCurve(NamedTuple):
    """Rényi divergences of an event but for its couplings, whose failure probabilities add up to `coupling`."""

    orders: np.ndarray
    divergences: np.ndarray
    coupling: float

    def epsilon(self, delta: float) -> float:
        r"""$\varepsilon$ at `delta`, of the coupled mechanism.

        Canonne, Kamath and Steinke's conversion holds at any real $\varepsilon$, so 0 is proven wherever it gives less.
        """
        from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

        return float(compute_epsilon(self.orders.tolist(), self.divergences.tolist(), delta)[0])

    def delta(self, epsilon: float) -> float:
        r"""$\delta$ at `epsilon`, of the coupled mechanism."""
        from dp_accounting.rdp.rdp_privacy_accountant import compute_delta

        return float(compute_delta(self.orders.tolist(), self.divergences.tolist(), epsilon)[0])


def least_renyi_epsilon(delta: float) -> float:
    """The epsilon that finite orders leave of no divergence at all: no smaller budget can be told from nothing."""
    from dp_accounting.rdp import RdpAccountant

    orders = np.asarray(RdpAccountant().orders, np.float64)
    orders = orders[orders > 1.01]
    return float(np.min(np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)))


@functools.lru_cache(maxsize=64)
def renyi_curve(event: Any, adjacency: str, orders: tuple[float, ...] | None = None) -> RenyiCurve:
    """The Rényi divergences of a strict `event` between neighbours, in both directions; raises `ValueError` where no bound is known.

    **Arguments:**

    - `orders`: integers or other numbers above 1; by default those of dp_accounting.
    """
    from dp_accounting.rdp import RdpAccountant

    coupling, found = uncoupled(event)
    leaves = [(_own_sensitivity(part, adjacency), count) for part, count in found]
    import dp_accounting as da

    chosen = None if orders is None else list(orders)
    divergences = np.zeros(len(RdpAccountant(chosen).orders))
    for leaf, count in leaves:
        if is_sampled_zcdp(leaf):  # dp_accounting has no amplification for it
            divergences = divergences + count * sampled_zcdp(leaf, np.asarray(RdpAccountant(chosen).orders))
            continue
        # dp_accounting's unit distance under replacement is that of a Gaussian mechanism whatever the neighbours
        is_fixed = isinstance(leaf, da.SampledWithoutReplacementDpEvent)
        accountant = RdpAccountant(chosen, relation("replace_one" if is_fixed else adjacency))
        if not accountant.supports(leaf):
            raise ValueError(_MSG_UNKNOWN.format(event=leaf, adjacency=adjacency))
        one = np.asarray(accountant.compose(leaf).rdp)
        # What rounding made negative is no divergence; dp_accounting would take it for a proof of privacy. What it made too small, or 0, is
        # less than what is added.
        one = np.where(one >= 0, one, np.inf)
        share = getattr(leaf, "sampling_probability", 1.0)
        divergences = divergences + count * (one * (1 + 1e-12) + (4e-12 * share + 4e-16) * _is_sampled(leaf))
    return RenyiCurve(np.asarray(RdpAccountant(chosen).orders), divergences, coupling)


def _is_sampled(event: Any) -> bool:
    """Whether the divergence is the logarithm of a sum that is near one, which rounds absolutely."""
    import dp_accounting as da

    return isinstance(event, da.PoissonSampledDpEvent | da.SampledWithoutReplacementDpEvent)


def _own_sensitivity(event: Any, adjacency: str) -> Any:
    """The event whose noise is measured against what a neighbour moves, rather than against one contribution."""
    import dp_accounting as da

    from .. import events

    match event:
        case events.FixedSizeSampledGaussianDpEvent(replace=False) if adjacency != "add_or_remove_one":
            # even an example that is emptied makes room for another in the batch, at up to twice the distance
            gaussian = da.GaussianDpEvent(event.noise_multiplier / 2)
            return da.SampledWithoutReplacementDpEvent(event.num_examples, event.batch_size, gaussian)
        case events.FixedSizeSampledGaussianDpEvent(replace=True):
            raise ValueError(_MSG_NO_FORMULA.format(event="sampling with replacement"))
        case events.FixedSizeSampledGaussianDpEvent():
            raise ValueError(MSG_FIXED_SIZE)
        case events.RandomAllocationDpEvent() | events.GaussianMixtureOfBinsDpEvent() | events.MinSepSampledDpEvent():
            raise ValueError(_MSG_NO_FORMULA.format(event=type(event).__name__))
    if adjacency == "replace_one" and not isinstance(event, da.NonPrivateDpEvent):
        if not isinstance(event, da.GaussianDpEvent):
            raise ValueError(_MSG_REPLACEMENT.format(event=event))
        return da.GaussianDpEvent(event.noise_multiplier / 2)
    return event
