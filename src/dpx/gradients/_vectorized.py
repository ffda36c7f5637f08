"""`vmap` of the gradient: the reference that every other method is compared with."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from .._checks import positive_int
from .._norms import at_most, grouped_norms, norms_of, settle
from .._tree import leaf_paths, weighted, weighted_sum
from .._types import Examples, FactorsFromNorms, Integer, Params, PerExampleLoss, Quantise
from ._base import AbstractGradientMethod, ClippedSum, LeafPlan, clip_weights
from ._microbatch import in_microbatches


class Vectorized(AbstractGradientMethod):
    """Materialises one gradient per example with `jax.vmap(jax.grad(loss))`, clips each, and sums.

    Right for every loss. Its memory is that of `microbatch_size` gradients.

    **Arguments:**

    - `microbatch_size`: how many examples are differentiated at once; by default all. One that does not divide the batch is
        padded; a microbatch of padding alone is skipped.
    """

    microbatch_size: int | None = eqx.field(static=True)

    def __init__(self, microbatch_size: Integer | None = None):
        name = "Vectorized(microbatch_size=...)"
        self.microbatch_size = None if microbatch_size is None else positive_int(name, microbatch_size)

    def clipped_sum(
        self,
        loss: PerExampleLoss,
        params: Params,
        examples: Examples,
        mask: Bool[Array, " batch"],
        labels: tuple[int, ...],
        order: int,
        factors: FactorsFromNorms,
        quantise: Quantise | None = None,
    ) -> ClippedSum:
        def value(params, example):
            out, aux = loss(params, example)
            return out, (out, aux)

        def compute(examples, mask):
            grads, (losses, aux) = jax.vmap(jax.grad(value, has_aux=True), in_axes=(None, 0))(params, examples)
            # what is measured must be what is added up, to the last bit
            grads = settle(grads, (params, examples, mask))
            leaves, treedef = jax.tree.flatten(grads)
            found = norms_of(leaves, order)
            norms = grouped_norms(found, labels, order)
            at_least = [at_most(norm, g.shape[1:], order) for norm, g in zip(found, leaves, strict=True)]
            safe = grouped_norms(at_least, labels, order)
            weights, keep, bounds = clip_weights(safe, mask, factors)
            # an example that is dropped is seen to be
            norms = jnp.where(jnp.isfinite(safe), norms, safe)
            if quantise is None:
                sums = [weighted_sum(g, weights[:, :, label], keep) for g, label in zip(leaves, labels, strict=True)]
            else:
                terms = [weighted(g, weights[:, :, label], keep) for g, label in zip(leaves, labels, strict=True)]
                sums = [jnp.sum(v, axis=0, dtype=jnp.int32) for v in quantise(terms)]
            return ClippedSum(jax.tree.unflatten(treedef, sums), norms, losses, aux, bounds)

        return in_microbatches(compute, examples, mask, self.microbatch_size)

    def explain(self, loss: PerExampleLoss, params: Params, examples: Examples) -> tuple[LeafPlan, ...]:
        del loss
        batch = jax.tree.leaves(examples)[0].shape[0]
        held = min(batch, self.microbatch_size or batch)

        def row(path, leaf):
            size = int(np.prod(leaf.shape))
            memory = held * size * jnp.dtype(leaf.dtype).itemsize
            return LeafPlan(path, leaf.shape, "one gradient per example", 4 * batch * size, memory)

        return tuple(row(path, leaf) for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True))
