r"""Brackets: beside the upper bound on epsilon, a lower bound of the same mechanism, which some attacker attains."""

import functools
import math
import secrets
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import probability
from ..events import canonical, composed, parts, uncoupled
from ._accountants import AccountantName, Adjacency, check_adjacency, epsilon as upper_epsilon
from ._attacks import attacks, sampled_discrete_gaussian
from ._fixed_size import gaussian_profile
from ._optimistic import AbstractPair, lower_epsilon, rough_epsilon

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_GOAL = 4e-3  # relative gap at which a finer grid is no longer tried
_SAMPLES = (2**20, 2**23)
_FAILURE = 1e-8
_OCTAVE = 1024  # epsilons that samples are asked about
_MSG_FAULT = (
    "The bounds on epsilon contradict each other: {upper!r} from above, {lower!r} from below, of {event} under `adjacency={adjacency!r}` at delta "
    "{delta!r}. One of them is wrong; rely on neither and report this to the authors of dpx."
)


def epsilon_bracket(
    event: "DpEvent",
    delta: float,
    *,
    adjacency: Adjacency = "add_or_remove_one",
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


def check_bracket(lower: float, upper: float, event: Any, delta: float, adjacency: str) -> tuple[float, float]:
    """Both, if they are a bracket."""
    if not lower <= upper:
        raise ArithmeticError(
            _MSG_FAULT.format(upper=upper, lower=lower, event=event, adjacency=adjacency, delta=delta)
        )
    return lower, upper


def attained_epsilon(
    event: "DpEvent", delta: float, *, adjacency: Adjacency = "add_or_remove_one", upper: float = math.inf
) -> float:
    r"""An $\varepsilon$ below which the worst mechanism of that event is not $(\varepsilon, \delta)$-DP: the lower end of `epsilon_bracket`.

    **Arguments:**

    - `event`, `delta`, `adjacency`: as for `dpx.accounting.epsilon`.
    - `upper`: an upper bound, where known: finer grids are tried only if the two are far apart.
    """
    delta = probability("delta", delta)
    check_adjacency(adjacency)
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

    from ..events import MinSepSampledDpEvent

    pairs = parts(composed(parts(event)))
    if any(isinstance(e, da.NonPrivateDpEvent) for e, _ in pairs):
        return math.inf
    if any(isinstance(e, da.GaussianDpEvent | da.LaplaceDpEvent) and e.noise_multiplier == 0 for e, _ in pairs):
        return math.inf
    if len(pairs) == 1:
        only, count = pairs[0]
        if isinstance(only, da.GaussianDpEvent):
            return gaussian_epsilon(
                only.noise_multiplier / math.sqrt(count) / (2 if adjacency == "replace_one" else 1), delta
            )
        if isinstance(only, MinSepSampledDpEvent) and count == 1:
            return 0.0 if adjacency == "replace_one" else _sampled_epsilon(only, delta)
    return best_attack([(attacks(e, adjacency), count) for e, count in pairs], delta, upper)


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


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """From below, by the exact formula (Balle and Wang 2018)."""
    from dp_accounting import get_epsilon_gaussian

    multiplier = noise_multiplier * (1 + 1e-9)
    found = max(0.0, float(get_epsilon_gaussian(multiplier, delta)) * (1 - 1e-9) - 1e-12)
    # its own tolerance is absolute: what it finds is checked, and lowered if need be
    for _ in range(60):
        if found == 0 or gaussian_profile(np.array([found]), multiplier)[0] > delta * (1 + 1e-11):
            return found
        found = max(0.0, found * (1 - 1e-7) - 1e-12)
    return 0.0


def _sampled_epsilon(event: Any, delta: float) -> float:
    """b-min-sep sampling, whose likelihood ratios are simulated: too large with probability 1e-8 at most, whatever is asked."""
    from ._monte_carlo import min_sep_losses

    samples = _SAMPLES[0]
    while samples < _SAMPLES[1] and samples * delta < 80:
        samples *= 2
    structure = (event.coefficients, event.steps, event.min_separation, event.sampling_probability, event.is_warm)
    remove, add = min_sep_losses(
        event.noise_multiplier, *structure, samples=samples, seed=_seed(event.noise_multiplier, structure)
    )
    raised = 2 * (1e-4 + event.steps * 2.0**-21)  # by half of that they were rounded up, and by half they may be wrong
    room = math.log(2 * 20 * _OCTAVE / _FAILURE) / samples
    found = 0.0
    for losses in (remove, add):
        losses = np.sort(losses[np.isfinite(losses)] - raised)[::-1]
        losses = losses[losses > 0]

        def is_above(place: int, losses: np.ndarray = losses) -> bool:
            epsilon = 2.0 ** (place / _OCTAVE)
            mean = float(-np.expm1(np.minimum(epsilon - losses, 0.0)).sum()) / samples
            return _kl_lower(mean, room) > delta

        low, high = -10 * _OCTAVE, 10 * _OCTAVE
        if not is_above(low):
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_above(middle) else (low, middle)
        found = max(found, 2.0 ** (low / _OCTAVE))
    return found


@functools.lru_cache(maxsize=64)
def _seed(multiplier: float, structure: Any) -> int:
    """A secret of its own: the samples of the upper bound decide nothing here."""
    del multiplier, structure
    return secrets.randbits(128)


def _kl_lower(mean: float, room: float) -> float:
    """The least mean of which samples of this mean are not yet a surprise (Chernoff and Hoeffding)."""
    low, high = 0.0, mean
    for _ in range(100):
        middle = 0.5 * (low + high)
        if not 0 < middle < mean:
            break
        divergence = mean * math.log(mean / middle)
        divergence += (1 - mean) * math.log((1 - mean) / (1 - middle)) if mean < 1 else 0.0
        low, high = (low, middle) if divergence <= room else (middle, high)
    return low
