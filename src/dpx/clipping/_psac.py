"""Per-sample adaptive clipping."""

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from .._checks import usable
from .._types import RealScalarLike
from ._base import AbstractOneGroupClipping
from ._flat import norm_scalar, usable_norm


class PSACClipping(AbstractOneGroupClipping):
    r"""Normalises large gradients and damps small ones: $C g / \left(\|g\| + \frac{r}{\|g\| + r}\right)$.

    Unlike `NormalizedClipping`, a gradient near zero is not blown up: its weight tends to $C$, not to $C / \gamma$.

    !!! success "Guarantee"

        One example's contribution has norm at most `norm` $(1 + 10^{-6})$, for every input and dtype.

    **Arguments:**

    - `norm`: the sensitivity $C > 0$.
    - `r`: $r > 0$, the norm around which gradients begin to be damped.

    ??? cite "Reference"

        Xia et al., *Differentially private learning with per-sample adaptive clipping*, AAAI 2023.
    """

    norm: Float[Array, ""]
    r: Float[Array, ""]
    order: int = eqx.field(static=True)

    def __init__(self, norm: RealScalarLike = 1.0, r: RealScalarLike = 0.1):
        self.norm = norm_scalar("PSACClipping(norm=...)", norm)
        self.r = norm_scalar("PSACClipping(r=...)", r)
        self.order = 2

    @property
    def sensitivity(self) -> Float[Array, ""]:
        return usable(usable_norm(self.norm), usable_norm(self.r) > 0)

    def factors(self, norms: Float[Array, "batch groups"], state: PyTree) -> Float[Array, "batch groups"]:
        del state
        return self.norm / (norms + self.r / (norms + self.r))
