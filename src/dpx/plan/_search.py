"""Finding the noise multiplier, the number of steps or the batch size with which a plan just keeps its budget."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import accounting
from .._checks import positive_float, probability, real_number
from ..sampling import UserSampler

if TYPE_CHECKING:
    from ._plan import PrivacyPlan

    Measure = Callable[["PrivacyPlan"], float]


class Target:
    r"""What a plan must keep: a measure of its cost that falls with the noise, and a limit.

    **Arguments:**

    - `description`: the limit in words.
    - `limit`: the number that `measures` must not exceed.
    - `guides`: cheaper stand-ins for the measure, ever closer to it, with the relative accuracy that is worth asking of each.
    - `measure`: what is proven.
    """

    def __init__(self, description: str, limit: float, guides: "list[tuple[Measure, float]]", measure: "Measure"):
        self.description, self.limit, self.guides, self.measure = description, limit, guides, measure

    def excess(self, measure: "Measure") -> "Measure":
        """The logarithm of measure over limit."""

        def of(plan: "PrivacyPlan") -> float:
            value = measure(plan)
            return math.log(value / self.limit) if value > 0 else -math.inf

        return of


def epsilon_target(plan: "PrivacyPlan", epsilon: Any, delta: Any) -> Target:
    """Keep epsilon at delta."""
    if real_number("PrivacyPlan.calibrate(epsilon=...)", epsilon) == math.inf:
        raise ValueError(
            "`PrivacyPlan.calibrate(epsilon=inf)` is a run without privacy, which needs no noise: use `clipping=NoClipping()` and no budget."
        )
    epsilon = positive_float("PrivacyPlan.calibrate(epsilon=...)", epsilon)
    delta = accounting.check_delta("PrivacyPlan.calibrate(delta=...)", delta)
    options: Any = {"adjacency": plan.adjacency, "accountant": plan.accountant}
    exact = lambda plan: accounting.epsilon(plan.event, delta, **options)
    if plan.accountant == "rdp" and delta > 0 and epsilon <= 1.01 * accounting.least_renyi_epsilon(delta):
        raise ValueError(
            f"`accountant='rdp'` has no useful answer for epsilon {epsilon:g} at delta {delta:g}: its orders are finite, and what they say of no "
            f"loss at all is epsilon {accounting.least_renyi_epsilon(delta):.3g}. Use `accountant='pld'`."
        )
    rough = accounting.rough_renyi_epsilon if plan.accountant == "rdp" else accounting.rough_epsilon
    guide = lambda plan: rough(plan.event, delta, plan.adjacency)
    # the guide lands within a per cent, at a tenth of the price
    return Target(f"epsilon {epsilon:g} at delta {delta:g}", epsilon, [(guide, 5e-3)] if delta > 0 else [], exact)


def attack_target(advantage: Any, true_positive_rate: Any, false_positive_rate: Any) -> Target:
    """Keep the advantage of every attack, or its true-positive rate at a false-positive rate."""
    guess = lambda plan: accounting.rough_distribution(plan.event, plan.adjacency)
    if advantage is not None:
        limit = probability("PrivacyPlan.calibrate(advantage=...)", advantage)
        guide = lambda plan: guess(plan).get_delta(0.0)
        return Target(f"attack advantage {limit:g}", limit, [(guide, 5e-3)], lambda plan: plan.delta(0.0))
    limit = probability("PrivacyPlan.calibrate(true_positive_rate=...)", true_positive_rate)
    rate = probability("PrivacyPlan.calibrate(false_positive_rate=...)", false_positive_rate)
    if limit <= rate:
        raise ValueError(
            f"`PrivacyPlan.calibrate(true_positive_rate={limit:g}, false_positive_rate={rate:g})`: who guesses has equal rates, so no noise brings "
            "the first down to that. Ask for a larger one."
        )
    measure = lambda plan: float(plan.trade_off().true_positive_rate(rate))
    return Target(f"true-positive rate {limit:g} at false-positive rate {rate:g}", limit, [(measure, 1e-2)], measure)


def least_noise(plan: "PrivacyPlan", target: Target) -> "PrivacyPlan":
    """The plan with the least noise multiplier that meets the target, within a relative 2e-5."""
    seen: dict[float, PrivacyPlan] = {}

    def at(measure: "Measure") -> Callable[[float], float]:
        excess = target.excess(measure)

        def of(multiplier: float) -> float:
            candidate = _unchecked(plan, noise=_with_multiplier(plan.noise, multiplier))
            seen[multiplier] = candidate
            return excess(candidate)

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


def largest(plan: "PrivacyPlan", parameter: str, target: Target) -> "PrivacyPlan":
    """The plan with the most steps, or the largest batches, that meets the target."""
    caps = [plan.sampler.num_examples, getattr(plan.sampler, "max_batch_size", None) or math.inf]
    most = int(min(caps)) if parameter == "batch_size" else 2**24

    def plan_with(number: int) -> "PrivacyPlan":
        return _unchecked(plan, sampler=_resized(plan.sampler, **{parameter: number}))

    def whole(x: float) -> int:
        return max(1, min(most, round(1 / x)))

    def of(measure: "Measure") -> Callable[[float], float]:
        excess = target.excess(measure)
        return lambda x: excess(plan_with(whole(x)))

    exact = target.excess(target.measure)
    guess = 1 / getattr(plan.sampler, parameter)
    bounds = {"largest": 2.0, "smallest": 0.5 / most}
    try:
        for measure, tolerance in target.guides:
            guess, _ = accounting.near_root(of(measure), guess, tolerance=tolerance, **bounds)
        guess = accounting.least_feasible(of(target.measure), guess, tolerance=max(1e-4, 1.0 * guess), **bounds)
    except ValueError:
        guess = 1.0  # the searches are guides; the integers decide
    best = accounting.largest_integer(lambda number: exact(plan_with(number)) <= 0, whole(guess), most)
    if best == 0:
        raise ValueError(
            f"Not even {parameter} = 1 keeps {target.description} with noise multiplier {plan.noise_multiplier:g}."
        )
    if parameter == "steps" and best == most:
        raise ValueError(
            f"`PrivacyPlan.calibrate(parameter='steps')`: even {most:,} steps, the most that are looked at, keep {target.description}. Use less "
            "noise, or give the number of steps that you need."
        )
    return plan_with(best)


def _with_multiplier(noise: Any, noise_multiplier: float) -> Any:
    return dataclasses.replace(noise, noise_multiplier=noise_multiplier)


def _unchecked(plan: "PrivacyPlan", **changes: Any) -> "PrivacyPlan":
    """A candidate on the way to an answer, which need not be a plan that could run: private counts may cost more than its noise allows."""
    candidate = object.__new__(type(plan))
    for field in dataclasses.fields(plan):
        object.__setattr__(candidate, field.name, changes.get(field.name, getattr(plan, field.name)))
    return candidate


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


def trade_off_epsilons(top: float) -> np.ndarray:
    """Where the trade-off curve asks for delta: from 0 to where delta is of no interest."""
    return np.linspace(0.0, min(top, 50.0), 101)
