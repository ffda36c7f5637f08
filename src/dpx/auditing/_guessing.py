"""What guesses of the canaries' coins prove about a plan's own trade-off curve, and what they would have."""

import math
from typing import Any, NamedTuple

import numpy as np

from .. import accounting
from ..accounting import TradeOffCurve
from ..plan import PrivacyPlan
from ._binomial import clopper_pearson_lower, clopper_pearson_upper
from ._canary_run import Run
from ._coins import Coins, flip_coins
from ._inputs import pairs_of_guesses
from ._likelihood import run_scores
from ._lower_bound import LowerBound
from ._noise_laws import NoiseLaw
from ._one_run import is_refuted, one_run_curve_p_value
from ._report import Evidence

_FORM = "the run is a mechanism of the plan's form with another noise multiplier"


class Claim(NamedTuple):
    """What the plan states about the steps that are audited."""

    epsilon: float
    delta: float
    curve: TradeOffCurve
    event: Any

    @classmethod
    def of(cls, plan: PrivacyPlan, steps: int, delta: float) -> "Claim":
        event = plan.event_after(steps)
        curve = plan.trade_off() if steps == plan.steps else _curve(plan, event)
        return cls(plan.epsilon(delta, steps), delta, curve, event)


def _curve(plan: PrivacyPlan, event: Any) -> TradeOffCurve:
    by = "rdp" if plan.noise.is_integer else "pld"
    top = accounting.epsilon(event, 1e-9, adjacency=plan.adjacency, accountant=by)
    epsilons = np.linspace(0.0, min(top, 50.0), 101)
    return TradeOffCurve(epsilons, accounting.deltas(event, epsilons, plan.adjacency, by))


def numbers_of_guesses(number: int) -> tuple[tuple[int, int], ...]:
    """Numbers of guesses, fixed beforehand: of the highest scores alone, and of the lowest as well."""
    sizes = sorted({max(1, number // k) for k in (50, 20, 10, 4)})
    pairs = {(k, j) for k in sizes for j in (0, k) if k + j <= number}
    return pairs_of_guesses("audit_plan", tuple(sorted(pairs)), number)


def right_guesses(coins: Coins, scores: np.ndarray, k_in: int, k_out: int) -> int:
    order = np.argsort(scores, kind="stable")
    inside = coins.included[order[len(order) - k_in :]]
    return int(inside.sum()) + int((~coins.included[order[:k_out]]).sum())


def in_words(coins: Coins, scores: np.ndarray, pairs: tuple[tuple[int, int], ...]) -> str:
    texts = [f"{right_guesses(coins, scores, *pair)} of {sum(pair)}" for pair in pairs]
    return "right guesses " + ", ".join(texts)


def curve_p_value(coins: Coins, scores: np.ndarray, pairs: tuple[tuple[int, int], ...], curve: TradeOffCurve) -> float:
    p = [
        one_run_curve_p_value(coins.number, sum(pair), right_guesses(coins, scores, *pair), curve=curve)
        for pair in pairs
    ]
    return min(1.0, len(pairs) * min(p))


def bound_of_this_form(
    plan: PrivacyPlan, coins: Coins, scores: np.ndarray, pairs: tuple[tuple[int, int], ...], claim: Claim, alpha: float
) -> LowerBound | None:
    """The epsilon of the same plan with the least noise multiplier that is refuted: more noise promises more, and is refuted sooner."""
    if accounting.is_monte_carlo(claim.event):
        return None
    right = [(sum(pair), right_guesses(coins, scores, *pair)) for pair in pairs]

    def refuted(multiplier: float) -> tuple[bool, Any]:
        try:
            other = plan.with_noise_multiplier(multiplier)
            curve = other.trade_off()
        except ValueError:
            return False, None
        return any(is_refuted(coins.number, r, v, curve=curve, failure=alpha / len(pairs)) for r, v in right), other

    low, high = plan.noise_multiplier, 32 * plan.noise_multiplier  # of a run without noise, `low` is refuted too
    found = None
    if not refuted(high)[0]:
        return LowerBound("epsilon", 0.0, 1 - alpha, claim.epsilon, _FORM, None, claim.delta)
    for _ in range(6):
        middle = math.sqrt(low * high)
        is_bad, other = refuted(middle)
        if is_bad:
            high, found = middle, other
        else:
            low = middle
    found = found or plan.with_noise_multiplier(high)
    return LowerBound("epsilon", float(found.epsilon(claim.delta)), 1 - alpha, math.inf, _FORM, None, claim.delta)


def power_of_guesses(
    plan: PrivacyPlan,
    run: Run,
    law: NoiseLaw,
    claim: Claim,
    level: float,
    pairs: tuple[tuple[int, int], ...],
    seed: int,
) -> str:
    """Whether guesses would have seen half of the noise, or none, in one simulated run each."""
    rng = np.random.default_rng([seed, 0x51])
    coins = flip_coins(run.x.shape[1], seed=int(rng.integers(2**62)))
    seen = []
    for ratio, name in ((0.5, "half of the noise"), (0.0, "no noise")):
        noise = rng.normal(size=run.x.shape) if law.kind != "laplace" else rng.laplace(size=run.x.shape)
        if law.matrix is not None:
            noise = np.linalg.solve(law.matrix, noise.reshape(len(law.matrix), -1)).reshape(noise.shape)
        signal = (run.taken & coins.included)[:, :, None] * run.shifts
        scores = run_scores(plan, signal + ratio * law.scale * noise, run.shifts, run.taken, law)
        p = curve_p_value(coins, scores, pairs, claim.curve)
        seen.append(f"{name}: {'seen' if p < level else 'NOT seen'} (p {p:.2g})")
    return "; ".join(seen)


def evidence_of(coins: Coins, scores: np.ndarray, curve: TradeOffCurve, alpha: float) -> Evidence:
    """Operating points at a few thresholds, with intervals of each rate for a picture."""
    inside, outside = scores[coins.included], scores[~coins.included]
    rates = np.concatenate([np.logspace(-5, -0.3, 60), np.linspace(0.5, 1, 11)])
    allowed = np.clip(curve.true_positive_rate(rates), 0, 1)
    false, true = [], []
    if len(inside) and len(outside):
        for level in (0.002, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75):
            threshold = np.quantile(outside, 1 - level, method="higher")
            for values, points in ((outside, false), (inside, true)):
                hits, n = int(np.sum(values > threshold)), len(values)
                points.append(
                    (clopper_pearson_lower(hits, n, alpha / 2), hits / n, clopper_pearson_upper(hits, n, alpha / 2))
                )
    return Evidence(tuple(false), tuple(true), (tuple(rates.tolist()), tuple(allowed.tolist())), 1 - alpha)
