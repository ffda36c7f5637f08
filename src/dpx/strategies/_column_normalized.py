"""Banded strategies whose columns all have norm 1."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._checks import positive_int
from ._banded_toeplitz import BandedToeplitz
from ._base import MSG_NO_REPLAY, AbstractAnalysedStrategy, check_bands, check_coefficients, check_steps
from ._error import Workload, inverse_series, scaled_toeplitz_error
from ._sensitivity import (
    GRAM_STEPS,
    best_pattern,
    check_participation,
    decreasing_envelope,
    gram_sensitivity,
    participation_sum,
    toeplitz,
)
from ._stream import Ring, init_ring, poison, solve_step


class ColumnNormalizedBanded(AbstractAnalysedStrategy[Ring]):
    r"""A banded Toeplitz matrix whose columns are divided by their norms $d_t = (\sum_{j < \min(b, n - t)} c_j^2)^{1/2}$.

    The last columns of a Toeplitz matrix are cut off and have less than their share of the sensitivity; here they have all of it.
    $x_t = d_t y_t$ with $y_t = (z_t - \sum_{j=1}^{b-1} c_j y_{t-j}) / c_0$. Keeps $b - 1$ copies of the parameters.

    !!! success "Guarantee"

        The sensitivity is exactly $\sqrt k$ for $k$ participations at least $b$ steps apart, that of the normalised matrix, and an
        upper bound otherwise. Past the horizon the noise is NaN.

    **Arguments:**

    - `coefficients`: $c_0 > 0, c_1, \dots, c_{b-1}$, finite; their scale cancels.
    - `steps`: the horizon $n \ge b$, which says where the last columns are.

    ??? cite "Reference"

        McKenna, *Scaling up the banded matrix factorization mechanism for differentially private ML*, ICLR 2025.
    """

    coefficients: tuple[float, ...] = eqx.field(static=True)
    steps: int | None = eqx.field(static=True)
    bands: int | None = eqx.field(static=True)
    replay_depth: int | None = eqx.field(static=True)

    def __init__(self, coefficients: Sequence[float] | np.ndarray, steps: int):
        call = "ColumnNormalizedBanded"
        self.coefficients = check_coefficients(f"{call}(coefficients=...)", coefficients)
        self.steps = positive_int(f"{call}(steps=...)", steps)
        self.bands = check_bands(call, len(self.coefficients), self.steps)
        self.replay_depth = None

    @classmethod
    def optimize(
        cls,
        steps: int,
        bands: int | Sequence[int] | None = None,
        *,
        workload: Workload = "prefix",
        kind: str = "mean",
        min_separation: int = 1,
        max_participations: int | None = 1,
        noise_multiplier_for_bands: Callable[[int], float] | None = None,
    ) -> "ColumnNormalizedBanded":
        """The columns of `BandedToeplitz.optimize(...)`, normalised; the arguments are the same."""
        toeplitz_strategy = BandedToeplitz.optimize(
            steps,
            bands,
            workload=workload,
            kind=kind,
            min_separation=min_separation,
            max_participations=max_participations,
            noise_multiplier_for_bands=noise_multiplier_for_bands,
        )
        return cls(toeplitz_strategy.coefficients, steps)

    def _tail_norms(self) -> np.ndarray:
        """Norms of the columns with 1, 2, ..., b entries left."""
        return np.sqrt(np.cumsum(np.square(self.coefficients)))

    def _scales(self, steps: int) -> np.ndarray:
        assert self.steps is not None
        left = np.minimum(self.steps - np.arange(steps), len(self.coefficients))
        return self._tail_norms()[left - 1]

    def _padded(self, steps: int) -> np.ndarray:
        padded = np.zeros(steps)
        padded[: len(self.coefficients)] = self.coefficients[:steps]
        return padded

    def materialize(self, steps: int) -> np.ndarray:
        steps = check_steps("ColumnNormalizedBanded.materialize", steps, self.steps)
        return toeplitz(self._padded(steps)) / self._scales(steps)

    def init(self, struct: PyTree[Any]) -> PyTree:
        return init_ring(struct, len(self.coefficients) - 1)

    def step(self, z: PyTree[Array], buffers: Ring) -> tuple[PyTree[Array], Ring]:
        assert self.steps is not None
        bands = len(self.coefficients)
        left = jnp.clip(self.steps - buffers.count, 1, bands)
        norm = jnp.asarray(self._tail_norms(), jnp.float32)[left - 1]
        weights, scale = np.asarray(self.coefficients[1:]), 1 / self.coefficients[0]
        return solve_step(z, buffers, weights, scale, norm * poison(buffers.count, self.steps))

    def replay(self, regenerate: Callable[[Any], PyTree[Array]], step: Int[Array, ""]) -> PyTree[Array]:
        raise ValueError(MSG_NO_REPLAY.format(name="ColumnNormalizedBanded"))

    def sensitivity(self, steps: int, min_separation: int = 1, max_participations: int | None = 1) -> float:
        call = "ColumnNormalizedBanded"
        check_steps(f"{call}.sensitivity", steps, self.steps)
        steps, separation, k = check_participation(call, steps, min_separation, max_participations)
        if k == 1 or separation >= len(self.coefficients):
            # columns that lie within the first `steps` rows have norm 1, those that a prefix cuts off have less, in no order:
            # the pattern that misses them, wherever it begins, is the worst
            squares = np.cumsum(np.square(self._padded(steps)))[::-1] / np.square(self._scales(steps))
            return math.sqrt(float(best_pattern(squares, separation, k)))
        if steps <= GRAM_STEPS:
            matrix = self.materialize(steps)
            return gram_sensitivity(matrix.T @ matrix, separation, k)
        # every column is at most the Toeplitz one over the smallest norm
        envelope = decreasing_envelope(self._padded(steps))
        return float(np.linalg.norm(participation_sum(envelope, separation, k)) / self._scales(steps).min())

    def inverse_row_power(self, steps: int) -> np.ndarray:
        steps = check_steps("ColumnNormalizedBanded.inverse_row_power", steps, self.steps)
        inverse = inverse_series(np.asarray(self.coefficients), steps)
        return np.square(self._scales(steps)) * np.cumsum(np.square(inverse))

    def decoder_error(self, queries: np.ndarray, kind: str) -> float:
        return scaled_toeplitz_error(np.asarray(self.coefficients), self._scales(len(queries)), queries, kind)
