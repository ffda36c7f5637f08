"""The interface of gradient methods: how the sum of clipped gradients is computed, never what it is."""

import abc

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from .._norms import exponent, times_power
from .._rounding_up import NORM_UP
from .._types import Examples, FactorsFromNorms, Params, PerExampleLoss, Quantise

# Clip norms are below 2**50.
_LONGEST = 60


class ClippedSum(eqx.Module):
    r"""What a gradient method returns: nothing in here is private yet.

    **Arguments:**

    - `total`: $\sum_i w_{i,g(\ell)} \nabla_\ell L_i$ for each trainable leaf $\ell$ of group $g(\ell)$; float32 (float64 for float64 leaves).
    - `norms`: norm of each example's unclipped gradient in each group, shape `(batch, groups)`; infinite or NaN where it is.
    - `losses`: the loss of each example, shape `(batch,)`.
    - `aux`: the auxiliary output of the loss, stacked on a leading axis.
    - `bounds`: of each example's gradient in each group, what clip factors were made of: never smaller than its norm, and infinite for an example
        that contributes zero. None from a method that does not say: then nothing can be learnt from slack.
    """

    total: Params
    norms: Float[Array, "batch groups"]
    losses: Float[Array, " batch"]
    aux: PyTree
    bounds: Float[Array, "batch groups"] | None = None


class LeafPlan(eqx.Module):
    """How one parameter leaf's clipped gradient is computed, for `PrivateGradient.explain`.

    **Arguments:**

    - `path`: where the leaf is in the model.
    - `shape`: its shape.
    - `rule`: the name of the rule by which its per-example norms are found; `"frozen"` if it is not trained.
    - `flops`: floating-point operations of norms and clipped sum, for the whole batch, beyond ordinary backpropagation.
    - `memory`: bytes held for it at once, beyond ordinary backpropagation.
    """

    path: str = eqx.field(static=True)
    shape: tuple[int, ...] = eqx.field(static=True)
    rule: str = eqx.field(static=True)
    flops: int = eqx.field(static=True)
    memory: int = eqx.field(static=True)


class AbstractGradientMethod(eqx.Module):
    """Computes sums of clipped per-example gradients.

    A method is a choice of speed and memory only: every method returns the same numbers, up to floating-point rounding.
    """

    @abc.abstractmethod
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
        r"""The sum over examples of clipped gradients.

        **Arguments:**

        - `loss`: `(params, example) -> (scalar, aux)` for one example.
        - `params`: trainable leaves, `None` elsewhere.
        - `examples`: the batch; its leading axis has length at least 1. Per-example PRNG keys may be among the leaves.
        - `mask`: True for real examples; a masked example contributes exactly zero whatever it contains.
        - `labels`: for each leaf of `params`, in flattening order, the clip group that it belongs to.
        - `order`: norms are $\ell_1$ (1) or $\ell_2$ (2).
        - `factors`: clip factors from finite norms. An example with a non-finite norm in any group contributes exactly zero.
        - `quantise`: rounds each example's clipped contribution to integers before they are added up; `total` is then int32, and exact.
        """

    @abc.abstractmethod
    def explain(self, loss: PerExampleLoss, params: Params, examples: Examples) -> tuple[LeafPlan, ...]:
        """One row for each leaf of `params`, in flattening order, from shapes alone."""


def clip_weights(
    norms: Float[Array, "batch groups"], mask: Bool[Array, " batch"], factors: FactorsFromNorms
) -> tuple[Float[Array, "2 batch groups"], Bool[Array, " batch"], Float[Array, "batch groups"]]:
    """Weights of every (example, group), as two factors, which examples are kept, and bounds of their norms; a masked or non-finite example has
    weight zero and infinite bounds.

    `norms` are upper bounds of what will be added up. They are inflated by the rounding that is left, so that what factors made of them let
    through obeys the bound exactly.

    The first factor is a power of two, by which gradients longer than any clip norm are shortened before they are clipped: a weight of
    theirs would underflow. The result is another gradient of the same direction, clipped.

    Multiplying by a zero weight is not enough to remove an example, since `0 * inf` is NaN: select by the second output.
    """
    keep = mask & jnp.all(jnp.isfinite(norms), axis=1)
    column = keep[:, None]
    norms = jnp.where(column, norms, 0)
    shorten = jnp.minimum(0, _LONGEST - exponent(norms, ()))
    bounds = times_power(norms, shorten) * NORM_UP
    weights = factors(bounds)
    powers = times_power(jnp.ones_like(norms), shorten)
    return jnp.where(column[None], jnp.stack([powers, weights]), 0), keep, jnp.where(column, bounds, jnp.inf)
