"""Which parameters a loss depends on, from its program: a leaf that it does not reach gets noise at every step and nothing else."""

import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from .._tree import leaf_paths
from .._types import Examples, Params, PerExampleLoss

# Programs that a loss calls, by the name of what they are called with: they are walked; of any other primitive, every output is taken to
# depend on every input.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}


def unreached(jaxpr: Any, num_params: int) -> tuple[int, ...]:
    """The numbers of the first `num_params` inputs that the first output of `jaxpr` has certainly no gradient with respect to.

    A walk backwards from the loss. Nothing passes `stop_gradient` or an array of integers or booleans; where a primitive is not understood, all of
    its inputs count as reached, so that a leaf is named only if the loss does not use it.
    """
    needed = _inputs(jaxpr, [True] + [False] * (len(jaxpr.outvars) - 1))
    return tuple(i for i in range(num_params) if not needed[i])


def _inputs(jaxpr: Any, outs: list[bool]) -> list[bool]:
    """Which inputs of `jaxpr` those of its outputs reach that are wanted."""
    wanted = {v for v, is_wanted in zip(jaxpr.outvars, outs, strict=True) if is_wanted and not _is_literal(v)}
    for eqn in reversed(jaxpr.eqns):
        flags = [v in wanted and _is_differentiable(v.aval) for v in eqn.outvars]
        if any(flags) and eqn.primitive.name != "stop_gradient":
            pairs = zip(eqn.invars, _reaches(eqn, flags), strict=True)
            wanted |= {v for v, is_wanted in pairs if is_wanted and not _is_literal(v)}
    return [v in wanted for v in jaxpr.invars]


def _reaches(eqn: Any, outs: list[bool]) -> list[bool]:
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS and _CALLS[name] in params:
        return _inputs(_open(params[_CALLS[name]]), outs)
    if name == "cond":
        branches = [_inputs(_open(branch), outs) for branch in params["branches"]]
        return [False, *(any(flags) for flags in zip(*branches, strict=True))]
    if name == "scan":
        num_consts, num_carry = params["num_consts"], params["num_carry"]
        carry, ys = outs[:num_carry], outs[num_carry:]
        while True:  # what a step's carry needs, the step before must have given
            flags = _inputs(_open(params["jaxpr"]), [*carry, *ys])
            again = [a or b for a, b in zip(carry, flags[num_consts : num_consts + num_carry], strict=True)]
            if again == carry:
                return flags
            carry = again
    return [True] * len(eqn.invars)


def _open(program: Any) -> Any:
    return getattr(program, "jaxpr", program)


def _is_literal(atom: Any) -> bool:
    return isinstance(atom, jex.Literal)


def _is_differentiable(aval: Any) -> bool:
    return not hasattr(aval, "dtype") or jnp.issubdtype(aval.dtype, jnp.inexact)


_MSG_UNREACHED = (
    "The loss does not depend on {paths}: no example has a gradient there, and every step adds noise there all the same, so that {they} "
    "away. Do not train {them}: `filter_spec=eqx.tree_at(lambda m: {where}, jax.tree.map(eqx.is_inexact_array, model), {falses})`, "
    "or use {them} in the loss."
)

# Of which losses the leaves were named. Weakly, since a loss may close over a model.
_NAMED: "weakref.WeakKeyDictionary[Any, set[tuple[str, ...]]]" = weakref.WeakKeyDictionary()


def watched(loss: PerExampleLoss, source: Any) -> PerExampleLoss:
    """The loss, traced to a program first, in which leaves that it does not reach are found and named: once for each `source`, what the user wrote.

    The loss itself is traced no more often than without.
    """

    def run(params: Params, example: Any) -> tuple[Array, PyTree]:
        leaves, treedef = jax.tree.flatten((params, example))
        flat = lambda *leaves: loss(*treedef.unflatten(leaves))
        closed, struct = jax.make_jaxpr(flat, return_shape=True)(*leaves)
        _name(source, unreached_paths(closed, params))
        return jax.tree.unflatten(jax.tree.structure(struct), jex.jaxpr_as_fun(closed)(*leaves))

    return run


def unreached_leaves(loss: PerExampleLoss, params: Params, examples: Examples) -> tuple[str, ...]:
    """The paths of the leaves of `params` that the loss of one example does not reach."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), examples)
    return unreached_paths(jax.make_jaxpr(loss)(params, one), params)


def unreached_paths(closed: Any, params: Params) -> tuple[str, ...]:
    """The paths of those leaves of `params`, the first inputs of the program, that its first output does not reach."""
    paths = leaf_paths(params)
    return tuple(paths[i] for i in unreached(_open(closed), len(paths)))


def _name(source: Any, paths: tuple[str, ...]) -> None:
    """Warns of these leaves, unless the same ones of the same loss have been named."""
    for key in _keys(source):
        try:
            known = _NAMED.setdefault(key, set())
        except TypeError:  # cannot be referred to weakly
            continue
        if paths in known or not paths:
            return
        known.add(paths)
        break
    if paths:
        several = len(paths) > 1
        shown = ", ".join(f"`{path}`" for path in paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
        where = f"({', '.join(f'm{path}' for path in paths[:8])})" if several else "m" + "".join(paths)
        words = {"they": "they walk" if several else "it walks", "them": "them" if several else "it"}
        falses = f"({', '.join(['False'] * min(len(paths), 8))})" if several else "False"
        warnings.warn(_MSG_UNREACHED.format(paths=shown, where=where, falses=falses, **words), stacklevel=2)


def _keys(source: Any) -> Iterator[Any]:
    """What a loss is recognised by: the function, in whatever wraps it; else its type."""
    for _ in range(8):
        inner = getattr(source, "__func__", None) or getattr(source, "func", None) or getattr(source, "loss", None)
        if not callable(inner):
            break
        source = inner
    yield source if not isinstance(source, eqx.Module) else type(source)
    yield type(source)
