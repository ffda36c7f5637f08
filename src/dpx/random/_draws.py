r"""Standard normal and Laplace numbers, each from 64 random bits of its own: where all noise of dpx comes from.

One bit is the sign. The others make an integer $M$ that is uniform below $2^{62}$, and $y = (M + \frac12)\, 2^{-62}$ is the probability of
being further out than the number drawn: $|z|$ is where $P(|Z| > |z|) = y$. So both tails reach as far as $y = 2^{-63}$, which is
9.08 standard deviations, or 43.67 scales of a Laplace variable. `jax.random.normal` uses 23 bits and ends at 5.4.

In floating point a number near 1 has no small digits, so $y$ and $s = 1 - y$ are both made of the integer: $y$ has all of its digits where it
is small, in the tail, and $s$ where that is small, near zero.

Words are a function of key and position only, and every device makes those of its own positions, without communication.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Key, UInt32

from ._chacha import CHACHA20, flat_index, iotas, word_pairs, word_pairs_of_blocks
from ._wide import add, multiply

_THREEFRY = "threefry2x32"
_NUMBERS_OF_BLOCK = {_THREEFRY: 1, CHACHA20: 8}
_SIGN, _REST = np.uint32(1), np.int32(2**31 - 1)

# |z| / s as a rational function of w = -log(1 - s^2) on [0, 43], where y = 2**-63 is. Fitted by us (least squares, reweighted until the error
# is level) to scipy's `ndtri` and `erfinv`; relative error 4e-8. All coefficients are positive, so that nothing cancels.
_NUMERATOR = (1.25331409, 0.460492543, 0.0969302369, 0.0138702345, 1.33850103e-3, 8.27520214e-5, 5.85232237e-7)
_DENOMINATOR = (1.0, 0.105619400, 0.0366608190, 2.71969680e-3, 3.07174930e-4, 6.70821777e-6, 1.07641693e-8)

# On one CPU large arrays are filled in parts of so many numbers, which stay in its cache: up to twice as fast at 10^7 numbers. Other devices
# have the bandwidth, and an array on several must not be cut in ways of our own.
_PARTS = {_THREEFRY: 2**17, CHACHA20: 2**15}

Law = Callable[[UInt32[Array, "*shape"], UInt32[Array, "*shape"], Any], Float[Array, "*shape"]]


def _split(first: Array, second: Array, dtype: Any) -> tuple[Array, Array, Array]:
    """Whether to negate, and $y$ and $1 - y$, from two words; never 0, and each rounded once or twice."""
    is_negative = first & _SIGN == 1
    # signed integers, because conversion from unsigned ones is slow
    high, low = (first >> np.uint32(1)).astype(jnp.int32), (second >> np.uint32(1)).astype(jnp.int32)

    def fraction(high: Array, low: Array) -> Array:
        return high.astype(dtype) * dtype(2.0**-31) + (low.astype(dtype) + dtype(0.5)) * dtype(2.0**-62)

    return is_negative, fraction(high, low), fraction(high ^ _REST, low ^ _REST)


def normal_from_words(
    first: UInt32[Array, "*shape"], second: UInt32[Array, "*shape"], dtype: Any
) -> Float[Array, "*shape"]:
    r"""The standard normal numbers that two words stand for: $\pm \Phi^{-1}(y / 2)$, to a relative $10^{-6}$ (float64: $10^{-13}$)."""
    is_negative, y, s = _split(first, second, dtype)
    if dtype == np.float64:
        size = -ndtri(y / 2)
    else:
        w = -jnp.log(y * (2 - y))
        size = s * (_polynomial(_NUMERATOR, w) / _polynomial(_DENOMINATOR, w))
    return jnp.where(is_negative, -size, size)


def laplace_from_words(
    first: UInt32[Array, "*shape"], second: UInt32[Array, "*shape"], dtype: Any
) -> Float[Array, "*shape"]:
    r"""The Laplace numbers of scale 1 that two words stand for: $\mp \log y$, to a relative $10^{-6}$ (float64: $10^{-15}$)."""
    is_negative, y, s = _split(first, second, dtype)
    log = -jnp.log(y)
    # y near 1 is rounded, but log(y) / (y - 1) hardly changes there, and s is exact
    is_one = y == 1
    near_zero = s * jnp.where(is_one, 1, log / jnp.where(is_one, 1, 1 - y))
    size = jnp.where(y < 0.5, log, near_zero)
    return jnp.where(is_negative, -size, size)


def _polynomial(coefficients: tuple[float, ...], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    *rest, last = coefficients
    total = jnp.full_like(x, last)
    for coefficient in reversed(rest):
        # Nothing is negative here, so `abs` changes nothing; but a compiler cannot contract what it stands between, as it does in some programs
        # and not in others, and the same key gives the same bits in all.
        total = jnp.abs(total * x) + np.float32(coefficient)
    return total


def words(key: Key[Array, ""], shape: tuple[int, ...]) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Two random words for every position of an array of that shape, to which the results may have yet to be reshaped.

    From a threefry key, those that make up `jax.random.bits(key, shape, jnp.uint64)` where x64 is on. From a ChaCha20 key, keystream of a nonce of
    their own. From any other key, what `jax.random.bits` gives for two such arrays.
    """
    impl = jr.key_impl(key)
    if impl == _THREEFRY:
        return _of_blocks(key, *flat_index(iotas(shape), shape))
    if impl == CHACHA20:
        return word_pairs(jr.key_data(key), shape)
    both = jr.bits(key, (2, *shape), jnp.uint32)
    return both[0], both[1]


