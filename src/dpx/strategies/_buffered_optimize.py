r"""Closed forms of buffered linear Toeplitz matrices, and their optimiser.

$c(x) = \prod_i (1 - \hat\theta_i x) / (1 - \theta_i x)$: the decays $\theta$ of $C$ are its poles, those of $C^{-1}$, $\hat\theta$, its
zeros. With $1 > \theta_1 > \hat\theta_1 > \theta_2 > \dots > \hat\theta_m > 0$ we have $\omega > 0$, $\hat\omega < 0$ and
$\sum_i \omega_i = \sum_i (\theta_i - \hat\theta_i) < 1$, so that $c$ is positive and decreases. Every function here is analytic and
accepts complex numbers: derivatives are taken by complex steps, exact to the last digit.
"""

import math
from typing import Any

import numpy as np


def interlaced_inverse(decays: np.ndarray, inverse_decays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""$(\hat\theta, \hat\omega)$ with $\hat\omega_i = \prod_j (\hat\theta_i - \theta_j) / \prod_{j \ne i} (\hat\theta_i - \hat\theta_j)$."""
    return inverse_decays, _residues(1 - inverse_decays, 1 - decays)


def _residues(gaps: np.ndarray, other_gaps: np.ndarray) -> np.ndarray:
    """`prod_j (a_i - b_j) / prod_{j != i} (a_i - a_j)` for a = 1 - gaps, b = 1 - other_gaps: differences of gaps keep their digits."""
    numerator = np.prod(other_gaps[None, :] - gaps[:, None], axis=1)
    differences = gaps[None, :] - gaps[:, None]
    differences = differences + np.eye(len(gaps))
    return numerator / np.prod(differences, axis=1)


def _geometric_sum(log_ratio: np.ndarray, size: Any) -> np.ndarray:
    r"""$\sum_{t < n} r^t$ for $\ln r < 0$."""
    return np.expm1(size * log_ratio) / np.expm1(log_ratio)


def _weighted_geometric_sum(log_ratio: np.ndarray, size: int) -> np.ndarray:
    r"""$\sum_{t < n} (n - t) r^t = \left(n - r (1 - r^n) / (1 - r)\right) / (1 - r)$."""
    gap = -np.expm1(log_ratio)
    exact = (size - np.exp(log_ratio) * _geometric_sum(log_ratio, size)) / gap
    # n (1 - r) below the root of the precision: two terms of the series in ln r
    total, moment = size * (size + 1) / 2, (size - 1) * size * (size + 1) / 6
    return np.where(np.abs(size * log_ratio) < 1e-5, total + moment * log_ratio, exact)


def _gaps(x: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    r"""From free numbers, the gaps $1 - \theta_i$ and $1 - \hat\theta_i$, which interlace between $10^{-4} / n$ and 1.

    A decay whose gap is smaller still cannot be told from 1 within $n$ steps.
    """
    parts = np.exp(x)
    logs = -_reach(steps) * np.cumsum(parts[::-1])[::-1] / (1 + parts.sum())
    gaps = np.exp(logs)
    return gaps[0::2], gaps[1::2]


def _reach(steps: int) -> float:
    return math.log(1e4 * steps)


def squared_sensitivity(gaps: np.ndarray, omega: np.ndarray, steps: int, separation: int, k: int) -> Any:
    r"""$\|\sum_{i<k} C_{:, ib}\|^2$, segment by segment between participations.

    In segment $q$, $\tau$ steps after participation $q$, the sum is $\sum_i \omega_i (1 + o_{qi}) \theta_i^{\tau - 1}$, where
    $o_{qi} = \sum_{p=1}^{q} \theta_i^{pb}$ are the older ones; at $\tau = 0$ it is $1 + \sum_i \omega_i o_{qi} / \theta_i$.
    """
    logs = np.log1p(-gaps)
    counts = np.arange(k)[:, None]
    older = np.exp(separation * logs) * _geometric_sum(separation * logs, counts)
    lengths = np.full(k, separation)
    lengths[-1] = steps - (k - 1) * separation
    first = 1 + (omega * np.exp(-logs) * older).sum(1)
    weights = omega * (1 + older)
    pairs = _geometric_sum((logs[:, None] + logs[None, :])[None], (lengths - 1)[:, None, None])
    return (first * first).sum() + np.einsum("qi,qj,qij->", weights, weights, pairs)


def closed_form_error(gaps: np.ndarray, inverse_gaps: np.ndarray, steps: int, kind: str) -> Any:
    r"""$\text{error}^2$ of prefix sums: $b_t = g + \sum_i h_i \hat\theta_i^t$, $g = 1 / c(1)$, $h_i = -\hat\omega_i / (1 - \hat\theta_i)$."""
    level = np.prod(gaps / inverse_gaps)
    heights = -_residues(inverse_gaps, gaps) / inverse_gaps
    logs = np.log1p(-inverse_gaps)
    pairs = logs[:, None] + logs[None, :]
    if kind == "max":
        single, double, constant = _geometric_sum(logs, steps), _geometric_sum(pairs, steps), float(steps)
    else:
        single, double = _weighted_geometric_sum(logs, steps) / steps, _weighted_geometric_sum(pairs, steps) / steps
        constant = (steps + 1) / 2
    return constant * level**2 + 2 * level * (heights * single).sum() + heights @ double @ heights


def _workload_error(inverse_gaps: np.ndarray, omega: np.ndarray, workload: np.ndarray, kind: str, power: float) -> Any:
    """The same for any workload, by filtering it with the buffers of the inverse."""
    from scipy.signal import lfilter

    rows = workload if workload.ndim == 1 else workload[:, ::-1]
    decoder = rows.astype(inverse_gaps.dtype)
    for gap, scale in zip(inverse_gaps, omega, strict=True):
        decoder = decoder + scale * lfilter(np.array([0.0, 1.0]), np.array([1.0, gap - 1]), rows, axis=-1)
    if workload.ndim == 1:
        squares = np.cumsum(decoder * decoder)
        return squares.mean() if kind == "mean" else squares[-1]
    squares = (decoder * decoder).sum(1)
    if kind == "mean":
        return squares.mean()
    largest = squares.real.max()
    return largest * ((squares / largest) ** power).sum() ** (1 / power)


def optimize_buffers(
    steps: int, buffers: int, workload: np.ndarray | None, kind: str, separation: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    r"""$(\theta, \omega)$ of least sensitivity times error; `workload` None for prefix sums."""
    from scipy.optimize import minimize

    def log_loss(x, power=1.0):
        gaps, inverse_gaps = _gaps(x, steps)
        sensitivity = squared_sensitivity(gaps, _residues(gaps, inverse_gaps), steps, separation, k)
        if workload is None:
            error = closed_form_error(gaps, inverse_gaps, steps, kind)
        else:
            error = _workload_error(inverse_gaps, _residues(inverse_gaps, gaps), workload, kind, power)
        return np.log(sensitivity) + np.log(error)

    def loss(x, power):
        with np.errstate(all="ignore"):
            columns = [log_loss(x + 1e-30j * unit, power) for unit in np.eye(len(x))]
        value, gradient = float(columns[0].real), np.array([c.imag for c in columns]) * 1e30
        return (value, gradient) if math.isfinite(value) and np.isfinite(gradient).all() else (1e10, np.zeros_like(x))

    # decays spread evenly in the logarithm of their gaps, over three ranges
    options = dict(maxiter=300, gtol=1e-7)
    bounds = [(-6.0, 6.0)] * (2 * buffers)  # no two gaps so close that their decays are one float
    results = []
    for reach in (0.6, 0.9, 1.2):
        part = reach * math.log(steps + 2) / _reach(steps)
        start = np.full(2 * buffers, math.log(part / (1 - part) / (2 * buffers)))
        results.append(_minimize(minimize, lambda x: loss(x, 1.0), start, bounds, options))
    best: Any = min(results, key=lambda result: result.fun)
    if workload is not None and workload.ndim == 2 and kind == "max":
        for power in (16.0, 256.0):
            best = _minimize(minimize, lambda x, power=power: loss(x, power), best.x, bounds, options)
    gaps, inverse_gaps = _gaps(best.x, steps)
    return 1 - gaps, _residues(gaps, inverse_gaps)


def _minimize(minimize: Any, loss: Any, start: np.ndarray, bounds: Any, options: dict[str, Any]) -> Any:
    return minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=dict(ftol=1e-14, maxcor=30, **options)
    )
