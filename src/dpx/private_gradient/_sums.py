"""The clipped sum of a problem, and what is published of a noisy one."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, PyTree

from .._checks import is_traced
from .._tree import wide_dtype
from .._types import Params
from ..clipping import AbstractClipping
from ..gradients import AbstractGradientMethod, ClippedSum, watched
from ..mechanism import Mechanism
from ..problem import Problem
from ..sharding import like


def clipped(
    problem: Problem, source: Any, method: AbstractGradientMethod, mechanism: Mechanism, clipping_state: PyTree
) -> tuple[ClippedSum, Array]:
    """The clipped sum, laid out as the model is, and which examples are real; of an empty batch, no example.

    Warns of trained leaves that `source`, the loss as the user wrote it, does not depend on.
    """
    clipping, params, mask = mechanism.clipping, problem.params, problem.mask
    labels, order = clipping.labels(params), clipping.order
    rounding = mechanism.rounding(params, mask.shape[0])
    tightened = (lambda norms: norms) if rounding is None else rounding.tightened
    options = {} if rounding is None else {"quantise": rounding.quantise}
    factors = lambda norms: clipping.factors(tightened(norms), clipping_state)
    loss = watched(problem.loss, source)
    out = method.clipped_sum(loss, params, problem.examples, mask, labels, order, factors, **options)
    total = jax.tree.map(like, out.total, problem.trained)
    rows: Any = (out.norms, out.losses, out.aux, out.bounds)
    if problem.size == 0:
        rows, mask = jax.tree.map(lambda x: x[:0], (rows, mask))
    return ClippedSum(total, *rows), mask


def rescaled(clipping: AbstractClipping, total: Params, clipping_state: PyTree, power: int = 1) -> Params:
    """A sum, each group multiplied by the clipping's public number (to a power: 2 for variances)."""
    rescale = clipping.rescale(clipping_state)
    if rescale is None:
        return total
    leaves, treedef = jax.tree.flatten(total)
    pairs = zip(leaves, clipping.labels(total), strict=True)
    return jax.tree.unflatten(treedef, [x * rescale[g].astype(x.dtype) ** power for x, g in pairs])


def published(
    clipping: AbstractClipping, noisy: Params, clipping_state: PyTree, normalizer: Float[Array, ""], power: int = 1
) -> Params:
    """The same, divided by the normalizer: what a step returns."""
    sums = rescaled(clipping, noisy, clipping_state, power)
    return jax.tree.map(lambda x: x / normalizer.astype(x.dtype) ** power, sums)


def struct_of_sum(x: Array) -> jax.ShapeDtypeStruct:
    """Shape, dtype and layout of the sum of gradients with respect to `x`."""
    x = jnp.asarray(x)
    # under auto axes only an array itself knows how it is laid out, not its type
    is_laid_out = not is_traced(x) and isinstance(x.sharding, NamedSharding)
    return jax.ShapeDtypeStruct(
        x.shape, wide_dtype(x.dtype), sharding=x.sharding if is_laid_out else jax.typeof(x).sharding
    )
