"""Norms and sums over trees, always accumulated in float32 or wider."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, PyTree


def wide_dtype(dtype: Any) -> Any:
    """float32 for half precision, otherwise the dtype itself."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def wide(x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
    """`x` in at least float32: thousands of squares summed in bfloat16 lose three quarters of the norm."""
    return x.astype(wide_dtype(x.dtype))


def per_example_power(x: Inexact[Array, "batch ..."], order: int) -> Float[Array, " batch"]:
    r"""$\sum |x|^p$ of each example's slice, $p$ = `order` in {1, 2}; as float32."""
    x = wide(x)
    power = jnp.abs(x) if order == 1 else x * x
    return jnp.sum(power, axis=tuple(range(1, x.ndim))).astype(jnp.float32)


def root(power: Float[Array, "*shape"], order: int) -> Float[Array, "*shape"]:
    """The norm whose `order`-th power is given."""
    return power if order == 1 else jnp.sqrt(power)


def pairwise_sum(values: list[Float[Array, "*shape"]]) -> Float[Array, "*shape"]:
    """Sums by halves: the rounding of thousands of terms grows with the logarithm of their number, not with the number."""
    while len(values) > 1:
        rest = values[len(values) // 2 * 2 :]
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=False)] + rest
    return values[0]


def grouped(values: list[Float[Array, " batch"]], labels: tuple[int, ...]) -> Float[Array, "batch groups"]:
    """Sums the values of the leaves with the same label; groups are numbered from zero without gaps."""
    groups = [[v for v, g in zip(values, labels, strict=True) if g == group] for group in range(max(labels) + 1)]
    return jnp.stack([pairwise_sum(group) for group in groups], axis=1)


def expand_like(column: Array, x: Array) -> Array:
    """`column`, of shape `(batch,)`, with the unit axes that make it broadcast against `x`."""
    return column.reshape(column.shape + (1,) * (x.ndim - 1))


def weighted(x: Inexact[Array, "batch *p"], weights: Float[Array, "2 batch"], keep: Bool[Array, " batch"]) -> Array:
    """Each example times the two factors of its weight, in float32 or wider; zero, whatever it contains, for one that is not kept."""
    x = wide(x)
    first, second = (expand_like(w.astype(x.dtype), x) for w in weights)
    # where, rather than weight = 0, because 0 * inf == nan
    return jnp.where(expand_like(keep, x), x * first * second, jnp.zeros((), x.dtype))


def weighted_sum(x: Inexact[Array, "batch *p"], weights: Float[Array, "2 batch"], keep: Bool[Array, " batch"]) -> Array:
    """The sum over examples of `weighted`: examples that are not kept are left out whatever they contain."""
    return jnp.sum(weighted(x, weights, keep), axis=0)


def is_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number in the inexact leaves of `tree` is finite."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    if not leaves:
        return jnp.array(True)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def path_str(path: tuple[Any, ...]) -> str:
    """A leaf's path as one would type it, such as `.layers[0].weight`."""
    return jax.tree_util.keystr(path) or "(the model itself)"


def leaf_paths(tree: PyTree) -> list[str]:
    """The path of every leaf of `tree`, in flattening order."""
    return [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
