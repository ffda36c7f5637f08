r"""Balls-in-bins sampling of a matrix mechanism: a deterministic bound, by convexity and Kahane's inequality.

The likelihood ratio is $S = \frac1b \sum_j e^{u_j - E u_j^2 / 2}$ with $u$ normal under $Q$, of covariance Gram / $\sigma^2$. Deltas of both
directions are expectations of convex functions of $S$, therefore

- they grow if any entry of the covariance grows (Kahane 1985), and
- they are at most the weighted mean of those of the averages over classes that partition the bins (Jensen).

So the bins are dealt into classes of bins far apart, within each all inner products are raised to the largest, $\rho$, and what is left is a
Gaussian of variance $\rho$ that all share, and random allocation among independent ones of variance $1 - \rho$. A banded matrix with fewer
bands than a class's bins are apart has $\rho = 0$: balls-in-bins is then at least as private as random allocation over `bins / bands` bins.
"""

import functools
import math

import numpy as np

from ._allocation import random_allocation
from ._distributions import LossDistribution, mixture, poisson_gaussian

_ORDERS = range(2, 25)
_Classes = list[tuple[float, int, float]]


@functools.lru_cache(maxsize=8)
def mixture_of_bins(noise_multiplier: float, gram: tuple[tuple[float, ...], ...], interval: float) -> LossDistribution:
    r"""$\frac1b \sum_j N(m_j, \sigma^2 I)$ against $N(0, \sigma^2 I)$, where `gram` holds $\langle m_i, m_j \rangle$."""
    largest, independent, others = _dealt(gram)
    sigma = noise_multiplier / math.sqrt(largest)
    best = min(others, key=lambda classes: _rough(sigma, classes))
    # Rényi moments flatter what is shared; classes without it are kept unless they are clearly worse
    if _rough(sigma, best) > 0.95 * _rough(sigma, independent):
        best = independent
    parts = [(weight, _equicorrelated(sigma, size, rho, interval)) for weight, size, rho in best]
    return LossDistribution(
        mixture([(weight, part.remove) for weight, part in parts]),
        mixture([(weight, part.add) for weight, part in parts]),
    )


@functools.lru_cache(maxsize=8)
def _dealt(gram: tuple[tuple[float, ...], ...]) -> tuple[float, _Classes, list[_Classes]]:
    """The largest inner product, the classes without any, and others, of fewer and larger ones: without the noise, so found once."""
    matrix = np.maximum(np.array(gram, np.float64), 0.0)
    largest = float(matrix.max())
    if not largest > 0:
        raise ValueError("`GaussianMixtureOfBinsDpEvent(gram=...)` needs a positive entry: nobody's data was used.")
    matrix, bins = matrix / largest, len(matrix)
    sizes = {max(1, bins // apart) for apart in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)}
    return (
        largest,
        _classes(matrix, max(1, bins // _bands(matrix))),
        [_classes(matrix, size) for size in sorted(sizes, reverse=True)],
    )


def bins_scale(noise_multiplier: float, gram: tuple[tuple[float, ...], ...]) -> tuple[float, float]:
    """Standard deviation and extent of the privacy loss, for its grid."""
    matrix = np.maximum(np.array(gram, np.float64), 0.0)
    largest = float(matrix.max())
    if not largest > 0:
        return 0.0, 0.0
    sigma = noise_multiplier / math.sqrt(largest)
    exponents = matrix / (largest * sigma**2)
    top = float(exponents.max())
    if top < 1:
        log_variance = math.log1p(float(np.expm1(exponents).mean()))
    else:
        log_variance = top + math.log(float(np.exp(exponents - top).mean()))
    return min(1 / sigma, math.sqrt(log_variance)), 1 / sigma**2 + 18 / sigma


def _bands(matrix: np.ndarray) -> int:
    """How far apart, on the ring, bins must be for their inner products to vanish."""
    bins = len(matrix)
    rows, columns = np.nonzero(matrix > 1e-12)
    apart = np.abs(rows - columns)
    return int(np.minimum(apart, bins - apart).max(initial=0)) + 1


def _classes(matrix: np.ndarray, size: int) -> _Classes:
    """Weights, sizes and largest inner products of classes that take one bin of each of `size` arcs of the ring."""
    bins = len(matrix)
    edges = np.arange(size + 1) * bins // size
    worst: dict[int, tuple[float, float]] = {}
    for place in range(int(np.diff(edges).max())):
        members = edges[:-1][np.diff(edges) > place] + place
        block = matrix[np.ix_(members, members)].copy()
        np.fill_diagonal(block, 0.0)
        weight, rho = worst.get(len(members), (0.0, 0.0))
        worst[len(members)] = (weight + len(members) / bins, max(rho, float(block.max())))
    return [(weight, size, min(rho, 1.0)) for size, (weight, rho) in worst.items()]


def _equicorrelated(sigma: float, size: int, rho: float, interval: float) -> LossDistribution:
    if size == 1 or rho > 1 - 1e-6:
        return poisson_gaussian(sigma, 1.0, interval)
    own = random_allocation(sigma / math.sqrt(1 - rho), size, interval)
    return own if rho == 0 else own.compose(poisson_gaussian(sigma / math.sqrt(rho), 1.0, interval))


def _rough(sigma: float, classes: _Classes) -> float:
    """Which classes to prefer: epsilon at delta 1e-6 from Rényi moments of the ratio, of whole orders."""
    moments = sum(weight * np.exp(_log_moments(sigma, size, rho)) for weight, size, rho in classes)
    orders = np.array(_ORDERS)
    with np.errstate(all="ignore"):
        return float(np.nanmin((np.log(moments) + math.log(1e6)) / (orders - 1)))


def _log_moments(sigma: float, size: int, rho: float) -> np.ndarray:
    r"""$\log E_Q[S^\alpha]$: $\alpha!$ times a coefficient of the `size`-th power of the generating function of one ratio's moments."""
    top = _ORDERS[-1]
    powers = np.arange(top + 1)
    pairs = powers * (powers - 1) / (2 * sigma**2)
    log_factorial = np.array([math.lgamma(i + 1) for i in powers])
    with np.errstate(all="ignore"):
        base = np.exp((1 - rho) * pairs - log_factorial - powers * math.log(size))
        result = np.eye(1, top + 1)[0]
        for digit in bin(size)[2:]:
            result = np.convolve(result, result)[: top + 1]
            if digit == "1":
                result = np.convolve(result, base)[: top + 1]
        log_moments = np.log(result) + log_factorial + rho * pairs
    return np.minimum(np.nan_to_num(log_moments[list(_ORDERS)], nan=700.0, posinf=700.0), 700.0)
