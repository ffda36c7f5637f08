"""A loss whose gradient is whatever the audit wants it to be, on rows of the user's own."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ..problem import takes_key

REAL, NOTHING, EVERYTHING = -1, -2, -3
"""What a row is, in place of a leaf's number: one of the user's; one without gradient; one whose gradient is the same number everywhere."""


class Probe(eqx.Module):
    r"""A loss of two arguments more: `leaf` and `position` of the one parameter that a row's gradient is about, with `gain` as its value.

    Of a row that is no canary the gradient is that of the user's loss. Of a canary it is exactly `gain` times a unit vector, whatever the user's
    loss does on it: parameters reach that loss through a selection whose derivative is zero there, and not through a product with zero,
    which keeps NaN.

    **Arguments:**

    - `loss`: the user's; None where no row is one of theirs.
    - `filter_spec`: what is trained.
    - `has_aux`: whether the user's loss returns `(loss, aux)`; what is returned here is the loss alone.
    - `arguments`: how many arguments an example has; None if leaf and position are the last two.
    - `gain`: the value, if the rows do not have one of their own.
    """

    loss: Callable[..., Any] | None
    filter_spec: PyTree
    has_aux: bool = eqx.field(static=True)
    arguments: int | None = eqx.field(static=True)
    gain: float | None = eqx.field(static=True, default=None)

    def __call__(self, model: PyTree, *args: Any, key: Any = None) -> Any:
        number = len(args) - 2 if self.arguments is None else self.arguments
        example, extra = args[:number], args[number:]
        leaf, position = jnp.atleast_1d(extra[0]), jnp.atleast_1d(extra[1])
        gain = extra[2] if self.gain is None else jnp.float32(self.gain)
        params, static = eqx.partition(model, self.filter_spec)
        forced = self._forced(params, leaf, position, gain)
        if self.loss is None:
            return forced
        is_real = leaf[0] == REAL
        seen = jax.tree.map(lambda p: jnp.where(is_real, p, jax.lax.stop_gradient(p)), params)
        kwargs = {"key": key} if takes_key(self.loss, number) else {}
        own = self.loss(eqx.combine(seen, static), *example, **kwargs)
        own = own[0] if self.has_aux else own
        return jnp.where(is_real, own, jnp.zeros((), own.dtype)).astype(jnp.float32) + forced

    def _forced(self, params: PyTree, leaf: Any, position: Any, gain: Any) -> Any:
        # float32, or what the parameters are: a gain of 1e4 is more than half precision adds up
        forced = jnp.zeros((), jnp.float32)
        for number, p in enumerate(jax.tree.leaves(params)):
            if p.size == 0:
                continue
            wide = p.astype(jnp.float32).ravel()
            for k in range(leaf.shape[0]):
                # a selection, and not a product with zero, which keeps NaN
                at = jnp.clip(position[k], 0, p.size - 1)
                forced = forced + jnp.where(leaf[k] == number, gain * wide[at], 0.0)
            forced = forced + jnp.where(leaf[0] == EVERYTHING, gain * jnp.sum(wide), 0.0)
        return forced


class _Keyless(eqx.Module):
    """The same without the keyword `key`, for losses that take none.

    **Arguments:**

    - `probe`: the probe.
    """

    probe: Probe

    def __call__(self, model: PyTree, *args: Any) -> Any:
        return self.probe(model, *args)


class _Keyed(eqx.Module):
    """The same with the keyword `key`.

    **Arguments:**

    - `probe`: the probe.
    """

    probe: Probe

    def __call__(self, model: PyTree, *args: Any, key: Any) -> Any:
        return self.probe(model, *args, key=key)


def keyed(probe: Probe, takes_key: bool) -> Any:
    """The probe with the keyword `key` or without, as the loss in it takes one or none."""
    return _Keyed(probe) if takes_key else _Keyless(probe)


def probe_of(loss: Callable[..., Any], arguments: int, filter_spec: Any, has_aux: bool) -> Any:
    """The probe, with a gain for each row, of a loss that takes so many arguments beside the model."""
    return keyed(Probe(loss, filter_spec, has_aux, arguments), takes_key(loss, arguments))


def rows_of(batch: tuple[Any, ...], number: int) -> tuple[Any, ...]:
    """So many rows of a batch, which begins again where it ends."""
    size = len(jax.tree.leaves(batch)[0])
    take = np.arange(number) % size
    return jax.tree.map(lambda x: x[take] if isinstance(x, jax.Array) else np.asarray(x)[take], batch)


def with_rows(batch: tuple[Any, ...], is_user: bool, *columns: Any) -> tuple[Any, ...]:
    """A batch with further arguments, one number a row (and the same for all examples of a user)."""
    shape = jax.tree.leaves(batch)[0].shape[: 2 if is_user else 1]
    spread = lambda c: np.broadcast_to(np.asarray(c).reshape((-1,) + (1,) * (len(shape) - 1)), shape).copy()
    return (*batch, *(spread(c) for c in columns))
