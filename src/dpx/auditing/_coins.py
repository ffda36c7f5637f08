"""The design of a one-run audit: which canaries are in, by independent coins."""

from typing import Any

import equinox as eqx
import numpy as np

from .._checks import described, flag, positive_int, probability
from .._types import Integer, RealScalarLike
from ..random import check_seed, fresh_seed

_MSG_HALF = (
    "`Coins(included)`: exactly half of the {size} canaries are in. If they were drawn like that (a random half), they are not independent, and what "
    "is known of one tells about the others: with two canaries and no leakage both are guessed with probability 1/2, where the bound says 1/4. "
    "Draw them with `flip_coins({size})`; if independent coins happened to fall so, say `Coins(included, independent=True)`."
)
_MSG_UNFAIR = (
    "`Coins(included)`: {count} of {size} canaries are in, which coins of probability {probability:g} give with probability {p:.1g}. Draw them with "
    "`flip_coins({size})`; if each was in with another probability, independently, say `Coins(included, probability=...)`."
)


class Coins(eqx.Module):
    """Which canaries are in: one independent coin each, flipped before the run and used nowhere else. `flip_coins` makes them.

    `repr` does not show how they fell: whoever attacks may not know.

    **Arguments:**

    - `included`: `Bool[m]`, which are in.
    - `probability`: with which each was; 1/2 unless it is said.
    - `independent`: that exactly half are in is chance.

    **Raises:** `ValueError` if they cannot be such coins: exactly half in, or a number that has probability below 1e-6.
    """

    included: np.ndarray = eqx.field(static=False)
    probability: float = eqx.field(static=True)

    def __init__(self, included: Any, probability: RealScalarLike = 0.5, *, independent: bool = False):
        array = np.asarray(included)
        if array.ndim != 1 or array.size == 0 or array.dtype != np.bool_:
            raise ValueError(
                f"`Coins(included=...)` must be a vector of booleans, one for each canary; got {described(included)}."
            )
        rate = _check_probability("Coins(probability=...)", probability)
        if not flag("Coins(independent=...)", independent):
            _check_drawn(array, rate)
        self.included = array.copy()
        self.included.setflags(write=False)
        self.probability = rate

    @property
    def number(self) -> int:
        """How many canaries there are."""
        return len(self.included)

    def __repr__(self) -> str:
        return f"Coins({self.number} canaries, each in with probability {self.probability:g})"

    __str__ = __repr__


def _check_probability(call: str, value: Any) -> float:
    return probability(call, value)


def _check_drawn(included: np.ndarray, rate: float) -> None:
    from scipy import stats

    size, count = len(included), int(included.sum())
    p = float(stats.binomtest(count, size, rate).pvalue)
    if p < 1e-6:
        raise ValueError(_MSG_UNFAIR.format(count=count, size=size, probability=rate, p=p))
    if rate == 0.5 and 2 * count == size:
        raise ValueError(_MSG_HALF.format(size=size))


def flip_coins(num_canaries: Integer, *, seed: Integer | None = None) -> Coins:
    """One fair coin for each canary, independent of each other and of everything else.

    **Arguments:**

    - `num_canaries`: how many.
    - `seed`: makes an audit reproducible, of up to 128 bits; by default entropy from the operating system. Whoever guesses must not know it, and
        nothing else may be drawn from it.
    """
    number = positive_int("flip_coins(num_canaries=...)", num_canaries)
    seed = fresh_seed() if seed is None else check_seed("flip_coins(seed=...)", seed)
    # a stream of its own: the seed may also be that of canaries or of a sampler
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, 0xC0155])))
    return Coins(rng.integers(0, 2, number) == 1, independent=True)
