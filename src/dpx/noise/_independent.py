"""Noise that is drawn afresh at every step: what all of its kinds have in common."""

import abc
import math
from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import Array, Float, Int, PyTree

from .._rounding_up import PRODUCT_UP
from .._types import Participation, Struct
from ..strategies import Identity
from ._base import AbstractNoise, known_multiplier
from ._rounding import Rounding


class AbstractIndependentNoise(AbstractNoise[PyTree]):
    """Noise without memory: steps compose in the accountant, and nothing is kept from one to the next."""

    unit_variance: eqx.AbstractClassVar[float]
    """Its variance at scale 1."""

    @property
    def bands(self) -> int | None:
        return 1

    @property
    def horizon(self) -> int | None:
        return None

    def variance(self, scale: Float[Array, ""], steps: int | None, step: Int[Array, ""]) -> Float[Array, ""]:
        del steps, step
        return self.unit_variance * scale**2

    def error(self, steps: int, participation: Participation, workload: Any, kind: str) -> float:
        del participation
        return math.sqrt(self.unit_variance) * Identity().error(steps, workload, kind)

    def init(self, struct: Struct) -> PyTree:
        del struct
        return ()


class AbstractIntegerNoise(AbstractIndependentNoise):
    """Noise for sums of integers: every contribution is rounded before it is added up, and `step` gets the sum as int32."""

    is_integer: ClassVar[bool] = True

    @abc.abstractmethod
    def rounding(self, sensitivity: Float[Array, ""], dimension: int, batch_size: int) -> Rounding:
        """How contributions, of `dimension` numbers and a norm of at most `sensitivity`, are rounded.

        Raises `ValueError` if they cannot be, or if a batch of `batch_size` could overflow.
        """


def scale_of(noise: AbstractNoise, sensitivity: Float[Array, ""]) -> Float[Array, ""]:
    """Noise multiplier times sensitivity, rounded up; raises if there is no multiplier yet."""
    return known_multiplier(noise) * sensitivity * PRODUCT_UP
