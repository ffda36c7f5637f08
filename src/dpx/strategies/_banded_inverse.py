"""Strategies whose inverse is banded: noise from the last few draws, which can be regenerated instead of stored."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._checks import positive_int
from ._base import AbstractAnalysedStrategy, check_bands, check_coefficients, check_steps
from ._error import Workload, check_kind, inverse_error, inverse_series, resolve_workload
from ._optimize import optimize_inverse_banded
from ._sensitivity import check_participation, toeplitz, toeplitz_sensitivity
from ._square_root import square_root_coefficients
from ._stream import Ring, filter_step, init_ring, replay_step


class BandedInverse(AbstractAnalysedStrategy[Ring]):
    r"""$C^{-1}$ is banded Toeplitz with $\tilde c_0, \dots, \tilde c_{p-1}$: $x_t = \sum_{j<p} \tilde c_j z_{t-j}$.

    Keeps $p - 1$ copies of the parameters, or none: `replay` draws the same $z_{t-j}$ again. Never ends.

    !!! success "Guarantee"

        The sensitivity is exact for one participation, and for any number of them where the coefficients of $C$ are non-negative
        and do not increase (as those of `square_root` do); otherwise an upper bound.

    **Arguments:**

    - `inverse_coefficients`: $\tilde c_0 > 0, \tilde c_1, \dots, \tilde c_{p-1}$, finite.

    ??? cite "Reference"

        Kalinin, McKenna, Upadhyay and Lampert, *Back to square roots: an optimal bound on the matrix factorization error for
        multi-epoch differentially private SGD*, 2025.
    """

    inverse_coefficients: tuple[float, ...] = eqx.field(static=True)
    steps: int | None = eqx.field(static=True)
    bands: int | None = eqx.field(static=True)
    replay_depth: int | None = eqx.field(static=True)

    def __init__(self, inverse_coefficients: Sequence[float] | np.ndarray):
        self.inverse_coefficients = check_coefficients("BandedInverse(inverse_coefficients=...)", inverse_coefficients)
        self.steps = None
        self.bands = None
        self.replay_depth = len(self.inverse_coefficients) - 1

    @classmethod
    def square_root(cls, bands: int, *, momentum: float = 0.0, weight_decay: float = 0.0) -> "BandedInverse":
        r"""The closed form (BISR): the first `bands` coefficients of the inverse square root, $1, -1/2, -1/8, -1/16, \dots$.

        **Arguments:**

        - `bands`: $p$.
        - `momentum`, `weight_decay`: of the workload, as for `momentum_workload`.
        """
        call = "BandedInverse.square_root"
        bands = positive_int(f"{call}(bands=...)", bands)
        return cls(square_root_coefficients(call, bands, momentum, weight_decay, inverse=True))

    @classmethod
    def optimize(
        cls,
        steps: int,
        bands: int,
        *,
        workload: Workload = "prefix",
        kind: str = "mean",
        min_separation: int = 1,
        max_participations: int | None = 1,
    ) -> "BandedInverse":
        r"""The coefficients of least error (BandInvMF), by L-BFGS in float64 from the closed form's.

        **Arguments:**

        - `steps`: $n$.
        - `bands`: $p \le n$, the number of bands of the inverse.
        - `workload`, `kind`, `min_separation`, `max_participations`: the error to be minimised, as for `error`.
        """
        call = "BandedInverse.optimize"
        steps = positive_int(f"{call}(steps=...)", steps)
        bands = check_bands(call, bands, steps)
        check_kind(call, kind)
        queries = resolve_workload(call, workload, steps)
        _, separation, k = check_participation("BandedInverse", steps, min_separation, max_participations)
        return cls(optimize_inverse_banded(queries, bands, kind, separation, k))

    def coefficients(self, steps: int) -> np.ndarray:
        """The first column of $C$, of shape `(steps,)`."""
        return inverse_series(np.asarray(self.inverse_coefficients), steps)

    def materialize(self, steps: int) -> np.ndarray:
        return toeplitz(self.coefficients(check_steps("BandedInverse.materialize", steps, None)))

    def init(self, struct: PyTree[Any]) -> PyTree:
        return init_ring(struct, len(self.inverse_coefficients) - 1)

    def step(self, z: PyTree[Array], buffers: Ring) -> tuple[PyTree[Array], Ring]:
        return filter_step(z, buffers, np.asarray(self.inverse_coefficients[1:]), self.inverse_coefficients[0])

    def replay(self, regenerate: Callable[[Any], PyTree[Array]], step: Int[Array, ""]) -> PyTree[Array]:
        return replay_step(regenerate, step, self.inverse_coefficients)

    def sensitivity(self, steps: int, min_separation: int = 1, max_participations: int | None = 1) -> float:
        steps, separation, k = check_participation("BandedInverse", steps, min_separation, max_participations)
        return toeplitz_sensitivity(self.coefficients(steps), separation, k)

    def inverse_row_power(self, steps: int) -> np.ndarray:
        steps = check_steps("BandedInverse.inverse_row_power", steps, None)
        squares = np.cumsum(np.square(self.inverse_coefficients))
        return squares[np.minimum(np.arange(steps), len(squares) - 1)]

    def decoder_error(self, queries: np.ndarray, kind: str) -> float:
        return inverse_error(np.asarray(self.inverse_coefficients), queries, kind)
