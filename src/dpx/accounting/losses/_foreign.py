"""Events of `dp_accounting` that it accounts for itself: losses and Rényi divergences through its own accountants."""

from typing import Any

import numpy as np

from ._distribution import LossDistribution, infinite
from ._pmf import LossPmf

MSG_REPLACEMENT = (
    "`accountant='rdp'` cannot account for {event} under `adjacency='replace_one'`: Rényi accounting of dp_accounting takes the sensitivity of "
    "replacement for that of removal, half of what it is. Use `accountant='pld'`."
)
_MSG_UNKNOWN = "Rényi accounting does not know {event} under `adjacency={adjacency!r}`. Use `accountant='pld'`."


def their_loss(event: Any, adjacency: str, interval: float) -> LossDistribution:
    """The privacy loss by `dp_accounting`; raises `ValueError` where it knows none."""
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(_relation(adjacency), value_discretization_interval=interval)
    if not accountant.supports(event):
        raise ValueError(
            f"No privacy loss distribution is known for {event} under `adjacency={adjacency!r}`. Another adjacency, `accountant='rdp'`, or "
            "Poisson sampling with Gaussian noise may be."
        )
    accountant.compose(event)
    return infinite(interval) if accountant._contains_non_dp_event else from_dp_accounting(accountant._pld)


def their_divergences(event: Any, adjacency: str, orders: np.ndarray) -> np.ndarray:
    """The Rényi divergences by `dp_accounting`, whose sensitivity is that of one contribution; raises `ValueError` where it knows none."""
    import dp_accounting as da

    if adjacency == "replace_one" and not isinstance(event, da.NonPrivateDpEvent):
        raise ValueError(MSG_REPLACEMENT.format(event=event))
    return divergences_at_one(event, adjacency, orders)


def divergences_at_one(event: Any, adjacency: str, orders: np.ndarray) -> np.ndarray:
    """The same of an event whose noise is measured against what a neighbour moves."""
    import dp_accounting as da
    from dp_accounting.rdp import RdpAccountant

    # dp_accounting's unit distance under replacement is that of a Gaussian mechanism whatever the neighbours
    is_fixed = isinstance(event, da.SampledWithoutReplacementDpEvent)
    accountant = RdpAccountant(orders.tolist(), _relation("replace_one" if is_fixed else adjacency))
    if not accountant.supports(event):
        raise ValueError(_MSG_UNKNOWN.format(event=event, adjacency=adjacency))
    one = np.asarray(accountant.compose(event).rdp)
    # What rounding made negative is no divergence; dp_accounting would take it for a proof of privacy. What it made too small, or 0, is
    # less than what is added.
    one = np.where(one >= 0, one, np.inf)
    # where the divergence is the logarithm of a sum that is near one, which rounds absolutely
    is_sampled = isinstance(event, da.PoissonSampledDpEvent | da.SampledWithoutReplacementDpEvent)
    share = getattr(event, "sampling_probability", 1.0)
    return one * (1 + 1e-12) + (4e-12 * share + 4e-16) * is_sampled


def _relation(adjacency: str) -> Any:
    """`dp_accounting`'s name for an adjacency."""
    from dp_accounting import NeighboringRelation

    return NeighboringRelation[adjacency.upper()]


def from_dp_accounting(distribution: "object") -> LossDistribution:
    """The same numbers as a `PrivacyLossDistribution` of `dp_accounting`."""

    def pmf(theirs) -> LossPmf:
        dense = theirs.to_dense_pmf()
        return LossPmf(
            dense._discretization, int(dense._lower_loss), np.array(dense._probs), float(dense._infinity_mass)
        )

    remove = pmf(distribution._pmf_remove)  # pyright: ignore[reportAttributeAccessIssue]
    if distribution._symmetric:  # pyright: ignore[reportAttributeAccessIssue]
        return LossDistribution(remove, remove)
    return LossDistribution(remove, pmf(distribution._pmf_add))  # pyright: ignore[reportAttributeAccessIssue]
