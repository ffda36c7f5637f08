r"""The best matrices where an example takes part several times: convex problems in $X = C^\top C$, with certificates. Host, float64.

The error is $\operatorname{tr}(M X^{-1})$ with $M = A^\top \Omega A$ and $\Omega$ = 1/n for the mean over the rows of the workload; the maximum
over rows is the largest over all diagonal $\Omega$ of trace 1. The squared sensitivity is the largest $u^\top X u$ over vectors of signs $u$ that
are allowed (at most `k` entries, `separation` apart), as long as $X$ has no negative entry where two participations meet. Both problems below
rest on one inequality (Cauchy and Schwarz): for every positive semidefinite $D$,
$$\operatorname{tr}(M X^{-1}) \operatorname{tr}(D X) \ge \big(\operatorname{tr} (D^{1/2} M D^{1/2})^{1/2}\big)^2,$$
so that any mixture $D$ of $u u^\top$, for which $\operatorname{tr}(D X)$ is at most the squared sensitivity, bounds every matrix's error from below.
"""

import functools
import itertools
import math

import numpy as np

from ._optimize import LossAndGradient, row_weights, stages
from ._sensitivity import allowed_patterns, pattern_sensitivity, toeplitz
from ._square_root import square_root_coefficients

_HUGE = 1e10
_FLOOR = 1e-5
MOST_SIGNED = 2**13  # vectors of signs up to which all of them are looked at


def triangular_factor(gram: np.ndarray) -> np.ndarray:
    """The lower-triangular $C$ with $C^T C$ = `gram`: a Cholesky factorization read backwards."""
    return np.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1].T


@functools.lru_cache(maxsize=4)
def signed_patterns(steps: int, separation: int, k: int) -> np.ndarray | None:
    """All vectors of signs on maximal patterns, up to the sign of the whole; None if they are more than `MOST_SIGNED`.

    A pattern that has room for one more participation is dominated: with the better of two signs it adds to $u^T X u$.
    """
    patterns = allowed_patterns(steps, separation, k)
    if patterns is None or sum(2 ** (len(p) - 1) for p in patterns) > MOST_SIGNED:
        return None
    rows = []
    for pattern in patterns:
        for signs in itertools.product((1.0, -1.0), repeat=len(pattern) - 1):
            u = np.zeros(steps)
            u[list(pattern)] = (1.0, *signs)
            rows.append(u)
    return np.stack(rows)


def optimize_patterns(queries: np.ndarray, kind: str, separation: int, k: int, tolerance: float = 1e-4) -> np.ndarray:
    r"""The $X$ of least error among ALL matrices, within a relative `tolerance` of its square, by weights on vectors of signs.

    For weights $w$ on the $u$ with $D = \sum_u w_u u u^\top$ the inequality above is attained by
    $X = D^{-1/2} (D^{1/2} M D^{1/2})^{1/2} D^{-1/2}$. Its right-hand side is concave in $(w, \Omega)$, and its slopes are $u^\top X u$ and the errors
    of single rows. Multiplying every weight by a power of its slope (the fixed point of Denisov et al., where all $u$ are unit vectors) climbs;
    when the two sides of the inequality differ by less than the tolerance, they enclose the optimum. The mean error gets there in hundreds of
    iterations; for the maximum, whose weights on rows tend to 0, the best of 3000 is taken, a per cent or two above the bound.
    """
    u = signed_patterns(len(queries), separation, k)
    assert u is not None
    steps = len(queries)
    weights, rows = np.full(len(u), 1 / len(u)), np.full(steps, 1 / steps)
    best, least, most = np.eye(steps), math.inf, 0.0
    power = (
        3.0  # the fixed point has 1, which climbs surely but slowly; what it reaches is certified whatever the power
    )
    for _ in range(3_000):
        target = queries.T @ (rows[:, None] * queries)
        values, vectors = np.linalg.eigh((u.T * weights) @ u)
        root, inverse = ((vectors * s) @ vectors.T for s in (np.sqrt(values), 1 / np.sqrt(values)))
        values, vectors = np.linalg.eigh(root @ target @ root)
        values = np.sqrt(np.clip(values, 0.0, None))
        gram = inverse @ ((vectors * values) @ vectors.T) @ inverse
        total = float(values.sum())
        lower = total * total
        slopes = np.einsum("pi,pi->p", u @ gram, u) / total
        squares = np.einsum("ij,ji->i", queries, np.linalg.solve(gram, queries.T))
        error = float(squares.mean() if kind == "mean" else squares.max())
        upper = error * pattern_sensitivity(gram, separation, k) ** 2
        most = max(most, lower)
        if upper < least:
            best, least = gram, upper
        if least <= most * (1 + tolerance):
            break
        weights = weights * slopes**power
        weights /= weights.sum()
        if kind == "max":
            # every row keeps some weight, or the target would be singular; any weights give a bound
            rows = rows * (squares / squares.max()) ** 2
            rows = rows / rows.sum()
            rows = (1 - _FLOOR) * rows + _FLOOR / steps
    return best