def _of_blocks(
    key: Key[Array, ""], low: UInt32[Array, "*blocks"], high: UInt32[Array, "*blocks"]
) -> tuple[Array, Array]:
    """`words` at the positions whose blocks have these numbers (halves of 64 bits)."""
    data = jr.key_data(key)
    if jr.key_impl(key) == CHACHA20:
        return word_pairs_of_blocks(data, low, high)
    # both words of the block of two, of which `jax.random.bits` gives the exclusive or
    first, second = threefry2x32_p.bind(data[0], data[1], high, low)
    return first, second


def draw(law: Law, key: Key[Array, ""], shape: tuple[int, ...], dtype: Any = jnp.float32) -> Float[Array, "..."]:
    """Independent numbers of a law (`normal_from_words`, `laplace_from_words`), in float32 or float64."""
    is_one_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    return _draw(law, key, tuple(shape), np.dtype(dtype).type, is_one_cpu)


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _draw(law: Law, key: Key[Array, ""], shape: tuple[int, ...], dtype: Any, in_parts: bool) -> Float[Array, "..."]:
    size, per_block = math.prod(shape), _NUMBERS_OF_BLOCK.get(jr.key_impl(key))
    if not in_parts or per_block is None or size == 0:
        return law(*words(key, shape), dtype).reshape(shape)
    blocks = -(-size // per_block)
    parts = -(-blocks * per_block // _PARTS[jr.key_impl(key)])
    count = -(-blocks // (8 * parts)) * 8  # XLA's loops over an odd number take three times as long

    def part(i):
        low, high = multiply(i.astype(jnp.uint32), jnp.uint32(count))
        low, carry = add(jnp.broadcast_to(low, (count,)), lax.iota(np.uint32, count))
        return law(*_of_blocks(key, low, high + carry), dtype)

    if parts == 1:
        out = part(jnp.uint32(0))
    else:
        out = jnp.zeros((parts, *jax.eval_shape(part, jnp.uint32(0)).shape), dtype)
        out = lax.fori_loop(0, parts, lambda i, out: lax.dynamic_update_index_in_dim(out, part(i), i, 0), out)
    return out.reshape(-1)[:size].reshape(shape)
