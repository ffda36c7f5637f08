"""What estimators are given, checked: scores, confidence, guesses."""

from typing import Any

import numpy as np

from .._checks import described, positive_int, probability, real_array, real_number

_MSG_NAN = (
    "`{call}` has {count} NaN among {size} scores. A score that is not a number orders nothing: find out where it comes from, or, if it means "
    "that an attack gave up, say so with -inf (surely out) or inf (surely in) before the coins are known."
)
_MSG_EQUAL = (
    "`{name}(scores_in, scores_out)` got twice the same numbers, so that nothing is measured. Give the scores of runs with the canary, and those of "
    "other runs without it."
)


def scores(call: str, value: Any) -> np.ndarray:
    """Scores of so many canaries or runs as a float64 vector; infinite ones are allowed, NaN is not."""
    array = real_array(call, value, "a vector of scores")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"`{call}` must be a vector of at least one score; got {described(value)}.")
    count = int(np.isnan(array).sum())
    if count:
        raise ValueError(_MSG_NAN.format(call=call, count=count, size=array.size))
    return array


def two_samples(name: str, scores_in: Any, scores_out: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores of independent runs with and without a canary."""
    inside = scores(f"{name}(scores_in=...)", scores_in)
    outside = scores(f"{name}(scores_out=...)", scores_out)
    # constants, coins and counts may well agree
    if scores_in is scores_out or (np.array_equal(inside, outside) and len(np.unique(inside)) > 2):
        raise ValueError(_MSG_EQUAL.format(name=name))
    return inside, outside


def failure(call: str, confidence: Any) -> float:
    """One minus the confidence."""
    return 1 - probability(call, confidence)


def delta_of(call: str, delta: Any) -> float:
    r"""A $\delta$ in [0, 1)."""
    number = real_number(call, delta)
    if not 0 <= number < 1:
        raise ValueError(f"`{call}` must lie in [0, 1); got {number}.")
    return number


def count(call: str, value: Any) -> int:
    """A number of things, zero too."""
    return positive_int(call, value) if value != 0 or isinstance(value, bool) else 0


def pairs_of_guesses(call: str, guesses: Any, canaries: int) -> tuple[tuple[int, int], ...]:
    """One or several `(k_in, k_out)`: how many canaries are guessed to be in, and out."""
    what = (
        f"`{call}` must be `(k_in, k_out)`, how many canaries are guessed in and out, or a tuple of such pairs, "
        "fixed before the scores are known"
    )
    if not isinstance(guesses, tuple | list) or not guesses:
        raise ValueError(f"{what}; got {described(guesses)}.")
    pairs = guesses if all(isinstance(g, tuple | list) for g in guesses) else (guesses,)
    found = []
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"{what}; got {described(guesses)}.")
        inside, outside = (count(call, k) for k in pair)
        if not 0 < inside + outside <= canaries:
            raise ValueError(f"{what}: between 1 and {canaries} of them in all; got {inside} and {outside}.")
        found.append((inside, outside))
    return tuple(found)
