"""Every example draws a group, and one group costs as much as another."""

import numpy as np

from ..random import Domain, generator
from ._permutation import permuted


def random_group(num_examples: int, groups: int, group: int, seed: int, number: int = 0) -> np.ndarray:
    """The members of a group, sorted, where every example draws one of `groups` groups uniformly and independently.

    Independent draws are multinomial sizes and a random order. Sizes come from a binary tree of binomial splits, of which only the way to
    the group is drawn, so that time and memory are proportional to the group, however many others there are. `number` tells repeated
    dealings apart.
    """
    begin, size, low, high, node = 0, num_examples, 0, groups, 1
    while high - low > 1 and size:
        middle = (low + high) // 2
        rng = generator(seed, node, Domain.GROUPS | number << 8)
        left = int(rng.binomial(size, (middle - low) / (high - low)))
        if group < middle:
            size, high, node = left, middle, 2 * node
        else:
            begin, size, low, node = begin + left, size - left, middle, 2 * node + 1
    return np.sort(permuted(np.arange(begin, begin + size, dtype=np.int64), num_examples, seed, number))
