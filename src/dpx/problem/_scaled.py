"""A loss as a function of scaled steps, so that its gradient comes scaled."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._checks import described
from .._tree import path_str
from .._types import Params


class Scaled(eqx.Module):
    """A per-example loss as a function of steps $p$ from the model: $L(\\text{origin} + s \\odot p)$, whose gradient at 0 is $s \\odot \\nabla L$.

    **Arguments:**

    - `loss`: `(params, example) -> (loss, aux)`.
    - `origin`: the parameters.
    - `scaling`: $s$, shaped like them.
    """

    loss: Callable[[Params, Any], tuple[Array, PyTree]]
    origin: Params
    scaling: Params

    def __call__(self, params: Params, example: Any) -> tuple[Array, PyTree]:
        moved = jax.tree.map(
            lambda o, s, p: o + (s.astype(p.dtype) * p).astype(o.dtype), self.origin, self.scaling, params
        )
        return self.loss(moved, example)


def check_scaling(scaling: Any, params: Params) -> None:
    """Raises unless `scaling` has the structure and shapes of the trainable leaves."""
    expected, got = jax.tree.structure(params), jax.tree.structure(scaling)
    if expected != got:
        raise ValueError(
            f"`scaling` must have the structure of `eqx.filter(model, filter_spec)`, {expected}; got {got}."
        )
    for (path, p), s in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(scaling), strict=True):
        if not eqx.is_array_like(s) or jnp.shape(s) != p.shape:
            raise ValueError(
                f"`scaling{path_str(path)}` must have the shape of that parameter, {p.shape}; got {described(s)}."
            )
