r"""ChaCha20 as a JAX key type: randomness that stays secret even from whoever sees most of it.

A key $K$ is 256 bits. All randomness is read off ChaCha20's block function $\text{block}_K : \{0, 1\}^{128} \to \{0, 1\}^{512}$, whose input is a
64-bit counter and a 64-bit nonce (RFC 8439's layout, with the first nonce word as the upper half of the counter). The nonce says what the
output is for, so that no input is ever used for two purposes:

| operation | nonce | counter | output |
|---|---|---|---|
| `random_bits(K, shape)` | (0, 0) | number of the block in the array | the keystream itself |
| `split(K)[j]` | (1, 0) | j | first 256 bits: a new key |
| `fold_in(K, data)` | (2, 0) | data | first 256 bits: a new key |
| `seed(s)`, with K = 0 | (3, 0) | s | first 256 bits: a key |
| `word_pairs(K, shape)` | (4, 0) | number of the block, of 8 pairs, in the array | the first words of the pairs, then the second ones |

**Why streams never overlap.** Under one key, all inputs above are distinct, so the outputs are those of a pseudorandom function at distinct
points: to anyone who does not hold $K$ they look independent and uniform, and this is the assumption under which ChaCha20 is used in TLS.
Keys derived by `split` and `fold_in` are such outputs, hence as good as independent 256-bit keys, each the root of a function of its own; by
induction over the tree of derivations so are all their descendants. Two streams coincide only if two of those keys do: with $2^{64}$ keys, at
odds of $2^{-129}$. No key can be computed from a descendant, from its bits, or from a sibling's.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import define_prng_impl
from jaxtyping import Array, Integer, UInt, UInt32

from ._wide import add, multiply

_WORDS = 16  # of 32 bits in a block
_KEY_WORDS = 8
_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k", little-endian
_BITS, _SPLIT, _FOLD_IN, _SEED, _PAIRS = 0, 1, 2, 3, 4
_UINTS: dict[int, Any] = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}


def _rotate(x: Array, by: int) -> Array:
    return (x << np.uint32(by)) | (x >> np.uint32(32 - by))


def _quarter_rounds(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array, Array, Array]:
    a = a + b
    d = _rotate(d ^ a, 16)
    c = c + d
    b = _rotate(b ^ c, 12)
    a = a + b
    d = _rotate(d ^ a, 8)
    c = c + d
    return a, _rotate(b ^ c, 7), c, d


def _turn(row: Array, by: Any) -> Array:
    return lax.dynamic_slice_in_dim(jnp.concatenate([row, row]), by, 4)


def _round(number: Any, rows: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
    # after an even round the diagonals are turned into columns, after an odd one back
    is_odd = number & 1
    a, b, c, d = _quarter_rounds(*rows)
    return a, _turn(b, 1 + 2 * is_odd), _turn(c, 2), _turn(d, 3 - 2 * is_odd)


def chacha20_blocks(
    key: UInt32[Array, "8"],
    low: UInt32[Array, "*blocks"],
    high: UInt32[Array, "*blocks"],
    nonce: Sequence[int],
) -> UInt32[Array, "16 *blocks"]:
    """ChaCha20's block function at many counters at once; word number w of every block is row w.

    **Arguments:**

    - `key`: 256 bits, as little-endian words.
    - `low`, `high`: the halves of the 64-bit counters (of RFC 8439: the block count and the first word of the nonce).
    - `nonce`: two words (of RFC 8439: the second and third word of the nonce).
    """
    # Words are the leading axis and blocks the trailing ones, so that every operation is elementwise over blocks: it vectorises, and where
    # the blocks are sharded each device computes its own. The loop is rolled, since XLA compiles a thousand operations slowly.
    shape = low.shape
    fixed = jnp.concatenate([np.asarray(_CONSTANTS, np.uint32), key]).reshape(-1, *(1,) * low.ndim)
    last = jnp.broadcast_to(np.asarray(nonce, np.uint32).reshape(-1, *(1,) * low.ndim), (len(nonce), *shape))
    start = jnp.concatenate([jnp.broadcast_to(fixed, (len(fixed), *shape)), low[None], high[None], last])
    start = start.reshape(4, 4, *shape)
    rows = lax.fori_loop(0, 20, _round, tuple(start))
    return (jnp.stack(rows) + start).reshape(_WORDS, *shape)


def flat_index(indices: Sequence[UInt32[Array, "*blocks"]], shape: Sequence[int]) -> tuple[Array, Array]:
    """Row-major number of a position in an array of that shape, as the halves (low, high) of 64 bits."""
    low = high = jnp.zeros_like(indices[0]) if indices else jnp.zeros((), jnp.uint32)
    for index, size in zip(indices, shape, strict=True):
        if size > 2**32 - 1:
            raise ValueError(
                f"ChaCha20 keys fill axes of fewer than 2**36 numbers, and noise those of fewer than 2**32; got {size} blocks or numbers. Use "
                "two axes."
            )
        product, carry = multiply(low, jnp.uint32(size))
        low, overflow = add(product, index)
        high = high * np.uint32(size) + carry + overflow
    return low, high


def iotas(shape: Sequence[int]) -> list[UInt32[Array, "..."]]:
    """The index along every axis, at every position of an array."""
    return [lax.broadcasted_iota(np.uint32, shape, axis) for axis in range(len(shape))]


def _counters(shape: Sequence[int]) -> tuple[Array, Array]:
    return flat_index(iotas(shape), shape)


def _keystream(key: UInt32[Array, "8"], shape: tuple[int, ...], domain: int = _BITS, parts: int = 1) -> list[Array]:
    """For every position of an array, of row-major number i: word i of the keystream.

    With several parts each block is cut into so many pieces, and there is an array for each: of its piece of all blocks in turn. Their last
    axes are still those of the blocks and of what is in one: reshaping comes last, after what is elementwise, which would not vectorise.
    """
    size, width = math.prod(shape), _WORDS // parts
    if size == 0:
        return [jnp.zeros(shape, jnp.uint32)] * parts
    # The shortest run of trailing axes that whole blocks fill: both the axes before it and the run itself may lie on several devices.
    runs = [math.prod(shape[axis:]) for axis in range(len(shape))]
    axis = max((k for k, run in enumerate(runs) if run % width == 0), default=None)
    blocks = (-(-size // width),) if axis is None else (*shape[:axis], runs[axis] // width)
    words = chacha20_blocks(key, *_counters(blocks), (domain, 0))
    pieces = [_interleave(words[start : start + width]) for start in range(0, _WORDS, width)]
    if axis is not None:
        return pieces
    # Not whole blocks. A gather, rather than a slice, since its operand is never sharded (every device computes all of the blocks): a slice
    # of sharded blocks would communicate. The barrier keeps what follows, which vectorises, out of the gather's loop, which does not.
    index = _counters(shape)[0]
    return [lax.optimization_barrier(p.reshape(-1).at[index].get(mode="promise_in_bounds")) for p in pieces]


def _interleave(words: UInt32[Array, "width *blocks"]) -> UInt32[Array, "*blocks width"]:
    """Moves the words of a block, 8 or 16 of them, side by side."""
    # By selection, not by transposition: it is one elementwise loop, and how the result is cut among devices does not reach the words,
    # all of which a device needs for any of them.
    width = len(words)
    number = lax.broadcasted_iota(np.uint32, (*words.shape[1:], width), words.ndim - 1)
    rows = [jnp.broadcast_to(word[..., None], number.shape) for word in words]
    for bit in range(width.bit_length() - 1):
        is_odd = (number >> np.uint32(bit)) & np.uint32(1) == 1
        rows = [jnp.where(is_odd, odd, even) for even, odd in zip(rows[::2], rows[1::2], strict=True)]
    return rows[0]


def word_pairs(key: UInt32[Array, "8"], shape: tuple[int, ...]) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Two words for every position of an array of that shape, to which the results have yet to be reshaped."""
    first, second = _keystream(key, shape, _PAIRS, 2)
    return first, second


