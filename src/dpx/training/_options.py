"""What `Trainer.fit` was asked for, checked."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jax.sharding import NamedSharding
from jaxtyping import PyTree

from .._checks import flag, function, instance, positive_float, positive_int, probability
from ..plan import PrivacyPlan
from ._callbacks import StepInfo, check_callbacks


@dataclasses.dataclass(frozen=True)
class Options:
    """What `fit` was asked for, checked.

    **Arguments:** those of `Trainer.fit`, and `horizon`, the step at which the run ends if nobody stops it.
    """

    evaluate: Callable[[PyTree], Any] | None
    evaluate_every: int
    callbacks: tuple[Callable[[StepInfo], Any], ...]
    delta: float
    horizon: int
    sharding: Any
    progress: bool


def options_of(
    plan: PrivacyPlan,
    *,
    evaluate: Any,
    evaluate_every: Any,
    callbacks: Any,
    stop_at_epsilon: Any,
    delta: Any,
    sharding: Any,
    progress: Any,
) -> Options:
    if evaluate is not None:
        function("Trainer.fit(evaluate=...)", evaluate, "evaluate(model)")
    elif evaluate_every is not None:
        raise ValueError("`Trainer.fit(evaluate_every=...)` needs `evaluate=...`, a function of the model.")
    every = -(-plan.steps // 20)
    if evaluate_every is not None:
        every = positive_int("Trainer.fit(evaluate_every=...)", evaluate_every)
    if delta is None:
        delta = min(1e-5, float(plan.sampler.num_examples) ** -1.5)
    delta = probability("Trainer.fit(delta=...)", delta)
    plan.mechanism.check_calibrated()
    callbacks = check_callbacks(callbacks)
    if sharding is not None:
        instance("Trainer.fit(sharding=...)", sharding, NamedSharding, 'jax.NamedSharding(mesh, jax.P("data"))')
    horizon = plan.steps
    if stop_at_epsilon is not None:
        horizon = steps_within(plan, positive_float("Trainer.fit(stop_at_epsilon=...)", stop_at_epsilon), delta)
    return Options(evaluate, every, callbacks, delta, horizon, sharding, flag("Trainer.fit(progress=...)", progress))


def steps_within(plan: PrivacyPlan, epsilon: float, delta: float) -> int:
    """How many of the plan's first steps cost at most `epsilon`: a public number, from the plan alone.

    **Raises:** `ValueError` if not even one does.
    """
    spent = functools.cache(lambda steps: plan.epsilon(delta, steps))
    if spent(plan.steps) <= epsilon:
        return plan.steps
    low, high = 0, plan.steps  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(middle) <= epsilon else (low, middle)
    if low == 0:
        raise ValueError(
            f"`Trainer.fit(stop_at_epsilon={epsilon:g})`: one step of this plan has epsilon {spent(1):.4g} at delta {delta:g}. Use more noise, or "
            "smaller batches."
        )
    return low
