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


def pairwise_sum(values: list[Float[Array, "*shape"]]) -> Float[Array, "*shape"]:
    """Sums by halves: the rounding of thousands of terms grows with the logarithm of their number, not with the number."""
    while len(values) > 1:
        rest = values[len(values) // 2 * 2 :]
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=False)] + rest
    return values[0]


def expand_like(column: Array, x: Array) -> Array:
    """`column`, of shape `(batch,)`, with the unit axes that make it broadcast against `x`."""
    return column.reshape(column.shape + (1,) * (x.ndim - 1))


def weighted(
    x: Inexact[Array, "..."], weights: Float[Array, "2 batch"], keep: Bool[Array, " batch"], axis: int = 0
) -> Array:
    """Each example, along `axis`, times the two factors of its weight, in float32 or wider; zero, whatever it contains, for one that is not kept.

    Written once, so that readers of one array share what it becomes.
    """
    x = wide(x)
    along = lambda column: jnp.expand_dims(column, tuple(k for k in range(x.ndim) if k != axis))
    first, second = (along(w.astype(x.dtype)) for w in weights)
    # a weight above one may make infinite what is then multiplied by zero
    limit = jnp.finfo(x.dtype).max
    # where, rather than weight = 0, because 0 * inf == nan
    return jnp.where(along(keep), jnp.clip(x * first * second, -limit, limit), jnp.zeros((), x.dtype))


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
