"""`audit_plan`: one run of a plan with canaries, seen by the adversary of differential privacy."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._checks import function, instance, positive_int, probability
from .._types import Batch, Integer, RealScalarLike, Unchecked
from ..gradients import AbstractGradientMethod, Auto
from ..plan import PrivacyPlan
from ..problem import check_batch, trainable
from ..random import check_seed, fresh_seed
from ._assert_private import decided
from ._canaries import gradient_canaries
from ._canary_run import Run, run_with_canaries
from ._coins import Coins, flip_coins
from ._gaussian import gaussian_epsilon, noncentral_t_bound, noncentral_t_p_value
from ._guessing import (
    Claim,
    bound_of_this_form,
    curve_p_value,
    evidence_of,
    in_words,
    numbers_of_guesses,
    power_of_guesses,
)
from ._likelihood import linear_scores, run_scores
from ._lower_bound import LowerBound
from ._noise_laws import NoiseLaw, stated_noise
from ._one_run import one_run
from ._report import AuditReport
from ._sampling_laws import Found
from ._shapes import why_not_gaussian

_MOST_STEPS = 2_000

_NORMAL = (
    "the scores of Dirac canaries are independent and normal given the coins, as unsampled Gaussian noise makes them"
)
_NO_LOSS = "no `batch` was given, so your loss was not called: what is audited is clipping, noise, sampling and accounting (see `assert_private`)"


def audit_plan(
    plan: PrivacyPlan,
    loss: Callable[..., Any],
    model: PyTree,
    *,
    canaries: Integer = 1000,
    confidence: RealScalarLike = 0.95,
    seed: Integer | None = None,
    steps: Integer | None = None,
    delta: RealScalarLike | None = None,
    batch: Unchecked[Batch | None] = None,
    method: AbstractGradientMethod = Auto(),
    filter_spec: PyTree = eqx.is_inexact_array,
) -> AuditReport:
    r"""Attacks ONE run of a plan, as its strongest adversary does, and reports what that proves: lower bounds beside the stated epsilon.

    Each canary has a gradient in a parameter of its own, and is in by a fair coin. The attacker sees every noisy gradient, knows all other rows, and
    scores each canary by its likelihood ratio. From the scores follow

    - by the noncentral t distribution, a bound that is nearly tight, for Gaussian noise without amplification by sampling;
    - by guesses of the coins, a bound on epsilon, and the p-value of the plan's own trade-off curve, for every plan.

    ```python
    report = dpx.auditing.audit_plan(plan, loss, model, canaries=200, seed=0)
    print(report.summary())
    ```

    !!! success "Guarantee"

        Each bound is above the truth with probability `1 - confidence` at most, over coins, noise and sampling; the report fails a sound plan with
        that probability at most.

    It is for a report. To find faults use `assert_private`, whose tests see a hundred times less of a difference.

    **Arguments:**

    - `plan`: the plan, calibrated.
    - `loss`: your loss; called on the rows of `batch`, if there are any.
    - `model`: your model, or a small one of the same make.
    - `canaries`: how many (fewer, with a note, where the model has fewer parameters or the plan fewer units).
    - `confidence`: of each bound.
    - `seed`: makes the audit reproducible; by default from the operating system.
    - `steps`: the first so many steps of the plan; by default all, up to 2,000.
    - `delta`: at which epsilon is stated; by default 1e-5, or a tenth over the number of units.
    - `batch`: rows of yours that are in every batch beside the canaries.
    - `method`, `filter_spec`: as for `plan.private_gradient`.

    **Returns:** an `AuditReport` with `.epsilon`, `.bounds`, `.p_value`, `.power` and `.plot(path)`.
    """
    name = "audit_plan"
    instance(f"{name}(plan=...)", plan, PrivacyPlan, "dpx.dp_sgd(...)")
    function(f"{name}(loss=...)", loss, "loss(model, *example)")
    wanted = positive_int(f"{name}(canaries=...)", canaries)
    confidence = probability(f"{name}(confidence=...)", confidence)
    seed = fresh_seed() if seed is None else check_seed(f"{name}(seed=...)", seed)
    length = plan.steps if steps is None else positive_int(f"{name}(steps=...)", steps)
    if length > plan.steps:
        raise ValueError(f"`{name}(steps={length})` is past the plan's end, {plan.steps}.")
    notes: list[str] = []
    if steps is None and length > _MOST_STEPS:
        length = _MOST_STEPS
        notes.append(f"the first {length} of {plan.steps} steps; what is stated is for these")
    units = plan.sampler.num_examples
    delta = min(1e-5, 0.1 / units) if delta is None else probability(f"{name}(delta=...)", delta)
    title = f"white-box audit of one run of {length} steps"
    if not plan.mechanism.is_private:
        found = Found(
            "P0", "contributions are bounded and hidden by noise", "`NoClipping`: epsilon is infinite", holds=False
        )
        return decided(title, [found], 1 - confidence)
    options = {"method": method, "filter_spec": filter_spec}
    number, surely = _numbers(plan, model, wanted, filter_spec, notes)
    chosen = gradient_canaries(model, number + surely, filter_spec=filter_spec, seed=seed, clipping=plan.clipping)
    coins = flip_coins(number, seed=seed)
    included = np.concatenate([coins.included, np.ones(surely, bool)])
    rows = None if batch is None else check_batch(batch)[0]
    if rows is None:
        notes.append(_NO_LOSS)
    elif plan.clipping.side_noise_multipliers:
        raise ValueError(
            f"`{name}(batch=...)`: what rows contribute under `{type(plan.clipping).__name__}` depends on the steps before; leave `batch` out."
        )
    law = stated_noise(plan.mechanism, length)
    if law is None:
        raise ValueError(
            f"`{name}`: the strategy's matrix is too large to be written down. Audit a shorter plan of the same kind."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = run_with_canaries(
            plan, loss if rows is not None else None, model, rows, chosen, included, length, seed, options
        )
        claim = Claim.of(plan, length, delta)
    title += f" with {number} Dirac canaries"
    return _reported(plan, title, run, coins, law, claim, confidence, notes, seed)


def _numbers(plan: PrivacyPlan, model: PyTree, wanted: int, filter_spec: PyTree, notes: list[str]) -> tuple[int, int]:
    """How many canaries have coins, and how many more are surely in.

    Normal scores need no coins: half of the canaries are out, and parameters without one are as good as those. So where scores are normal as many
    more
    are in as would be out, if there is room.
    """
    params, _ = trainable(model, filter_spec)
    labels = plan.clipping.labels(params)
    sizes = [x.size for x in jax.tree.leaves(params)]
    room = max(sum(n for n, g in zip(sizes, labels, strict=True) if g == group) for group in set(labels))
    units = plan.sampler.num_examples
    number = min(wanted, room, units)
    if number < wanted:
        why = "units of the plan" if number == units else "parameters, one for each"
        notes.append(f"{number} canaries, as many as there are {why}")
    surely = 0 if why_not_gaussian(plan) else min(number // 2, (room - number) // 2, units - number)
    return number, max(0, surely)


# What it proves


def _reported(
    plan: PrivacyPlan, title: str, run: Run, coins: Coins, law: NoiseLaw, claim: Claim, confidence: float, notes: list[str], seed: int
) -> AuditReport:  # fmt: skip
    alpha = 1 - confidence
    common: dict[str, Any] = {"epsilon": claim.epsilon, "delta": claim.delta}
    if not (np.isfinite(run.x).all() and np.isfinite(run.spare).all()):
        found = Found("E0", "gradients are finite", "numbers that are not finite", holds=False)
        report = decided(title, [found], alpha, notes)
        return AuditReport(report.title, report.laws, alpha, notes=tuple(notes), **common)
    number = coins.number
    flipped = run._replace(x=run.x[:, :number], shifts=run.shifts[:number], taken=run.taken[:, :number])
    scores = run_scores(plan, flipped.x, flipped.shifts, flipped.taken, law)
    pairs = numbers_of_guesses(number)
    by_guesses = one_run(
        coins, scores, guesses=pairs, delta=claim.delta, epsilon=min(claim.epsilon, 500.0), confidence=confidence
    )
    p_value = curve_p_value(coins, scores, pairs, claim.curve)
    bounds = {"one run, by guesses": by_guesses}
    found = [Found("E1", "epsilon is at least what guesses prove", str(by_guesses.value), p_value=by_guesses.p_value)]
    found.append(
        Found("E2", "the plan's own trade-off curve allows so many right guesses", f"{in_words(coins, scores, pairs)}", p_value=p_value,
              power=lambda a: power_of_guesses(plan, flipped, law, claim, a, pairs, seed))
    )  # fmt: skip
    why_not = why_not_gaussian(plan)
    if not why_not and law.kind == "gaussian":
        bound, p, power = _by_t(run, coins, law, claim, alpha)
        bounds["Gaussian scores"] = bound
        found.append(
            Found(
                "E3",
                "scores of canaries are no further apart than the plan allows",
                f"epsilon >= {bound.value:.4g}",
                p_value=p,
                power=power,
            )
        )
        curve = one_run(coins, scores, guesses=pairs, curve=claim.curve, confidence=confidence)
        value = gaussian_epsilon(curve.value, claim.delta)
        words = f"{curve.assumption}, and the run is a Gaussian mechanism"
        top = gaussian_epsilon(curve.ceiling, claim.delta)
        bounds["one run, by a Gaussian curve"] = LowerBound(
            "epsilon", value, confidence, top, words, p_value, claim.delta
        )
    else:
        notes = [*notes, f"no bound by normal scores: {why_not or 'the noise is not Gaussian'}"]
        bound = bound_of_this_form(plan, coins, scores, pairs, claim, alpha)
        if bound is not None:
            bounds["one run, by plans of this form"] = bound
    report = decided(title, found, alpha, notes)
    evidence = evidence_of(coins, scores, claim.curve, alpha)
    return AuditReport(
        report.title, report.laws, alpha, bounds, p_value=p_value, notes=tuple(notes), evidence=evidence, **common
    )


def _by_t(
    run: Run, coins: Coins, law: NoiseLaw, claim: Claim, alpha: float
) -> tuple[LowerBound, float, Callable[[float], str]]:
    normal, mu = linear_scores(run.x, run.shifts, run.taken, law)
    used = mu > 0
    # scores of parameters without a canary, along the participations of one that has one, are of canaries that are out
    pattern = run.taken[:, [int(np.argmax(mu))]]
    free = linear_scores(
        run.spare[:, :, None], np.ones((run.spare.shape[1], 1)), np.repeat(pattern, run.spare.shape[1], 1), law
    )[0]
    included = np.concatenate([coins.included, np.ones(len(used) - coins.number, bool)])
    inside, outside = normal[included & used], np.concatenate([normal[~included & used], free])
    stated = _stated_mu(claim)
    if len(inside) < 1 or len(inside) + len(outside) < 3 or len(outside) < 1:
        return LowerBound("epsilon", 0.0, 1 - alpha, math.inf, _NORMAL, 1.0, claim.delta), 1.0, lambda a: "nothing"
    value = noncentral_t_bound(inside, outside, alpha)
    p = noncentral_t_p_value(inside, outside, stated)
    epsilon = gaussian_epsilon(value, claim.delta)
    width = math.sqrt(1 / len(inside) + 1 / len(outside))
    bound = LowerBound("epsilon", epsilon, 1 - alpha, math.inf, _NORMAL, p, claim.delta)

    def power(level: float) -> str:
        from scipy import special

        z = lambda a: -float(special.ndtri(a))
        expected = gaussian_epsilon(max(0.0, stated - z(alpha) * width), claim.delta)
        ratio = stated / (stated + (z(level) + z(0.01)) * width)
        return f"noise {ratio:.3g} times the stated; expects epsilon >= {expected:.3g} if the plan is tight"

    return bound, p, power


def _stated_mu(claim: Claim) -> float:
    """Of an event that is a Gaussian mechanism."""
    import dp_accounting as da

    def precision(event: Any) -> float:
        if isinstance(event, da.SelfComposedDpEvent):
            return event.count * precision(event.event)
        if isinstance(event, da.ComposedDpEvent):
            return sum(map(precision, event.events))
        return float(event.noise_multiplier) ** -2

    return math.sqrt(precision(claim.event))
