"""Independent noise, as a strategy."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int, PyTree

from ._base import AbstractAnalysedStrategy, Buffers, check_steps
from ._error import toeplitz_error
from ._sensitivity import check_participation


class Identity(AbstractAnalysedStrategy[PyTree]):
    r"""$C = I$: independent noise at every step, the noise of DP-SGD, and the baseline of every comparison.

    !!! success "Guarantee"

        The sensitivity $\sqrt k$ for $k$ participations is exact.

    **Arguments:** none.

    ??? example

        ```python
        Identity().error(1024)  # 22.638, that is sqrt((n + 1) / 2)
        ```
    """

    steps: int | None = eqx.field(static=True)
    bands: int | None = eqx.field(static=True)
    replay_depth: int | None = eqx.field(static=True)

    def __init__(self):
        self.steps = None
        self.bands = 1
        self.replay_depth = 0

    def materialize(self, steps: int) -> np.ndarray:
        return np.eye(check_steps("Identity.materialize", steps, None))

    def init(self, struct: PyTree[Any]) -> PyTree:
        del struct
        return ()

    def step(self, z: PyTree[Array], buffers: Buffers) -> tuple[PyTree[Array], Buffers]:
        return z, buffers

    def replay(self, regenerate: Callable[[Any], PyTree[Array]], step: Int[Array, ""]) -> PyTree[Array]:
        del step
        return regenerate(0)

    def sensitivity(self, steps: int, min_separation: int = 1, max_participations: int | None = 1) -> float:
        return math.sqrt(check_participation("Identity", steps, min_separation, max_participations)[2])

    def inverse_row_power(self, steps: int) -> np.ndarray:
        return np.ones(check_steps("Identity.inverse_row_power", steps, None))

    def decoder_error(self, queries: np.ndarray, kind: str) -> float:
        return toeplitz_error(np.ones(1), queries, kind)
