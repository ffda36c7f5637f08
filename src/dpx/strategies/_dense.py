"""Any lower-triangular matrix, and the best of them."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._checks import positive_int, real_array
from ._base import MSG_NO_REPLAY, AbstractAnalysedStrategy, check_bands, check_steps
from ._error import Workload, check_kind, matrix_error, resolve_workload
from ._optimize import optimize_gram
from ._participations import optimize_patterns, optimize_separated, signed_patterns, triangular_factor
from ._sensitivity import check_participation, gram_sensitivity, toeplitz
from ._stream import Ring, init_ring, poison, solve_step


class _FrozenMatrix:
    """A float64 matrix that compares and hashes by its contents, once: an array cannot be a static field, this can."""

    def __init__(self, array: np.ndarray):
        self.array = np.array(array, np.float64)
        self.array.setflags(write=False)
        self._digest = hashlib.sha256(self.array.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _FrozenMatrix) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return f"f64[{self.array.shape[0]},{self.array.shape[1]}]"


class DenseStrategy(AbstractAnalysedStrategy[Ring]):
    r"""Any lower-triangular $C$: $x_t = (z_t - \sum_{j \ge 1} C_{t,t-j} x_{t-j}) / C_{tt}$, as far back as $C$ has bands.

    Keeps (bands - 1) copies of the parameters, up to one a step. `optimize` says which of them it makes are the best there are; it handles a
    thousand steps or so.

    !!! success "Guarantee"

        The sensitivity is exact for one participation, for any number of them at least `bands` steps apart, and for a $C^\top C$ without negative
        entries in runs with so few patterns of participation (8192) that each is looked at; otherwise an upper bound. Past the horizon the noise is
        NaN; it never repeats.

    **Arguments:**

    - `matrix`: $C$ of shape `(steps, steps)`: finite, lower triangular, with a positive diagonal.

    ??? cite "Reference"

        Denisov, McMahan, Rush, Smith and Guha Thakurta, *Improved differential privacy for SGD via optimal private linear operators
        on adaptive streams*, NeurIPS 2022.
    """

    frozen: _FrozenMatrix = eqx.field(static=True)
    steps: int | None = eqx.field(static=True)
    bands: int | None = eqx.field(static=True)
    replay_depth: int | None = eqx.field(static=True)

    def __init__(self, matrix: np.ndarray):
        call = "DenseStrategy(matrix=...)"
        array = real_array(call, matrix, "a square matrix, one row a step")
        if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape[0] == 0:
            raise ValueError(f"`{call}` must be a square matrix, one row a step; got shape {array.shape}.")
        if not np.isfinite(array).all():
            raise ValueError(f"`{call}` must be finite.")
        if np.triu(array, 1).any():
            raise ValueError(
                f"`{call}` must be lower triangular, so that no noise is needed before its step. For another C take the "
                "factor of C^T C: `np.linalg.cholesky((C.T @ C)[::-1, ::-1])[::-1, ::-1].T`, which has the same sensitivity and error."
            )
        if not (np.diag(array) > 0).all():
            raise ValueError(f"`{call}` must have a positive diagonal; got {np.diag(array).min()}.")
        self.frozen = _FrozenMatrix(array)
        self.steps = len(array)
        self.bands = next(b for b in range(1, len(array) + 1) if not np.tril(array, -b).any())
        self.replay_depth = None

    @classmethod
    def optimize(
        cls,
        steps: int,
        *,
        bands: int | None = None,
        workload: Workload = "prefix",
        kind: str = "mean",
        min_separation: int = 1,
        max_participations: int | None = 1,
    ) -> "DenseStrategy":
        r"""The matrix of least error among those with at most `bands` bands.

        The problem is convex in $C^\top C$. With one participation the columns of the optimum are unit vectors: without a limit on the bands the
        mean error's optimum is a fixed point, otherwise L-BFGS in float64 finds it. With several they are not: participations that are in
        more patterns cost more.

        - `bands` given, at most `min_separation`: participations do not meet, and the optimum is found by L-BFGS.
        - `bands=None`: without a limit, by weights on all patterns of participation and signs, with a dual bound beside it: the squared mean error is
            within a relative $10^{-4}$ of the least, the maximum within two per cent or so. Where patterns and signs are more than 8192, as in most
            runs of more than thirty steps, the same as `bands=min_separation`, whose squared error is larger by a fraction of a per cent if
            participations are few and far apart.

        All of them cost $O(n^3)$ an iteration. The scale is such that the sensitivity is $\sqrt k$.

        **Arguments:**

        - `steps`: $n$.
        - `bands`: at most `steps` with one participation, at most `min_separation` with several.
        - `workload`, `kind`, `min_separation`, `max_participations`: the error to be minimised, as for `error`.

        ??? cite "Reference"

            Denisov et al. 2022; for several participations Choquette-Choo, McMahan, Rush and Thakurta, *Multi-epoch matrix factorization
            mechanisms for private machine learning*, ICML 2023.
        """
        call = "DenseStrategy.optimize"
        steps = positive_int(f"{call}(steps=...)", steps)
        check_kind(call, kind)
        queries = resolve_workload(call, workload, steps)
        _, separation, k = check_participation("DenseStrategy", steps, min_separation, max_participations)
        limit = steps if k == 1 else min(separation, steps)
        chosen = limit if bands is None else check_bands(call, bands, steps)
        if chosen > limit:
            raise ValueError(
                f"`{call}(bands={chosen}, min_separation={separation})` lets participations overlap, for which there is no exact "
                f"sensitivity to optimise: give at most {limit} bands, or optimise a `BandedToeplitz` or `BufferedToeplitz`."
            )
        if k == 1:
            return cls(optimize_gram(queries, chosen, kind))
        rows = toeplitz(queries) if queries.ndim == 1 else queries
        matrix = np.tril(triangular_factor(optimize_separated(rows, chosen, kind, separation, k)))
        found = [matrix - np.tril(matrix, -chosen)]
        if bands is None and signed_patterns(steps, separation, k) is not None:
            found.append(np.tril(triangular_factor(optimize_patterns(rows, kind, separation, k))))
        scaled = [matrix * (math.sqrt(k) / gram_sensitivity(matrix.T @ matrix, separation, k)) for matrix in found]
        return cls(min(scaled, key=lambda matrix: matrix_error(matrix, queries, kind)))

    def materialize(self, steps: int) -> np.ndarray:
        steps = check_steps("DenseStrategy.materialize", steps, self.steps)
        return self.frozen.array[:steps, :steps].copy()

    def init(self, struct: PyTree[Any]) -> PyTree:
        assert self.bands is not None
        return init_ring(struct, self.bands - 1)

    def step(self, z: PyTree[Array], buffers: Ring) -> tuple[PyTree[Array], Ring]:
        assert self.steps is not None and self.bands is not None
        lag = np.arange(self.bands)[None, :]
        column = np.arange(self.steps)[:, None] - lag
        array = self.frozen.array
        by_age = np.where(column >= 0, array[np.arange(self.steps)[:, None], np.clip(column, 0, None)], 0.0)
        # the index is clamped past the horizon, where the noise is poisoned
        row = jax.lax.dynamic_index_in_dim(jnp.asarray(by_age, jnp.float32), buffers.count, keepdims=False)
        return solve_step(z, buffers, row[1:], 1 / row[0], poison(buffers.count, self.steps))

    def replay(self, regenerate: Callable[[Any], PyTree[Array]], step: Int[Array, ""]) -> PyTree[Array]:
        raise ValueError(MSG_NO_REPLAY.format(name="DenseStrategy"))

    def sensitivity(self, steps: int, min_separation: int = 1, max_participations: int | None = 1) -> float:
        check_steps("DenseStrategy.sensitivity", steps, self.steps)
        steps, separation, k = check_participation("DenseStrategy", steps, min_separation, max_participations)
        matrix = self.materialize(steps)
        return gram_sensitivity(matrix.T @ matrix, separation, k)

    def inverse_row_power(self, steps: int) -> np.ndarray:
        from scipy.linalg import solve_triangular

        matrix = self.materialize(check_steps("DenseStrategy.inverse_row_power", steps, self.steps))
        return np.square(solve_triangular(matrix, np.eye(len(matrix)), lower=True)).sum(1)

    def decoder_error(self, queries: np.ndarray, kind: str) -> float:
        return matrix_error(self.materialize(len(queries)), queries, kind)
