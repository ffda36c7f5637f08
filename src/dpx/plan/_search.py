"""Finding the noise multiplier, the number of steps or the batch size with which a budget is just kept. Knows no plan: candidates are given."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

from .. import accounting
from .._checks import positive_float, probability, real_number
from ..sampling import AbstractSampler, UserSampler

Parameter = Literal["noise_multiplier", "steps", "batch_size"]
"""What a calibration may choose."""

# What is tried: anything that has an `event`, `delta(epsilon)` and `trade_off()`. No protocol, which would be asked for each of them at run time.
P = TypeVar("P")


class Target(Generic[P]):
    r"""What a plan must keep: a measure of its cost that falls with the noise, and a limit.

    **Arguments:**

    - `description`: the limit in words.
    - `limit`: the number that `measures` must not exceed.
    - `guides`: cheaper stand-ins for the measure, ever closer to it, with the relative accuracy that is worth asking of each.
    - `measure`: what is proven.
    """

    def __init__(
        self,
        description: str,
        limit: float,
        guides: list[tuple[Callable[[P], float], float]],
        measure: Callable[[P], float],
    ):
        self.description, self.limit, self.guides, self.measure = description, limit, guides, measure

    def excess(self, measure: Callable[[P], float]) -> Callable[[P], float]:
        """The logarithm of measure over limit."""

        def of(candidate: P) -> float:
            value = measure(candidate)
            return -math.inf if value <= 0 else math.log(value / self.limit)  # NaN keeps no limit

        return of


def target_of(
    epsilon: Any,
    delta: Any,
    advantage: Any,
    true_positive_rate: Any,
    false_positive_rate: Any,
    *,
    adjacency: Any,
    accountant: Any,
    num_examples: int,
) -> Target[Any]:
    """What was asked for: epsilon at delta, or a bound on every attack. Arguments as for `PrivacyPlan.calibrate`."""
    is_epsilon, is_advantage = epsilon is not None, advantage is not None
    is_rate = true_positive_rate is not None or false_positive_rate is not None
    if is_epsilon + is_advantage + is_rate != 1:
        raise ValueError(
            "`PrivacyPlan.calibrate` takes one budget: `epsilon=` with `delta=`, or `advantage=`, or `true_positive_rate=` with "
            "`false_positive_rate=`."
        )
    if is_epsilon:
        if delta is None:
            raise ValueError(
                f"`PrivacyPlan.calibrate(epsilon={epsilon})` needs a `delta=` too, well below 1 / num_examples = "
                f"{1 / num_examples:g}."
            )
        return epsilon_target(epsilon, delta, adjacency, accountant)
    if delta is not None:
        raise ValueError("`delta=` goes with `epsilon=`; an attack's advantage or rates need none.")
    if is_rate and (true_positive_rate is None or false_positive_rate is None):
        raise ValueError("`true_positive_rate=` and `false_positive_rate=` go together.")
    return attack_target(adjacency, advantage, true_positive_rate, false_positive_rate)


def epsilon_target(epsilon: Any, delta: Any, adjacency: Any, accountant: Any) -> Target[Any]:
    """Keep epsilon at delta."""
    if real_number("PrivacyPlan.calibrate(epsilon=...)", epsilon) == math.inf:
        raise ValueError(
            "`PrivacyPlan.calibrate(epsilon=inf)` is a run without privacy, which needs no noise: use `clipping=NoClipping()` and no budget."
        )
    epsilon = positive_float("PrivacyPlan.calibrate(epsilon=...)", epsilon)
    delta = accounting.check_delta("PrivacyPlan.calibrate(delta=...)", delta)
    options: Any = {"adjacency": adjacency, "accountant": accountant}
    exact = lambda candidate: accounting.epsilon(candidate.event, delta, **options)
    if accountant == "rdp" and delta > 0 and epsilon <= 1.01 * accounting.least_renyi_epsilon(delta):
        raise ValueError(
            f"`accountant='rdp'` has no useful answer for epsilon {epsilon:g} at delta {delta:g}: its orders are finite, and what they say of no "
            f"loss at all is epsilon {accounting.least_renyi_epsilon(delta):.3g}. Use `accountant='pld'`."
        )
    rough = accounting.rough_renyi_epsilon if accountant == "rdp" else accounting.rough_epsilon
    guide = lambda candidate: rough(candidate.event, delta, adjacency)
    # the guide lands within a per cent, at a tenth of the price
    return Target(f"epsilon {epsilon:g} at delta {delta:g}", epsilon, [(guide, 5e-3)] if delta > 0 else [], exact)


def attack_target(adjacency: Any, advantage: Any, true_positive_rate: Any, false_positive_rate: Any) -> Target[Any]:
    """Keep the advantage of every attack, or its true-positive rate at a false-positive rate."""
    guess = lambda candidate: accounting.rough_distribution(candidate.event, adjacency)
    if advantage is not None:
        limit = probability("PrivacyPlan.calibrate(advantage=...)", advantage)
        guide = lambda candidate: guess(candidate).get_delta(0.0)
        return Target(f"attack advantage {limit:g}", limit, [(guide, 5e-3)], lambda candidate: candidate.delta(0.0))
    limit = probability("PrivacyPlan.calibrate(true_positive_rate=...)", true_positive_rate)
    rate = probability("PrivacyPlan.calibrate(false_positive_rate=...)", false_positive_rate)
    if limit <= rate:
        raise ValueError(
            f"`PrivacyPlan.calibrate(true_positive_rate={limit:g}, false_positive_rate={rate:g})`: who guesses has equal rates, so no noise brings "
            "the first down to that. Ask for a larger one."
        )
    measure = lambda candidate: float(candidate.trade_off().true_positive_rate(rate))
    return Target(f"true-positive rate {limit:g} at false-positive rate {rate:g}", limit, [(measure, 1e-2)], measure)


def least_noise(candidate: Callable[[float], P], target: Target[P]) -> P:
    """The candidate with the least noise multiplier that meets the target, within a relative 2e-5."""
    seen: dict[float, P] = {}

    def at(measure: Callable[[P], float]) -> Callable[[float], float]:
        excess = target.excess(measure)

        def of(multiplier: float) -> float:
            seen[multiplier] = candidate(multiplier)
            return excess(seen[multiplier])

        return of

    guess, slope = 1.0, None
    for measure, tolerance in target.guides:
        try:
            guess, slope = accounting.near_root(at(measure), guess, tolerance=tolerance)
        except ValueError:
            continue  # the exact search says what is wrong, or that nothing is
    try:
        found = seen[accounting.least_feasible(at(target.measure), guess, tolerance=2e-5, slope=slope)]
    except OverflowError as error:
        raise ValueError(f"No noise multiplier that floats can hold keeps {target.description}.") from error
    return found


def largest(
    candidate: Callable[[AbstractSampler], P],
    target: Target[P],
    parameter: str,
    sampler: AbstractSampler,
    noise_multiplier: float,
) -> P:
    """The candidate with the most `"steps"`, or the largest `"batch_size"`, of a sampler, that meets the target."""
    caps = [sampler.num_examples, getattr(sampler, "max_batch_size", None) or math.inf]
    most = int(min(caps)) if parameter == "batch_size" else 2**24

    def of_size(number: int) -> P:
        return candidate(_resized(sampler, **{parameter: number}))

    def whole(x: float) -> int:
        return max(1, min(most, round(1 / x)))

    def of(measure: Callable[[P], float]) -> Callable[[float], float]:
        excess = target.excess(measure)
        return lambda x: excess(of_size(whole(x)))

    exact = target.excess(target.measure)
    guess = 1 / getattr(sampler, parameter)
    bounds = {"largest": 2.0, "smallest": 0.5 / most}
    try:
        for measure, tolerance in target.guides:
            guess, _ = accounting.near_root(of(measure), guess, tolerance=tolerance, **bounds)
        guess = accounting.least_feasible(of(target.measure), guess, tolerance=max(1e-4, 1.0 * guess), **bounds)
    except ValueError:
        guess = 1.0  # the searches are guides; the integers decide
    best = accounting.largest_integer(lambda number: exact(of_size(number)) <= 0, whole(guess), most)
    if best == 0:
        raise ValueError(
            f"Not even {parameter} = 1 keeps {target.description} with noise multiplier {noise_multiplier:g}."
        )
    if parameter == "steps" and best == most:
        raise ValueError(
            f"`PrivacyPlan.calibrate(parameter='steps')`: even {most:,} steps, the most that are looked at, keep {target.description}. Use less "
            "noise, or give the number of steps that you need."
        )
    return of_size(best)


def _resized(sampler: Any, **changes: int) -> Any:
    if isinstance(sampler, UserSampler):
        return dataclasses.replace(sampler, base=_resized(sampler.base, **changes))
    try:
        return dataclasses.replace(sampler, **changes)
    except ValueError as error:
        name = next(iter(changes))
        raise ValueError(
            f"`PrivacyPlan.calibrate(parameter={name!r})` cannot search among all integers with this sampler; try values of your own, or calibrate "
            f"the noise multiplier. {error}"
        ) from None
