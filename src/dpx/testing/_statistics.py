"""Bounds that are wrong with a stated probability. SciPy is imported when they are asked for."""

from collections.abc import Callable
from typing import Any

import numpy as np

_BETS = (0.03, 0.1, 0.3, 0.6, 0.95)


def at_least(successes: int, trials: int, failure: float) -> float:
    """A lower bound of a coin's probability, wrong with probability `failure` (Clopper and Pearson)."""
    from scipy import stats

    return 0.0 if successes == 0 else float(stats.beta.ppf(failure, successes, trials - successes + 1))


def at_most(successes: int, trials: int, failure: float) -> float:
    """An upper bound of a coin's probability, wrong with probability `failure` (Clopper and Pearson)."""
    from scipy import stats

    return 1.0 if successes == trials else float(stats.beta.isf(failure, successes + 1, trials - successes))


def quantile(failure: float) -> float:
    """What a standard normal number exceeds with probability `failure`."""
    from scipy import special

    return float(-special.ndtri(failure))


def tail(x: Any) -> Any:
    """With what probability a standard normal number exceeds `x`."""
    from scipy import special

    return special.ndtr(-np.asarray(x, np.float64))


def log_evidence(values: np.ndarray, mean: float) -> float:
    r"""Evidence against "the mean is at most `mean`", from independent non-negative values of one distribution.

    Whoever bets a share of their capital on every value being above the mean, at odds that are fair if the claim is true, has more than
    $1 / \alpha$ times what they began with, ever, with probability at most $\alpha$ (Ville's inequality). Nothing is assumed of the
    distribution, and no limit is taken; a small variance is rewarded all the same.

    **Returns:** the logarithm of the largest capital, averaged over a few shares: the claim is refuted if it exceeds $-\log \alpha$.

    ??? cite "Reference"

        Waudby-Smith and Ramdas, *Estimating means of bounded random variables by betting*, JRSS B 2024.
    """
    if not mean > 0:
        return np.inf if np.any(values > 0) else 0.0
    gains = np.asarray(values, np.float64) / mean - 1
    capital = np.array([np.cumsum(np.log1p(share * gains)) for share in _BETS])
    total = np.logaddexp.reduce(capital, axis=0) - np.log(len(_BETS))
    return float(max(0.0, total.max()))


def distinguish(
    first: Callable[[Any], Any], second: Callable[[Any], Any], key: Any, samples: int, failure: float
) -> float:
    r"""A lower bound of $\mu$ for which an attacker tells two distributions apart as well as $N(0, 1)$ and $N(\mu, 1)$.

    **Arguments:**

    - `first`, `second`: from a key, a vector drawn from each distribution.
    - `key`: for the draws.
    - `samples`: of each, half of them to choose the attack, a linear statistic and its threshold, and half to measure it.
    - `failure`: the probability with which the bound is wrong.
    """
    import jax
    import jax.random as jr
    from scipy import special

    keys = jr.split(key, 2 * samples)
    x = np.asarray(jax.jit(jax.vmap(first))(keys[:samples]), np.float64)
    y = np.asarray(jax.jit(jax.vmap(second))(keys[samples:]), np.float64)
    half = samples // 2
    shift = x[:half].mean(0) - y[:half].mean(0)
    spread = np.cov(y[:half].T).reshape(len(shift), -1) + np.cov(x[:half].T).reshape(len(shift), -1)
    size = np.sqrt(np.maximum(np.diag(spread), 1e-300))
    direction = np.linalg.pinv(spread / size[:, None] / size, 1e-9, hermitian=True) @ (shift / size) / size
    scores = x @ direction, y @ direction
    shares = (0.1, 0.3, 0.5, 0.7, 0.9)
    middle = np.quantile(np.concatenate([scores[0][:half], scores[1][:half]]), shares)
    best = 0.0
    for threshold in middle:
        hits = int(np.sum(scores[0][half:] > threshold)), int(np.sum(scores[1][half:] > threshold))
        rest, each = samples - half, failure / 2 / len(shares)
        rates = at_least(hits[0], rest, each), at_most(hits[1], rest, each)
        if 0 < rates[0] and rates[1] < 1:
            best = max(best, float(special.ndtri(rates[0]) - special.ndtri(rates[1])))
    return best
