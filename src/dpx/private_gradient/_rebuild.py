"""The noise's buffers, computed again from the key alone."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PyTree

from ..problem import trainable
from ._learning import struct_of_query
from ._private_gradient import _NOISE, PrivateGradient
from ._state import PrivateGradientState


def rebuilt_noise(private_gradient: PrivateGradient, model: PyTree, state: PrivateGradientState) -> PyTree:
    """The buffers of correlated noise after `state.step` steps: the same bits as those of the run, which depend on key and step alone.

    **Arguments:**

    - `private_gradient`: the run's.
    - `model`: the model, whose shapes and layout matter.
    - `state`: with the run's key and step; its buffers may be anything.
    """
    params, _ = trainable(model, private_gradient.filter_spec)
    mechanism = private_gradient.mechanism
    query = struct_of_query(private_gradient.clipping, params)
    zeros = jax.tree.map(_zeros, query)
    first = private_gradient.noise.init(query)
    if not jax.tree.leaves(first):
        return first
    # placed as the step places them, and no weak types
    first = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), first, state.noise)

    @jax.jit
    def rebuild(zeros: Any, first: Any, key: Any, steps: Any) -> Any:
        body = lambda t, buffers: mechanism.step(zeros, jr.fold_in(key, _NOISE), t, buffers)[1]
        return jax.lax.fori_loop(0, steps, body, first)

    buffers = rebuild(zeros, first, state.key, state.step)
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), buffers, state.noise)


def _zeros(struct: Any) -> Any:
    sharding = None if struct.sharding is None or struct.sharding.mesh.empty else struct.sharding
    return jnp.zeros(struct.shape, struct.dtype, device=sharding)
