"""Contributions as vectors of integers, of a norm that is bounded exactly."""

import math
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from .._rounding_up import ALL_ERRORS
from .._tree import expand_like
from .._types import Params

_MOST = np.uint32(2**32 - 1)

_MSG_TOO_COARSE = (
    "`DiscreteGaussian(granularity={granularity:g})` is too coarse for {dimension} parameters: rounding alone can move a gradient by "
    "sqrt({dimension}) / 2 = {half:.6g} steps of the grid, and the clip norm is only {radius} steps. {remedy}"
)
_MSG_OVERFLOW = (
    "`DiscreteGaussian(granularity={granularity:g})` cannot add up a batch of {batch} in 32-bit integers: contributions reach {radius}, and "
    "sums must stay below 2**30. Use batches of at most {most}, or a coarser granularity."
)


class Rounding(eqx.Module):
    r"""Rounds clipped contributions to a grid, so that one contribution is a vector of integers of norm at most $R$ = `radius`.

    **Arguments:**

    - `spacing`: distance of the grid's points, in units of the contribution: its bound over $R$.
    - `radius`: $R$, a power of two.
    - `shrink`: by what the clip norm is tightened, so that rounding does not lead out of the ball.
    """

    spacing: Float[Array, ""]
    radius: int = eqx.field(static=True)
    shrink: float = eqx.field(static=True)

    finest: ClassVar[int] = 2**16

    def __init__(self, sensitivity: Float[Array, ""], radius: int, dimension: int, batch_size: int):
        half = math.sqrt(dimension) / 2
        if radius <= half:
            fine = 2 ** math.floor(math.log2(half) + 1)
            remedy = (
                f"Use a granularity of at most 2**-{fine.bit_length() - 1}; a hundredth of that costs little accuracy."
            )
            if fine > self.finest:
                remedy = "No granularity is fine enough; train fewer parameters, or use `IndependentGaussian`."
            options = {"dimension": dimension, "half": half, "radius": radius, "remedy": remedy}
            raise ValueError(_MSG_TOO_COARSE.format(granularity=1 / radius, **options))
        if batch_size * radius > 2**30:
            options = {"batch": batch_size, "radius": radius, "most": 2**30 // radius}
            raise ValueError(_MSG_OVERFLOW.format(granularity=1 / radius, **options))
        self.spacing = sensitivity / radius
        self.radius = radius
        self.shrink = (radius - half) / radius / (1 + ALL_ERRORS)

    def tightened(self, norms: Float[Array, "batch groups"]) -> Float[Array, "batch groups"]:
        r"""Norms that make any clipping clip to `shrink` times its clip norm, and leave what is shorter alone.

        Whatever the factors $w$ are, $w(m)\, m \le C$ for all $m$, so that $w(n / s)\, n \le s\, C$.
        """
        return norms / np.nextafter(np.float32(self.shrink), np.float32(0))

    def quantise(self, terms: list[Float[Array, "batch ..."]]) -> list[Int[Array, "batch ..."]]:
        """The nearest integers; zero for an example whose integers have a norm above the radius, which tightened factors rule out."""

        def nearest(x):
            steps = jnp.round(x / self.spacing.astype(x.dtype))
            return jnp.clip(steps, -2.0 * self.radius, 2.0 * self.radius).astype(jnp.int32)

        integers = [nearest(x) for x in terms]
        # this, not the accuracy of float32 norms, is what the sensitivity rests on
        is_inside = squared_norms(integers) <= np.uint32(min(self.radius**2, 2**32 - 2))
        return [jnp.where(expand_like(is_inside, v), v, 0) for v in integers]

    def restore(self, total: Params) -> Params:
        """Sums of integers in units of the contribution."""
        return jax.tree.map(lambda v: v.astype(jnp.float32) * self.spacing, total)


def squared_norms(leaves: list[Int[Array, "batch ..."]]) -> UInt32[Array, " batch"]:
    """Exact squared l2 norm of each example's integers, over all leaves; 2**32 - 1 where it is that or more."""
    total, *rest = [_squared_norm(v) for v in leaves]
    for other in rest:
        total = jnp.where(total + other < total, _MOST, total + other)
    return total


def _squared_norm(v: Int[Array, "batch ..."]) -> UInt32[Array, " batch"]:
    size = jnp.abs(v).astype(jnp.uint32)
    square = jnp.where(size > 0xFFFF, _MOST, size * size)
    # Sums of limbs so short that none overflows, then the carries.
    number = math.prod(v.shape[1:])
    bits = min(16, 31 - number.bit_length())
    if bits < 1:
        raise ValueError(f"`DiscreteGaussian` takes arrays of fewer than 2**30 numbers; got {number}.")
    axes = tuple(range(1, v.ndim))
    total = carry = jnp.zeros(v.shape[0], jnp.uint32)
    for low in range(0, 32, bits):
        width = min(bits, 32 - low)
        limb = square >> np.uint32(low) & np.uint32(2**width - 1)
        partial = jnp.sum(limb, axis=axes, dtype=jnp.uint32) + carry
        total = total | (partial & np.uint32(2**width - 1)) << np.uint32(low)
        carry = partial >> np.uint32(width)
    # an entry beyond 16 bits has a square beyond 32
    is_beyond = (carry > 0) | jnp.any(size > 0xFFFF, axis=axes)
    return jnp.where(is_beyond, _MOST, total)
