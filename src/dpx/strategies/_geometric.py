"""Noise that cancels a fraction of the last step's: no memory at all."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .._checks import flag, positive_int
from ._base import AbstractAnalysedStrategy, check_steps, check_unit_interval
from ._error import Workload, check_kind, geometric, inverse_error, is_prefix, scaled_toeplitz_error, squared_rows_error
from ._sensitivity import (
    GRAM_STEPS,
    check_participation,
    gram_sensitivity,
    participation_sum,
    toeplitz,
    toeplitz_sensitivity,
)
from ._stream import Ring, filter_step, init_ring, poison, replay_step


class GeometricStrategy(AbstractAnalysedStrategy[Ring]):
    r"""$C_{ij} = \lambda^{i-j}$ (DP-$\lambda$CGD): $x_t = z_t - \lambda z_{t-1}$. Two draws a step with `replay`, and no memory.

    In one participation its error is below that of 32 bands or of `BandedInverse.square_root(16)`.

    !!! success "Guarantee"

        The sensitivity is exact without `normalize_columns`, and exact for one participation with it; for more it is an upper
        bound, never above that of $k$ columns of the infinite matrix, as dense as they may be. With `normalize_columns` the noise
        past the horizon is NaN.

    **Arguments:**

    - `decay`: $0 \le \lambda \le 1$. 0 is independent noise, 1 is output perturbation.
    - `normalize_columns`: divide the columns by their norms $d_t$, so that $x_t = d_t (z_t - \lambda z_{t-1})$.
    - `steps`: the horizon, needed where columns are normalised.

    ??? cite "Reference"

        *DP-$\lambda$CGD: efficient noise correlation for differentially private model training*, 2026.
    """

    decay: float = eqx.field(static=True)
    normalize_columns: bool = eqx.field(static=True)
    steps: int | None = eqx.field(static=True)
    bands: int | None = eqx.field(static=True)
    replay_depth: int | None = eqx.field(static=True)

    def __init__(self, decay: float, *, normalize_columns: bool = False, steps: int | None = None):
        self.decay = check_unit_interval("GeometricStrategy(decay=...)", decay)
        self.normalize_columns = flag("GeometricStrategy(normalize_columns=...)", normalize_columns)
        if self.normalize_columns and steps is None:
            raise ValueError(
                "`GeometricStrategy(..., normalize_columns=True)` must know its last column: give `steps=...` as well."
            )
        self.steps = None if steps is None else positive_int("GeometricStrategy(steps=...)", steps)
        self.bands = None
        self.replay_depth = 1

    @classmethod
    def optimize(
        cls,
        steps: int,
        *,
        workload: Workload = "prefix",
        kind: str = "mean",
        min_separation: int = 1,
        max_participations: int | None = 1,
        normalize_columns: bool = False,
    ) -> "GeometricStrategy":
        r"""The $\lambda$ of least error, by bounded scalar minimisation in $\ln(1 - \lambda)$.

        **Arguments:**

        - `steps`: $n$.
        - `workload`, `kind`, `min_separation`, `max_participations`: the error to be minimised, as for `error`.
        - `normalize_columns`: as for the class.
        """
        from scipy.optimize import minimize_scalar

        steps = positive_int("GeometricStrategy.optimize(steps=...)", steps)
        check_kind("GeometricStrategy.optimize", kind)
        check_participation("GeometricStrategy", steps, min_separation, max_participations)
        normalize_columns = flag("GeometricStrategy.optimize(normalize_columns=...)", normalize_columns)

        def build(log_gap: float, normalized: bool) -> "GeometricStrategy":
            horizon = steps if normalized else None
            return cls(1 - math.exp(log_gap), normalize_columns=normalized, steps=horizon)

        def loss(log_gap: Any, normalized: bool) -> float:
            participation: Any = dict(min_separation=min_separation, max_participations=max_participations)
            return math.log(build(float(log_gap), normalized).error(steps, workload, kind, **participation))

        # the normalised optimum lies next to the other one, whose loss is much cheaper
        lowest = math.log(0.01 / steps)
        grid = np.linspace(lowest, 0.0, 30)
        middle = grid[np.argmin([loss(g, False) for g in grid])]
        width = float(grid[1] - grid[0])
        bounds = (max(middle - width, lowest), min(middle + width, 0.0))
        best: Any = minimize_scalar(loss, bounds=bounds, args=(False,), method="bounded", options=dict(xatol=1e-9))
        if normalize_columns:
            bounds = (best.x - 0.2, min(best.x + 0.2, 0.0))
            best = minimize_scalar(loss, bounds=bounds, args=(True,), method="bounded", options=dict(xatol=1e-5))
        return build(float(best.x), normalize_columns)

    def _scales(self, steps: int) -> np.ndarray:
        """Column norms of the un-normalised matrix."""
        assert self.steps is not None
        return np.sqrt(np.cumsum(geometric(self.decay**2, self.steps)))[::-1][:steps]

    def materialize(self, steps: int) -> np.ndarray:
        steps = check_steps("GeometricStrategy.materialize", steps, self.steps)
        matrix = toeplitz(geometric(self.decay, steps))
        return matrix / self._scales(steps) if self.normalize_columns else matrix

    def _scale(self, step: Int[Array, ""]) -> Float[Array, ""] | None:
        if self.steps is None:
            return None
        if not self.normalize_columns:
            return poison(step, self.steps)
        left = jnp.maximum(self.steps - step, 1).astype(jnp.float32)
        if self.decay in (0.0, 1.0):
            squared = left if self.decay == 1 else jnp.ones((), jnp.float32)
        else:
            squared = -jnp.expm1(left * (2 * math.log(self.decay))) / (1 - self.decay**2)
        return jnp.sqrt(squared) * poison(step, self.steps)

    def init(self, struct: PyTree[Any]) -> PyTree:
        return init_ring(struct, 1)

    def step(self, z: PyTree[Array], buffers: Ring) -> tuple[PyTree[Array], Ring]:
        return filter_step(z, buffers, np.array([-self.decay]), 1.0, self._scale(buffers.count))

    def replay(self, regenerate: Callable[[Any], PyTree[Array]], step: Int[Array, ""]) -> PyTree[Array]:
        return replay_step(regenerate, step, (1.0, -self.decay), self._scale(step))

    def sensitivity(self, steps: int, min_separation: int = 1, max_participations: int | None = 1) -> float:
        call = "GeometricStrategy"
        check_steps(f"{call}.sensitivity", steps, self.steps)
        steps, separation, k = check_participation(call, steps, min_separation, max_participations)
        coefficients = geometric(self.decay, steps)
        if not self.normalize_columns:
            return toeplitz_sensitivity(coefficients, separation, k)
        if k == 1:
            norms = np.sqrt(np.cumsum(np.square(coefficients)))[::-1] / self._scales(steps)
            return float(norms.max())
        # <column i, column j> = lambda^(j-i) d_j / d_i <= lambda^(j-i) for i < j
        gaps = geometric(self.decay**separation, k)
        bound = math.sqrt(k + 2 * float(((k - np.arange(1, k)) * gaps[1:]).sum()))
        bound = min(
            bound, float(np.linalg.norm(participation_sum(coefficients, separation, k)) / self._scales(steps).min())
        )
        if steps > GRAM_STEPS:
            return bound
        matrix = self.materialize(steps)
        return min(bound, gram_sensitivity(matrix.T @ matrix, separation, k))

    def inverse_row_power(self, steps: int) -> np.ndarray:
        steps = check_steps("GeometricStrategy.inverse_row_power", steps, self.steps)
        power = np.full(steps, 1 + self.decay**2)
        power[0] = 1.0
        return power * np.square(self._scales(steps)) if self.normalize_columns else power

    def decoder_error(self, queries: np.ndarray, kind: str) -> float:
        if not self.normalize_columns:
            return inverse_error(np.array([1.0, -self.decay]), queries, kind)
        # A D C^-1 from the right: dividing by 1 / (1 - lambda x) is multiplying by two coefficients
        scales = self._scales(len(queries))
        if is_prefix(queries):
            squares = np.square(scales[:-1] - self.decay * scales[1:])
            return squared_rows_error(np.square(scales) + np.concatenate([[0.0], np.cumsum(squares)]), kind)
        return scaled_toeplitz_error(geometric(self.decay, len(queries)), scales, queries, kind)
