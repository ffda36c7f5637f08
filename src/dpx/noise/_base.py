"""The interface of noise: what is added to a clipped sum."""

import abc
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from .._checks import instance, positive_scalar
from .._types import Params, Participation, RealScalarLike, Struct
from ..strategies import AbstractStrategy

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Buffers = TypeVar("Buffers")

_MSG_UNCALIBRATED = (
    "`{name}(noise_multiplier=None)` has no noise multiplier yet. Give one, or let a plan find it: "
    "`plan.calibrate(epsilon=..., delta=...)` or `dpx.dp_sgd(..., epsilon=..., delta=...)`."
)


class AbstractNoise(eqx.Module, Generic[Buffers]):
    r"""Makes a clipped sum private.

    The noise multiplier $\sigma$ is the ratio of standard deviation to sensitivity, and the only number that accounting knows.
    `scale` turns it into units of the sum, and is the one place that does. State is threaded through `init` and `step`. The
    key that `step` gets is that of the run's noise and used for nothing else: it must be folded with the number of the step.
    """

    noise_multiplier: eqx.AbstractVar[Float[Array, ""] | None]
    """None until it is calibrated."""
    order: eqx.AbstractClassVar[int]
    r"""The norm in which the clipped sum's sensitivity must be bounded: $\ell_2$ (2) or $\ell_1$ (1)."""
    strategy: ClassVar[AbstractStrategy | None] = None
    """The matrix that correlates the noise of different steps, a field where there is one; None if it is independent."""
    is_integer: ClassVar[bool] = False
    """Whether it is noise for sums of integers; see `AbstractIntegerNoise`."""

    @property
    @abc.abstractmethod
    def bands(self) -> int | None:
        """Number of bands of the strategy matrix: 1 if the noise of different steps is independent, None if it is dense."""

    @property
    @abc.abstractmethod
    def description(self) -> str:
        """What the privacy statement calls the mechanism."""

    @abc.abstractmethod
    def event(self, noise_multiplier: float) -> "DpEvent":
        """The DP event of this noise on a sum of sensitivity 1 at that multiplier: of one step if `bands` is 1, else of the run."""

    @property
    @abc.abstractmethod
    def horizon(self) -> int | None:
        """Number of steps after which the mechanism has no more noise to give; None if it never ends."""

    @abc.abstractmethod
    def scale(self, sensitivity: Float[Array, ""], steps: int | None, participation: Participation) -> Float[Array, ""]:
        r"""Noise multiplier $\times$ sensitivity of the clipped sum $\times$ sensitivity of the strategy in a run of `steps` steps
        under that participation: the scale of the noise, in units of the sum."""

    @abc.abstractmethod
    def variance(self, scale: Float[Array, ""], steps: int | None, step: Int[Array, ""]) -> Float[Array, ""]:
        """Variance, in units of the sum squared, of the noise that `step` adds to every coordinate at step number `step` (from 0) of a
        run of `steps`. It is public: it depends on the mechanism and not on the data."""

    @abc.abstractmethod
    def error(self, steps: int, participation: Participation, workload: Any, kind: str) -> float:
        """Error of a workload of partial sums, `"mean"` or `"max"` over steps, at noise multiplier 1 and clip norm 1; see
        `AbstractStrategy.error`."""

    @abc.abstractmethod
    def init(self, struct: Struct) -> PyTree:
        """Buffers before the first step, for sums of the given shapes and dtypes."""

    @abc.abstractmethod
    def step(
        self, total: Params, scale: Float[Array, ""], key: Key[Array, ""], step: Int[Array, ""], buffers: Buffers
    ) -> tuple[Params, Buffers]:
        """The noisy sum of step number `step` (from 0), and the buffers after it. The noise is a function of `fold_in(key, step)`, or of
        earlier steps' folds where it is correlated."""


def as_multiplier(name: str, noise_multiplier: RealScalarLike | None) -> Float[Array, ""] | None:
    """The noise multiplier that a noise of that name is given, rounded up to float32; None where a plan is to calibrate it."""
    if noise_multiplier is None:
        return None
    why = "For a non-private baseline use `NoClipping()`."
    return positive_scalar(f"{name}(noise_multiplier=...)", noise_multiplier, why)


def known_multiplier(noise: AbstractNoise) -> Float[Array, ""]:
    """The noise multiplier; raises if there is none yet."""
    if noise.noise_multiplier is None:
        raise ValueError(_MSG_UNCALIBRATED.format(name=type(noise).__name__))
    return noise.noise_multiplier


def check_noise(call: str, noise: Any) -> None:
    """Raises unless `noise` is one. A bare number is none: it could be a multiplier, or a standard deviation."""
    if isinstance(noise, int | float | np.number) and not isinstance(noise, bool):
        raise ValueError(
            f"`{call}` must say what noise it is; got the number {noise}. For a noise multiplier write `IndependentGaussian({noise})`."
        )
    instance(call, noise, AbstractNoise, "IndependentGaussian(1.0)")
