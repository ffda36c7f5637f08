"""Clipping without a clip norm to tune: gradients are normalised."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._checks import is_traced, positive_scalar, real_number, usable
from .._types import RealScalarLike
from ._base import AbstractOneGroupClipping
from ._flat import norm_scalar, usable_norm

# Below this, squares of single numbers underflow float32 and a norm may be understated; normalising would make the error large.
_SMALLEST_NORM = 1e-10


class NormalizedClipping(AbstractOneGroupClipping):
    r"""Scales every gradient towards one norm: $C g / (\|g\| + \gamma)$, "automatic clipping" (AUTO-S; AUTO-V for $\gamma = 0$).

    $C$ only rescales the learning rate, so there is no clip norm to tune; $\gamma$ keeps small gradients smaller than large ones.

    !!! success "Guarantee"

        One example's contribution has norm at most `norm` $(1 + 10^{-6})$, for every input and dtype. With $\gamma = 0$, a gradient
        whose norm is below $10^{-10}$, where float32 cannot tell its size, contributes zero.

    **Arguments:**

    - `norm`: the sensitivity $C > 0$.
    - `gamma`: the stability constant $\gamma$, 0 or at least $10^{-10}$; in the units of a gradient.

    ??? cite "Reference"

        Bu et al., *Automatic clipping: differentially private deep learning made easier and stronger*, NeurIPS 2023.
    """

    norm: Float[Array, ""]
    gamma: Float[Array, ""]
    order: int = eqx.field(static=True)

    def __init__(self, norm: RealScalarLike = 1.0, gamma: RealScalarLike = 0.01):
        self.norm = norm_scalar("NormalizedClipping(norm=...)", norm)
        self.order = 2
        if is_traced(gamma):
            self.gamma = _usable_gamma(jnp.asarray(gamma, jnp.float32))
            return
        number = real_number("NormalizedClipping(gamma=...)", gamma)
        self.gamma = jnp.zeros(()) if number == 0 else positive_scalar("NormalizedClipping(gamma=...)", gamma)
        if 0 < number < _SMALLEST_NORM:
            raise ValueError(
                f"`NormalizedClipping(gamma=...)` must be 0 or at least {_SMALLEST_NORM}, or float32 cannot tell it from 0; got {gamma}."
            )

    @property
    def sensitivity(self) -> Float[Array, ""]:
        return usable(usable_norm(self.norm), _usable_gamma(self.gamma) >= 0)

    def factors(self, norms: Float[Array, "batch groups"], state: PyTree) -> Float[Array, "batch groups"]:
        del state
        is_known = (norms >= _SMALLEST_NORM) | (self.gamma > 0)
        return jnp.where(is_known, self.norm / jnp.where(is_known, norms + self.gamma, 1), 0)


def _usable_gamma(gamma: Float[Array, ""]) -> Float[Array, ""]:
    return usable(gamma, (gamma == 0) | ((gamma >= _SMALLEST_NORM) & (gamma < jnp.inf)))
