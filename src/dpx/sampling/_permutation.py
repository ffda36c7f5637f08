"""A random order of any number of examples, of which one entry costs as much as another."""

import functools

import numpy as np

from ..random import Domain, generator

_TABLE = 2**20
_ROUNDS = 12


def permuted(positions: np.ndarray, size: int, seed: int, number: int = 0) -> np.ndarray:
    """Which of `size` examples stand at `positions` of the permutation with that seed and number.

    Up to about a million examples the permutation is drawn as a table of bounded size; above, it is a Feistel network with cycle walking, so
    that time and memory are proportional to the number of positions. The network is a bijection for every key; it mixes well, and is no
    cipher: nothing in the accounting may rest on its being one.
    """
    positions = np.asarray(positions, np.int64)
    if size <= _TABLE:
        return _table(size, seed, number)[positions]
    keys = _round_keys(seed, number)
    half = (size.bit_length() + 1) // 2
    out = _feistel(positions.astype(np.uint64), half, keys)
    while (
        True
    ):  # the network permutes a power of four above `size`: walk on until back inside, at most four steps on average
        outside = out >= size
        if not outside.any():
            return out.astype(np.int64)
        out[outside] = _feistel(out[outside], half, keys)


@functools.lru_cache(maxsize=4)
def _table(size: int, seed: int, number: int) -> np.ndarray:
    table = generator(seed, number, Domain.PERMUTATION).permutation(size)
    table.flags.writeable = False
    return table


@functools.lru_cache(maxsize=16)
def _round_keys(seed: int, number: int) -> tuple[int, ...]:
    return tuple(generator(seed, number, Domain.PERMUTATION).integers(0, 2**64, _ROUNDS, np.uint64).tolist())


def _feistel(x: np.ndarray, half: int, keys: tuple[int, ...]) -> np.ndarray:
    shift, low = np.uint64(half), np.uint64(2**half - 1)
    left, right = x >> shift, x & low
    for key in keys:
        left, right = right, left ^ (_mix(right + np.uint64(key)) & low)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser (Steele, Lea and Flood 2014): every input bit flips every output bit half of the time."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
