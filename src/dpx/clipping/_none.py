"""The non-private baseline."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._types import Params
from ._base import AbstractStatelessClipping


class NoClipping(AbstractStatelessClipping):
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

    def labels(self, params: Params) -> tuple[int, ...]:
        return (0,) * len(jax.tree.leaves(params))

    def factors(self, norms: Float[Array, "batch groups"], state: PyTree) -> Float[Array, "batch groups"]:
        del state
        return jnp.ones_like(norms)

    def rescale(self, state: PyTree) -> None:
        del state
