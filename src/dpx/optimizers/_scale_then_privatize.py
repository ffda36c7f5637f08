"""The preconditioner before clipping instead of after the noise."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._checks import described, flag, positive_float
from .._tree import pairwise_sum, wide
from .._types import Params, RealScalarLike


class ScaleThenPrivatize(eqx.Module):
    r"""An adaptive optimiser whose preconditioner is applied before clipping, and undone after the noise.

    `scaling` gives, before each step, a multiplier $s = k / (\sqrt{\nu} + \epsilon)$ for every coordinate, from the second moment $\nu$ that the
    optimiser keeps of earlier PRIVATE gradients, so it is public. What is clipped and gets noise is $s g$, and the result is divided
    by $s$: the noise is small where gradients are, and no coordinate drowns because another is large. `init` and `update` are the
    optimiser's own.

    ```python
    optim = dpx.optimizers.scale_then_privatize(optax.adam(1e-2))
    opt_state = optim.init(params)
    grads, state, _ = private_grad(model, batch, state, mask=mask, scaling=optim.scaling(opt_state))
    updates, opt_state = optim.update(grads, opt_state, params)
    ```

    **Arguments:**

    - `optimizer`: an optax transformation whose state has one second moment `nu`: `optax.adam`, `optax.adamw`, `optax.rmsprop`, or a chain
        with one of them.
    - `eps`: $\epsilon > 0$, in units of a gradient. The larger, the more alike the scales: raise it where coordinates of tiny gradients
        take too much of the clip norm.
    - `normalize`: choose $k$ so that the mean of $1 / s^2$ over coordinates is 1. Then the noise has the total variance that it
        has without scaling, and the clip norm keeps its unit; the first step, when $\nu = 0$, has $s = 1$. Otherwise $k = 1$, as published.

    ??? cite "Reference"

        Ganesh, McMahan and Thakurta, *On design principles for private adaptive optimizers*, 2025.
    """

    optimizer: optax.GradientTransformation
    eps: float = eqx.field(static=True)
    normalize: bool = eqx.field(static=True)

    def __init__(self, optimizer: Any, eps: RealScalarLike = 1e-8, normalize: bool = True):
        if not isinstance(optimizer, optax.GradientTransformation):
            raise ValueError(
                f"`scale_then_privatize(optimizer=...)` must be an optax transformation such as `optax.adam(1e-3)`; got {described(optimizer)}."
            )
        self.optimizer = optimizer
        self.eps = positive_float("scale_then_privatize(eps=...)", eps)
        self.normalize = flag("scale_then_privatize(normalize=...)", normalize)

    def init(self, params: Params) -> Any:
        """The optimiser's state. Raises `ValueError` if it has not exactly one second moment."""
        opt_state = self.optimizer.init(params)
        self._second_moment(opt_state)
        return opt_state

    def scaling(self, opt_state: Any) -> PyTree:
        """Positive multipliers in the shapes of the parameters, as float32, for the next private gradient."""
        sizes = jax.tree.map(lambda v: jnp.sqrt(wide(v).astype(jnp.float32)) + self.eps, self._second_moment(opt_state))
        leaves = jax.tree.leaves(sizes)
        typical = jnp.ones(())
        if self.normalize:
            number = sum(x.size for x in leaves)
            typical = jnp.sqrt(pairwise_sum([jnp.sum(jnp.square(x)) for x in leaves]) / number)
        return jax.tree.map(lambda x: typical / x, sizes)

    def update(self, grads: Params, opt_state: Any, params: Params = None, **extra_args: Any) -> tuple[Params, Any]:
        """The optimiser's update, from gradients that are scaled back already."""
        return optax.with_extra_args_support(self.optimizer).update(grads, opt_state, params, **extra_args)

    def _second_moment(self, opt_state: Any) -> PyTree:
        found = list(_fields(opt_state, "nu"))
        if len(found) != 1:
            raise ValueError(
                f"`scale_then_privatize(optimizer=...)` needs an optimiser whose state has one second moment `nu`, such as `optax.adam`; this "
                f"one has {len(found)}."
            )
        return found[0]


def scale_then_privatize(optimizer: Any, eps: RealScalarLike = 1e-8, normalize: bool = True) -> ScaleThenPrivatize:
    """`ScaleThenPrivatize(optimizer, eps, normalize)`, by the name that it has in the literature."""
    return ScaleThenPrivatize(optimizer, eps, normalize)


def _fields(state: Any, name: str) -> Iterator[Any]:
    """Fields of that name in the named tuples of an optax state; parameters, which may use the name too, are not looked into."""
    if hasattr(state, "_fields"):
        if name in state._fields:
            yield getattr(state, name)
            return
        state = tuple(state)
    if isinstance(state, (tuple, list)):
        for part in state:
            yield from _fields(part, name)
    elif isinstance(state, dict):
        for part in state.values():
            yield from _fields(part, name)
