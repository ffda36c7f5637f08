r"""Norms that are never smaller than what they are norms of, whatever the data and however the compiler adds up.

With $u = 2^{-24}$, half a unit in the last place of float32. Everything here is proven from two facts alone: an operation of float32 is
exact up to a relative $u$ (or, where it underflows, an absolute $2^{-126}$), and a compiler may add up the numbers of one `reduce` in any
order, whose error is at most $(n - 1) u$ times the sum of their absolute values. The derivation is in docs/ghost.md.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Inexact, Int, PyTree

from ._tree import pairwise_sum, wide

UNIT = 2.0**-24
# At most so many numbers are added up in an order that the compiler chooses.
_GROUP = 1024
# So many slices are added up at once, in an order that is written down.
_SLICES = 16
# Squares of a gradient that overflow are computed again, of the gradient divided by two to this power.
_DOWN = 80
_NO_POWER = 2000


def ordered_sum(
    x: Inexact[Array, "..."], axes: tuple[int, ...], of: Callable[[Array], Array] = lambda x: x, group: int = _GROUP
) -> Float[Array, "..."]:
    r"""$\sum \mathrm{of}(x)$ over `axes`, in at least float32, with a relative error of at most `additions(...)` $u$ for terms of one sign.

    Long axes are folded by adding up slices, which no compiler reorders. What is left is summed in groups of at most `group` numbers.
    """
    x = wide(x)
    axes = tuple(sorted(axis % x.ndim for axis in axes))
    long = [axis for axis in axes if x.shape[axis] > group]
    spec = None if jax.typeof(x).sharding.mesh.empty else tuple(jax.typeof(x).sharding.spec)
    if spec is not None and any(spec[axis] is not None for axis in long):
        # slices of a sharded axis are ambiguous under explicit axes: the compiler places them
        kept = PartitionSpec(*(name for axis, name in enumerate(spec) if axis not in axes))
        function: Any = jax.sharding.auto_axes(
            functools.partial(_ordered, axes=axes, of=of, group=group), out_sharding=kept
        )
        return function(x)
    return _ordered(x, axes, of, group)


def _ordered(x: Array, axes: tuple[int, ...], of: Callable[[Array], Array], group: int) -> Array:
    for axis in axes:
        while (length := x.shape[axis]) > group:
            slices = min(_SLICES, -(-length // group))
            size = -(-length // slices)
            parts = [lax.slice_in_dim(x, k, min(k + size, length), axis=axis) for k in range(0, length, size)]
            parts = [of(part) for part in parts]
            if (missing := size - parts[-1].shape[axis]) > 0:
                parts[-1] = jnp.pad(parts[-1], [(0, missing if k == axis else 0) for k in range(x.ndim)])
            x, of = pairwise_sum(parts), lambda x: x
    x = of(x)
    for stage in _stages(tuple(x.shape[axis] for axis in axes), group):
        # the barrier keeps two sums from becoming one long one
        x = lax.optimization_barrier(jnp.sum(x, axis=tuple(axes[k] for k in stage), keepdims=True))
    return x.reshape(tuple(n for axis, n in enumerate(x.shape) if axis not in axes))


def _stages(lengths: tuple[int, ...], group: int) -> list[list[int]]:
    """Which axes are summed at once, the last first: neighbours of a product of at most `group`."""
    stages: list[list[int]] = []
    product = math.inf
    for k in reversed(range(len(lengths))):
        if product * max(1, lengths[k]) <= group:
            stages[-1].append(k)
            product *= max(1, lengths[k])
        else:
            stages.append([k])
            product = max(1, lengths[k])
    return stages


def additions(lengths: tuple[int, ...], group: int = _GROUP) -> int:
    """How many additions a term meets in `ordered_sum` over axes of these lengths, at most: its rounding error in units of `UNIT`."""
    number, left = 0, []
    for length in lengths:
        while length > group:
            slices = min(_SLICES, -(-length // group))
            length = -(-length // slices)
            number += (slices - 1).bit_length()
        left.append(length)
    return number + sum(max(0, math.prod(left[k] for k in stage) - 1) for stage in _stages(tuple(left), group))


Cores = dict[int, tuple[Array, Array, Callable[[Array], Array]]]
"""By the `id` of an array that only repeats a smaller one: itself, the smaller one, and what makes the array of it, without arithmetic."""


def settle(tree: PyTree, inputs: PyTree, cores: Cores | None = None) -> PyTree:
    """The same numbers, in memory: whoever reads them from here on reads the same bits.

    A compiler may compute a value once for each of its readers, and differently: with a fused multiply-add here and without one there, $ab - c$
    is once zero and once a rounding error. What is measured would then not be what is added up. No compiler sees through a loop whose
    number of turns (none) it does not know.

    `inputs` is what the numbers were computed from. As long as a compiler does not know all of it, it does not know the number of turns. Of leaves
    with `cores` those are kept in memory, and repeated by whoever reads them.
    """
    leaves, treedef = jax.tree.flatten(tree)
    inexact = [k for k, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact) and x.size]
    firsts = [_first_is_zero(x) for x in jax.tree.leaves(inputs) if isinstance(x, jax.Array) and x.size]
    if not inexact or not firsts:
        return tree
    # what a weight's product and its bias have in common, the cotangents, stays one array
    cores = cores or {}
    # a core holds its array, so that no other array can have come to that id
    kept = {id(leaves[k]): cores.get(id(leaves[k]), (leaves[k], leaves[k], lambda x: x)) for k in inexact}
    distinct = list({id(core): core for _, core, _ in kept.values()}.values())
    # a count is never negative, but that is not for the compiler to know
    count = jnp.sum(jnp.stack(firsts).astype(jnp.int32))
    turn = lambda carry: (carry[0] + 1, [-x for x in carry[1]])
    _, settled = lax.while_loop(lambda carry: carry[0] < 0, turn, (count, distinct))
    found = dict(zip(map(id, distinct), settled, strict=True))
    again = {number: repeat(found[id(core)]) for number, (_, core, repeat) in kept.items()}
    return jax.tree.unflatten(treedef, [again.get(id(x), x) for x in leaves])


def _first_is_zero(x: Array) -> Bool[Array, ""]:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jr.key_data(x)

    def first(x):
        one = lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())
        return one == jnp.zeros((), x.dtype)

    sharding = jax.typeof(x).sharding
    if all(name is None for name in sharding.spec):
        return first(x)
    # a slice of a sharded axis is ambiguous under explicit axes
    function: Any = jax.sharding.auto_axes(first, out_sharding=PartitionSpec())
    return function(x)


def norms_of(arrays: list[Inexact[Array, "batch ..."]], order: int) -> list[Float[Array, " batch"]]:
    r"""The norm of each example's slice of each array; infinite or NaN only if the norm itself exceeds the largest float32.

    Squares overflow long before; then they are computed again from numbers scaled down. `at_most` makes a bound of it.
    """
    axes = lambda x: tuple(range(1, x.ndim))
    if not arrays:
        return []
    if order == 1:
        return [ordered_sum(x, axes(x), jnp.abs).astype(jnp.float32) for x in arrays]
    plain = [jnp.sqrt(ordered_sum(x, axes(x), jnp.square)).astype(jnp.float32) for x in arrays]

    # of a sum, which costs one kernel: it may overflow where no norm did, which costs time and nothing else
    overflows = jnp.any(~jnp.isfinite(pairwise_sum(plain)))
    # powers that the compiler knew it would square, and the numbers too, which is what overflowed
    power = jnp.where(overflows, -_DOWN, 0)
    down, up = (times_power(jnp.ones(()), p) for p in (power, -power))

    def again():
        def one(x, norm):
            # squares of small numbers underflow there; from float64 a norm may be beyond float32, and is infinite then
            scaled = ordered_sum(x, axes(x), lambda part: jnp.square(part * down.astype(part.dtype)))
            return jnp.where(jnp.isfinite(norm), norm, (jnp.sqrt(scaled) * up.astype(x.dtype)).astype(jnp.float32))

        return [one(wide(x), norm) for x, norm in zip(arrays, plain, strict=True)]

    return lax.cond(overflows, again, lambda: plain)


def at_most(norm: Float[Array, " batch"], shape: tuple[int, ...], order: int) -> Float[Array, " batch"]:
    """An upper bound of the norm of numbers of this shape, from what `norms_of` found: with its rounding, and squares that underflowed."""
    if order == 1:
        return norm * (1 + additions(shape) * UNIT)
    return norm * rounded(shape) + math.sqrt(math.prod(shape)) * 2.0**-62


def rounded(shape: tuple[int, ...]) -> float:
    """By how much a norm of numbers of this shape may be too small, as a factor."""
    return 1 + (additions(shape) / 2 + 3) * UNIT


def combined(norms: list[Float[Array, " batch"]], order: int) -> Float[Array, " batch"]:
    """The norm of what has these norms, without overflow."""
    if len(norms) == 1:
        return norms[0]
    if order == 1:
        return pairwise_sum(norms)
    largest = functools.reduce(jnp.maximum, norms)
    shift = exponent(largest, ())
    squares = [jnp.square(times_power(n, -shift)) for n in norms]
    return times_power(jnp.sqrt(pairwise_sum(squares)), shift)


def grouped_norms(
    values: list[Float[Array, " batch"]], labels: tuple[int, ...], order: int
) -> Float[Array, "batch groups"]:
    """The norms of groups, from those of leaves and the group of each leaf; groups are numbered from zero without gaps."""
    groups = [[v for v, g in zip(values, labels, strict=True) if g == group] for group in range(max(labels) + 1)]
    return jnp.stack([combined(group, order) for group in groups], axis=1)


def exponent(x: Float[Array, "..."], axes: tuple[int, ...]) -> Int[Array, "..."]:
    r"""$\lfloor \log_2 \max |x| \rfloor$ over `axes`, kept within [-126, 126]; a number below -500 for zero, however many powers are added to it."""
    largest = jnp.max(jnp.abs(x), axis=axes, initial=0) if axes else jnp.abs(x)
    # anything beyond float32 is infinite there, and so are its norms
    largest = largest.astype(jnp.float32)
    bits = lax.bitcast_convert_type(largest, jnp.int32)
    return jnp.where(largest == 0, -_NO_POWER, jnp.clip((bits >> 23) - 127, -126, 126))


def times_power(x: Float[Array, "..."], power: Int[Array, "..."]) -> Float[Array, "..."]:
    r"""$x 2^p$ for $p$ clipped to [-126, 126], exact unless it underflows; $x$ for the power of zero.

    That is no nicety: of a zero that the compiler knows it computes the square of the product as $0^2 (2^{126})^2$, which is NaN.
    """
    power = jnp.where(jnp.abs(power) > 500, 0, jnp.clip(power, -126, 126))
    scale = lax.bitcast_convert_type((power + 127) << 23, jnp.float32)
    return x * scale.astype(x.dtype)
