"""What a step is called with, looked at before anything is traced."""

import sys
import warnings
from collections.abc import Hashable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._checks import check_numbers, described
from ..random import check_key

_WRAPPERS = ("dpx", "jax", "equinox", "jaxtyping", "beartype")
_MSG_STRANGE_BATCH = (
    "A batch of {size} examples without a mask is none of this plan's, which are padded to {physical} and come with one. The privacy statement "
    "holds only for batches that are sampled as it says: take them from `for batch, mask in plan.batches(data, seed=...)`, or load the rows "
    "`plan.sampler.indices(seed, step)`, and pass `mask=mask`."
)


def check_arguments(model: PyTree, batch: Any, mask: Any, key: Any, scaling: Any = None) -> None:
    """Raises for what no compiled function can take, in the caller's words and not in JAX's."""
    if key is not None:
        check_key("key=...", key)
    for name, tree in (("model", model), ("batch", batch), ("mask", mask), ("scaling", scaling)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            where = name + jax.tree_util.keystr(path)
            if isinstance(leaf, np.ndarray | np.generic):
                check_numbers(where, leaf.dtype)
            elif not (eqx.is_array(leaf) or isinstance(leaf, Hashable)):
                raise ValueError(
                    f"`{where}` must be an array or something that can be hashed; got {described(leaf)}. Make a tuple of it, or a static field."
                )


def warn_of_strange_batch(physical_batch_size: int | None, batch: Any) -> None:
    """Warns if a batch, which has no mask, has not the size of the plan's batches: somebody else's loader made it.

    Called while a step is traced, and so once and not at every step.
    """
    if physical_batch_size is None:
        return
    sizes = {x.shape[0] for x in jax.tree.leaves(batch) if eqx.is_array(x) and x.ndim > 0}
    if not sizes or sizes == {physical_batch_size}:
        return
    # what is shown is the caller's line, not that of what traces
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _WRAPPERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(_MSG_STRANGE_BATCH.format(size=min(sizes), physical=physical_batch_size), stacklevel=level)
