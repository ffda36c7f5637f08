"""A quantile, followed from step to step or searched for at once."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from .._checks import probability_scalar
from .._types import RealScalarLike
from ._base import AbstractMetric, Values, check_expected, check_multiplier, check_range, check_values
from ._noisy_sum import noisy_sum

# The step shrinks where two errors in a row differ in sign and grows where they agree.
_SHRINK, _GROW = 0.5, 1.3
_SMALLEST_STEP, _FIRST_STEP, _LARGEST_STEP = 1e-5, 0.25, 0.5
_ROUNDS = 16  # of the search; a square, so that its root is exact


class QuantileState(eqx.Module):
    """Where a `Quantile` is.

    **Arguments:**

    - `position`: the estimate, as a fraction of the range.
    - `step_size`: how far it moves at most, as a fraction of the range.
    - `error`: the last one, private like all of this.
    """

    position: Float[Array, ""]
    step_size: Float[Array, ""]
    error: Float[Array, ""]


class Quantile(AbstractMetric):
    r"""The $\gamma$-quantile of values in $[a, b]$: a threshold $q$ that follows the private fraction of values below it.

    The fraction is $\frac12 + \frac1B \big(\sum_i (1[v_i \le q] - \frac12) + N(0, \sigma^2 / 4)\big)$, with the shift and the EXPECTED
    number of examples $B$ of Andrew et al. (2021). Then $q$ moves against the error, on a logarithmic scale if $a > 0$ and on a linear
    one otherwise, by a step that halves whenever the error changes its sign and grows while it does not: so it does not matter
    how narrow the distribution is in its range, and a quantile that drifts is followed. `release` searches by bisection instead,
    in 16 rounds that share the budget.

    !!! success "Guarantee"

        One example, added or removed, moves the un-noised sum by at most 1/2, exactly, for every input: infinite, NaN and masked ones
        contribute zero. The estimate is in $[a, b]$.

    **Arguments:**

    - `values`: as for `Mean`.
    - `quantile`: $0 < \gamma < 1$; 0.5 is the median.
    - `low`, `high`: $a < b$, chosen without looking at the data. It begins in the middle.
    - `noise_multiplier`: $\sigma > 0$, at most 1e5, rounded up to float32: the noise on the sum in units of 1/2.

    ??? cite "Reference"

        Andrew et al., *Differentially private learning with adaptive clipping*, NeurIPS 2021.
    """

    quantile: Float[Array, ""]
    low: Float[Array, ""]
    high: Float[Array, ""]
    noise_multiplier: Float[Array, ""]
    values: Values = eqx.field(static=True)

    def __init__(
        self,
        values: Any,
        quantile: RealScalarLike,
        low: RealScalarLike,
        high: RealScalarLike,
        noise_multiplier: RealScalarLike | None = None,
    ):
        self.values = check_values("Quantile", values)
        self.quantile = probability_scalar("metrics.Quantile(quantile=...)", quantile)
        self.low, self.high = check_range("Quantile", low, high)
        self.noise_multiplier = check_multiplier("Quantile", noise_multiplier)

    def init(self) -> QuantileState:
        return QuantileState(jnp.asarray(0.5), jnp.asarray(_FIRST_STEP), jnp.asarray(0.0))

    def measure(
        self,
        state: QuantileState,
        values: Float[Array, " batch"],
        keep: Bool[Array, " batch"],
        expected_size: Float[Array, ""],
        key: Key[Array, ""],
    ) -> QuantileState:
        error = self._error(state.position, values, keep, expected_size, self.noise_multiplier, key)
        # all of this is a function of what was released
        agreement = error * state.error
        factor = jnp.where(agreement > 0, _GROW, jnp.where(agreement < 0, _SHRINK, 1.0))
        step_size = jnp.clip(state.step_size * factor, _SMALLEST_STEP, _LARGEST_STEP)
        # both ways as fast, or the estimate of a quantile near 0 or 1 would jump over a narrow distribution for ever
        rarer = jnp.maximum(jnp.minimum(self.quantile, 1 - self.quantile), 0.05)
        position = jnp.clip(state.position - step_size * jnp.clip(error / rarer, -1.0, 1.0), 0.0, 1.0)
        return QuantileState(position, step_size, error)

    def value(self, state: QuantileState) -> Float[Array, ""]:
        return self._at(state.position)

    def answer(
        self,
        values: Float[Array, " batch"],
        keep: Bool[Array, " batch"],
        expected_size: Float[Array, ""] | None,
        key: Key[Array, ""],
    ) -> Float[Array, ""]:
        size = check_expected("Quantile", expected_size)
        # n queries of multiplier sqrt(n) sigma are as revealing as one of sigma, whichever way each depends on those before
        multiplier = self.noise_multiplier * np.sqrt(_ROUNDS).item()

        def halve(i: Int[Array, ""], position: Float[Array, ""]) -> Float[Array, ""]:
            error = self._error(position, values, keep, size, multiplier, jr.fold_in(key, i))
            return position - jnp.sign(error) * 0.25 * jnp.exp2(-i.astype(jnp.float32))

        return self._at(jax.lax.fori_loop(0, _ROUNDS, halve, jnp.asarray(0.5)))

    def _error(self, position, values, keep, size, multiplier, key) -> Float[Array, ""]:
        """The private fraction of values that are at most the threshold, less what it should be."""
        units = jnp.where(values <= self._at(position), 1.0, -1.0)
        return noisy_sum(units, keep, multiplier, key) / (2 * size) + 0.5 - self.quantile

    def _at(self, position: Float[Array, ""]) -> Float[Array, ""]:
        """The number at a fraction of the range."""
        is_positive = self.low > 0
        low, high = jnp.log(jnp.where(is_positive, self.low, 1.0)), jnp.log(jnp.where(is_positive, self.high, 2.0))
        logarithmic = jnp.exp(low + position * (high - low))
        linear = self.low + position * (self.high - self.low)
        return jnp.clip(jnp.where(is_positive, logarithmic, linear), self.low, self.high)
