"""One Gaussian query: a sum of contributions of norm at most 1, added up exactly, and its noise."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from .._draws import draw, normal_from_words
from .._tree import expand_like
from ..noise._gaussian import ROUND_UP

# Contributions are rounded to multiples of 2**-20, and added up in two parts of which neither can overflow.
_GRID = 2**20
_PART = 2**10
_MOST_EXAMPLES = 2**20
LARGEST_MULTIPLIER = 1e5  # then noise of six standard deviations fits too


def exact_sum(
    units: Float[Array, "batch *shape"], keep: Bool[Array, " batch"]
) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"]]:
    """The sum over examples of entries in [-1, 1], as integers `high * 2**10 + low` on a grid of 2**-20.

    An example that is not kept, or has an entry that is not finite, contributes zero; entries outside [-1, 1] are clamped. Sums of
    integers do not depend on their order, nor on the number of devices, so one example moves them by its own contribution exactly.
    """
    if units.shape[0] > _MOST_EXAMPLES:
        raise ValueError(
            f"A metric takes at most {_MOST_EXAMPLES} examples at a time; got {units.shape[0]}. Release parts of them, which is as private "
            "where each example is in one part, and add up."
        )
    is_real = jnp.all(jnp.isfinite(units), axis=tuple(range(1, units.ndim))) & keep
    steps = jnp.round(jnp.clip(units, -1.0, 1.0) * _GRID)
    steps = jnp.where(expand_like(is_real, steps), steps, 0.0).astype(jnp.int32)
    return jnp.sum(steps // _PART, axis=0), jnp.sum(steps % _PART, axis=0)


def noisy_sum(
    units: Float[Array, "batch *shape"],
    keep: Bool[Array, " batch"],
    noise_multiplier: Float[Array, ""],
    key: Key[Array, ""],
) -> Float[Array, "*shape"]:
    """`exact_sum` and Gaussian noise of that standard deviation in every entry, as float32.

    To round the noise to the grid of the sum is to round their sum, and what follows is a function of it: no bit of the sum gets past
    the noise through the rounding of floating-point addition.
    """
    high, low = exact_sum(units, keep)
    noise = jnp.round(draw(normal_from_words, key, high.shape) * (noise_multiplier * ROUND_UP * _GRID))
    above = jnp.floor(noise / _PART)
    high = high + above.astype(jnp.int32)
    low = low + (noise - above * _PART).astype(jnp.int32)
    total = high.astype(jnp.float32) * (_PART / _GRID) + low.astype(jnp.float32) / _GRID
    # a multiplier that came in traced, or was changed, is checked here
    return jnp.where((noise_multiplier > 0) & (noise_multiplier <= LARGEST_MULTIPLIER), total, jnp.nan)
