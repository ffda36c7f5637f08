"""Random numbers as a pure function of (seed, step), on the host."""

from typing import Any

import numpy as np

from .._checks import integer


def check_seed(call: str, seed: Any) -> int:
    """A seed of at most 128 bits."""
    number = integer(call, seed)
    if not 0 <= number < 2**128:
        raise ValueError(f"`{call}` must lie between 0 and 2**128 - 1; got {number}.")
    return number


def generator(seed: int, step: int, domain: int) -> np.random.Generator:
    """An independent stream for every (seed, step, domain): a counter of Philox, keyed by the seed, that starts there.

    The low half of the 256-bit counter counts the numbers drawn, so that streams cannot meet.
    """
    # as Python integers: NumPy has none of 128 bits
    seed, step = check_seed("seed=...", seed), integer("step=...", step)
    return np.random.Generator(np.random.Philox(key=seed, counter=(step << 128) | (domain << 192)))
