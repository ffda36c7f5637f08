"""Bounds of a probability from counts: for one event, and for all thresholds at once."""

import functools
import math
from typing import Any

import numpy as np

from .._checks import positive_int, probability


def clopper_pearson_lower(successes: Any, trials: Any, failure: float) -> Any:
    """A lower bound of a probability from independent trials, wrong with probability `failure` at most; arrays of counts too."""
    from scipy import special

    k, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    with np.errstate(invalid="ignore"):
        bound = special.betaincinv(np.maximum(k, 0.5), n - k + 1, failure)
    return _plain(np.where(k <= 0, 0.0, bound))


def clopper_pearson_upper(successes: Any, trials: Any, failure: float) -> Any:
    """An upper bound of a probability from independent trials, wrong with probability `failure` at most; arrays of counts too."""
    from scipy import special

    k, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    with np.errstate(invalid="ignore"):
        # of failures: `1 - failure` would lose the small ones
        bound = 1 - special.betaincinv(np.maximum(n - k, 0.5), k + 1, failure)
        small = special.betainccinv(k + 1, np.maximum(n - k, 0.5), failure)
    return _plain(np.where(k >= n, 1.0, np.where(small < 0.5, small, bound)))


def _plain(x: np.ndarray) -> Any:
    return float(x) if x.ndim == 0 else x


@functools.lru_cache(maxsize=64)
def equal_local_level(number: int, failure: float) -> float:
    r"""The level $\eta$ at which all order statistics of `number` uniform numbers keep their own bounds at once, but for probability `failure`.

    $P(\exists k: U_{(k)} > B(1 - \eta; k, n - k + 1)) = \alpha$, where $B$ is the quantile of the $k$-th order statistic. With it a confidence bound
    may be taken at any threshold, chosen after looking at the scores. It costs a factor of 47 at 1,000 numbers, where the union bound
    costs 1,000.

    !!! success "Guarantee"

        The probability of a crossing is that of a sum of positive terms (a Poisson process, looked at where the bounds lie), so nothing
        cancels; the level is rounded down in the tenth digit.

    **Arguments:**

    - `number`: how many numbers; time grows with its square (a second at 1,000), and answers are remembered.
    - `failure`: $\alpha$.
    """
    number = positive_int("equal_local_level(number=...)", number)
    failure = probability("equal_local_level(failure=...)", failure)
    if number == 1:
        return failure
    # between the union bound and one event
    low, high = math.log(failure / number), math.log(failure)
    gap = lambda level: math.log(_crossing(number, math.exp(level))) - math.log(failure)
    at_low, at_high = gap(low), gap(high)
    for step in range(60):
        if high - low < 1e-12:
            break
        middle = low + (high - low) * at_low / (at_low - at_high) if step % 3 != 2 else (low + high) / 2
        middle = min(max(middle, low + (high - low) * 1e-3), high - (high - low) * 1e-3)
        at_middle = gap(middle)
        if abs(at_middle) < 1e-12:
            low = middle
            break
        if at_middle > 0:
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return math.exp(low)


def _crossing(number: int, level: float) -> float:
    r"""$P(\exists k: U_{(k)} > b_k)$ for $b_k$ the upper `level` quantile of the $k$-th of `number` uniform order statistics.

    Uniform numbers are a Poisson process of that many points. It is looked at in $b_1 < b_2 < \dots$: there is a crossing at $k$, and none before,
    where fewer than $k$ points lie below $b_k$, which then are $k - 1$.
    """
    from scipy import special

    ranks = np.arange(1, number + 1)
    bounds = special.betainccinv(ranks, number - ranks + 1.0, level)
    steps = np.diff(np.concatenate([[0.0], bounds])) * number
    reach = int(30 + 12 * math.sqrt(number))  # of the state: more points lie below with probability exp(-288)
    state = np.zeros(reach)
    state[0] = 1.0  # state[i]: that k - 1 + i points lie below
    log_all = _log_poisson(number, float(number))
    crossed = 0.0
    for k in ranks.tolist():
        rate = steps[k - 1]
        jumps = np.exp(_log_poisson(np.arange(int(40 + 3 * rate)), rate))
        state = np.convolve(state, jumps)[:reach]
        # the process is now in b_k
        if state[0] > 0:
            rest = number * (1 - bounds[k - 1]) if bounds[k - 1] < 0.5 else number * _above(k, number, level)
            log = math.log(state[0]) + float(_log_poisson(number - k + 1, rest)) - log_all
            crossed += math.exp(log)
        state = np.append(state[1:], 0.0)
    return crossed


def _above(k: int, number: int, level: float) -> float:
    """One minus the bound, without cancellation."""
    from scipy import special

    return float(special.betaincinv(number - k + 1.0, float(k), level))


def _log_poisson(k: Any, rate: float) -> Any:
    from scipy import special

    return special.xlogy(k, rate) - rate - special.gammaln(np.asarray(k) + 1.0)
