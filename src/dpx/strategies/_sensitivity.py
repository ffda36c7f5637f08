r"""How far one example can move $C x$: exact where a theorem gives it, else a proven upper bound. Host, float64.

Throughout, an example contributes vectors $g_t$ with $\|g_t\| \le 1$ at the steps $t$ of one participation pattern: at most `k`
steps, any two of them at least `separation` apart. The sensitivity is $\max \|C g\|_F$ over patterns and contributions, at most
$\max_\pi (\sum_{i, j \in \pi} |X_{ij}|)^{1/2}$ with $X = C^\top C$, and equal to it where $X \ge 0$ (all contributions the same).
"""

import functools
import math
from typing import Any

import numpy as np

from .._checks import positive_int

# above this many steps no Gram matrix is built to refine a bound that also has a closed form
GRAM_STEPS = 2048

# so many patterns are looked at one by one
_MOST_PATTERNS = 2**13


def check_participation(
    call: str, steps: int, min_separation: int, max_participations: int | None
) -> tuple[int, int, int]:
    """`(steps, separation, k)`, with `k` cut to the number of participations that fit into `steps`."""
    steps = positive_int(f"{call}.sensitivity(steps=...)", steps)
    separation = positive_int(f"{call}.sensitivity(min_separation=...)", min_separation)
    fit = -(-steps // separation)
    if max_participations is None:
        return steps, separation, fit
    return steps, separation, min(positive_int(f"{call}.sensitivity(max_participations=...)", max_participations), fit)


def best_pattern(values: np.ndarray, separation: int, k: int) -> Any:
    r"""$\max_\pi \sum_{i \in \pi} v_i$ over patterns of at most `k` positions, `separation` apart: VecSens, along the last axis.

    Dynamic programming, $F_k[i] = \max(v_i + F_{k-1}[i + b], F_k[i+1])$, on all rows of the non-negative `values` at once.
    """
    values = np.moveaxis(np.asarray(values, np.float64), -1, 0)
    size = values.shape[0]
    best = np.zeros((size + separation, *values.shape[1:]))
    for _ in range(min(k, -(-size // separation))):
        take = np.zeros_like(best)
        take[:size] = values + best[separation:]
        best = np.maximum.accumulate(take[::-1], axis=0)[::-1]
    return best[0]


@functools.lru_cache(maxsize=16)
def allowed_patterns(steps: int, separation: int, k: int) -> tuple[tuple[int, ...], ...] | None:
    """The patterns that have no room for one more participation; None if there are too many patterns to look at."""
    # those of m participations: m of the steps that are left when m - 1 gaps are taken out
    if sum(math.comb(max(0, steps - (m - 1) * (separation - 1)), m) for m in range(1, k + 1)) > _MOST_PATTERNS:
        return None
    found: list[tuple[int, ...]] = []

    def extend(pattern: tuple[int, ...]) -> None:
        first = pattern[-1] + separation if pattern else 0
        if len(pattern) == k or (pattern and first >= steps):
            edges = (-separation, *pattern, steps - 1 + separation)
            is_full = len(pattern) == k or all(b - a < 2 * separation for a, b in zip(edges, edges[1:], strict=False))
            if is_full:
                found.append(pattern)
            return
        for step in range(first, steps):
            extend((*pattern, step))

    extend(())
    return tuple(found)


def pattern_sensitivity(gram: np.ndarray, separation: int, k: int) -> float:
    r"""$\max_\pi (\sum_{i, j \in \pi} |X_{ij}|)^{1/2}$, pattern by pattern; infinite where there are too many of them."""
    patterns = allowed_patterns(len(gram), separation, k)
    if patterns is None:
        return math.inf
    size = np.abs(gram)
    most = 0.0
    for length in sorted({len(p) for p in patterns}):
        chosen = np.array([p for p in patterns if len(p) == length])
        most = max(most, float(size[chosen[:, :, None], chosen[:, None, :]].sum((1, 2)).max()))
    return math.sqrt(most)


def gram_sensitivity(gram: np.ndarray, separation: int, k: int) -> float:
    r"""Upper bound from $X = C^\top C$; exact for one participation, where $X_{ij} = 0$ for $|i - j| \ge$ `separation`, and where no entry is
    negative and the patterns are few enough to look at each.

    $\sum_{i,j \in \pi} |X_{ij}| \le \sum_{i \in \pi} r_i$, with $r_i$ the most that row $i$ can sum to when $i$ itself takes part.
    """
    size = len(gram)
    diagonal = np.clip(np.diag(gram), 0.0, None)
    if k == 1:
        return math.sqrt(float(diagonal.max()))
    index = np.arange(size)
    others = np.where(np.abs(index[:, None] - index[None, :]) >= separation, np.abs(gram), 0.0)
    if not others.any():
        return math.sqrt(float(best_pattern(diagonal, separation, k)))
    rows = diagonal + best_pattern(others, separation, k - 1)
    return min(math.sqrt(float(best_pattern(rows, separation, k))), pattern_sensitivity(gram, separation, k))


def decreasing_envelope(coefficients: np.ndarray) -> np.ndarray:
    """The smallest non-increasing sequence above `|coefficients|`: its strategy is at least as sensitive."""
    return np.maximum.accumulate(np.abs(coefficients)[::-1])[::-1]


def participation_sum(coefficients: np.ndarray, separation: int, k: int) -> np.ndarray:
    r"""$\sum_{i < k} C_{:, i b}$ for the Toeplitz $C$ of `coefficients`: participations as early and as dense as they can be."""
    total = np.array(coefficients, np.float64)
    for i in range(1, min(k, -(-len(total) // separation))):
        total[i * separation :] += coefficients[: len(total) - i * separation]
    return total


def toeplitz_sensitivity(coefficients: np.ndarray, separation: int, k: int) -> float:
    r"""Sensitivity of the `n` x `n` Toeplitz matrix of its `n` coefficients.

    Exact for one participation, for bands $\le$ `separation` (disjoint columns) and for non-negative, non-increasing coefficients
    (Kalinin and Lampert 2024); otherwise that of the decreasing envelope, an upper bound because $|X| \le X_{\text{envelope}}$.
    """
    nonzero = np.flatnonzero(coefficients)
    bands = int(nonzero[-1]) + 1 if len(nonzero) else 1
    if k == 1 or bands <= separation:
        norms = np.cumsum(np.square(coefficients))[::-1]  # squared column norms, largest first
        return math.sqrt(float(norms[: (k - 1) * separation + 1 : separation].sum()))
    envelope = decreasing_envelope(coefficients)
    bound = float(np.linalg.norm(participation_sum(envelope, separation, k)))
    if np.array_equal(envelope, coefficients) or len(coefficients) > GRAM_STEPS:
        return bound
    return min(bound, gram_sensitivity(toeplitz_gram(coefficients), separation, k))


def toeplitz(coefficients: np.ndarray) -> np.ndarray:
    """The lower-triangular Toeplitz matrix with that first column."""
    size = len(coefficients)
    padded = np.concatenate([np.zeros(size - 1), coefficients])
    # row i is padded[n-1-(n-1-i)...]: a window that slides one to the left, then is read backwards
    return np.lib.stride_tricks.sliding_window_view(padded, size)[:, ::-1].copy()


def toeplitz_gram(coefficients: np.ndarray) -> np.ndarray:
    matrix = toeplitz(coefficients)
    return matrix.T @ matrix
