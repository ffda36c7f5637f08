"""Random numbers as a pure function of (seed, step), on the host."""

import operator
from typing import Any

import numpy as np


def check_seed(call: str, seed: Any) -> int:
    """A seed of at most 128 bits."""
    try:
        number = operator.index(seed)
    except TypeError:
        raise ValueError(f"`{call}` must be an integer; got {seed!r}.") from None
    if not 0 <= number < 2**128:
        raise ValueError(f"`{call}` must lie between 0 and 2**128 - 1; got {number}.")
    return number


def generator(seed: int, step: int, domain: int) -> np.random.Generator:
    """An independent stream for every (seed, step, domain): a counter of Philox, keyed by the seed, that starts there.

    The low half of the 256-bit counter counts the numbers drawn, so that streams cannot meet.
    """
    seed = check_seed("seed=...", seed)
    return np.random.Generator(np.random.Philox(key=seed, counter=(step << 128) | (domain << 192)))
