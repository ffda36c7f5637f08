r"""Optimisers: the matrix of least sensitivity times error. Host, float64, gradients by hand, L-BFGS.

Losses are $\ln \text{sens}^2 + \ln \text{error}^2$, which the scale of the matrix leaves alone: the first coefficient is held at 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._error import divide, filtered_rows, inverse_error, inverse_series, multiplied_rows, multiply, toeplitz_error
from ._sensitivity import decreasing_envelope, participation_sum, toeplitz, toeplitz_sensitivity
from ._square_root import square_root_coefficients

LossAndGradient = tuple[float, np.ndarray]

_HUGE = 1e10  # loss of coefficients whose inverse overflows: finite, so that a line search can turn back
_POWERS = (16.0, 128.0, 1024.0)  # the maximum over rows is minimised as a norm of growing order


def minimize(loss: Callable[[np.ndarray], LossAndGradient], start: np.ndarray, iterations: int = 1000) -> np.ndarray:
    """L-BFGS."""
    from scipy.optimize import minimize as scipy_minimize

    if start.size == 0:
        return start
    options: Any = dict(maxiter=iterations, maxfun=2 * iterations, maxcor=30, ftol=1e-13, gtol=1e-8)
    return np.asarray(scipy_minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x)


def candidate_bands(call: str, bands: int | Sequence[int] | None, steps: int) -> list[int]:
    """The numbers of bands to choose from: those given, or all powers of two up to `steps`."""
    if bands is None:
        return [2**i for i in range(steps.bit_length()) if 2**i <= steps]
    is_many = isinstance(bands, Sequence | np.ndarray) and np.ndim(bands) == 1 and not isinstance(bands, str | bytes)
    candidates: Any = list(bands) if is_many else [bands]  # pyright: ignore[reportArgumentType]
    if not candidates:
        raise ValueError(f"`{call}(bands=...)` must name at least one number of bands; got none.")
    return candidates


def query_weights(steps: int, kind: str) -> np.ndarray:
    r"""$\text{error}^2 = \sum_i \omega_i b_i^2$ for the coefficients $b$ of a Toeplitz $A C^{-1}$, whose last row is its largest."""
    return np.arange(steps, 0, -1) / steps if kind == "mean" else np.ones(steps)


def row_weights(squares: np.ndarray, power: float) -> tuple[float, np.ndarray]:
    """The norm of that order of the squared row norms (1: their mean), and its derivative with respect to each of them."""
    if power == 1:
        return float(squares.mean()), np.full(len(squares), 1 / len(squares))
    largest = squares.max()
    powers = (squares / largest) ** (power - 1)
    total = float((powers * squares / largest).sum())
    return float(largest * total ** (1 / power)), powers * total ** (1 / power - 1)


def stages(workload: np.ndarray, kind: str) -> tuple[float, ...]:
    """Orders to minimise one after the other; the last row of a Toeplitz workload is always the largest, so that it needs none."""
    return (1.0,) if kind == "mean" or workload.ndim == 1 else (1.0, *_POWERS)


def squared_sensitivity(
    c: np.ndarray, steps: int, separation: int, k: int, decreasing: bool = False
) -> LossAndGradient:
    r"""$\text{sens}^2$ of the Toeplitz matrix that begins with `c`, and its gradient; see `toeplitz_sensitivity`.

    `decreasing` takes it for granted that `c` decreases, which makes the bound smooth.
    """
    bands = len(c)
    if k == 1 or bands <= separation:
        times = np.zeros(bands)
        for i in range(k):
            times[: max(steps - i * separation, 0)] += 1
        return float((times * c * c).sum()), 2 * times * c
    envelope = np.zeros(steps)
    envelope[:bands] = c if decreasing else decreasing_envelope(c)
    total = participation_sum(envelope, separation, k)
    slope = np.zeros(bands)
    for i in range(k):
        part = total[i * separation :][:bands]
        slope[: len(part)] += 2 * part
    if decreasing:
        return float((total * total).sum()), slope
    # where each value of the envelope comes from: the last index at which the running maximum from the right was raised
    raised = np.where(np.abs(c) >= envelope[:bands], np.arange(bands), bands)
    source = np.minimum.accumulate(raised[::-1])[::-1]
    return float((total * total).sum()), np.bincount(source, slope, minlength=bands) * np.sign(c)


def _log_loss(sensitivity: LossAndGradient, error: LossAndGradient) -> LossAndGradient:
    value = math.log(sensitivity[0]) + math.log(error[0])
    gradient = sensitivity[1] / sensitivity[0] + error[1] / error[0]
    return (
        (value, gradient) if math.isfinite(value) and np.isfinite(gradient).all() else (_HUGE, np.zeros_like(gradient))
    )


def _held(loss: Callable[[np.ndarray], LossAndGradient]) -> Callable[[np.ndarray], LossAndGradient]:
    def free(x):
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                value, gradient = loss(np.concatenate([[1.0], x]))
            except (ValueError, OverflowError):  # the logarithm of something infinite
                return _HUGE, np.zeros_like(x)
        return value, gradient[1:]

    return free


def banded_error(c: np.ndarray, workload: np.ndarray, kind: str, power: float) -> LossAndGradient:
    r"""$\text{error}^2$ of a banded Toeplitz matrix and its gradient."""
    steps, bands = len(workload), len(c)
    if workload.ndim == 1:
        b = divide(workload, c)
        weighted = query_weights(steps, kind) * b
        # db = -(1/c) * b * dc; the adjoint of division by c runs backwards in time
        adjoint = divide(2 * weighted[::-1], c)[::-1]
        return float((weighted * b).sum()), -np.array([adjoint[j:] @ b[: steps - j] for j in range(bands)])
    decoder = np.concatenate(list(filtered_rows(workload, c)))
    value, weights = row_weights(np.square(decoder).sum(1), power)
    # d|A C^-1|^2 = -2 tr(C^-1 M^T W M dC) for M = A C^-1
    solved = divide(weights[:, None] * decoder, c)
    gradient = [-2 * np.einsum("ij,ij->", solved[:, : steps - j], decoder[:, j:]) for j in range(bands)]
    return value, np.array(gradient)


def inverse_banded_error(inverse: np.ndarray, workload: np.ndarray, kind: str, power: float) -> LossAndGradient:
    r"""$\text{error}^2$ of a Toeplitz matrix with a banded inverse and its gradient with respect to the inverse's coefficients."""
    steps, bands = len(workload), len(inverse)
    if workload.ndim == 1:
        b = multiply(inverse, workload, steps)
        weighted = query_weights(steps, kind) * b
        return float((weighted * b).sum()), 2 * np.array([weighted[j:] @ workload[: steps - j] for j in range(bands)])
    decoder = np.concatenate(list(multiplied_rows(workload, inverse)))
    value, weights = row_weights(np.square(decoder).sum(1), power)
    weighted = weights[:, None] * decoder
    gradient = [2 * np.einsum("ij,ij->", weighted[:, : steps - j], workload[:, j:]) for j in range(bands)]
    return value, np.array(gradient)


