"""Random numbers as a pure function of (seed, step), on the host."""

import enum
from typing import Any

import numpy as np

from .._checks import integer


@enum.unique
class Domain(enum.IntEnum):
    """What a stream is for. Two that share a number share their randomness: whoever needs a stream adds a line here.

    Numbers are below 256, so that one purpose may have many streams (`domain | number << 8`), and never change: batches follow from them.
    """

    POISSON = 1
    PERMUTATION = 2
    CYCLIC_GROUP_SIZES = 3
    CYCLIC_COINS = 4
    GROUPS = 5
    FIXED_SIZE = 6
    RENEWAL_STEPS = 7
    RENEWAL_RESTS = 8
    MIN_SEP_CUTS = 9
    ROWS_OF_USERS = 10
    OWNERS = 11
    NUMBER_OF_RUNS = 0x6B


def check_seed(call: str, seed: Any) -> int:
    """A seed of at most 128 bits."""
    number = integer(call, seed)
    if not 0 <= number < 2**128:
        raise ValueError(f"`{call}` must lie between 0 and 2**128 - 1; got {number}.")
    return number


def generator(seed: int, step: int, domain: int) -> np.random.Generator:
    """An independent stream for every (seed, step, domain): a counter of Philox, keyed by the seed, that starts there.

    The low half of the 256-bit counter counts the numbers drawn, so that streams cannot meet.

    **Arguments:**

    - `seed`: at most 128 bits.
    - `step`: below 2**64.
    - `domain`: a `Domain`, or one with a number of its own in the bits above the eighth.
    """
    # as Python integers: NumPy has none of 128 bits
    seed, step = check_seed("seed=...", seed), integer("step=...", step)
    if not 0 <= step < 2**64:  # else it would reach the domain's bits
        raise ValueError(f"`step=...` must lie between 0 and 2**64 - 1; got {step}.")
    return np.random.Generator(np.random.Philox(key=seed, counter=(step << 128) | (int(domain) << 192)))
