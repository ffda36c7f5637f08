"""How many examples fall in each bin."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import described, real_array
from .._types import RealScalarLike
from ._base import AbstractQuery, Values, check_multiplier, check_values


class Histogram(AbstractQuery):
    r"""How many examples have a value in each of the bins $[e_0, e_1), [e_1, e_2), \dots$, with noise of standard deviation $\sigma$ in every bin.

    The first and the last bin are open: what lies below $e_0$ or above the last edge counts there. Counts may be negative; that is the noise.

    !!! success "Guarantee"

        One example, added or removed, moves one count by 1, exactly, and no other: all bins together are one query of $\ell_2$
        sensitivity 1, however many there are. Infinite, NaN and masked ones are in none.

    **Arguments:**

    - `values`: as for `Mean`.
    - `edges`: $e_0 < e_1 < \dots$, at least three finite numbers, chosen without looking at the data.
    - `noise_multiplier`: $\sigma > 0$, at most 1e5, rounded up to float32.
    """

    edges: Float[Array, " edges"]
    noise_multiplier: Float[Array, ""]
    values: Values = eqx.field(static=True)

    def __init__(self, values: Any, edges: Any, noise_multiplier: RealScalarLike | None = None):
        numbers = real_array("metrics.Histogram(edges=...)", edges, "a sequence of numbers")
        with np.errstate(over="ignore"):  # what overflows is not finite, which is refused
            numbers = numbers.astype(np.float32)
        if numbers.ndim != 1 or len(numbers) < 3 or not np.isfinite(numbers).all() or not (np.diff(numbers) > 0).all():
            raise ValueError(
                "`metrics.Histogram(edges=...)` must be at least three finite numbers that increase, in float32, chosen without looking at "
                f"the data; got {described(edges)}. With fewer than two bins use `metrics.Count`."
            )
        self.values = check_values("Histogram", values)
        self.edges = jnp.asarray(numbers)
        self.noise_multiplier = check_multiplier("Histogram", noise_multiplier)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.edges) - 1,)

    def contributions(self, values: Float[Array, " batch"]) -> Float[Array, "batch bins"]:
        # one row an example: a scatter would not follow the sharding of the batch
        index = jnp.sum(values[:, None] >= self.edges[None, 1:-1], axis=1)
        return jax.nn.one_hot(index, len(self.edges) - 1, dtype=jnp.float32)

    def from_sum(self, total: Float[Array, " bins"], expected_size: Float[Array, ""] | None) -> Float[Array, " bins"]:
        del expected_size
        return total
