"""Fresh Gaussian noise at every step."""

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from .._types import Params, Participation, RealScalarLike
from ..sharding import normal_like
from ._base import Buffers, as_multiplier
from ._independent import AbstractIndependentNoise, scale_of

if TYPE_CHECKING:
    from dp_accounting import DpEvent


class IndependentGaussian(AbstractIndependentNoise):
    r"""Adds independent $N(0, (\sigma C)^2)$ noise to every coordinate at every step, $C$ the clip norm: the noise of DP-SGD.

    !!! success "Guarantee"

        Its scale is never smaller than noise multiplier times sensitivity, rounding included. Noise is drawn in float32 (float64
        for float64 sums), where the sum lies, without communication, and does not depend on how the sum is sharded.

    **Arguments:**

    - `noise_multiplier`: $\sigma > 0$, rounded up to float32; None to let a plan calibrate it. May be an array, for a sweep.

    ??? cite "Reference"

        Abadi et al., *Deep learning with differential privacy*, CCS 2016.
    """

    noise_multiplier: Float[Array, ""] | None
    order: ClassVar[int] = 2
    unit_variance: ClassVar[float] = 1.0

    def __init__(self, noise_multiplier: RealScalarLike | None = None):
        self.noise_multiplier = as_multiplier("IndependentGaussian", noise_multiplier)

    @property
    def description(self) -> str:
        return "independent Gaussian noise at every step (DP-SGD)"

    def event(self, noise_multiplier: float) -> "DpEvent":
        from dp_accounting import GaussianDpEvent

        return GaussianDpEvent(float(noise_multiplier))

    def scale(self, sensitivity: Float[Array, ""], steps: int | None, participation: Participation) -> Float[Array, ""]:
        del steps, participation  # steps compose in the accountant
        return scale_of(self, sensitivity)

    def step(
        self, total: Params, scale: Float[Array, ""], key: Key[Array, ""], step: Int[Array, ""], buffers: Buffers
    ) -> tuple[Params, Buffers]:
        z = standard_normal(jr.fold_in(key, step), total)
        return jax.tree.map(lambda x, z: x + scale.astype(z.dtype) * z, total, z), buffers


def standard_normal(key: Key[Array, ""], tree: Params) -> Params:
    """Independent standard normal numbers, in the shapes and shardings of `tree`."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jr.split(key, len(leaves))
    return jax.tree.unflatten(treedef, [normal_like(keys[i], x) for i, x in enumerate(leaves)])