def word_pairs_of_blocks(
    key: UInt32[Array, "8"], low: UInt32[Array, " blocks"], high: UInt32[Array, " blocks"]
) -> tuple[UInt32[Array, "blocks 8"], UInt32[Array, "blocks 8"]]:
    """Those of the positions, 8 to a block, whose blocks have these numbers (halves of 64 bits)."""
    words = chacha20_blocks(key, low, high, (_PAIRS, 0))
    return _interleave(words[:8]), _interleave(words[8:])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_bits(key: UInt32[Array, "8"], bit_width: int, shape: tuple[int, ...]) -> UInt[Array, "..."]:
    dtype = _UINTS[bit_width]
    if bit_width == 64:
        return lax.bitcast_convert_type(_keystream(key, (*shape, 2))[0].reshape(*shape, 2), dtype)
    return _keystream(key, shape)[0].reshape(shape).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def _split(key: UInt32[Array, "8"], shape: tuple[int, ...]) -> UInt32[Array, "*shape 8"]:
    return _derive(key, *_counters(shape), _SPLIT)


@jax.jit
def _fold_in(key: UInt32[Array, "8"], data: Integer[Array, ""]) -> UInt32[Array, "8"]:
    low = data.astype(jnp.uint32)
    return _derive(key, low, jnp.zeros_like(low), _FOLD_IN)


@jax.jit
def _seed(seed: Integer[Array, ""]) -> UInt32[Array, "8"]:
    low = seed.astype(jnp.uint32)
    high = (seed >> 32).astype(jnp.uint32) if seed.dtype.itemsize == 8 else jnp.zeros_like(low)
    return _derive(jnp.zeros(_KEY_WORDS, jnp.uint32), low, high, _SEED)


def _derive(key: UInt32[Array, "8"], low: Array, high: Array, domain: int) -> UInt32[Array, "*shape 8"]:
    return jnp.moveaxis(chacha20_blocks(key, low, high, (domain, 0))[:_KEY_WORDS], 0, -1)


CHACHA20: Any = define_prng_impl(
    key_shape=(_KEY_WORDS,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="chacha20",
    tag="chacha20",
)
