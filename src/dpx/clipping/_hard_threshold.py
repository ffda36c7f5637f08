"""Gradients above a threshold are left out, the others are scaled alike."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._checks import usable
from .._types import RealScalarLike
from ._base import AbstractOneGroupClipping
from ._flat import norm_scalar, usable_norm


class HardThresholdClipping(AbstractOneGroupClipping):
    r""" "Global clipping": $\frac{C}{Z} g$ if $\|g\| \le Z$, else 0. It never changes a direction or the ratio of two gradients that are kept.

    !!! success "Guarantee"

        One example's contribution has norm at most `norm` $(1 + 10^{-6})$, for every input and dtype.

    **Arguments:**

    - `norm`: the sensitivity $C > 0$.
    - `threshold`: $Z > 0$, above which a gradient is left out; usually well above the norms of most.

    ??? cite "Reference"

        Bu et al., *On the convergence and calibration of deep learning with differential privacy*, 2021.
    """

    norm: Float[Array, ""]
    threshold: Float[Array, ""]
    order: int = eqx.field(static=True)

    def __init__(self, norm: RealScalarLike, threshold: RealScalarLike):
        self.norm = norm_scalar("HardThresholdClipping(norm=...)", norm)
        self.threshold = norm_scalar("HardThresholdClipping(threshold=...)", threshold)
        self.order = 2

    @property
    def sensitivity(self) -> Float[Array, ""]:
        return usable(usable_norm(self.norm), usable_norm(self.threshold) > 0)

    def factors(self, norms: Float[Array, "batch groups"], state: PyTree) -> Float[Array, "batch groups"]:
        del state
        return jnp.where(norms <= self.threshold, self.norm / self.threshold, 0)
