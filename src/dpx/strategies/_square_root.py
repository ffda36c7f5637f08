"""The square root of the workload: the optimal Toeplitz factorization up to lower-order terms."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._checks import positive_int
from ._base import MSG_NO_REPLAY, AbstractAnalysedStrategy, check_steps
from ._error import check_decays, geometric, inverse_error, multiply
from ._sensitivity import check_participation, toeplitz, toeplitz_sensitivity
from ._stream import Ring, filter_step, init_ring, poison


def square_root_coefficients(
    call: str, size: int, momentum: float, weight_decay: float, *, inverse: bool = False
) -> np.ndarray:
    r"""Coefficients of $((1 - \alpha x)(1 - \beta x))^{\mp 1/2}$, $\alpha = 1 - \lambda$ and $\beta$ the momentum.

    $(1 - x)^{-1/2} = \sum_k f(k) x^k$ with $f(k) = \prod_{j \le k} (1 - 1/(2j))$ and $(1 - x)^{1/2} = \sum_k -f(k)/(2k-1) x^k$.
    """
    momentum, weight_decay = check_decays(call, momentum, weight_decay)
    index = np.arange(1, size)
    root = np.concatenate([[1.0], np.cumprod(1 - 0.5 / index)])
    if inverse:
        root[1:] /= 1 - 2.0 * index
    kept = root * geometric(1 - weight_decay, size)
    return kept if momentum == 0 else multiply(kept, root * geometric(momentum, size), size)


class SquareRootToeplitz(AbstractAnalysedStrategy[Ring]):
    r"""$C = A^{1/2}$ for the prefix workload $A$, or for one with momentum and weight decay: the coefficients of $(1 - x)^{-1/2}$.

    Maximum error and squared sensitivity are both $\sum_{k<n} f(k)^2 = (\ln n + \gamma + 4 \ln 2) / \pi + o(1)$. The stream keeps
    all steps in memory, so this is mostly the mark that cheaper strategies are measured by; `BufferedToeplitz` comes close with a
    few buffers.

    !!! success "Guarantee"

        The sensitivity is exact, for one participation and for several (the coefficients decrease). Past the horizon the noise
        is NaN.

    **Arguments:**

    - `steps`: the horizon that the stream has memory for. None gives a strategy of any length that can be analysed, not run.
    - `momentum`: $\beta$ of the workload whose root is taken.
    - `weight_decay`: $\lambda$ of that workload.

    ??? cite "Reference"

        Fichtenberger, Henzinger and Upadhyay, *Constant matters: fine-grained complexity of differentially private continual
        observation*, ICML 2023. Kalinin and Lampert, *Banded square root matrix factorization for differentially private model
        training*, NeurIPS 2024.
    """

    steps: int | None = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    weight_decay: float = eqx.field(static=True)
    bands: int | None = eqx.field(static=True)
    replay_depth: int | None = eqx.field(static=True)

    def __init__(self, steps: int | None = None, *, momentum: float = 0.0, weight_decay: float = 0.0):
        self.steps = None if steps is None else positive_int("SquareRootToeplitz(steps=...)", steps)
        square_root_coefficients("SquareRootToeplitz", 1, momentum, weight_decay)
        self.momentum = float(momentum)
        self.weight_decay = float(weight_decay)
        self.bands = None
        self.replay_depth = None

    def coefficients(self, steps: int) -> np.ndarray:
        """The first column of the matrix, of shape `(steps,)`."""
        return square_root_coefficients("SquareRootToeplitz", steps, self.momentum, self.weight_decay)

    def materialize(self, steps: int) -> np.ndarray:
        return toeplitz(self.coefficients(check_steps("SquareRootToeplitz.materialize", steps, self.steps)))

    def init(self, struct: PyTree[Any]) -> PyTree:
        if self.steps is None:
            raise ValueError(
                "`SquareRootToeplitz().init(...)` needs memory for every step, so it must know how many there are: build "
                "`SquareRootToeplitz(steps=...)`. `BufferedToeplitz` has nearly its error with a few buffers."
            )
        return init_ring(struct, self.steps - 1)

    def step(self, z: PyTree[Array], buffers: Ring) -> tuple[PyTree[Array], Ring]:
        assert self.steps is not None
        call = "SquareRootToeplitz"
        inverse = square_root_coefficients(call, self.steps, self.momentum, self.weight_decay, inverse=True)
        return filter_step(z, buffers, inverse[1:], 1.0, poison(buffers.count, self.steps))

    def replay(self, regenerate: Callable[[Any], PyTree[Array]], step: Int[Array, ""]) -> PyTree[Array]:
        raise ValueError(MSG_NO_REPLAY.format(name="SquareRootToeplitz"))

    def sensitivity(self, steps: int, min_separation: int = 1, max_participations: int | None = 1) -> float:
        call = "SquareRootToeplitz"
        check_steps(f"{call}.sensitivity", steps, self.steps)
        steps, separation, k = check_participation(call, steps, min_separation, max_participations)
        return toeplitz_sensitivity(self.coefficients(steps), separation, k)

    def inverse_row_power(self, steps: int) -> np.ndarray:
        call = "SquareRootToeplitz"
        steps = check_steps(f"{call}.inverse_row_power", steps, self.steps)
        inverse = square_root_coefficients(call, steps, self.momentum, self.weight_decay, inverse=True)
        return np.cumsum(np.square(inverse))

    def decoder_error(self, queries: np.ndarray, kind: str) -> float:
        # dividing by n coefficients costs n^2, multiplying by the inverse's n log n
        call, steps = "SquareRootToeplitz.error", len(queries)
        inverse = square_root_coefficients(call, steps, self.momentum, self.weight_decay, inverse=True)
        return inverse_error(inverse, queries, kind)
