"""Banded Toeplitz strategies: the workhorse of DP-FTRL."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._checks import described, function, positive_float, positive_int
from ._base import MSG_NO_REPLAY, AbstractAnalysedStrategy, check_bands, check_coefficients, check_steps
from ._error import Workload, check_kind, inverse_series, resolve_workload, toeplitz_error
from ._optimize import candidate_bands, optimize_banded
from ._sensitivity import check_participation, toeplitz, toeplitz_sensitivity
from ._square_root import square_root_coefficients
from ._stream import Ring, init_ring, solve_step


class BandedToeplitz(AbstractAnalysedStrategy[Ring]):
    r"""$C$ has $c_0, \dots, c_{b-1}$ on its diagonals and zero below: $x_t = (z_t - \sum_{j=1}^{b-1} c_j x_{t-j}) / c_0$.

    Keeps $b - 1$ copies of the parameters. Never ends, and is the strategy that cyclic Poisson sampling amplifies.

    !!! success "Guarantee"

        The sensitivity is exact for one participation, for any number of them at least $b$ steps apart, and for non-negative
        non-increasing coefficients; otherwise an upper bound.

    **Arguments:**

    - `coefficients`: $c_0 > 0, c_1, \dots, c_{b-1}$, finite. Their scale does not matter: the sensitivity has it too.

    ??? cite "Reference"

        Choquette-Choo et al., *(Amplified) banded matrix factorization: a unified approach to private training*, NeurIPS 2023.
        McKenna, *Scaling up the banded matrix factorization mechanism for differentially private ML*, ICLR 2025.
    """

    coefficients: tuple[float, ...] = eqx.field(static=True)
    steps: int | None = eqx.field(static=True)
    bands: int | None = eqx.field(static=True)
    replay_depth: int | None = eqx.field(static=True)

    def __init__(self, coefficients: Sequence[float] | np.ndarray):
        self.coefficients = check_coefficients("BandedToeplitz(coefficients=...)", coefficients)
        self.steps = None
        self.bands = len(self.coefficients)
        self.replay_depth = None

    @classmethod
    def square_root(cls, bands: int, *, momentum: float = 0.0, weight_decay: float = 0.0) -> "BandedToeplitz":
        r"""The closed form (BSR): the first `bands` coefficients of the square root of the workload.

        **Arguments:**

        - `bands`: $b$.
        - `momentum`, `weight_decay`: of the workload, as for `momentum_workload`.
        """
        bands = positive_int("BandedToeplitz.square_root(bands=...)", bands)
        return cls(square_root_coefficients("BandedToeplitz.square_root", bands, momentum, weight_decay))

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
    ) -> "BandedToeplitz":
        r"""The coefficients of least error, by L-BFGS in float64 from the square root's.

        **Arguments:**

        - `steps`: $n$.
        - `bands`: $b \le n$; or several to choose from, or None for all powers of two, if `noise_multiplier_for_bands` is given.
        - `workload`, `kind`, `min_separation`, `max_participations`: the error to be minimised, as for `error`.
        - `noise_multiplier_for_bands`: the noise multiplier at which a strategy of so many bands meets the privacy target,
            amplification included. The number of bands with the least noise multiplier times error wins.
        """
        call = "BandedToeplitz.optimize"
        steps = positive_int(f"{call}(steps=...)", steps)
        check_kind(call, kind)
        queries = resolve_workload(call, workload, steps)
        _, separation, k = check_participation("BandedToeplitz", steps, min_separation, max_participations)

        def best(count):
            return cls(optimize_banded(queries, check_bands(call, count, steps), kind, separation, k))

        if noise_multiplier_for_bands is None:
            if bands is None or isinstance(bands, Sequence | np.ndarray) and not isinstance(bands, str | bytes):
                raise ValueError(
                    f"`{call}(bands={described(bands)})` leaves the number of bands open: give one, or `noise_multiplier_for_bands=...` to "
                    "choose by, since without amplification more bands are always better."
                )
            return best(bands)
        call_of_noise = f"{call}(noise_multiplier_for_bands=...)"
        function(call_of_noise, noise_multiplier_for_bands, "noise_multiplier_for_bands(bands) -> float")
        score = lambda s: (
            positive_float(call_of_noise, noise_multiplier_for_bands(s.bands))
            * s.error(steps, workload, kind, min_separation=separation, max_participations=k)
        )
        return min((best(count) for count in candidate_bands(call, bands, steps)), key=score)

    def materialize(self, steps: int) -> np.ndarray:
        return toeplitz(self._padded(check_steps("BandedToeplitz.materialize", steps, None)))

    def _padded(self, steps: int) -> np.ndarray:
        padded = np.zeros(steps)
        padded[: len(self.coefficients)] = self.coefficients[:steps]
        return padded

    def init(self, struct: PyTree[Any]) -> PyTree:
        return init_ring(struct, len(self.coefficients) - 1)

    def step(self, z: PyTree[Array], buffers: Ring) -> tuple[PyTree[Array], Ring]:
        return solve_step(z, buffers, np.asarray(self.coefficients[1:]), 1 / self.coefficients[0])

    def replay(self, regenerate: Callable[[Any], PyTree[Array]], step: Int[Array, ""]) -> PyTree[Array]:
        raise ValueError(MSG_NO_REPLAY.format(name="BandedToeplitz"))

    def sensitivity(self, steps: int, min_separation: int = 1, max_participations: int | None = 1) -> float:
        steps, separation, k = check_participation("BandedToeplitz", steps, min_separation, max_participations)
        return toeplitz_sensitivity(self._padded(steps), separation, k)

    def inverse_row_power(self, steps: int) -> np.ndarray:
        steps = check_steps("BandedToeplitz.inverse_row_power", steps, None)
        return np.cumsum(np.square(inverse_series(np.asarray(self.coefficients), steps)))

    def decoder_error(self, queries: np.ndarray, kind: str) -> float:
        return toeplitz_error(np.asarray(self.coefficients), queries, kind)
