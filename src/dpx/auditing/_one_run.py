"""Auditing in one run: many canaries, one independent coin each, and guesses of how the coins fell."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .._checks import at_least_zero, described, instance, probability, real_number
from .._types import Integer, RealScalarLike, Unchecked
from ..accounting import TradeOffCurve
from ._coins import Coins
from ._inputs import count, delta_of, failure, pairs_of_guesses, scores as check_scores
from ._lower_bound import LowerBound
from ._roots import largest_refuted

_COINS = "each canary was in by its own independent coin of probability {probability:g}, used nowhere else"
_CURVE = " (that the mechanism is mu-GDP, or has the claimed trade-off curve, is what is refuted)"
_MSG_COINS = (
    "`one_run(coins, scores)` needs the coins that chose the canaries, `coins = flip_coins(m)`: scores of one run depend on each other, and only the "
    "coins are independent. Got {got}. For scores of independent runs use `epsilon_lower_bound(scores_in, scores_out)`."
)
_MSG_CLAIM = "`one_run` takes one of `delta=...` (a bound on epsilon) and `curve=...` (the p-value of a curve, and a bound on mu); got {got}."
_MSG_BIASED = "`one_run(coins, ...)` of coins of probability {probability:g} has a proven bound for `delta=0` only. Use `flip_coins`, which are fair."


def one_run(
    coins: Unchecked[Coins],
    scores: Any,
    *,
    guesses: Unchecked[tuple[int, int] | tuple[tuple[int, int], ...]],
    delta: RealScalarLike | None = None,
    curve: Unchecked[TradeOffCurve | RealScalarLike | None] = None,
    epsilon: RealScalarLike | None = None,
    confidence: RealScalarLike = 0.95,
) -> LowerBound:
    r"""A lower bound from the canaries of ONE run, by guessing how their coins fell: the highest `k_in` scores "in", the lowest `k_out` "out".

    With `delta`, a bound on $\varepsilon$. With a `curve`, the p-value of that trade-off curve, such as the plan's own, and a bound on $\mu$; it is
    the
    stronger one for mechanisms whose curve is known. Neither finds more than gross faults: see `assert_private`.

    !!! success "Guarantee"

        Whatever the scores are and however they depend on each other, the bound is above the truth with probability `1 - confidence` at most. That
        rests on the coins alone, which is why it takes them and not two arrays.

    **Arguments:**

    - `coins`: from `flip_coins`; which canaries were in.
    - `scores`: one for each canary, high where it seems to be in; ties are broken by position.
    - `guesses`: `(k_in, k_out)`, fixed before the scores are known; or several such pairs, of which the best counts, with Bonferroni's correction.
    - `delta`: $\delta$.
    - `curve`: a `TradeOffCurve`, or $\mu$ of a Gaussian one.
    - `epsilon`: with `delta`: a claim, whose `p_value` the bound then has.
    - `confidence`: of the bound.

    ??? cite "Reference"

        Steinke, Nasr and Jagielski, *Privacy auditing with one (1) training run*, NeurIPS 2023 (arXiv:2305.08846); Mahloujifar, Melis and Chaudhuri,
        *Auditing f-differential privacy in one run*, 2024 (arXiv:2410.22235).
    """
    if not isinstance(coins, Coins):
        raise ValueError(_MSG_COINS.format(got=described(coins)))
    values = check_scores("one_run(scores=...)", scores)
    if len(values) != coins.number:
        raise ValueError(
            f"`one_run(coins, scores)` needs a score for each canary, those that were out too: {coins.number} coins, and {len(values)} scores."
        )
    pairs = pairs_of_guesses("one_run(guesses=...)", guesses, coins.number)
    if (delta is None) == (curve is None):
        raise ValueError(_MSG_CLAIM.format(got="neither" if delta is None else "both"))
    if curve is not None and (epsilon is not None or coins.probability != 0.5):
        if epsilon is not None:
            raise ValueError(
                "`one_run(epsilon=...)` is a claim beside `delta=...`; the claim of a `curve=...` is the curve."
            )
        raise ValueError("`one_run(curve=...)` needs fair coins: use `flip_coins`.")
    alpha = failure("one_run(confidence=...)", confidence)
    if delta is not None:
        delta = delta_of("one_run(delta=...)", delta)
    order = np.argsort(values, kind="stable")
    bounds = []
    for k_in, k_out in pairs:
        top, bottom = order[len(order) - k_in :], order[:k_out]
        right = int(coins.included[top].sum()) + int((~coins.included[bottom]).sum())
        if delta is not None:
            bounds.append(_by_epsilon(coins, k_in, k_out, right, delta, epsilon, alpha, len(pairs)))
        else:
            bounds.append(_by_curve(coins, k_in + k_out, right, curve, alpha, len(pairs)))
    best = max(bounds, key=lambda b: (b.value, -(1.0 if b.p_value is None else b.p_value)))
    p_values = [b.p_value for b in bounds if b.p_value is not None]
    p_value = min(p_values, default=None)
    shared = f", the best of {len(pairs)} numbers of guesses" if len(pairs) > 1 else ""
    words = _COINS.format(probability=coins.probability) + (_CURVE if curve is not None else "") + shared
    ceiling = max(b.ceiling for b in bounds)
    return LowerBound(best.quantity, best.value, 1 - alpha, ceiling, words, p_value, best.delta)


def _by_epsilon(
    coins: Coins, k_in: int, k_out: int, right: int, delta: float, claim: Any, alpha: float, pairs: int
) -> LowerBound:
    if coins.probability == 0.5:
        p_value = lambda right, epsilon: one_run_p_value(
            coins.number, k_in + k_out, right, epsilon=epsilon, delta=delta
        )
    else:
        if delta > 0:
            raise ValueError(_MSG_BIASED.format(probability=coins.probability))
        p_value = lambda right, epsilon: _biased_p_value(coins.probability, k_in, k_out, right, epsilon)
    found = [largest_refuted(lambda e, v=v: p_value(v, e), alpha / pairs) for v in (right, k_in + k_out)]
    claimed = None
    if claim is not None:
        claimed = min(1.0, pairs * p_value(right, at_least_zero("one_run(epsilon=...)", claim)))
    return LowerBound("epsilon", found[0], 1 - alpha, found[1], "", claimed, delta)


def _by_curve(coins: Coins, guesses: int, right: int, curve: Any, alpha: float, pairs: int) -> LowerBound:
    mu = lambda v: one_run_mu(coins.number, guesses, v, alpha / pairs)
    p_value = min(1.0, pairs * one_run_curve_p_value(coins.number, guesses, right, curve=curve))
    return LowerBound("mu", mu(right), 1 - alpha, mu(guesses), "", p_value)


def one_run_p_value(
    canaries: Integer, guesses: Integer, correct: Integer, *, epsilon: RealScalarLike, delta: RealScalarLike
) -> float:
    r"""The probability that so many guesses are right in one run of an $(\varepsilon, \delta)$-DP mechanism, at most (fair, independent coins):
    $P(W \ge v) + 2 m \delta \max_{1 \le i \le v} P(v > W \ge v - i) / i$ for $W \sim \mathrm{Bin}(r, e^\varepsilon / (1 + e^\varepsilon))$."""
    from scipy import special

    m, r, v = _counts_of("one_run_p_value", canaries, guesses, correct)
    epsilon = at_least_zero("one_run_p_value(epsilon=...)", epsilon)
    delta = delta_of("one_run_p_value(delta=...)", delta)
    if v == 0:
        return 1.0
    p = float(special.betainc(v, r - v + 1.0, special.expit(epsilon)))
    if delta > 0:
        k = np.arange(v - 1, -1, -1)
        # log(1 - rate) without cancellation
        log_rate, log_rest = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
        choose = special.gammaln(r + 1.0) - special.gammaln(k + 1.0) - special.gammaln(r - k + 1.0)
        below = np.cumsum(np.exp(choose + k * log_rate + (r - k) * log_rest))
        p += 2 * m * delta * float(np.max(below / np.arange(1, v + 1)))
    return min(1.0, p)


def _biased_p_value(rate: float, k_in: int, k_out: int, right: int, epsilon: float) -> float:
    """The same at delta 0 for coins that are not fair: guesses of both kinds have their own probability of being right."""
    from scipy import special, stats

    shift = math.log(rate) - math.log1p(-rate)
    high, low = float(special.expit(epsilon + shift)), float(special.expit(epsilon - shift))
    total = np.convolve(
        stats.binom.pmf(np.arange(k_in + 1), k_in, high), stats.binom.pmf(np.arange(k_out + 1), k_out, low)
    )
    return min(1.0, float(total[right:].sum()))


def one_run_curve_p_value(
    canaries: Integer, guesses: Integer, correct: Integer, *, curve: Unchecked[TradeOffCurve | RealScalarLike]
) -> float:
    r"""The probability that so many guesses are right in one run of a mechanism with that trade-off curve, at most (fair, independent coins).

    **Arguments:**

    - `canaries`, `guesses`, `correct`: $m$, $r$ and $v$.
    - `curve`: a symmetric `TradeOffCurve`, as plans' are, or $\mu$ of a Gaussian one.
    """
    m, r, v = _counts_of("one_run_curve_p_value", canaries, guesses, correct)
    inverse = _inverse("one_run_curve_p_value(curve=...)", curve)
    if v == 0 or _excess(m, r, v, 1.0, inverse) <= 0:
        return 1.0
    low = math.log(1e-300)
    excess = lambda log_p: _excess(m, r, v, math.exp(log_p), inverse)
    if excess(low) > 0:
        return math.exp(low)
    return min(1.0, math.exp(_root(excess, low, 0.0) + 1e-12))


def one_run_mu(canaries: Integer, guesses: Integer, correct: Integer, failure: RealScalarLike) -> float:
    r"""The largest $\mu$ for which so many right guesses refute $\mu$-GDP at level `failure`; 0 if they refute none."""
    m, r, v = _counts_of("one_run_mu", canaries, guesses, correct)
    level = probability("one_run_mu(failure=...)", failure)
    if v == 0:
        return 0.0
    # Phi(Phi^-1(y) - mu)
    excess = lambda mu: _excess(m, r, v, level, _gaussian_inverse(mu))
    if excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while excess(high) > 0:
        low, high = high, 2 * high
        if high > 1e3:
            return low
    return max(0.0, _root(excess, low, high) - 1e-11)


def is_refuted(
    canaries: Integer,
    guesses: Integer,
    correct: Integer,
    *,
    curve: Unchecked[TradeOffCurve | RealScalarLike],
    failure: float,
) -> bool:
    """Whether `one_run_curve_p_value` is at most `failure`, in one pass: a second at 10^4 canaries."""
    m, r, v = _counts_of("is_refuted", canaries, guesses, correct)
    inverse = _inverse("is_refuted(curve=...)", curve)
    return v > 0 and _excess(m, r, v, failure, inverse) > 0


def _root(excess: Callable[[float], float], low: float, high: float) -> float:
    from scipy import optimize

    return float(optimize.brentq(excess, low, high, xtol=1e-13, rtol=4e-15))  # pyright: ignore[reportArgumentType]


def _excess(m: int, r: int, v: int, p: float, inverse: Callable[[float], float]) -> float:
    r"""Positive where $P(V \ge v) \ge p$ is impossible.

    With $a$ the probability that a random canary is guessed right and $V \ge i$, and $h$ that it is guessed wrong and $V \ge i - 1$: to flip its
    coin maps one event into the other, so that $h \ge f^{-1}(a)$; what is left is spread over $i$ as disfavours the claim least.
    """
    a, h = p * v / m, p * (r - v) / m
    for i in range(v - 1, -1, -1):
        new = max(h, inverse(a))
        if i:
            a += i / (r - i) * (new - h)
        h = new
    return a + h - r / m


def _gaussian_inverse(mu: float) -> Callable[[float], float]:
    from scipy import special

    return lambda y: float(special.ndtr(special.ndtri(min(y, 1.0)) - mu))


def _inverse(call: str, curve: Any) -> Callable[[float], float]:
    """The least false-positive rate at which the curve allows a true-positive rate; of a symmetric curve f, f(1 - y)."""
    if not isinstance(curve, TradeOffCurve):
        if isinstance(curve, str | bytes) or hasattr(curve, "shape") and curve.shape:
            instance(call, curve, TradeOffCurve, "plan.trade_off()")
        mu = real_number(call, curve)
        if not mu >= 0:
            raise ValueError(f"`{call}` must be a curve, or mu of at least 0; got {mu}.")
        return _gaussian_inverse(mu)
    epsilons, deltas = np.asarray(curve.epsilons), np.asarray(curve.deltas)
    grow, room = np.exp(np.minimum(epsilons, 700.0)), 1 - deltas
    slopes = np.concatenate([grow, 1 / grow])
    intercepts = np.concatenate([room - grow, (room - 1) / grow])  # at alpha = 1 - y: a - s + s y
    return lambda y: max(float((intercepts + slopes * min(y, 1.0)).max()), 0.0)


def _counts_of(name: str, canaries: Any, guesses: Any, correct: Any) -> tuple[int, int, int]:
    m, r, v = count(f"{name}(canaries=...)", canaries), count(f"{name}(guesses=...)", guesses), correct
    v = count(f"{name}(correct=...)", v)
    if not 0 <= v <= r <= m or m == 0 or r == 0:
        raise ValueError(
            f"`{name}(canaries, guesses, correct)` must fall, of at least one guess; got {m}, {r} and {v}."
        )
    return m, r, v
