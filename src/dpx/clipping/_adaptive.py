"""A clip norm that follows a quantile of the gradients' norms."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from .._checks import is_probability, positive_scalar, probability_scalar, usable
from .._rounding_up import PRODUCT_UP
from .._types import Params, RealScalarLike
from ..random import draw, normal_from_words
from ._base import AbstractClipping
from ._flat import LARGEST, SMALLEST, usable_norm
from ._grouping import Grouping, block, layer, parse_norms, split_norm, total_norm


class AdaptiveClippingState(eqx.Module):
    """What adaptive clipping has learnt; private by itself.

    **Arguments:**

    - `norms`: the clip norm of each group in the next step, shape `(groups,)`.
    """

    norms: Float[Array, " groups"]


class AdaptiveClipping(AbstractClipping):
    r"""Flat clipping at $C_t$, which is steered to a quantile of the norms by a private count.

    Each step adds up $b_i - \frac12$, where $b_i$ tells whether $\|g_i\| \le C_t$, adds noise of standard deviation $\sigma_b$ and divides by
    the EXPECTED batch size $m$: $\bar b = \frac12 + \frac1m (\sum_i (b_i - \frac12) + N(0, \sigma_b^2))$; then
    $C_{t+1} = C_t \exp(-\eta (\bar b - q))$. The shift by one half halves the count's sensitivity.

    The noise multiplier $z$ of a plan covers both: the gradient gets $z_\Delta = (z^{-2} - (2 \sigma_b)^{-2})^{-1/2}$ (with $K$ groups,
    $(z^{-2} - K (2 \sigma_b)^{-2})^{-1/2}$), so that counts and gradient together are one Gaussian mechanism of multiplier $z$.

    !!! success "Guarantee"

        One example's contribution has norm at most `sensitivity` $(1 + 10^{-6})$ in the units in which noise is added (those of
        `initial_norm`; the private sum is multiplied by $C_t / C_0$ after), and moves each count by at most one half.

    **Arguments:**

    - `initial_norm`: $C_0$: a number, or a tree prefix of the model for a clip norm for each group.
    - `quantile`: $q$, the fraction of gradients that shall not be clipped, in (0, 1).
    - `learning_rate`: $\eta > 0$.
    - `count_noise_multiplier`: $\sigma_b > 0$, in units of one example; a twentieth of the batch size is a good choice. It must exceed half of
        the plan's noise multiplier.

    ??? cite "Reference"

        Andrew et al., *Differentially private learning with adaptive clipping*, NeurIPS 2021.
    """

    initial_norms: Float[Array, " groups"]
    quantile: Float[Array, ""]
    learning_rate: Float[Array, ""]
    count_noise_multiplier: Float[Array, ""]
    grouping: Grouping
    order: int = eqx.field(static=True)

    def __init__(
        self,
        initial_norm: PyTree,
        quantile: RealScalarLike = 0.5,
        learning_rate: RealScalarLike = 0.2,
        count_noise_multiplier: RealScalarLike = 10.0,
    ):
        name = "AdaptiveClipping"
        values, self.grouping = parse_norms(f"{name}(initial_norm=...)", initial_norm)
        self.initial_norms = jnp.stack(values)
        self.quantile = probability_scalar(f"{name}(quantile=...)", quantile)
        self.learning_rate = positive_scalar(f"{name}(learning_rate=...)", learning_rate)
        self.count_noise_multiplier = positive_scalar(f"{name}(count_noise_multiplier=...)", count_noise_multiplier)
        self.order = 2

    @classmethod
    def per_layer(
        cls, model: PyTree, norm: RealScalarLike, *, filter_spec: PyTree = eqx.is_inexact_array, **options: Any
    ) -> "AdaptiveClipping":
        """A clip norm for each module that holds parameters, the total `norm` to begin with; see `GroupClipping.per_layer`."""
        return cls(split_norm("AdaptiveClipping.per_layer", model, norm, filter_spec, layer), **options)

    @classmethod
    def per_block(
        cls, model: PyTree, norm: RealScalarLike, *, filter_spec: PyTree = eqx.is_inexact_array, **options: Any
    ) -> "AdaptiveClipping":
        """A clip norm for each block, the total `norm` to begin with; see `GroupClipping.per_block`."""
        return cls(split_norm("AdaptiveClipping.per_block", model, norm, filter_spec, block), **options)

    @property
    def sensitivity(self) -> Float[Array, ""]:
        others = usable(self.learning_rate) * usable(self.count_noise_multiplier)
        return usable(total_norm(usable_norm(self.initial_norms)), (others > 0) & is_probability(self.quantile))

    @property
    def side_noise_multipliers(self) -> tuple[Float[Array, ""], ...]:
        # K counts, each moved by one half
        return (2 * self.count_noise_multiplier / jnp.sqrt(jnp.float32(len(self.initial_norms))),)

    def init(self, params: Params) -> AdaptiveClippingState:
        del params
        return AdaptiveClippingState(self.initial_norms)

    def labels(self, params: Params) -> tuple[int, ...]:
        return self.grouping.labels(params)

    def factors(self, norms: Float[Array, "batch groups"], state: PyTree) -> Float[Array, "batch groups"]:
        return self.initial_norms[None] / jnp.maximum(norms, state.norms[None])

    def rescale(self, state: PyTree) -> Float[Array, " groups"]:
        return state.norms / self.initial_norms

    def update(
        self,
        state: AdaptiveClippingState,
        norms: Float[Array, "batch groups"],
        mask: Bool[Array, " batch"],
        expected_batch_size: Float[Array, ""],
        key: Key[Array, ""],
    ) -> AdaptiveClippingState:
        # a norm that is not finite compares as larger
        votes = jnp.where(norms <= state.norms[None], 0.5, -0.5)
        count = jnp.sum(jnp.where(mask[:, None], votes, 0), axis=0)
        noise = self.count_noise_multiplier * PRODUCT_UP * draw(normal_from_words, key, state.norms.shape)
        fraction = 0.5 + (count + noise) / expected_batch_size
        new = state.norms * jnp.exp(-self.learning_rate * (fraction - self.quantile))
        return AdaptiveClippingState(jnp.clip(new, SMALLEST, LARGEST))
