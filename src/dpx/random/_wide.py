"""Unsigned integers of 64 bits as pairs of uint32, since JAX has none unless x64 is on."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32


def multiply(x: UInt32[Array, "..."], y: UInt32[Array, "..."]) -> tuple[Array, Array]:
    """The product, as its halves (low, high)."""
    half, mask = np.uint32(16), np.uint32(0xFFFF)
    x1, x0, y1, y0 = x >> half, x & mask, y >> half, y & mask
    middle = (x0 * y0 >> half) + (x0 * y1 & mask) + (x1 * y0 & mask)
    return x * y, x1 * y1 + (x0 * y1 >> half) + (x1 * y0 >> half) + (middle >> half)


def add(x: UInt32[Array, "..."], y: UInt32[Array, "..."]) -> tuple[Array, Array]:
    """The sum, as its halves (low, high)."""
    low = x + y
    return low, (low < x).astype(jnp.uint32)