def _search(
    loss: Callable[[np.ndarray, float, int, bool], LossAndGradient],
    bound: Callable[[np.ndarray], float],
    start: np.ndarray,
    powers: tuple[float, ...],
    k: int,
) -> np.ndarray:
    """Minimises `loss(c, power, k, decreasing)`.

    For k > 1 the envelope makes it rough, and looser than the sensitivity is: of several descents the one with the least
    `bound`, sensitivity times error, wins.
    """

    def descend(c, power, k, decreasing):
        return np.concatenate([[1.0], minimize(_held(lambda c: loss(c, power, k, decreasing)), c[1:])])

    best = start
    for power in powers:
        best = descend(best, power, 1, False)
    if k == 1:
        return best
    smooth = descend(best, powers[-1], k, True)
    return min((start, best, smooth, *(descend(c, powers[-1], k, False) for c in (start, best, smooth))), key=bound)


def optimize_banded(workload: np.ndarray, bands: int, kind: str, separation: int, k: int) -> np.ndarray:
    """Coefficients of the banded Toeplitz matrix of least error."""
    steps, participations = len(workload), k

    def loss(c, power, k, decreasing):
        k = participations if bands <= separation else k
        return _log_loss(
            squared_sensitivity(c, steps, separation, k, decreasing), banded_error(c, workload, kind, power)
        )

    def bound(c):
        padded = np.concatenate([c, np.zeros(steps - bands)])
        return toeplitz_sensitivity(padded, separation, k) * toeplitz_error(c, workload, kind)

    start = square_root_coefficients("optimize", bands, 0.0, 0.0)
    return _search(loss, bound, start, stages(workload, kind), 1 if bands <= separation else k)


