"""Rényi accounting: curves of whole events for questions, and divergences at chosen orders for filters and random repetition."""

import functools
from typing import Any, NamedTuple

import numpy as np

from ..events import reduced, uncoupled
from ._neighbours import check_accountant
from ._rules import renyi_of

# integers, whose formulas are sums of positive terms: fractional orders lose digits where the sampling rate is small
ORDERS = (*range(2, 65), 96, 128, 192, 256, 512)


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
    """The Rényi divergences of a reduced `event` between neighbours, in both directions; raises `ValueError` where no bound is known.

    **Arguments:**

    - `orders`: integers or other numbers above 1; by default those of dp_accounting.
    """
    from dp_accounting.rdp import RdpAccountant

    coupling, leaves = uncoupled(event)
    chosen = np.asarray(RdpAccountant(None if orders is None else list(orders)).orders)
    divergences = np.zeros(len(chosen))
    for leaf, count in leaves:
        divergences = divergences + count * renyi_of(leaf, adjacency, chosen)
    return RenyiCurve(chosen, divergences, coupling)


def renyi_divergences(event: Any, adjacency: str, orders: tuple[int, ...] = ORDERS) -> np.ndarray:
    r"""Upper bounds on the Rényi divergences $D_\alpha$ of `event`, between neighbours and in both directions, for each of `orders`.

    Raises `ValueError` where dp_accounting knows none, and always under replacement, where its sensitivity is half of what it should be.
    """
    check_accountant("rdp", adjacency)
    curve = renyi_curve(reduced(event), adjacency, orders)
    if curve.coupling:
        raise ValueError(
            "A mechanism that may fail, such as one that cuts batches once in a blue moon, has no Rényi divergence. Leave `max_batch_size` out."
        )
    return curve.divergences
