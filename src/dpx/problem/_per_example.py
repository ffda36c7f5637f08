"""Making sure that a loss, a model, a batch and a mask fit together, before anything compiles."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._checks import check_numbers, check_tuple, described, is_traced
from .._tree import path_str
from .._types import Params

_MSG_STATEFUL = (
    "The model's `{path}` is a `{kind}`, which keeps statistics of the batch or mixes its examples, so that no example's contribution can "
    "be bounded. Replace it by a layer that sees one example at a time, such as `eqx.nn.GroupNorm` or `eqx.nn.LayerNorm`; or, if its statistics "
    "come from public data, freeze them: `eqx.nn.inference_mode(model)`."
)
_MSG_ITERATING = (
    "The model's `{path}` is a `{kind}`, which hands a state on from one call to the next: the loss of one example cannot. Let it rest while "
    "the model is trained, `eqx.nn.inference_mode(model)`, and move it on outside of the loss."
)
_MSG_PAIR = (
    "`batch` looks like the pair that `plan.batches` yields. Write `for batch, mask in plan.batches(...)` and give them apart: "
    "`private_grad(model, batch, state, mask=mask)`."
)
_MSG_COMPLEX = (
    "`filter_spec` asks to train `{path}`, which is of dtype {dtype}; only arrays of real floating-point numbers can be trained privately. "
    "Keep its real and imaginary part as two arrays and put them together in the loss with `jax.lax.complex`; or leave it as it is with "
    "`filter_spec=lambda x: eqx.is_inexact_array(x) and not jnp.iscomplexobj(x)`."
)
_MSG_AXIS_NAME = (
    "`loss` uses a named `vmap` axis ({error}), as `eqx.nn.BatchNorm` does: that mixes the examples of a batch, so that no "
    "example's contribution can be bounded. Write the loss for one example; replace BatchNorm by `eqx.nn.GroupNorm`."
)
_MSG_BATCH_AXIS = (
    "`loss` must be written for ONE example, without a batch axis: it fails on one example ({shapes}: {error}) but works on "
    "the whole batch. Remove its `jax.vmap` and its mean over the batch; dpx adds the batch axis."
)
_MSG_ONE_EXAMPLE = "dpx called `loss` with ONE example, without a batch axis: {shapes}."


def describe(tree: PyTree) -> str:
    """Dtypes and shapes, one for each leaf."""
    return ", ".join(f"{x.dtype}{list(x.shape)}" if eqx.is_array(x) else described(x) for x in jax.tree.leaves(tree))


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
            f"`filter_spec` must be a function of a leaf, or a tree of booleans that is a prefix of the model's: {_first_line(error)}"
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


class PerExample(eqx.Module):
    """A user's loss as `(params, (example, key)) -> (loss, aux)`, checked while it is traced.

    **Arguments:**

    - `loss`: as the user wrote it.
    - `static`: the rest of the model, which is not trained.
    - `has_aux`: whether the loss returns an auxiliary output.
    - `batch`: the batch; used to see how the loss can be called.
    """

    loss: Callable[..., Any]
    static: PyTree
    has_aux: bool = eqx.field(static=True)
    takes_key: bool = eqx.field(static=True)
    batch: tuple[Any, ...]

    def __init__(self, loss: Callable[..., Any], static: PyTree, has_aux: bool, batch: tuple[Any, ...]):
        self.loss, self.static, self.has_aux, self.batch = loss, static, has_aux, batch
        try:
            self.takes_key = bool(keywords(loss, len(batch), ("key",)))
        except ValueError as error:
            if is_pair(batch):
                raise ValueError(_MSG_PAIR) from error
            raise

    def __call__(self, params: Params, example: Any) -> tuple[Array, PyTree]:
        args, key = example
        kwargs = {"key": key} if self.takes_key else {}
        try:
            out = self.loss(eqx.combine(params, self.static), *args, **kwargs)
        except NameError as error:
            if "unbound axis name" not in str(error):
                raise
            raise ValueError(_MSG_AXIS_NAME.format(error=error)) from error
        except Exception as error:
            if is_pair(self.batch):
                raise ValueError(_MSG_PAIR) from error
            if self._works_on_the_whole_batch(params, kwargs):
                raise ValueError(_MSG_BATCH_AXIS.format(shapes=describe(args), error=_first_line(error))) from error
            error.add_note(_MSG_ONE_EXAMPLE.format(shapes=describe(args)))
            raise
        return _check_output(out, self.has_aux, describe(args))

    def _works_on_the_whole_batch(self, params: Params, kwargs: dict[str, Any]) -> bool:
        try:
            eqx.filter_eval_shape(self.loss, eqx.combine(params, self.static), *self.batch, **kwargs)
        except Exception:
            return False
        return True


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def is_pair(batch: Any) -> bool:
    """Whether this looks like a batch and its mask, as `plan.batches` yields them."""
    if not (isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], tuple)):
        return False
    mask = batch[1]
    return bool(eqx.is_array(mask) and mask.dtype == bool and mask.ndim in (1, 2))


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name, filled by an example or not."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def keywords(
    function: Callable[..., Any], arguments: int, names: tuple[str, ...], name: str = "loss"
) -> tuple[str, ...]:
    """Which of `names`, such as `key`, a function wants by keyword beside a model and so many arguments.

    One that the arguments fill already is none of them: in `loss(model, x, key)` with a batch of two, `key` is the second. Raises
    `ValueError`, with the signature, if the function cannot be called like that.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables of C have none
        return ()
    positional = [None] * (arguments + 1)
    try:
        filled = signature.bind_partial(*positional).arguments
        parameters = signature.parameters
        wanted = tuple(
            n
            for n in names
            if n in parameters and parameters[n].kind is not inspect.Parameter.POSITIONAL_ONLY and n not in filled
        )
        signature.bind(*positional, **dict.fromkeys(wanted))
    except TypeError as error:
        raise ValueError(
            f"`{name}{signature}` is called as `{name}(model, *example)` and the batch is a tuple of {arguments}, so it must take "
            f"{arguments + 1} arguments ({error})."
        ) from None
    return wanted


def _check_output(out: Any, has_aux: bool, shapes: str) -> tuple[Array, PyTree]:
    if has_aux:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(f"With `has_aux=True` the loss must return `(loss, aux)`; got {type(out).__name__}.")
        value, aux = out
    else:
        if isinstance(out, tuple):
            raise ValueError(f"The loss must return a scalar; got a tuple of {len(out)}. Did you mean `has_aux=True`?")
        value, aux = out, None
    if not (eqx.is_array_like(value) and jnp.issubdtype(jnp.result_type(value), jnp.floating)):
        got = describe([value])
        raise ValueError(f"The loss must return a real floating-point scalar; got {got}.")
    if jnp.shape(value) != ():
        raise ValueError(
            f"The loss of ONE example must be a scalar; got shape {jnp.shape(value)} for an example of {shapes}. Reduce it with `jnp.sum` "
            "or `jnp.mean`."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if not (eqx.is_array_like(leaf) or is_traced(leaf)):
            raise ValueError(f"`aux{path_str(path)}` must be an array or a number; got {type(leaf).__name__}.")
    return jnp.asarray(value), jax.tree.map(jnp.asarray, aux)


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