def optimize_inverse_banded(workload: np.ndarray, bands: int, kind: str, separation: int, k: int) -> np.ndarray:
    """Coefficients of the inverse of the Toeplitz matrix of least error whose inverse is banded."""
    steps = len(workload)

    def loss(inverse, power, k, decreasing):
        c = inverse_series(inverse, steps)
        squared, slope = squared_sensitivity(c, steps, separation, k, decreasing)
        # dc = -(c * c) * d(inverse)
        square = multiply(c, c, steps)
        gradient = -np.array([slope[j:] @ square[: steps - j] for j in range(bands)])
        return _log_loss((squared, gradient), inverse_banded_error(inverse, workload, kind, power))

    def bound(inverse):
        c = inverse_series(inverse, steps)
        return toeplitz_sensitivity(c, separation, k) * inverse_error(inverse, workload, kind)

    start = square_root_coefficients("optimize", bands, 0.0, 0.0, inverse=True)
    return _search(loss, bound, start, stages(workload, kind), k)


def optimize_gram(workload: np.ndarray, bands: int, kind: str) -> np.ndarray:
    r"""The lower-triangular $C$ with unit columns and `bands` bands that minimises $\operatorname{tr}(A^\top A X^{-1})$, $X = C^\top C$.

    Without a limit on the bands and for the mean error by the fixed point of Denisov et al.; otherwise by L-BFGS on the entries of
    $X$, from the (convex) problem's feasible side: a step that leaves the positive definite cone has infinite loss.
    """
    steps = len(workload)
    queries = toeplitz(workload) if workload.ndim == 1 else workload
    if kind == "mean" and bands == steps:
        gram = _fixed_point(queries.T @ queries)
    else:
        gram = _masked_gram(queries, bands, kind)
    # X = C^T C with C lower triangular is a Cholesky factorization read backwards
    matrix = np.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1].T
    lag = np.arange(steps)[:, None] - np.arange(steps)[None, :]
    matrix = np.where((lag >= 0) & (lag < bands), matrix, 0.0)
    return matrix / np.linalg.norm(matrix, axis=0)


def _fixed_point(target: np.ndarray, iterations: int = 500, tolerance: float = 1e-6) -> np.ndarray:
    r"""$v = \operatorname{diag}((D^{1/2} A^\top A D^{1/2})^{1/2})$ with $D = \operatorname{diag} v$, and the $X$ of that $v$."""
    v = np.sqrt(np.diag(target))
    root, scale = target, v
    for _ in range(iterations):
        scale = np.sqrt(v)
        values, vectors = np.linalg.eigh(scale[:, None] * target * scale[None, :])
        root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
        new = np.diag(root).copy()
        done = np.abs(new / v - 1).max() < tolerance
        v = new
        if done:
            break
    gram = root / (scale[:, None] * scale[None, :])
    norms = np.sqrt(np.diag(gram))
    return gram / (norms[:, None] * norms[None, :])


def _masked_gram(queries: np.ndarray, bands: int, kind: str) -> np.ndarray:
    from scipy.linalg import cho_factor, cho_solve

    steps = len(queries)
    root = square_root_coefficients("optimize", steps, 0.0, 0.0)
    columns = toeplitz(np.where(np.arange(steps) < bands, root, 0.0))
    columns = columns / np.linalg.norm(columns, axis=0)
    start = columns.T @ columns
    rows, cols = np.nonzero(np.tril(np.ones((steps, steps)), -1) - np.tril(np.ones((steps, steps)), -bands))

    def gram_of(x):
        gram = np.eye(steps)
        gram[rows, cols] = x
        gram[cols, rows] = x
        return gram

    def loss(x, power):
        try:
            factor = cho_factor(gram_of(x), lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            return _HUGE, np.zeros_like(x)
        solved = cho_solve(factor, queries.T, check_finite=False)  # X^-1 A^T
        value, weights = row_weights(np.einsum("ij,ji->i", queries, solved), power)
        slope = -(solved * weights) @ solved.T / value
        return math.log(value), 2 * slope[rows, cols]

    best = start[rows, cols]
    for power in (1.0,) if kind == "mean" else (1.0, *_POWERS):
        best = minimize(lambda x, power=power: loss(x, power), best, 500)
    return gram_of(best)
