"""Rényi divergences of events at chosen orders, for what needs the curve itself: filters and random repetition."""

from typing import Any

import numpy as np

from ..events import reduced
from ._accountants import check_accountant
from ._renyi_accountant import renyi_curve

# integers, whose formulas are sums of positive terms: fractional orders lose digits where the sampling rate is small
ORDERS = (*range(2, 65), 96, 128, 192, 256, 512)


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
