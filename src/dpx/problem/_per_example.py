"""The loss of one example, as the user wrote it and as dpx calls it."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._checks import is_traced
from .._tree import path_str
from .._types import Params
from ._batch import is_pair
from ._words import describe, first_line

_MSG_PAIR = (
    "`batch` looks like the pair that `plan.batches` yields. Write `for batch, mask in plan.batches(...)` and give them apart: "
    "`private_grad(model, batch, state, mask=mask)`."
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
            self.takes_key = takes_key(loss, len(batch))
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
                raise ValueError(_MSG_BATCH_AXIS.format(shapes=describe(args), error=first_line(error))) from error
            error.add_note(_MSG_ONE_EXAMPLE.format(shapes=describe(args)))
            raise
        return _check_output(out, self.has_aux, describe(args))

    def _works_on_the_whole_batch(self, params: Params, kwargs: dict[str, Any]) -> bool:
        try:
            eqx.filter_eval_shape(self.loss, eqx.combine(params, self.static), *self.batch, **kwargs)
        except Exception:
            return False
        return True


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name, filled by an example or not."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def takes_key(loss: Callable[..., Any], arguments: int) -> bool:
    """Whether a loss wants a PRNG key, by the keyword `key`, beside a model and so many arguments."""
    return bool(keywords(loss, arguments, ("key",)))


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
