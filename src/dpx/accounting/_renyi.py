"""Rényi divergences of events at chosen orders, for what needs the curve itself: filters and random repetition."""

from typing import Any

import numpy as np

from ._accountants import check_accountant, relation
from ._event_tree import canonical, composed, parts
from ._poisson_renyi import is_sampled_zcdp, sampled_zcdp

# integers, whose formulas are sums of positive terms: fractional orders lose digits where the sampling rate is small
ORDERS = (*range(2, 65), 96, 128, 192, 256, 512)


def renyi_divergences(event: Any, adjacency: str, orders: tuple[int, ...] = ORDERS) -> np.ndarray:
    r"""Upper bounds on the Rényi divergences $D_\alpha$ of `event`, between neighbours and in both directions, for each of `orders`.

    Raises `ValueError` where dp_accounting knows none, and always under replacement, where its sensitivity is half of what it should be.
    """
    from dp_accounting.rdp import RdpAccountant

    check_accountant("rdp", adjacency)
    pairs = parts(canonical(event))
    sampled = [(e, n) for e, n in pairs if is_sampled_zcdp(e)]
    pairs = tuple((e, n) for e, n in pairs if not is_sampled_zcdp(e))
    accountant = RdpAccountant(list(orders), relation(adjacency))
    for e, _ in pairs:
        if not accountant.supports(e):
            raise ValueError(
                f"Rényi accounting does not know {e} under `adjacency={adjacency!r}`. Of sampled mechanisms it knows Poisson sampling with "
                "Gaussian noise, under 'add_or_remove_one' and 'replace_special'."
            )
    total = accountant.compose(composed(pairs)).rdp
    return sum((n * sampled_zcdp(e, np.array(orders)) for e, n in sampled), total)
