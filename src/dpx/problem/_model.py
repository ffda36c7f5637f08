"""A model, checked: what of it is trained, and that none of its layers mixes examples."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._checks import described
from .._tree import path_str
from .._types import Params
from ._words import first_line

_MSG_STATEFUL = (
    "The model's `{path}` is a `{kind}`, which keeps statistics of the batch or mixes its examples, so that no example's contribution can "
    "be bounded. Replace it by a layer that sees one example at a time, such as `eqx.nn.GroupNorm` or `eqx.nn.LayerNorm`; or, if its statistics "
    "come from public data, freeze them: `eqx.nn.inference_mode(model)`."
)
_MSG_ITERATING = (
    "The model's `{path}` is a `{kind}`, which hands a state on from one call to the next: the loss of one example cannot. Let it rest while "
    "the model is trained, `eqx.nn.inference_mode(model)`, and move it on outside of the loss."
)
_MSG_COMPLEX = (
    "`filter_spec` asks to train `{path}`, which is of dtype {dtype}; only arrays of real floating-point numbers can be trained privately. "
    "Keep its real and imaginary part as two arrays and put them together in the loss with `jax.lax.complex`; or leave it as it is with "
    "`filter_spec=lambda x: eqx.is_inexact_array(x) and not jnp.iscomplexobj(x)`."
)


def check_model(model: PyTree) -> None:
    """Raises if a layer of `model` keeps state or mixes examples, naming its path; a frozen one (`inference=True`) does neither."""
    is_index = lambda x: isinstance(x, eqx.nn.StateIndex)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_index):
        if is_index(leaf):
            owner = model
            for key in path[:-1]:
                owner = (
                    getattr(owner, key.name)
                    if hasattr(key, "name")
                    else owner[getattr(key, "idx", getattr(key, "key", None))]
                )
            if getattr(owner, "inference", None) is True:
                continue
            message = _MSG_STATEFUL if isinstance(owner, eqx.nn.BatchNorm) else _MSG_ITERATING
            raise ValueError(message.format(path=path_str(path[:-1]), kind=type(owner).__name__))


def trainable(model: PyTree, filter_spec: PyTree) -> tuple[Params, PyTree]:
    """Splits `model` into what is trained and the rest, and checks that what is trained consists of real arrays."""
    try:
        params, static = eqx.partition(model, filter_spec)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`filter_spec` must be a function of a leaf, or a tree of booleans that is a prefix of the model's: {first_line(error)}"
        ) from error
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("`filter_spec` selects no array of the model: there is nothing to train.")
    for path, leaf in leaves:
        if eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(_MSG_COMPLEX.format(path=path_str(path), dtype=leaf.dtype))
        kind = f"of dtype {leaf.dtype}" if eqx.is_array(leaf) else f"a {type(leaf).__name__}"
        if not (eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
            raise ValueError(
                f"`filter_spec` asks to train `{path_str(path)}`, which is {kind}; only arrays of real floating-point numbers can be "
                "trained privately. Leave it out with `filter_spec=eqx.is_inexact_array`, or store it as such an array."
            )
    return params, static


def check_filter_spec(call: str, spec: PyTree) -> PyTree:
    """A function of a leaf, or a tree of booleans: what `equinox.partition` takes."""
    leaves = jax.tree.leaves(spec)
    if not leaves or not all(isinstance(leaf, bool | np.bool_) or callable(leaf) for leaf in leaves):
        raise ValueError(
            f"`{call}` must be a function of a leaf, such as `eqx.is_inexact_array`, or a tree of booleans that is a prefix "
            f"of the model's; got {described(spec)}."
        )
    return spec
