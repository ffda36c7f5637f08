"""A batch and its mask, checked."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .._checks import check_numbers, check_tuple
from .._tree import path_str
from ._words import describe


def check_batch(batch: Any) -> tuple[tuple[Any, ...], int]:
    """The batch with JAX arrays for leaves, and its length."""
    check_tuple("batch", batch)
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError("`batch` contains no array.")
    for path, leaf in leaves:
        if not (eqx.is_array(leaf) and leaf.ndim > 0):
            raise ValueError(
                f"`batch{path_str(path)}` must be an array with a leading batch axis; got {describe([leaf])}. What is the same for every example "
                "belongs into the model or the loss."
            )
        check_numbers(f"batch{path_str(path)}", leaf.dtype)
    lengths = {path_str(path): leaf.shape[0] for path, leaf in leaves}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"`batch{path}`: {n}" for path, n in lengths.items())
        raise ValueError(f"The leaves of `batch` must have the same length along their leading axis; got {listed}.")
    return jax.tree.map(jnp.asarray, batch), leaves[0][1].shape[0]


def check_mask(mask: Any, size: int) -> Array:
    """The mask as a JAX array; all True for None."""
    if mask is None:
        return jnp.ones(size, bool)
    if not (eqx.is_array(mask) and mask.dtype == bool):
        got = describe([mask])
        raise ValueError(f"`mask` must be a boolean array, True for real examples; got {got}.")
    if mask.shape != (size,):
        raise ValueError(f"`mask` must have one entry for each of the batch's {size} examples; got shape {mask.shape}.")
    return jnp.asarray(mask)


def is_pair(batch: Any) -> bool:
    """Whether this looks like a batch and its mask, as `plan.batches` yields them."""
    if not (isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], tuple)):
        return False
    mask = batch[1]
    return bool(eqx.is_array(mask) and mask.dtype == bool and mask.ndim in (1, 2))
