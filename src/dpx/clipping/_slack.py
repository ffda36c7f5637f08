"""A clip norm that follows the gradients' norms at no cost: what a short gradient leaves unused of its norm says how short it is."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .._checks import is_probability, positive_int, positive_scalar, probability_scalar, usable
from .._types import Integer, Params, RealScalarLike
from ._base import AbstractSlackClipping
from ._flat import LARGEST, SMALLEST, norm_scalar, usable_norm


class SlackClippingState(eqx.Module):
    r"""What slack clipping has learnt; private by itself.

    **Arguments:**

    - `norm`: the clip norm $C_t$ of the next step.
    - `fractions`: of the last step, shape `(bins,)`: number $k$, from 1, estimates how many gradients are shorter than about
        $(1 - (k - \frac12) / K) C_t$, as a fraction of the expected batch. NaN before the first step.
    """

    norm: Float[Array, ""]
    fractions: Float[Array, " bins"]


class SlackClipping(AbstractSlackClipping[SlackClippingState]):
    r"""Flat clipping at $C_t$, which is steered to a quantile of the norms by what short gradients leave unused of their clip norm (SlaClip).

    A gradient of norm $n < C_t$ could have been longer by $u C_t$, $u = 1 - n / C_t$. So example $i$ contributes, beside its clipped gradient,
    the numbers $\frac{C}{\sqrt K} \min(1, \max(0, K u_i - k + 1))$ for $k = 1, \dots, K$: the first ones full, one in part, the others zero.
    The sum of their squares is at most $C^2 u$, that of all that it contributes $C^2 ((1 - u)^2 + u) \le C^2$. Gradient and numbers together get
    the noise of one Gaussian mechanism, of the sensitivity, the noise multiplier and the privacy cost of flat clipping.

    The noisy numbers estimate the distribution of the norms below $C_t$. From the first, $\hat F \approx P(n \le (1 - \frac{1}{2K}) C_t)$, comes
    $C_{t+1} = C_t \exp(-\eta (\hat F - q))$: post-processing. Its noise is $z \sqrt K / m$ for noise multiplier $z$ and expected batch size $m$.

    !!! success "Guarantee"

        One example's contribution, slack included, has norm at most `sensitivity` $(1 + 10^{-6})$ in the units in which noise is added (those of
        `norm`; the private sum is multiplied by $C_t / C_0$ after). One that is not finite contributes exactly zero, and no slack.

    **Arguments:**

    - `norm`: $C_0$, the clip norm of the first step.
    - `quantile`: $q$, the fraction of gradients that shall not be clipped, in (0, 1).
    - `learning_rate`: $\eta > 0$.
    - `bins`: $K \ge 1$. More bins look closer at the norms just below $C_t$, through more noise. With one, $\hat F$ is the mean of $u$.

    ??? example

        ```python
        plan = dpx.PrivacyPlan(sampler, dpx.SlackClipping(1.0), dpx.IndependentGaussian(1.1))
        ```

    ??? cite "Reference"

        Zou et al., *SlaClip: Gradient norm slacks can be indicator for adaptive clipping in DP-SGD*, ICML 2026. The steering by a quantile is that of
        Andrew et al., *Differentially private learning with adaptive clipping*, NeurIPS 2021.
    """

    initial_norm: Float[Array, ""]
    quantile: Float[Array, ""]
    learning_rate: Float[Array, ""]
    bins: int = eqx.field(static=True)
    order: int = eqx.field(static=True)

    def __init__(
        self,
        norm: RealScalarLike,
        quantile: RealScalarLike = 0.5,
        learning_rate: RealScalarLike = 0.2,
        bins: Integer = 4,
    ):
        self.initial_norm = norm_scalar("SlackClipping(norm=...)", norm)
        self.quantile = probability_scalar("SlackClipping(quantile=...)", quantile)
        self.learning_rate = positive_scalar("SlackClipping(learning_rate=...)", learning_rate)
        self.bins = positive_int("SlackClipping(bins=...)", bins)
        self.order = 2

    @property
    def sensitivity(self) -> Float[Array, ""]:
        is_good = (usable(self.learning_rate) > 0) & is_probability(self.quantile)
        return usable(usable_norm(self.initial_norm), is_good)

    @property
    def slack_size(self) -> int:
        return self.bins

    def init(self, params: Params) -> SlackClippingState:
        del params
        return SlackClippingState(self.initial_norm, jnp.full(self.bins, jnp.nan))

    def labels(self, params: Params) -> tuple[int, ...]:
        return (0,) * len(jax.tree.leaves(params))

    def factors(self, norms: Float[Array, "batch groups"], state: PyTree) -> Float[Array, "batch groups"]:
        return self.initial_norm / jnp.maximum(norms, state.norm)

    def rescale(self, state: PyTree) -> Float[Array, " groups"]:
        return (state.norm / self.initial_norm)[None]

    def slack(self, norms: Float[Array, " batch"], state: PyTree) -> Float[Array, "batch slack"]:
        unused = 1 - jnp.minimum(norms / state.norm, 1)
        return self._full * jnp.clip(
            self.bins * unused[:, None] - jnp.arange(self.bins, dtype=unused.dtype)[None], 0, 1
        )

    def learn(
        self, state: SlackClippingState, released: Float[Array, " slack"], expected_batch_size: Float[Array, ""]
    ) -> SlackClippingState:
        fractions = released / (self._full * expected_batch_size)
        new = state.norm * jnp.exp(-self.learning_rate * (fractions[0] - self.quantile))
        return SlackClippingState(jnp.clip(new, SMALLEST, LARGEST), fractions)

    @property
    def _full(self) -> Float[Array, ""]:
        return self.initial_norm / jnp.sqrt(jnp.float32(self.bins))
