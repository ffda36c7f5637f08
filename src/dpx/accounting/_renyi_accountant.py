"""Rényi accounting by `dp_accounting`, with the sensitivity of replacement in our own hands."""

import functools
from typing import Any

from ._event_tree import parts
from ._pairs import relation
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


@functools.lru_cache(maxsize=64)
def renyi_accountant(event: Any, adjacency: str) -> tuple[Any, float]:
    """An `RdpAccountant` that has composed `event`, but for its couplings, and the sum of their failure probabilities.

    Raises `ValueError` where no bound is known.
    """
    from dp_accounting.rdp import RdpAccountant

    from .. import _events

    leaves: list[tuple[Any, int]] = []
    coupling = 0.0

    def walk(event: Any, count: int) -> None:
        nonlocal coupling
        for part, times in parts(event):
            if isinstance(part, _events.CoupledDpEvent):
                coupling += count * times * part.failure_probability
                walk(part.event, count * times)
            else:
                leaves.append((_own_sensitivity(part, adjacency), count * times))

    walk(event, 1)
    import dp_accounting as da

    # dp_accounting's unit distance under replacement is that of a Gaussian mechanism whatever the neighbours
    is_fixed = any(isinstance(leaf, da.SampledWithoutReplacementDpEvent) for leaf, _ in leaves)
    accountant = RdpAccountant(neighboring_relation=relation("replace_one" if is_fixed else adjacency))
    for leaf, count in leaves:
        if is_sampled_zcdp(leaf):
            accountant._rdp += count * sampled_zcdp(
                leaf, accountant._orders
            )  # dp_accounting has no amplification for it
            continue
        if not accountant.supports(leaf):
            raise ValueError(_MSG_UNKNOWN.format(event=leaf, adjacency=adjacency))
        accountant.compose(leaf, count)
    return accountant, coupling


def _own_sensitivity(event: Any, adjacency: str) -> Any:
    """The event whose noise is measured against what a neighbour moves, rather than against one contribution."""
    import dp_accounting as da

    from .. import _events

    match event:
        case _events.FixedSizeSampledGaussianDpEvent(replace=False) if adjacency != "add_or_remove_one":
            # even an example that is emptied makes room for another in the batch, at up to twice the distance
            gaussian = da.GaussianDpEvent(event.noise_multiplier / 2)
            return da.SampledWithoutReplacementDpEvent(event.num_examples, event.batch_size, gaussian)
        case _events.FixedSizeSampledGaussianDpEvent(replace=True):
            raise ValueError(_MSG_NO_FORMULA.format(event="sampling with replacement"))
        case (
            _events.RandomAllocationDpEvent() | _events.GaussianMixtureOfBinsDpEvent() | _events.MinSepSampledDpEvent()
        ):
            raise ValueError(_MSG_NO_FORMULA.format(event=type(event).__name__))
    if adjacency == "replace_one" and not isinstance(event, da.NonPrivateDpEvent):
        if not isinstance(event, da.GaussianDpEvent):
            raise ValueError(_MSG_REPLACEMENT.format(event=event))
        return da.GaussianDpEvent(event.noise_multiplier / 2)
    return event
