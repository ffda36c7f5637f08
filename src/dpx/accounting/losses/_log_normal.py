r"""Log-normal likelihood ratios $e^{u - a}$ with $u \sim N(0, 2a)$ under $Q$, $2a = 1 / \sigma^2$, and their means: what the two sides of random
allocation have in common."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ._connect import log_normal_mass


def log_variance(sigma: float, size: int) -> float:
    """Log of one plus the relative variance of a mean of log-normal variables."""
    exponent = sigma**-2
    log_variance = exponent + math.log(-math.expm1(-exponent)) - math.log(size)
    return float(np.logaddexp(0.0, log_variance))


def single_masses(sigma: float, step: float, reach: float) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
    """One ratio on multiples of `step`, up to `reach` standard deviations: the lowest, all of them, and the log masses of Q and of P between
    neighbours and outside."""
    shift = 0.5 / sigma**2
    lowest = math.floor((-shift - reach / sigma) / step)
    highest = math.ceil((shift + reach / sigma) / step)
    losses = np.arange(lowest, highest + 1) * step
    log_q, log_p = (log_normal_mass((losses + sign * shift) * sigma) for sign in (1.0, -1.0))
    return lowest, losses, log_q, log_p


def mean_by_halves(
    sigma: float,
    bins: int,
    points: int,
    most: int,
    single: Callable[[float], Any],
    average: Callable[[Any, int, Any, int, int], Any],
) -> Any:
    """The mean of `bins` ratios, from single ones up: every level holds the two sizes, at most, that the next one averages.

    **Arguments:**

    - `sigma`: the noise multiplier.
    - `points`: of the grid, in a standard deviation of the logarithm of the ratio.
    - `most`: so many points are affordable.
    - `single`: one ratio, on the grid of a step; its `mass` is that at each point.
    - `average`: of two ratios with these weights, on a grid so many times as fine.
    """
    wanted = lambda size: min(1 / sigma, math.sqrt(log_variance(sigma, size))) / points
    step = wanted(1)
    ratios = {1: single(step)}
    for level in reversed(range((bins - 1).bit_length())):
        sizes = {bins >> level, -(-bins >> level)}
        longest = max(len(ratio.mass) for ratio in ratios.values())
        # the sum gets narrower as terms are added: a finer grid, by a whole factor, while it is affordable
        finer = max(1, min(math.floor(step / wanted(min(sizes)) + 1e-9), most // longest))
        halves, step = ratios, step / finer
        ratios = {
            size: single(step)
            if size == 1
            else average(halves[size // 2], size // 2, halves[size - size // 2], size - size // 2, finer)
            for size in sizes
        }
    return ratios[bins]
