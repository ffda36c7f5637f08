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
from collections.abc import Callable
from typing import Any

import numpy as np

from ...events import GaussianMixtureOfBinsDpEvent
from .._rules import loss_rule
from ._allocation import random_allocation
from ._allocation_lower import average, directions, fits, mean_ratio, times_shared, with_absent
from ._distribution import LossDistribution
from ._gaussian import poisson_gaussian
from ._pair import NOTHING, Attacks, FixedPair
from ._pmf import mixture

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


@functools.lru_cache(maxsize=32)
def _pairs_of(multiplier: float, gram: tuple[tuple[float, ...], ...]) -> Attacks:
    r"""Kahane's inequality from below: deltas fall where entries of the covariance do.

    The bins are dealt into blocks of neighbours. Of each block all inner products are lowered to the least, $\rho$, those between blocks to
    nothing, and all squared norms to the least, $d$. What is left is the mean over independent blocks of a ratio of variance $\rho$ that the block
    shares and the mean of independent ones of variance $d - \rho$.
    """
    matrix = np.array(gram, np.float64)
    bins = len(matrix)
    norms = np.diag(matrix)
    least, most = float(norms.min()), float(norms.max())
    if not most > 0 or not np.all(matrix >= 0) or not fits(multiplier / math.sqrt(most)):
        return NOTHING
    removed, added = [], []
    for size in sorted({1, 2, 4, 8, 16, 32, bins} & set(range(1, bins + 1))) if least > 0 else ():
        blocks = bins // size
        shared = min(
            float(matrix[i : i + size, i : i + size][~np.eye(size, dtype=bool)].min(initial=least))
            for i in range(0, blocks * size, size)
        )
        shared = 0.0 if size == 1 else min(shared, least)
        if size > 1 and shared < 1e-3:
            continue
        pairs = _blocks(multiplier, size, blocks, shared, least, blocks * size / bins)
        removed.append(pairs[0])
        added.append(pairs[1])
    if least < most:
        # or those of less than the largest norm count as if the unit were absent
        largest = norms >= (1 - 1e-12) * most
        number = int(largest.sum())
        pairs = _blocks(multiplier, 1, number, 0.0, most * (1 - 1e-12), number / bins)
        removed.append(pairs[0])
        added.append(pairs[1])
    return tuple(removed), tuple(added)


def _blocks(
    multiplier: float, size: int, blocks: int, shared: float, norm: float, present: float
) -> tuple[FixedPair, FixedPair]:
    found = []
    own = norm - shared
    for is_removed in (True, False):
        if shared == 0:
            ratio = mean_ratio(multiplier / math.sqrt(norm), size * blocks, is_removed)
        else:
            # of a block that shares all, a tenth of a per cent is left, so that the grid of its own part is not infinitely fine
            inner = mean_ratio(multiplier / math.sqrt(max(own, 1e-3 * norm)), size, is_removed)
            rest = min(shared, norm - max(own, 1e-3 * norm))
            ratio = times_shared(inner, multiplier / math.sqrt(rest), is_removed)
            ratio = repeated(lambda a, m, b, n, low=is_removed: average(a, m, b, n, 1, low), ratio, blocks)
        if present < 1:
            ratio = with_absent(ratio, present, is_removed)
        found.append(directions(ratio, is_removed))
    return found[0], found[1]


def repeated(mean: Callable[..., Any], ratio: Any, count: int) -> Any:
    """The mean of `count` independent copies, by halves."""
    if count == 1:
        return ratio
    half = repeated(mean, ratio, count // 2)
    other = half if count % 2 == 0 else mean(half, count // 2, ratio, 1)
    return mean(half, count // 2, other, count - count // 2)


def _scale(event: Any, adjacency: str) -> tuple[float, float]:
    del adjacency
    return bins_scale(event.noise_multiplier, event.gram)


def _attacks(event: Any, adjacency: str) -> Attacks:
    del adjacency
    return _pairs_of(event.noise_multiplier, event.gram)


def _with_side_queries(event: Any, noise_multiplier: float, side_precision: float) -> Any:
    del event, noise_multiplier, side_precision
    raise ValueError(
        "Nobody can account for adaptive clipping or metrics next to correlated noise under balls-in-bins sampling. Use "
        "`CyclicPoissonSampler` or `MinSepSampler`, independent noise, or a clip norm that is fixed and no metrics."
    )


@loss_rule(
    GaussianMixtureOfBinsDpEvent,
    scale=_scale,
    attacks=_attacks,
    only_presence="Balls-in-bins sampling",
    with_side_queries=_with_side_queries,
)
def _loss(event: Any, adjacency: str, interval: float) -> LossDistribution:
    del adjacency
    return mixture_of_bins(float(event.noise_multiplier), event.gram, interval)
