"""User-level losses: several examples of one user, clipped as one."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, PyTree

from .._tree import expand_like, path_str
from .._types import Params
from ._batch import check_mask
from ._per_example import PerExample
from ._words import describe

WithinUser = Literal["mean", "sum"]


class PerUser(eqx.Module):
    """The mean or sum of one user's losses, as `(params, ((examples, mask), key)) -> (loss, aux)`.

    **Arguments:**

    - `per_example`: the loss of one example.
    - `within_user`: `"mean"` or `"sum"` of the user's real examples.
    """

    per_example: PerExample
    within_user: WithinUser = eqx.field(static=True)

    @property
    def takes_key(self) -> bool:
        """Whether the loss wants randomness."""
        return self.per_example.takes_key

    def __call__(self, params: Params, example: Any) -> tuple[Array, PyTree]:
        (examples, mask), key = example
        rows = jnp.arange(mask.shape[0])
        keys = None if key is None else jax.vmap(jr.fold_in, in_axes=(None, 0))(key, rows)
        # padding repeats a real example: whatever it contains, 0 * inf in the backward pass cannot poison the user
        source = jnp.where(mask, rows, jnp.argmax(mask))
        examples = jax.tree.map(lambda x: jnp.take(x, source, axis=0), examples)
        losses, aux = jax.vmap(self.per_example, in_axes=(None, 0))(params, (examples, keys))
        total = jnp.sum(jnp.where(mask, losses, jnp.zeros((), losses.dtype)))
        if self.within_user == "mean":
            total = total / jnp.maximum(jnp.sum(mask), 1).astype(total.dtype)
        return total, jax.tree.map(lambda x: jnp.where(expand_like(mask, x), x, jnp.zeros((), x.dtype)), aux)


def check_user_batch(batch: tuple[Any, ...], users: int, mask: Any) -> tuple[tuple[Any, Array], Array]:
    """The batch with its mask of shape (users, examples) beside it, and which users have any example.

    Raises unless every leaf has a user axis and an example axis, of equal length everywhere.
    """
    lengths = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if leaf.ndim < 2:
            raise ValueError(
                f"With `unit='user'`, `batch{path_str(path)}` must have two leading axes, (users, examples of a user); got {describe([leaf])}."
            )
        lengths[path_str(path)] = leaf.shape[1]
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"`batch{path}`: {n}" for path, n in lengths.items())
        raise ValueError(
            f"With `unit='user'` the leaves of `batch` must have the same number of examples for each user; got {listed}. Pad users with fewer "
            "examples and give a `mask` of shape (users, examples)."
        )
    shape = (users, next(iter(lengths.values())))
    if mask is None:
        mask = jnp.ones(shape, bool)
    elif eqx.is_array(mask) and mask.shape == (users,):  # which users are real, all of their examples being so
        mask = jnp.broadcast_to(check_mask(mask, users)[:, None], shape)
    elif not (eqx.is_array(mask) and mask.shape == shape):
        raise ValueError(
            f"With `unit='user'`, `mask` must be a boolean array of shape (users, examples) = {shape}, True for real examples; got "
            f"{describe([mask])}."
        )
    else:
        mask = check_mask(mask.reshape(-1), shape[0] * shape[1]).reshape(shape)
    return (batch, mask), jnp.any(mask, axis=1)
