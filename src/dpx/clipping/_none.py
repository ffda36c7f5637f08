"""The non-private baseline."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._base import AbstractOneGroupClipping


class NoClipping(AbstractOneGroupClipping):
    """Clips nothing, for a baseline that differs from the private run in nothing else.

    !!! warning

        NOT PRIVATE. The sensitivity is infinite, no noise hides it, so none is added, and every plan with it has epsilon infinity.
        As everywhere, an example whose gradient is not finite contributes zero.

    **Arguments:**

    None.
    """

    order: int = eqx.field(static=True, default=2)

    @property
    def sensitivity(self) -> Float[Array, ""]:
        return jnp.array(jnp.inf, jnp.float32)

    def factors(self, norms: Float[Array, "batch groups"], state: PyTree) -> Float[Array, "batch groups"]:
        del state
        return jnp.ones_like(norms)
