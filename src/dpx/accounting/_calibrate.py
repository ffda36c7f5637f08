"""Finding the number at which a plan just keeps its budget, with few evaluations of a costly accountant."""

import math
from collections.abc import Callable


def least_feasible(
    excess: Callable[[float], float],
    guess: float,
    *,
    tolerance: float,
    slope: float | None = None,
    largest: float = 1e12,
    smallest: float = 1e-12,
) -> float:
    r"""The smallest $x$, up to a relative `tolerance`, with `excess(x)` <= 0, for a decreasing function of $\log x$.

    Secants on (log x, excess), kept inside the bracket. The answer has always been evaluated and found feasible, and either a point that is
    closer than `tolerance` below it was found infeasible, or the measured slope says that it would be.

    **Arguments:**

    - `excess`: decreasing; for a budget, $\log(\varepsilon(x) / \varepsilon)$. It may be infinite, of either sign.
    - `guess`: where to start.
    - `tolerance`: relative accuracy of $x$.
    - `slope`: the derivative by $\log x$ near the guess, if it is known.
    - `largest`, `smallest`: the search gives up beyond.

    **Raises:** `ValueError` if everything up to `largest` is infeasible, or everything down to `smallest` feasible.
    """
    low, high = None, None  # (log x, excess): infeasible, feasible
    is_measured = slope is not None
    slope = -1.0 if slope is None else slope
    x = math.log(guess)
    for _ in range(200):
        y = excess(math.exp(x))
        if y <= 0:
            high = (x, y)
        else:
            low = (x, y)
        if low is not None and high is not None:
            if high[0] - low[0] <= tolerance:
                return math.exp(high[0])
            if math.isfinite(low[1]) and math.isfinite(high[1]):
                slope, is_measured = (high[1] - low[1]) / (high[0] - low[0]), True
        elif x > math.log(largest) or x < math.log(smallest):
            break
        if high is not None and is_measured and -high[1] <= tolerance * 0.5 * abs(slope):
            return math.exp(high[0])
        x = _next(x, y, slope, low, high, tolerance)
    if high is not None and low is not None:
        return math.exp(high[0])
    if high is not None:
        raise ValueError(f"Every value down to {smallest:g} meets the budget: there is no least one.")
    raise ValueError(f"No value up to {largest:g} meets the budget.")


def _next(x, y, slope, low, high, tolerance):
    aim = 0.25 * tolerance  # aim a little inside, so that the next point is feasible and close
    step = -y / slope + aim if math.isfinite(y) else math.copysign(2.0, y)
    x = x + max(-2.0, min(2.0, step))
    if low is not None and high is not None:
        width = high[0] - low[0]
        inside = min(max(x, low[0] + 0.25 * tolerance), high[0] - 0.25 * tolerance)
        # a secant that hugs one end for long would stall; the ends are at least a tenth of the bracket away unless close
        return inside if abs(inside - x) < 0.5 * width else 0.5 * (low[0] + high[0])
    if low is None and high is not None:
        return min(x, high[0] - 0.75 * tolerance)
    if high is None and low is not None:
        return max(x, low[0] + 0.75 * tolerance)
    return x


def largest_integer(is_feasible: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest integer in [1, most] that is feasible, given that feasibility is lost once and for good; 0 if there is none.

    Gallops away from `guess`, which costs two evaluations if it is right, then bisects.
    """
    low, high = 0, most + 1  # feasible, infeasible
    probe, stride = max(1, min(guess, most)), 1
    while high - low > 1:
        if is_feasible(probe):
            low, ahead = probe, probe + stride
        else:
            high, ahead = probe, probe - stride
        is_galloping = low == 0 or high == most + 1
        probe = max(low + 1, min(ahead, high - 1)) if is_galloping else (low + high) // 2
        stride *= 2
    return low
