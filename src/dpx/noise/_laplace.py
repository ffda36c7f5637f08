"""Fresh Laplace noise at every step."""

from typing import TYPE_CHECKING, ClassVar

import jax
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from .._types import Params, Participation, RealScalarLike
from ..sharding import laplace_like
from ._base import Buffers, as_multiplier
from ._independent import AbstractIndependentNoise, scale_of

if TYPE_CHECKING:
    from dp_accounting import DpEvent


class Laplace(AbstractIndependentNoise):
    r"""Adds independent Laplace noise of scale $b = \sigma C$ to every coordinate at every step, $C$ the $\ell_1$ clip norm.

    One step without sampling is $(1 / \sigma, 0)$-DP. For gradients of many coordinates Gaussian noise is far better, since their
    $\ell_1$ norm is up to $\sqrt d$ times the $\ell_2$ norm; Laplace is for few coordinates and pure DP.

    **Arguments:**

    - `noise_multiplier`: $\sigma > 0$, the scale (not the standard deviation, $\sqrt 2$ times more) over the $\ell_1$ sensitivity; None
        to let a plan calibrate it.

    ??? cite "Reference"

        Dwork et al., *Calibrating noise to sensitivity in private data analysis*, TCC 2006.
    """

    noise_multiplier: Float[Array, ""] | None
    order: ClassVar[int] = 1
    unit_variance: ClassVar[float] = 2.0

    def __init__(self, noise_multiplier: RealScalarLike | None = None):
        self.noise_multiplier = as_multiplier("Laplace", noise_multiplier)

    @property
    def description(self) -> str:
        return "independent Laplace noise at every step"

    def event(self, noise_multiplier: float) -> "DpEvent":
        from dp_accounting import LaplaceDpEvent

        return LaplaceDpEvent(float(noise_multiplier))

    def scale(self, sensitivity: Float[Array, ""], steps: int | None, participation: Participation) -> Float[Array, ""]:
        del steps, participation  # steps compose in the accountant
        return scale_of(self, sensitivity)

    def step(
        self, total: Params, scale: Float[Array, ""], key: Key[Array, ""], step: Int[Array, ""], buffers: Buffers
    ) -> tuple[Params, Buffers]:
        leaves, treedef = jax.tree.flatten(total)
        keys = jr.split(jr.fold_in(key, step), len(leaves))

        def noisy(i, x):
            z = laplace_like(keys[i], x)
            return x + scale.astype(z.dtype) * z

        return jax.tree.unflatten(treedef, [noisy(i, x) for i, x in enumerate(leaves)]), buffers
