"""Which clip group a parameter belongs to: by the path that leads to it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._checks import is_traced, positive_scalar
from .._rounding_up import ROOT_UP
from .._tree import path_str
from .._types import Params, RealScalarLike
from ._flat import norm_scalar

KeyPath = tuple[Any, ...]


class Grouping(eqx.Module):
    """The partition of a model's trainable leaves into clip groups.

    **Arguments:**

    - `call`: the constructor, as its caller typed it, for messages.
    - `prefixes`: paths, none of which leads to another; a leaf belongs to the group of the path that leads to it.
    - `groups`: the group of each path, numbered from zero without gaps.
    """

    call: str = eqx.field(static=True)
    prefixes: tuple[KeyPath, ...] = eqx.field(static=True)
    groups: tuple[int, ...] = eqx.field(static=True)

    def labels(self, params: Params) -> tuple[int, ...]:
        """The group of each leaf of `params`; raises unless every leaf has one and every path leads to a leaf."""
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        owner = {prefix: group for prefix, group in zip(self.prefixes, self.groups, strict=True)}
        used, labels = set(), []
        for path in paths:
            prefix = next((path[:n] for n in range(len(path) + 1) if path[:n] in owner), None)
            if prefix is None:
                raise ValueError(
                    f"`{self.call}` must be a prefix of the model's tree, and differs from it at `{path_str(path)}`: the model has a trainable leaf "
                    f"there, the norms have {self._nearest(path)}. Give a norm to it or to what it is part of."
                )
            used.add(prefix)
            labels.append(owner[prefix])
        unused = [prefix for prefix in self.prefixes if prefix not in used]
        if unused:
            raise ValueError(
                f"`{self.call}` must be a prefix of the tree of what is trained, and differs from it at `{path_str(unused[0])}`: a norm is "
                "there, and the model trains nothing there. Leave it out (None), or make the norms from `eqx.filter(model, filter_spec)`."
            )
        return tuple(labels)

    def _nearest(self, path: KeyPath) -> str:
        below = [path_str(p) for p in self.prefixes if p[: len(path)] == path]
        return f"{', '.join(below[:3])} inside it" if below else "none"


class SplitNorm(eqx.Module):
    """Norms of groups that are not a tree prefix.

    **Arguments:**

    - `values`: the norm of each group.
    - `grouping`: the groups.
    """

    values: list[Float[Array, ""]]
    grouping: Grouping


def parse_norms(call: str, norms: PyTree) -> tuple[list[Float[Array, ""]], Grouping]:
    """The norms of a tree prefix, one a group, as float32 scalars; and the grouping."""
    if isinstance(norms, SplitNorm):
        return norms.values, norms.grouping
    leaves = jax.tree_util.tree_leaves_with_path(norms)
    if not leaves:
        raise ValueError(f"`{call}` contains no norm.")
    values = []
    for path, leaf in leaves:
        is_number = eqx.is_array_like(leaf) and np.shape(leaf) == ()
        if not is_number:
            raise ValueError(
                f"`{call}` must have a number for each group, the bound on that group's norm; got {_described(leaf)} at `{path_str(path)}`. For one "
                "norm for each layer of a model use `GroupClipping.per_layer(model, norm)`."
            )
        where = call if path == () else call.replace("=...", f"...{path_str(path)}=...")
        values.append(norm_scalar(where, leaf))
    return values, Grouping(call, tuple(path for path, _ in leaves), tuple(range(len(leaves))))


def split_norm(
    call: str, model: PyTree, norm: RealScalarLike, filter_spec: PyTree, name: Callable[[KeyPath], KeyPath]
) -> SplitNorm:
    """A norm split equally between groups: the trainable leaves whose paths have the same `name`."""
    positive_scalar(f"{call}(norm=...)", norm)
    total = norm if is_traced(norm) else float(np.asarray(norm))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(eqx.filter(model, filter_spec))]
    if not paths:
        raise ValueError(f"`{call}(model)`: `filter_spec` selects no leaf of the model.")
    names = list(dict.fromkeys(map(name, paths)))
    grouping = Grouping(f"{call}(model)", tuple(paths), tuple(names.index(name(path)) for path in paths))
    share = norm_scalar(f"{call}(norm=...) / sqrt({len(names)} groups)", total / np.float32(np.sqrt(len(names))))
    return SplitNorm([share] * len(names), grouping)


def total_norm(norms: Float[Array, " groups"]) -> Float[Array, ""]:
    """The norm of a gradient whose groups have these norms, rounded up."""
    largest = jnp.max(norms)  # or the squares of small norms underflow
    return largest * jnp.sqrt(jnp.sum((norms / largest) ** 2)) * ROOT_UP if norms.shape[0] > 1 else norms[0]


def layer(path: KeyPath) -> KeyPath:
    """The module that directly holds a leaf."""
    return path[:-1]


def block(path: KeyPath) -> KeyPath:
    """The element of the outermost list that a leaf is part of, such as `.layers[3]`; else the model's field."""
    for n, key in enumerate(path):
        if isinstance(key, jax.tree_util.SequenceKey | jax.tree_util.DictKey):
            return path[: n + 1]
    return path[:1]


def _described(leaf: Any) -> str:
    return f"an array of shape {leaf.shape}" if eqx.is_array(leaf) else repr(leaf)
