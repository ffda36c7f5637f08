"""Sums, means and counts."""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._types import RealScalarLike
from ._base import AbstractQuery, Values, check_expected, check_multiplier, check_range, check_values


class Mean(AbstractQuery):
    r"""The mean of values clamped to $[a, b]$: $m + \frac{1}{B} \big(\sum_i (\mathrm{clamp}(v_i) - m) + N(0, \sigma^2 h^2)\big)$.

    $m = (a + b) / 2$, $h = (b - a) / 2$, and $B$ is the EXPECTED number of examples (Andrew et al. 2021): to add or remove an example
    moves the sum by at most $h$, half of what it would without the shift. The noise on the mean is $\sigma h / B$.

    Bias: a batch of $n$ examples gives $m + \frac{n}{B} (\bar v - m)$ before the noise, the mean drawn towards or away from the middle as
    the batch is smaller or larger than expected; none on average over Poisson batches. A value that is not finite counts as $m$.

    !!! success "Guarantee"

        One example, added or removed, moves the sum by at most $h$, exactly, for every input: infinite, NaN and masked ones contribute zero.

    **Arguments:**

    - `values`: `"losses"`, `"norms"`, or a function of ONE example's diagnostics: `lambda d: d.aux["is_correct"]`. None where only
        `release` is used.
    - `low`, `high`: $a < b$, chosen without looking at the data. A number outside counts as the nearer one.
    - `noise_multiplier`: $\sigma > 0$, at most 1e5, rounded up to float32: the noise on the sum in units of $h$.

    ??? cite "Reference"

        Andrew et al., *Differentially private learning with adaptive clipping*, NeurIPS 2021.
    """

    low: Float[Array, ""]
    high: Float[Array, ""]
    noise_multiplier: Float[Array, ""]
    values: Values = eqx.field(static=True)

    def __init__(
        self, values: Any, low: RealScalarLike, high: RealScalarLike, noise_multiplier: RealScalarLike | None = None
    ):
        self.values = check_values("Mean", values)
        self.low, self.high = check_range("Mean", low, high)
        self.noise_multiplier = check_multiplier("Mean", noise_multiplier)

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def contributions(self, values: Float[Array, " batch"]) -> Float[Array, " batch"]:
        middle, half = self._middle_and_half()
        return jnp.clip((jnp.clip(values, self.low, self.high) - middle) / half, -1.0, 1.0)

    def from_sum(self, total: Float[Array, ""], expected_size: Float[Array, ""] | None) -> Float[Array, ""]:
        middle, half = self._middle_and_half()
        return middle + half * total / check_expected("Mean", expected_size)

    def _middle_and_half(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return self.low / 2 + self.high / 2, self.high / 2 - self.low / 2


class Sum(AbstractQuery):
    r"""The sum of values clamped to $[a, b]$, with noise of standard deviation $\sigma \max(|a|, |b|)$.

    !!! success "Guarantee"

        One example, added or removed, moves the sum by at most $\max(|a|, |b|)$, exactly, for every input: infinite, NaN and masked ones
        contribute zero.

    **Arguments:** as for `Mean`; the noise multiplier is in units of $\max(|a|, |b|)$.
    """

    low: Float[Array, ""]
    high: Float[Array, ""]
    noise_multiplier: Float[Array, ""]
    values: Values = eqx.field(static=True)

    def __init__(
        self, values: Any, low: RealScalarLike, high: RealScalarLike, noise_multiplier: RealScalarLike | None = None
    ):
        self.values = check_values("Sum", values)
        self.low, self.high = check_range("Sum", low, high)
        self.noise_multiplier = check_multiplier("Sum", noise_multiplier)

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def contributions(self, values: Float[Array, " batch"]) -> Float[Array, " batch"]:
        return jnp.clip(jnp.clip(values, self.low, self.high) / self._bound(), -1.0, 1.0)

    def from_sum(self, total: Float[Array, ""], expected_size: Float[Array, ""] | None) -> Float[Array, ""]:
        del expected_size
        return total * self._bound()

    def _bound(self) -> Float[Array, ""]:
        return jnp.maximum(jnp.abs(self.low), jnp.abs(self.high))


class Count(AbstractQuery):
    r"""How many examples have a value other than zero, with noise of standard deviation $\sigma$.

    For a fraction, `Mean(values, 0, 1, ...)` has half the sensitivity.

    !!! success "Guarantee"

        One example, added or removed, moves the count by at most 1, exactly; NaN and masked ones do not count.

    **Arguments:**

    - `values`: as for `Mean`; None counts every real example.
    - `noise_multiplier`: $\sigma > 0$, at most 1e5, rounded up to float32.
    """

    noise_multiplier: Float[Array, ""]
    values: Values = eqx.field(static=True)

    def __init__(self, values: Any = None, noise_multiplier: RealScalarLike | None = None):
        self.values = check_values("Count", values)
        self.noise_multiplier = check_multiplier("Count", noise_multiplier)

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def contributions(self, values: Float[Array, " batch"]) -> Float[Array, " batch"]:
        return (values != 0).astype(jnp.float32)

    def from_sum(self, total: Float[Array, ""], expected_size: Float[Array, ""] | None) -> Float[Array, ""]:
        del expected_size
        return total


class Dropped(AbstractQuery):
    r"""How many examples a step left out because their gradient was not finite, with noise of standard deviation $\sigma$.

    Such an example contributes zero to the sum, and nothing that is published says so: a run whose losses overflow (half precision with loss
    scaling, say) trains on fewer examples than it seems to, or on noise alone. This is the private way to see it.

    ```python
    plan = plan.with_metrics(dropped=dpx.metrics.Dropped(noise_multiplier=10.0))
    ```

    !!! success "Guarantee"

        One example, added or removed, moves the count by at most 1, exactly. Masked ones do not count.

    **Arguments:**

    - `noise_multiplier`: $\sigma > 0$, at most 1e5, rounded up to float32.

    `release` takes the norms of gradients, as diagnostics have them, and counts those that are infinite or NaN.
    """

    noise_multiplier: Float[Array, ""]
    values: Values = eqx.field(static=True)
    takes_all: ClassVar[bool] = True

    def __init__(self, noise_multiplier: RealScalarLike | None = None):
        self.values = "norms"
        self.noise_multiplier = check_multiplier("Dropped", noise_multiplier)

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def contributions(self, values: Float[Array, " batch"]) -> Float[Array, " batch"]:
        return (~jnp.isfinite(values)).astype(jnp.float32)

    def from_sum(self, total: Float[Array, ""], expected_size: Float[Array, ""] | None) -> Float[Array, ""]:
        del expected_size
        return total
