"""Finding the number at which a plan just keeps its budget, with few evaluations of a costly accountant."""

import math
from collections.abc import Callable, Iterator

_AIM = 0.45  # of the tolerance: how far inside the predicted root a point is asked for
_PROBE = 0.9  # of the tolerance: how far from a point near the root the other side is looked for


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

    Secants on (log x, excess), kept inside the bracket. The answer has been evaluated and found feasible, and a point that is no more than
    `tolerance` below it was found infeasible.

    **Arguments:**

    - `excess`: decreasing; for a budget, $\log(\varepsilon(x) / \varepsilon)$. It may be infinite, of either sign.
    - `guess`: where to start.
    - `tolerance`: relative accuracy of $x$.
    - `slope`: the derivative by $\log x$ near the guess, if it is known.
    - `largest`, `smallest`: the search gives up beyond.

    **Raises:** `ValueError` if everything up to `largest` is infeasible, or everything down to `smallest` feasible.
    """
    low, high = -math.inf, math.inf
    for _, low, high, _ in _points(excess, guess, slope, tolerance, largest, smallest):
        if high - low <= tolerance:
            break
    if math.isinf(high):
        raise ValueError(f"No value up to {largest:g} meets the budget.")
    if math.isinf(low):
        raise ValueError(f"Every value down to {smallest:g} meets the budget: there is no least one.")
    return math.exp(high)


def near_root(
    excess: Callable[[float], float],
    guess: float,
    *,
    tolerance: float,
    largest: float = 1e12,
    smallest: float = 1e-12,
) -> tuple[float, float | None]:
    r"""A point within about a relative `tolerance` of where `excess` crosses 0, and the slope by $\log x$ there: a guess, on either side.

    **Arguments:** as for `least_feasible`.

    **Raises:** `ValueError` if there is no such point.
    """
    x, slope = guess, None
    for (x, y), low, high, slope in _points(excess, guess, None, tolerance, largest, smallest):
        if slope is not None and abs(y) <= tolerance * abs(slope):
            return math.exp(x), slope
        if high - low <= tolerance:
            return math.exp(high), slope
    raise ValueError(f"Nothing between {smallest:g} and {largest:g} just meets the budget.")


def _points(
    excess: Callable[[float], float],
    guess: float,
    slope: float | None,
    tolerance: float,
    largest: float,
    smallest: float,
) -> Iterator[tuple[tuple[float, float], float, float, float | None]]:
    """The last point, the largest infeasible and the least feasible log x so far, and the slope, after every evaluation."""
    low, high = -math.inf, math.inf
    x, last = math.log(guess), None
    streak = 0  # evaluations since the sides were last swapped, or the bracket last halved
    width = math.inf
    for _ in range(200):
        y = excess(math.exp(x))
        if last is not None and math.isfinite(y - last[1]) and x != last[0]:
            secant = (y - last[1]) / (x - last[0])
            slope = secant if secant < -1e-3 else slope  # a plateau says nothing
        was_bracketed = math.isfinite(high - low)
        low, high = (low, x) if y <= 0 else (x, high)
        yield (x, y), low, high, slope
        if high - low <= 0.5 * width or (math.isfinite(high - low) and not was_bracketed):
            width, streak = high - low, 0
        elif last is not None and not was_bracketed and (last[1] <= 0) != (y <= 0):
            streak = 0
        else:
            streak += 1
        last = (x, y)
        if math.isinf(high - low) and not math.log(smallest) <= x <= math.log(largest):
            return
        step = -y / (slope or -1.0) if math.isfinite(y) else math.copysign(2.0, y)
        if math.isinf(high - low):
            step *= 2.0 ** max(0, streak - 3)  # a march in one direction gathers speed
        root = x + max(-2.0, min(2.0, step))
        if high - root < _PROBE * tolerance:
            x = high - max(_PROBE * tolerance, x - root)
        elif root - low < _PROBE * tolerance:
            x = low + max(_PROBE * tolerance, root - x)
        else:
            x = root + _AIM * tolerance
        if math.isfinite(high - low) and (streak >= 3 or not low < x < high):
            x, streak = 0.5 * (low + high), 0


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
