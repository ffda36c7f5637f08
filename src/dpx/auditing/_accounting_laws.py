"""Whether what a plan says it costs follows from what it does: more of anything costs more, and another accountant agrees."""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

from .. import accounting
from ..metrics import Mean
from ..plan import PrivacyPlan
from ..sampling import PoissonSampler
from ._gaussian import gaussian_epsilon
from ._sampling_laws import Found


def is_slow(plan: PrivacyPlan) -> bool:
    """Whether one answer of the accountant takes minutes: it is found by samples, and has no part in a test."""
    return accounting.is_monte_carlo(plan.event)


def accounting_laws(plan: PrivacyPlan, delta: float) -> Iterator[Found]:
    """A1 to A5: epsilon grows with metrics, steps and the sampling rate, falls with noise, and is what an independent composition gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from _laws(plan, delta)


def _laws(plan: PrivacyPlan, delta: float) -> Iterator[Found]:
    if is_slow(plan):
        return
    epsilon = plan.epsilon(delta)
    cost = lambda other: other.epsilon(delta)
    grows = lambda less, more: less < more * (1 - 1e-9) or (math.isinf(less) and math.isinf(more))
    law = "every metric is paid for"
    if plan.metrics:
        for name in plan.metrics:
            rest = {k: m for k, m in plan.metrics.items() if k != name}
            less = cost(dataclasses.replace(plan, metrics=rest))
            yield Found(
                "A1",
                law,
                f"epsilon {epsilon:.6g} with it, and {less:.6g} without",
                f"metrics[{name!r}]",
                holds=grows(less, epsilon),
            )
    elif plan.noise.order == 2:
        try:
            probe = plan.with_metrics(audit=Mean("losses", 0.0, 1.0, noise_multiplier=2 * plan.noise_multiplier))
            more = cost(probe)
        except ValueError:
            more = None  # nobody can account for it, which is no cheap answer
        if more is not None:
            yield Found(
                "A1", law, f"epsilon {more:.6g} with one, and {epsilon:.6g} without", holds=grows(epsilon, more)
            )
    if plan.steps > 1:
        first = plan.epsilon(delta, plan.steps // 2)
        strict = isinstance(plan.sampler, PoissonSampler) and epsilon > 0 and plan.noise.bands == 1
        holds = grows(first, epsilon) if strict else first <= epsilon * (1 + 1e-9)
        found = f"epsilon {first:.6g} after {plan.steps // 2} steps, and {epsilon:.6g} after {plan.steps}"
        yield Found("A2", "more steps cost more", found, holds=holds)
    louder = cost(plan.with_noise_multiplier(1.25 * plan.noise_multiplier))
    found = f"epsilon {louder:.6g} with 1.25 times the noise, and {epsilon:.6g} as it is"
    yield Found("A3", "more noise costs less", found, holds=grows(louder, epsilon) or epsilon == 0)
    sampler = plan.sampler
    if (
        isinstance(sampler, PoissonSampler)
        and sampler.max_batch_size is None
        and 2 * sampler.batch_size <= sampler.num_examples
    ):
        twice = cost(dataclasses.replace(plan, sampler=_with_batch(sampler, 2 * sampler.batch_size)))
        found = f"epsilon {twice:.6g} at twice the rate, and {epsilon:.6g} as it is"
        yield Found("A4", "a higher sampling rate costs more", found, holds=grows(epsilon, twice) or twice == 0)
    yield from _independent(plan, epsilon, delta)


def _with_batch(sampler: PoissonSampler, batch_size: int) -> PoissonSampler:
    return PoissonSampler(sampler.num_examples, batch_size, sampler.steps)


def _independent(plan: PrivacyPlan, epsilon: float, delta: float) -> Iterator[Found]:
    """The same from the plan's own numbers by other code: a formula without sampling, and dp_accounting with it."""
    sampler: Any = plan.sampler
    if not isinstance(sampler, PoissonSampler) or sampler.max_batch_size is not None or plan.noise.order != 2:
        return
    if plan.noise.bands != 1 or plan.noise.is_integer:
        return
    twice = 2.0 if plan.adjacency == "replace_one" else 1.0
    precision = plan.noise_multiplier**-2 + sum(float(m.noise_multiplier) ** -2 for m in plan.metrics.values())
    multiplier = precision**-0.5
    law = "epsilon is what an independent composition gives"
    if sampler.batch_size == sampler.num_examples:
        other = gaussian_epsilon(twice * math.sqrt(sampler.steps) / multiplier, delta)
        name = "by the formula of the Gaussian mechanism"
    elif plan.adjacency != "replace_one" and multiplier > 0.2:
        try:
            other = _by_dp_accounting(sampler, multiplier, delta)
        except (ValueError, ArithmeticError):
            return  # it has limits of its own
        name = "by dp_accounting"
    else:
        return
    # it may be a little above for its grid; never below what the mechanism has
    holds = epsilon >= other * 0.98 - 1e-3
    yield Found("A5", law, f"epsilon {epsilon:.6g} stated, and {other:.6g} {name}", holds=holds)


def _by_dp_accounting(sampler: PoissonSampler, multiplier: float, delta: float) -> float:
    import dp_accounting as da
    from dp_accounting import pld

    event = da.SelfComposedDpEvent(
        da.PoissonSampledDpEvent(sampler.sampling_probability, da.GaussianDpEvent(multiplier)), sampler.steps
    )
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
    accountant.compose(event)
    return float(accountant.get_epsilon(delta))
