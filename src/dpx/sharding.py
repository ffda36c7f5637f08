"""Sharding: device code never names a mesh axis, it follows the shardings of its inputs."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Key, PyTree, Shaped, UInt32

from ._tree import wide_dtype
from .random import Law, draw, laplace_from_words, normal_from_words


def _has_explicit_axes() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and all(kind is AxisType.Explicit for kind in mesh.axis_types)


def shard(tree: PyTree[Array], spec: PartitionSpec) -> PyTree[Array]:
    """Lays every leaf of `tree` out by `spec`, on the mesh in scope; does nothing where there is none.

    Portable where `equinox.filter_shard` and `jax.reshard` are not: the first asserts under explicit axes (JAX's default), the
    second does nothing under auto axes.

    **Arguments:**

    - `tree`: arrays.
    - `spec`: a partition spec whose axes exist in the mesh set by `jax.set_mesh`.

    **Returns:**

    The same values, laid out. Under auto axes call it inside `jit`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    if _has_explicit_axes():
        return jax.reshard(tree, spec)
    return jax.lax.with_sharding_constraint(tree, spec)


def batch_axis(tree: PyTree[Array]) -> Any:
    """The mesh axis (a name, a tuple of names, or None) over which the leading axis of `tree`'s leaves is explicitly sharded."""
    if not _has_explicit_axes():
        return None
    for leaf in jax.tree.leaves(tree):
        spec = jax.typeof(leaf).sharding.spec
        if len(spec) > 0 and spec[0] is not None:
            return spec[0]
    return None


def axis_size(axis: Any) -> int:
    """Number of devices along a mesh axis, or along a tuple of them."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[name] for name in (axis if isinstance(axis, tuple) else (axis,)))


def shard_batch(tree: PyTree[Array], axis: Any) -> PyTree[Array]:
    """Shards the leading axis of every leaf over the explicit mesh axis `axis` (from `batch_axis`); None does nothing."""
    if axis is None:
        return tree

    def one(x):
        rest = tuple(jax.typeof(x).sharding.spec)[1:]
        return jax.reshard(x, PartitionSpec(axis, *rest))

    return jax.tree.map(one, tree)


def off_batch_axis(params: PyTree[Array], axis: Any) -> PyTree[Array]:
    """Gathers the parameters that are sharded over the batch's own mesh axis (FSDP), which `vmap` over the batch cannot cross."""
    if axis is None:
        return params
    names = set(axis) if isinstance(axis, tuple) else {axis}

    def one(x):
        spec = jax.typeof(x).sharding.spec
        kept = tuple(None if names & (set(s) if isinstance(s, tuple) else {s}) else s for s in spec)
        return x if kept == tuple(spec) else jax.reshard(x, PartitionSpec(*kept))

    return jax.tree.map(one, params)


def like(x: Array, reference: Array) -> Array:
    """`x` laid out as `reference` is, where axes are explicit."""
    return jax.reshard(x, jax.typeof(reference).sharding.spec) if _has_explicit_axes() else x


def normal_like(key: Key[Array, ""], x: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Standard normal noise with the shape, dtype and sharding of `x`; float32 where `x` is narrower. Its tails reach 9.08, either way.

    Each device draws its own shard, without communication, and the numbers are those that one device would draw.
    """
    return _draw_like(normal_from_words, key, x)


def laplace_like(key: Key[Array, ""], x: Shaped[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Laplace noise of scale 1, in the same way. Its tails reach 43.67."""
    return _draw_like(laplace_from_words, key, x)


def _draw_like(law: Law, key: Key[Array, ""], x: Array) -> Array:
    draw_one = functools.partial(draw, law, shape=x.shape, dtype=wide_dtype(x.dtype))
    sharding = _explicit(x)
    if sharding is None:
        return draw_one(key)
    # inside, all axes are auto: the layout of the result decides where its words are made
    placed: Any = jax.sharding.auto_axes(draw_one, axes=sharding.mesh.explicit_axes, out_sharding=sharding)
    return placed(key)


def bits_like(key: Key[Array, ""], x: Shaped[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """32 random bits for every number of `x`, in the same way."""
    return jr.bits(key, x.shape, jnp.uint32, out_sharding=_explicit(x))


def _explicit(x: Array) -> Any:
    return jax.typeof(x).sharding if _has_explicit_axes() else None
