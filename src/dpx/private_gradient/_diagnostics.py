"""What a step saw of single examples."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key, PyTree

from .._norms import combined
from .._tree import expand_like
from ..gradients import ClippedSum
from ..metrics import AbstractMetric


class Diagnostics(eqx.Module):
    """What a step saw of single examples; masked examples read 0.

    **Arguments:**

    - `losses`: loss of each example, shape `(batch,)`.
    - `norms`: norm of each example's unclipped gradient, shape `(batch,)`; infinite or NaN exactly where the example was left out of the sum,
        because its gradient was.
    - `group_norms`: the same in each clip group, shape `(batch, groups)`.
    - `aux`: what the loss returned besides, stacked on a leading axis; None without `has_aux`.
    - `mask`: which examples are real, shape `(batch,)`.
    """

    losses: Float[Array, " batch"]
    norms: Float[Array, " batch"]
    group_norms: Float[Array, "batch groups"]
    aux: PyTree
    mask: Array


def diagnostics_of(out: ClippedSum, mask: Array, order: int) -> Diagnostics:
    """Those of a clipped sum; masked examples read 0."""

    def real(x):
        return jnp.where(expand_like(mask, x), x, jnp.zeros((), x.dtype))

    norms = real(out.norms)
    overall = combined([norms[:, k] for k in range(norms.shape[1])], order)
    # finite wherever the norm of every group is: then the example was not left out
    is_kept = jnp.all(jnp.isfinite(norms), axis=1)
    overall = jnp.where(is_kept, jnp.minimum(overall, jnp.finfo(overall.dtype).max), overall)
    return Diagnostics(real(out.losses), overall, norms, jax.tree.map(real, out.aux), mask)


def measured(
    metrics: dict[str, AbstractMetric],
    states: dict[str, Any],
    diagnostics: Diagnostics,
    mask: Array,
    normalizer: Float[Array, ""],
    key: Key[Array, ""],
) -> dict[str, Any]:
    """The states of the metrics after a step that saw this."""
    keys = {name: jr.fold_in(key, number) for number, name in enumerate(sorted(metrics))}
    update = lambda name: metrics[name].update(states[name], diagnostics, mask, normalizer, keys[name])
    return {name: update(name) for name in keys}
