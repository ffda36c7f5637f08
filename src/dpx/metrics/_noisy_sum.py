"""One Gaussian query: a sum of contributions of norm at most 1, added up exactly, and its noise."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from .._rounding_up import PRODUCT_UP
from .._tree import expand_like
from ..random import draw, normal_from_words

# Contributions are cut to multiples of 2**-20, or coarser, and added up in two parts of which neither can overflow.
_GRID = 2**20
_PART = 2**10
_MOST_EXAMPLES = 2**20
LARGEST_MULTIPLIER = (
    1e5  # then the largest noise that can be drawn fits too, and the coarsest grid is finer than one contribution
)
_FURTHEST = 9.1  # standard deviations; no draw is further out
_DIGITS = 24  # bits of a float32
_FINER = 8  # powers of two between the noise and what fills its gaps


def exact_sum(
    units: Float[Array, "batch *shape"], keep: Bool[Array, " batch"], step: ArrayLike = 1.0
) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"]]:
    """The sum over examples of entries in [-1, 1], as integers `high * 2**10 + low` on a grid of 2**-20.

    Entries are cut towards zero to multiples of `step` (a power of two) points of the grid, which makes no contribution longer.
    An example that is not kept, or has an entry that is not finite, contributes zero; entries outside [-1, 1] are clamped. Sums of
    integers do not depend on their order, nor on the number of devices, so one example moves them by its own contribution exactly.
    """
    if units.shape[0] > _MOST_EXAMPLES:
        raise ValueError(
            f"A metric takes at most {_MOST_EXAMPLES} examples at a time; got {units.shape[0]}. Release parts of them, which is as private "
            "where each example is in one part, and add up."
        )
    is_real = jnp.all(jnp.isfinite(units), axis=tuple(range(1, units.ndim))) & keep
    steps = jnp.trunc(jnp.clip(units, -1.0, 1.0) * _GRID / step) * step
    steps = jnp.where(expand_like(is_real, steps), steps, 0.0).astype(jnp.int32)
    return jnp.sum(steps // _PART, axis=0), jnp.sum(steps % _PART, axis=0)


def noisy_sum(
    units: Float[Array, "batch *shape"],
    keep: Bool[Array, " batch"],
    noise_multiplier: Float[Array, ""],
    key: Key[Array, ""],
) -> Float[Array, "*shape"]:
    r"""`exact_sum` and Gaussian noise of at least that standard deviation in every entry, as float32.

    Everything is a multiple of one step and is added up as integers: to round the noise to the grid of the sum is to round their sum, and what
    follows is a function of it. So no bit of the sum gets past the noise through the rounding of floating-point addition. The noise must
    also be smooth on that grid, or what it misses gives the sum away: a float32 is not, neither where it is larger than 2**24 steps nor
    where few of them make up a step. A second draw, $2^{-8}$ times as large, fills the gaps of the first: it spans thousands of them.
    """
    scale = jnp.clip(noise_multiplier, 0, LARGEST_MULTIPLIER) * PRODUCT_UP * _GRID
    _, exponent = jnp.frexp(scale * _FURTHEST)
    power = lambda e: jnp.ldexp(jnp.float32(1), jnp.maximum(e, 0))
    wide, step = power(exponent - _DIGITS), power(exponent - _DIGITS - _FINER)
    high, low = exact_sum(units, keep, step)
    large, small = draw(normal_from_words, key, (2, *high.shape))
    for noise in (jnp.round(large * (scale / wide)) * wide, jnp.round(small * (scale / 2**_FINER / step)) * step):
        above = jnp.floor(noise / _PART)
        high = high + above.astype(jnp.int32)
        low = low + (noise - above * _PART).astype(jnp.int32)
    total = high.astype(jnp.float32) * (_PART / _GRID) + low.astype(jnp.float32) / _GRID
    # a multiplier that came in traced, or was changed, is checked here
    return jnp.where((noise_multiplier > 0) & (noise_multiplier <= LARGEST_MULTIPLIER), total, jnp.nan)