def optimize_separated(queries: np.ndarray, bands: int, kind: str, separation: int, k: int) -> np.ndarray:
    r"""The $X$ of least error among matrices with at most `bands` bands, `bands` $\le$ `separation`, by L-BFGS.

    Participations do not meet, so the squared sensitivity is the most that a pattern collects of $d = \operatorname{diag} X$: a linear
    program over $x \in [0, 1]^n$ with $\sum x \le k$ and at most 1 in every window of `separation` steps. Its rows are intervals, hence it is totally
    unimodular and its dual has no gap: the sensitivity is at most 1 if and only if there are $p, \mu \ge 0$ with
    $d_i \le \mu + \sum_{j \ni i} p_j$ (over windows) and $k \mu + \sum_j p_j \le 1$. More of $d$ is less of an error, so that equality holds: what is
    left is smooth and convex in the entries off the diagonal, $p$ and $\mu$, with bounds $p, \mu \ge 0$.
    """
    from scipy.linalg import cho_factor, cho_solve
    from scipy.optimize import minimize as scipy_minimize

    steps = len(queries)
    windows = steps - separation + 1
    cover = np.ones((steps, windows + 1))
    cover[:, :-1] = np.tri(steps, windows) - np.tri(steps, windows, k=-separation)
    price = np.concatenate([np.ones(windows), [float(k)]])
    rows, columns = np.nonzero(np.tril(np.ones((steps, steps)), -1) - np.tril(np.ones((steps, steps)), -bands))

    def gram_of(x: np.ndarray) -> np.ndarray:
        gram = np.diag(cover @ x[: windows + 1])
        gram[rows, columns] = x[windows + 1 :]
        gram[columns, rows] = x[windows + 1 :]
        return gram

    def loss(x: np.ndarray, power: float) -> LossAndGradient:
        try:
            factor = cho_factor(gram_of(x), lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            return _HUGE, np.zeros_like(x)
        solved = cho_solve(factor, queries.T, check_finite=False)  # X^-1 A^T
        value, weights = row_weights(np.einsum("ij,ji->i", queries, solved), power)
        slope = (solved * weights) @ solved.T / value
        cost = float(price @ x[: windows + 1])
        down = price / cost - cover.T @ np.diag(slope)
        return math.log(value) + math.log(cost), np.concatenate([down, -2 * slope[rows, columns]])

    root = square_root_coefficients("optimize", steps, 0.0, 0.0)
    start = toeplitz(np.where(np.arange(steps) < bands, root, 0.0))
    start = start / np.linalg.norm(start, axis=0)
    dual = np.concatenate([np.full(windows, 0.5 / windows), [0.5 / k]])
    scale = np.sqrt(cover @ dual)
    x = np.concatenate([dual, (start.T @ start * scale[:, None] * scale)[rows, columns]])
    bounds = [(0.0, None)] * (windows + 1) + [(None, None)] * len(rows)
    for power in stages(queries, kind):
        found = scipy_minimize(
            lambda x, power=power: loss(x, power),
            x,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options=dict(maxiter=1000, maxfun=2000, maxcor=50, ftol=1e-14, gtol=1e-9),
        )
        x = np.asarray(found.x)
        x = x / float(price @ x[: windows + 1])
    return gram_of(x)
