"""The largest claim that a p-value refutes."""

import math
from collections.abc import Callable


def largest_refuted(p_value: Callable[[float], float], failure: float, most: float = 700.0) -> float:
    """The largest number, of at least 0, whose p-value, which grows with it, is at most `failure`; 0 if none is.

    It is on the side of what is refuted, by a relative 1e-12 of the number.
    """
    if p_value(0.0) > failure:
        return 0.0
    gap = lambda x: math.log(max(p_value(x), 1e-320)) - math.log(failure)
    low, high = 0.0, 1.0
    while gap(high) <= 0:
        low, high = high, 2 * high
        if high > most:
            return low
    from scipy import optimize

    root = float(optimize.brentq(gap, low, high, xtol=1e-13, rtol=4e-15))  # pyright: ignore[reportArgumentType]
    return max(0.0, root * (1 - 1e-12))
