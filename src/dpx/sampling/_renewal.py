"""A renewal process for every example: it takes part, rests, and then takes part again after a geometric wait."""

import functools
from typing import Any

import numpy as np

from ..random import Domain, generator
from ._permutation import permuted

Recent = tuple[np.ndarray, ...]


def renewal_batch(
    num_examples: int, rate: float, share: float, rest: int, is_warm: bool, seed: int, step: int
) -> np.ndarray:
    """Who takes part in `step`: everybody who did not in the `rest` steps before, independently with probability `rate`.

    With `is_warm` the steps before step 0 are as any others, in which an example takes part with probability `share`; otherwise nobody rests.

    A step depends on the `rest` steps before it, so it is replayed from the beginning, or from the latest step that was asked for with the
    same seed, which is remembered: in order, a step costs what the batches of `rest` steps do.
    """
    memory = _memory(num_examples, rate, share, rest, is_warm, seed)
    latest, recent = memory[0] or (-1, _before(num_examples, share, rest, is_warm, seed))
    if latest - step >= len(recent):
        latest, recent = -1, _before(num_examples, share, rest, is_warm, seed)
    while latest < step:
        latest += 1
        resting = recent[len(recent) - rest :]
        recent = (*resting, _next(num_examples, rate, resting, generator(seed, latest, Domain.RENEWAL_STEPS)))
    memory[0] = (latest, recent)  # replaced as a whole, so that threads see one or the other
    return recent[step - latest - 1].copy()


def _next(num_examples: int, rate: float, resting: Recent, rng: np.random.Generator) -> np.ndarray:
    rests = np.sort(np.concatenate([np.zeros(0, np.int64), *resting]))
    eligible = num_examples - len(rests)
    taken = int(rng.binomial(eligible, rate)) if eligible else 0
    if not taken:
        return np.zeros(0, np.int64)
    ranks = np.sort(rng.choice(eligible, taken, replace=False, shuffle=False))
    # from the rank among those who may take part to the number: add how many resting ones stand before
    return ranks + np.searchsorted(rests - np.arange(len(rests)), ranks, side="right")


def _before(num_examples: int, share: float, rest: int, is_warm: bool, seed: int) -> Recent:
    """The batches of the `rest` steps before the first."""
    if not is_warm or rest == 0:
        return (np.zeros(0, np.int64),) * rest
    sizes = generator(seed, 0, Domain.RENEWAL_RESTS).multinomial(num_examples, [*[share] * rest, 1 - share * rest])
    edges = np.cumsum(sizes[:-1])
    return tuple(np.split(permuted(np.arange(edges[-1]), num_examples, seed), edges[:-1]))


@functools.lru_cache(maxsize=4)
def _memory(*key: Any) -> list[tuple[int, Recent] | None]:
    """A place for the latest step of one process."""
    del key
    return [None]
