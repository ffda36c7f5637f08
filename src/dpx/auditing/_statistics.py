"""Exact laws of what white-box tests look at, as p-values."""

import math
from typing import Any

import numpy as np

from .._checks import positive_float, probability
from ._inputs import count


def chi_square_p_value(total: float, number: int) -> float:
    """Two-sided, of a sum of squares of so many standard normal numbers."""
    from scipy import stats

    if not math.isfinite(total):
        return 0.0
    return min(1.0, 2 * min(float(stats.chi2.cdf(total, number)), float(stats.chi2.sf(total, number))))


def gamma_p_value(total: float, number: int) -> float:
    """Two-sided, of a sum of so many standard exponential numbers."""
    from scipy import stats

    if not math.isfinite(total):
        return 0.0
    return min(1.0, 2 * min(float(stats.gamma.cdf(total, number)), float(stats.gamma.sf(total, number))))


def cosine_p_value(cosine: float, dimension: int) -> float:
    r"""Two-sided, of the cosine of two independent vectors, one of them with a direction that is uniform: $\cos^2 \sim
    \mathrm{Beta}(\frac12, \frac{d - 1}{2})$."""
    from scipy import special

    if dimension < 2:
        return 1.0
    square = min(1.0, cosine * cosine)
    return float(special.betaincc(0.5, (dimension - 1) / 2, square))


def binomial_p_value(successes: Any, trials: Any, probability: float) -> float:
    """Two-sided and exact, of so many successes: that of all counts that are no more likely (scipy's `binomtest`)."""
    from scipy import stats

    k, n = count("binomial_p_value(successes=...)", successes), count("binomial_p_value(trials=...)", trials)
    if n == 0:
        return 1.0
    return float(stats.binomtest(k, n, probability).pvalue)


def uniform_p_value(values: np.ndarray) -> float:
    """Of numbers that should be uniform in [0, 1] and independent (Kolmogorov and Smirnov, exact)."""
    from scipy import stats

    if len(values) == 0:
        return 1.0
    return float(stats.kstest(np.clip(values, 0.0, 1.0), "uniform").pvalue)


def transformed(counts: np.ndarray, below: np.ndarray, mass: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uniform numbers from counts with a discrete law, exactly: $F(k - 1) + U f(k)$, of $P(X < k)$ and $P(X = k)$."""
    return np.clip(below + rng.random(np.shape(counts)) * mass, 0.0, 1.0)


def of_binomial(counts: np.ndarray, trials: Any, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Uniform numbers from binomial counts."""
    from scipy import stats

    return transformed(counts, stats.binom.cdf(counts - 1, trials, rate), stats.binom.pmf(counts, trials, rate), rng)


def of_hypergeometric(
    counts: np.ndarray, population: int, marked: Any, drawn: Any, rng: np.random.Generator
) -> np.ndarray:
    """Uniform numbers from counts of marked ones among those drawn without replacement."""
    from scipy import stats

    law: Any = stats.hypergeom(population, marked, drawn)
    return transformed(counts, law.cdf(counts - 1), law.pmf(counts), rng)


def noise_draws_to_see(ratio: float, *, failure: float = 1e-6, power: float = 0.99) -> int:
    r"""How many numbers of Gaussian noise show, at level `failure` (one-sided), that its standard deviation is `ratio` < 1 times the stated one."""
    from scipy import stats

    ratio = positive_float("noise_draws_to_see(ratio=...)", ratio)
    failure = probability("noise_draws_to_see(failure=...)", failure)
    power = probability("noise_draws_to_see(power=...)", power)
    if not ratio < 1:
        raise ValueError(f"`noise_draws_to_see(ratio=...)` must be below 1: less noise than is stated; got {ratio}.")
    sees = lambda n: stats.chi2.cdf(stats.chi2.ppf(failure, n) / ratio**2, n) >= power
    low, high = 0, 1
    while not sees(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if sees(middle) else (middle, high)
    return high


def least_ratio_seen(number: int, failure: float, power: float = 0.99) -> float:
    """The standard deviation nearest to the stated one, as a multiple below 1, that so many numbers of noise would show."""
    from scipy import stats

    return math.sqrt(float(stats.chi2.ppf(failure / 2, number)) / float(stats.chi2.ppf(power, number)))


def least_rate_seen(trials: int, rate: float, failure: float, power: float = 0.99) -> float:
    """The relative excess of a rate that so many trials would show."""
    from scipy import special

    z = -float(special.ndtri(failure / 2)) - float(special.ndtri(1 - power))
    return z * math.sqrt((1 - rate) / max(trials * rate, 1e-300))
