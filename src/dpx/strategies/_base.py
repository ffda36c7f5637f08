"""The interface of strategies: how the noise of one step is correlated with that of others."""

import abc
import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._checks import positive_int, real_array, real_number
from ._error import Workload, check_kind, resolve_workload

Buffers = TypeVar("Buffers")

MSG_NO_REPLAY = (
    "`{name}.replay(...)` is impossible: the inverse of its matrix is not banded, so the noise of one step depends on all steps "
    "before. Use the buffers of `.init` and `.step`, or a strategy that replays: `BandedInverse`, `GeometricStrategy`, `Identity`."
)


class AbstractStrategy(eqx.Module, Generic[Buffers]):
    r"""A lower-triangular matrix $C$ with positive diagonal: the noise of a run is $C^{-1} z$ for independent $z_t$.

    With $z \sim N(0, \sigma^2 I)$ and $\sigma$ = noise multiplier times sensitivity, all steps together are one Gaussian mechanism
    of that noise multiplier, for gradients chosen adaptively too (Denisov et al. 2022). The matrix is analysed on the host in
    float64; the stream runs on devices, in the dtype of the noise, at least float32. Buffers are PyTrees of arrays with the
    structure of the noise, so they donate, checkpoint and shard like it.
    """

    steps: eqx.AbstractVar[int | None]
    """The horizon that the strategy was built for: past it `step` gives NaN. None if it never ends."""
    bands: eqx.AbstractVar[int | None]
    """The number of bands of $C$ (1: diagonal), or None if it is not banded."""
    replay_depth: eqx.AbstractVar[int | None]
    r"""How many earlier draws $z_{t-1}, z_{t-2}, \dots$ the noise of a step needs where $C^{-1}$ is banded, else None."""

    @abc.abstractmethod
    def materialize(self, steps: int) -> np.ndarray:
        """$C$ as a float64 array of shape `(steps, steps)`."""

    @abc.abstractmethod
    def init(self, struct: PyTree[Any]) -> PyTree:
        """Buffers before the first step, for noise like `struct`, a tree of arrays or `jax.ShapeDtypeStruct`s."""

    @abc.abstractmethod
    def step(self, z: PyTree[Array], buffers: Buffers) -> tuple[PyTree[Array], Buffers]:
        """The correlated noise of the next step, from its independent noise `z`, and the buffers after it."""

    @abc.abstractmethod
    def replay(self, regenerate: Callable[[Any], PyTree[Array]], step: Int[Array, ""]) -> PyTree[Array]:
        r"""The correlated noise of step number `step`, without buffers.

        **Arguments:**

        - `regenerate`: gives $z_{t-\text{age}}$ again for an age of 0 (this step) to `replay_depth`, a Python or a traced integer.
            May be called with an age above `step`; what it returns then has no effect as long as it is finite.
        - `step`: $t$, from 0.

        **Raises:**

        `ValueError` if `replay_depth` is None.
        """

    @abc.abstractmethod
    def sensitivity(self, steps: int, min_separation: int = 1, max_participations: int | None = 1) -> float:
        r"""How far one example can move $C x$ in a run of `steps` steps, when each of its gradients has norm at most 1.

        **Arguments:**

        - `steps`: $n$.
        - `min_separation`: at least this many steps lie between the starts of two participations.
        - `max_participations`: at most this many of them; None for as many as fit.

        **Returns:**

        The sensitivity or a proven upper bound of it, in float64.
        """

    @abc.abstractmethod
    def inverse_row_power(self, steps: int) -> np.ndarray:
        r"""$\|(C^{-1})_t\|^2$ for every step of a run of `steps`: the variance of the noise of that step, at $z \sim N(0, I)$.

        **Returns:** a float64 array of shape `(steps,)`.
        """

    @abc.abstractmethod
    def error(
        self,
        steps: int,
        workload: Workload = "prefix",
        kind: str = "mean",
        *,
        min_separation: int = 1,
        max_participations: int | None = 1,
    ) -> float:
        r"""Error of a workload $A$ at noise multiplier 1, the sensitivity included.

        **Arguments:**

        - `steps`: $n$.
        - `workload`: `"prefix"` (sums of all gradients so far), the `(steps,)` coefficients of a Toeplitz workload, or a
            lower-triangular `(steps, steps)` matrix, such as `momentum_workload` gives.
        - `kind`: `"mean"`, $\text{sens} \cdot \|A C^{-1}\|_F / \sqrt n$, or `"max"`, $\text{sens} \cdot \max_i \|(A C^{-1})_i\|$.
        - `min_separation`, `max_participations`: as for `sensitivity`.
        """


class AbstractAnalysedStrategy(AbstractStrategy[Buffers]):
    """A strategy whose error is its sensitivity times that of its decoder, of any workload."""

    @abc.abstractmethod
    def decoder_error(self, queries: np.ndarray, kind: str) -> float:
        r"""$\|A C^{-1}\|_F / \sqrt n$ (`kind` `"mean"`) or $\max_i \|(A C^{-1})_i\|$ (`"max"`).

        **Arguments:** `queries`, the workload $A$: the `(steps,)` coefficients of a Toeplitz matrix, or a lower-triangular `(steps, steps)` one.
        """

    def error(
        self,
        steps: int,
        workload: Workload = "prefix",
        kind: str = "mean",
        *,
        min_separation: int = 1,
        max_participations: int | None = 1,
    ) -> float:
        call = f"{type(self).__name__}.error"
        check_kind(call, kind)
        steps = check_steps(call, steps, self.steps)
        queries = resolve_workload(call, workload, steps)
        return self.sensitivity(steps, min_separation, max_participations) * self.decoder_error(queries, kind)


def check_steps(call: str, steps: int, horizon: int | None) -> int:
    """`steps`, positive and within the horizon."""
    steps = positive_int(f"{call}(steps=...)", steps)
    if horizon is not None and steps > horizon:
        raise ValueError(
            f"`{call}(steps={steps})` is past the horizon: this strategy was built for {horizon} steps. Build it for {steps}."
        )
    return steps


def check_bands(call: str, bands: int, steps: int) -> int:
    """`bands`, positive and at most `steps`."""
    bands = positive_int(f"{call}(bands=...)", bands)
    if bands > steps:
        raise ValueError(f"`{call}(bands=...)` must be at most `steps`; got {bands} bands for {steps} steps.")
    return bands


def check_coefficients(call: str, coefficients: Any) -> tuple[float, ...]:
    """Finite coefficients, the first of them positive, as Python floats."""
    array = real_array(call, coefficients, "a sequence of numbers, such as `[1.0, 0.5]`")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"`{call}` must be a sequence of at least one number; got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(
            f"`{call}` must be finite; got {array[~np.isfinite(array)][0]} at position {np.argmin(np.isfinite(array))}."
        )
    if not array[0] > 0:
        raise ValueError(f"`{call}` must begin with a positive number, the diagonal of the matrix; got {array[0]}.")
    return tuple(array.tolist())


def check_unit_interval(call: str, value: Any) -> float:
    """A number in [0, 1]."""
    number = real_number(call, value)
    if not (math.isfinite(number) and 0 <= number <= 1):
        raise ValueError(f"`{call}` must lie in [0, 1]; got {number}.")
    return number
