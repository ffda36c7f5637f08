r"""Brackets: beside the upper bound on epsilon, a lower bound of the same mechanism, which some attacker attains."""

import functools
import math
from typing import TYPE_CHECKING, Any

from .._checks import probability
from ..events import canonical, composed, parts, uncoupled
from ._neighbours import AccountantName, Adjacency, Neighbours, check_adjacency
from ._questions import epsilon as upper_epsilon
from ._rules import attacks_of, attained_by
from .losses._optimistic import lower_epsilon, rough_epsilon
from .losses._pair import AbstractPair, sampled_discrete_gaussian

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_GOAL = 4e-3  # relative gap at which a finer grid is no longer tried
_MSG_FAULT = (
    "The bounds on epsilon contradict each other: {upper!r} from above, {lower!r} from below, of {event} under `adjacency={adjacency!r}` at delta "
    "{delta!r}. One of them is wrong; rely on neither and report this to the authors of dpx."
)


def epsilon_bracket(
    event: "DpEvent",
    delta: float,
    *,
    adjacency: Neighbours = "add_or_remove_one",
    accountant: AccountantName = "pld",
) -> tuple[float, float]:
    r"""A lower and an upper bound on the least $\varepsilon$ at which a mechanism of that event is $(\varepsilon, \delta)$-DP in the worst case.

    The upper one is that of `dpx.accounting.epsilon`. The lower one is proven too: what an attacker reaches who picks two neighbouring data sets,
    and what all gradients are, against the mechanism with exactly the stated parameters. It counts as known what the upper bound counts as known,
    such as who is in which of the groups that take turns, or the order of a shuffle.

    | event | from below | apart |
    |---|---|---|
    | Gaussian, any composition | the exact formula | rounding |
    | Poisson-sampled Gaussian or Laplace, any composition | the pair that dominates is reached; its losses on a grid | less than 1 % |
    | random allocation | the same, likelihood ratios contracted by convexity | less than 1 % |
    | fixed size | the best of a few attacks | 1 % for one step of replacement, 5 to 20 % for many; far where one is emptied |
    | balls in bins with correlated noise | inner products lowered (Kahane's inequality) | up to 70 %; less than 1 % if bins do not overlap |
    | b-min-sep | samples; wrong with probability 1e-8 | 5 to 15 % |
    | truncated Poisson | others without a gradient, or with the opposite one | little if batches are seldom cut, far if often |
    | a coupling | that of its event, its failures in the attacker's disfavour | as its event |
    | zero-concentrated DP | a Gaussian mechanism of that cost | the looseness of Rényi accounting |
    | any other | nothing is attacked: 0, or what the rest of a composition gives | - |

    **Arguments:**

    - `event`, `delta`, `adjacency`, `accountant`: as for `dpx.accounting.epsilon`.

    **Returns:**

    `(lower, upper)`, with `0 <= lower <= upper`.

    **Raises:**

    - `ValueError` as `dpx.accounting.epsilon` does.
    - `ArithmeticError` if the two contradict each other, which would be a fault of dpx.

    ??? cite "Reference"

        Optimistic losses: Koskela, Jälkö and Honkela, *Computing tight differential privacy guarantees using FFT*, AISTATS 2020; Doroshenko et al.,
        *Connect the dots*, PETS 2022. That what dominates is reached: Zhu, Dong and Wang, AISTATS 2022; Feldman and Shenfeld 2025.
    """
    upper = upper_epsilon(event, delta, adjacency=adjacency, accountant=accountant)
    return check_bracket(
        attained_epsilon(event, delta, adjacency=adjacency, upper=upper), upper, event, delta, adjacency
    )


def check_bracket(lower: float, upper: float, event: Any, delta: float, adjacency: Neighbours) -> tuple[float, float]:
    """Both, if they are a bracket."""
    if not lower <= upper:
        raise ArithmeticError(
            _MSG_FAULT.format(upper=upper, lower=lower, event=event, adjacency=adjacency, delta=delta)
        )
    return lower, upper


def attained_epsilon(
    event: "DpEvent", delta: float, *, adjacency: Neighbours = "add_or_remove_one", upper: float = math.inf
) -> float:
    r"""An $\varepsilon$ below which the worst mechanism of that event is not $(\varepsilon, \delta)$-DP: the lower end of `epsilon_bracket`.

    **Arguments:**

    - `event`, `delta`, `adjacency`: as for `dpx.accounting.epsilon`.
    - `upper`: an upper bound, where known: finer grids are tried only if the two are far apart.
    """
    delta = probability("delta", delta)
    adjacency = check_adjacency(adjacency)
    event = canonical(event)
    coupling, leaves = uncoupled(event)
    plain = composed(leaves)
    found = _attained(plain, delta, adjacency, upper)
    if not coupling or found == 0:
        return found
    # of whoever is (epsilon, delta)-DP, the event is (epsilon, delta + tau (1 + e^epsilon))-DP
    raised = delta + coupling * (1 + math.exp(min(found, 700.0)))
    return min(found, _attained(plain, raised, adjacency, upper)) if raised < 1 else 0.0


def attained_discrete_gaussian(
    scale: float, shift: int, probability: float, count: int, delta: float, upper: float = math.inf
) -> float:
    r"""The same for `count` sums of integers, moved by `shift` with that probability, with discrete Gaussian noise of that scale."""
    pair = sampled_discrete_gaussian(scale, shift, probability)
    return best_attack([(((pair,), (pair.swapped,)), count)], delta, upper)


@functools.lru_cache(maxsize=256)
def _attained(event: Any, delta: float, adjacency: Adjacency, upper: float) -> float:
    import dp_accounting as da

    pairs = parts(composed(parts(event)))
    if any(isinstance(e, da.NonPrivateDpEvent) for e, _ in pairs):
        return math.inf
    if any(isinstance(e, da.GaussianDpEvent | da.LaplaceDpEvent) and e.noise_multiplier == 0 for e, _ in pairs):
        return math.inf
    if len(pairs) == 1 and (found := attained_by(*pairs[0], adjacency, delta)) is not None:
        return found
    return best_attack([(attacks_of(e, adjacency), n) for e, n in pairs], delta, upper)


def best_attack(composition: Any, delta: float, upper: float = math.inf) -> float:
    """The lower bound from the best of the attacks on each part of a composition, `(attacks, count)`, in the better direction."""
    directions: list[tuple[float, list[tuple[AbstractPair, int]]]] = []
    for side in (0, 1):
        chosen: list[tuple[AbstractPair, int]] = []
        for choices, count in composition:
            if choices[side]:
                pairs = choices[side]
                best = pairs[0] if len(pairs) == 1 else max(pairs, key=lambda p: rough_epsilon([(p, count)], delta))
                chosen.append((best, count))
        directions.append((rough_epsilon(chosen, delta), chosen))
    found = 0.0
    for rough, chosen in sorted(directions, key=lambda d: -d[0]):
        if rough <= found:  # no attack of this direction reaches more than that
            break
        before = 0.0
        for fineness in (1.0, 3.0, 10.0):
            found = max(found, lower_epsilon(chosen, delta, fineness))
            goal = min(upper, rough)
            # an attack that is not the worst one gets no better on finer grids
            if found >= (1 - _GOAL) * goal or (before and found - before < 0.2 * (goal - found)):
                break
            before = found
    return found
