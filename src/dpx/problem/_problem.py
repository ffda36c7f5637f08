"""From a loss, a model and a batch to what gradient methods differentiate: the one place where they are put together."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, PyTree

from .._tree import wide_dtype
from .._types import Examples, Params, PerExampleLoss
from ..random import check_key
from ..sharding import batch_axis, off_batch_axis, shard_batch
from ._batch import check_batch, check_mask
from ._model import check_model, trainable
from ._per_example import PerExample
from ._scaled import Scaled, check_scaling
from ._user import PerUser, WithinUser, check_user_batch


class Problem(eqx.Module):
    """What is differentiated, with respect to what, and for whom.

    **Arguments:**

    - `loss`: `(params, example) -> (scalar, aux)` of one example or user.
    - `params`: where it is differentiated; of `scaling`, a step of zero from the parameters.
    - `examples`: the batch, never empty, and a key for each example where the loss wants one.
    - `mask`: which of them are real.
    - `size`: how long the batch was: 0 for an empty one, for which a masked example of zeros stands.
    - `trained`: the trained leaves as the model has them, laid out over devices as it lays them out.
    """

    loss: PerExampleLoss
    params: Params
    examples: Examples
    mask: Bool[Array, " batch"]
    size: int = eqx.field(static=True)
    trained: Params


def prepare(
    loss: Any,
    model: PyTree,
    batch: Any,
    mask: Any = None,
    key: Any = None,
    *,
    filter_spec: PyTree,
    has_aux: bool = False,
    unit: str = "example",
    within_user: WithinUser = "mean",
    scaling: PyTree = None,
) -> Problem:
    """Checks that loss, model, batch and mask fit together, and puts them together.

    **Arguments:** as for a step of `PrivateGradient`, and its fields.

    **Raises:** `ValueError`, in the caller's words, for what cannot be trained privately.
    """
    # the model: nothing in it mixes examples, and what is trained is real
    check_model(model)
    trained, static = trainable(model, filter_spec)
    params = jax.tree.map(jnp.asarray, trained)

    # the batch: rows of examples, or of users with several
    batch, size = check_batch(batch)
    inner = batch
    if unit == "user":
        batch, mask = check_user_batch(batch, size, mask)
        inner = jax.tree.map(lambda x: x[0] if size else jnp.zeros(x.shape[1:], x.dtype), inner)
    mask = check_mask(mask, size)
    if size == 0:
        # nothing can be differentiated: one masked example of zeros gives the zero sum that noise is added to
        batch = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), batch)
        mask = jnp.zeros(1, bool)

    axis = batch_axis(batch)

    # the loss, of one of them
    per_example = PerExample(loss, static, has_aux, inner)
    if unit == "user":
        per_example = PerUser(per_example, within_user)
    keys = None
    if per_example.takes_key:
        if key is None:
            raise ValueError("This loss takes `key`: `clipped_sum(..., key=jax.random.key(...))` must be given one.")
        check_key("key=...", key)
        # one fold for each example, by its rank among the real ones, so that neither padding, wherever it stands, nor microbatches nor devices
        # change an example's randomness
        ranks = jnp.maximum(jnp.cumsum(off_batch_axis(mask, axis)) - 1, 0)
        keys = jax.vmap(jr.fold_in, in_axes=(None, 0))(key, ranks)

    # devices: who has which examples, and all of the parameters
    batch, mask, keys = shard_batch((batch, mask, keys), axis)
    params = off_batch_axis(params, axis)

    if scaling is not None:
        check_scaling(scaling, params)
        per_example = Scaled(per_example, params, scaling)
        params = jax.tree.map(lambda x: jnp.zeros_like(x, wide_dtype(x.dtype)), params)
    return Problem(per_example, params, (batch, keys), mask, size, trained)
