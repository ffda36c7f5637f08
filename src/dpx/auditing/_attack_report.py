"""How well an attack does, in words that are no bound on epsilon: AUC, and true-positive rates with intervals."""

import math
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import numpy as np

from .._checks import described, probability
from .._types import RealScalarLike, Unchecked
from ._binomial import clopper_pearson_lower, clopper_pearson_upper
from ._inputs import failure, two_samples


class RateReport(eqx.Module):
    """The true-positive rate of an attack at one false-positive rate.

    **Arguments:**

    - `false_positive_rate`: the rate that was asked for.
    - `true_positive_rate`: the share of scores inside above the threshold.
    - `lower`, `upper`: an interval that covers what the attack reaches at exactly that rate: the threshold's own rate is covered for as well. An
        interval of
        the share alone misses in two runs of five.
    - `measured_false_positive_rate`: the share of scores outside above that threshold.
    - `threshold`: the largest at which that share would be at least the rate asked for; scores strictly above say "in".
    """

    false_positive_rate: float = eqx.field(static=True)
    true_positive_rate: float = eqx.field(static=True)
    lower: float = eqx.field(static=True)
    upper: float = eqx.field(static=True)
    measured_false_positive_rate: float = eqx.field(static=True)
    threshold: float = eqx.field(static=True)


class AttackReport(eqx.Module):
    """How well an attack tells scores inside from scores outside. It is no statement about epsilon, and has none.

    **Arguments:**

    - `auc`: the probability that a score inside is the higher one (ties count half).
    - `auc_interval`: by the variance of DeLong on the logit scale; it misses in 5.3 % of runs at 95 %.
    - `rates`: a `RateReport` for each false-positive rate.
    - `confidence`: of each interval.
    - `num_in`, `num_out`: how many scores there were.
    """

    auc: float = eqx.field(static=True)
    auc_interval: tuple[float, float] = eqx.field(static=True)
    rates: tuple[RateReport, ...] = eqx.field(static=True)
    confidence: float = eqx.field(static=True)
    num_in: int = eqx.field(static=True)
    num_out: int = eqx.field(static=True)

    def __str__(self) -> str:
        low, high = self.auc_interval
        lines = [
            f"attack on {self.num_in} scores inside and {self.num_out} outside ({100 * self.confidence:g} % intervals; no bound on epsilon)",
            f"AUC {self.auc:.4f} [{low:.4f}, {high:.4f}]",
        ]
        for rate in self.rates:
            lines.append(
                f"TPR at FPR {rate.false_positive_rate:g}: {rate.true_positive_rate:.4f} [{rate.lower:.4f}, {rate.upper:.4f}]"
            )
        return "\n".join(lines)

    __repr__ = __str__


def attack_report(
    scores_in: Any,
    scores_out: Any,
    *,
    false_positive_rates: Unchecked[Sequence[float]] = (1e-3, 1e-2, 1e-1),
    confidence: RealScalarLike = 0.95,
) -> AttackReport:
    """AUC, and the true-positive rates at small false-positive rates, of scores inside and outside.

    The intervals are those of independent scores; they describe an attack, and say nothing about epsilon.

    **Arguments:**

    - `scores_in`, `scores_out`: scores; high ones say "in".
    - `false_positive_rates`: rates at which the true-positive rate is reported. With fewer than log(4 / (1 - confidence)) / rate scores outside (438
        for 1 %
        at 95 %) nothing is known from below: the interval then starts at 0.
    - `confidence`: of each interval.

    ??? cite "Reference"

        DeLong et al. 1988; Carlini et al., *Membership inference attacks from first principles*, S&P 2022 (rates rather than averages).
    """
    inside, outside = two_samples("attack_report", scores_in, scores_out)
    alpha = failure("attack_report(confidence=...)", confidence)
    if not isinstance(false_positive_rates, Sequence | np.ndarray) or isinstance(false_positive_rates, str):
        raise ValueError(
            f"`attack_report(false_positive_rates=...)` must be a sequence of rates; got {described(false_positive_rates)}."
        )
    rates = [probability("attack_report(false_positive_rates=...)", rate) for rate in false_positive_rates]
    auc, interval = area_under_curve(inside, outside, alpha)
    found = tuple(_rate(inside, outside, rate, alpha) for rate in rates)
    return AttackReport(auc, interval, found, 1 - alpha, len(inside), len(outside))


def area_under_curve(inside: np.ndarray, outside: np.ndarray, failure: float) -> tuple[float, tuple[float, float]]:
    """The statistic of Mann and Whitney with its interval by DeLong's variance, on the logit scale."""
    from scipy import special

    wins = lambda x, y: (
        (np.searchsorted(np.sort(y), x, "left") + np.searchsorted(np.sort(y), x, "right")) / (2 * len(y))
    )
    over, under = wins(inside, outside), 1 - wins(outside, inside)
    auc = float(over.mean())
    if min(len(inside), len(outside)) < 2:
        return auc, (0.0, 1.0)
    variance = float(over.var(ddof=1) / len(inside) + under.var(ddof=1) / len(outside))
    if not 0 < auc < 1:
        # no variance is measured where all agree: exact for a pair of each, and so from the smaller side
        bound = float(failure / 2) ** (1 / min(len(inside), len(outside)))
        return auc, (bound, 1.0) if auc == 1 else (0.0, 1 - bound)
    logit, width = special.logit(auc), -float(special.ndtri(failure / 2)) * math.sqrt(variance) / (auc * (1 - auc))
    return auc, (float(special.expit(logit - width)), float(special.expit(logit + width)))


def _rate(inside: np.ndarray, outside: np.ndarray, rate: float, failure: float) -> RateReport:
    n1, n0 = len(inside), len(outside)
    high = np.sort(outside)[::-1]
    rank = max(1, math.ceil(rate * n0 - 1e-9))
    threshold = float(high[rank - 1])
    ranks = np.arange(1, n0 + 1)
    lower, upper = 0.0, 1.0
    # of the threshold of rank r, the rate above is Beta(r, n0 - r + 1): at most `rate` but for a quarter of the failures, and at least
    at_most = np.flatnonzero(_quantile(1 - failure / 4, ranks, n0) <= rate)
    if at_most.size:
        t = high[at_most[-1]]
        lower = clopper_pearson_lower(int(np.sum(inside > t)), n1, failure / 4)
    at_least = np.flatnonzero(_quantile(failure / 4, ranks, n0) >= rate)
    if at_least.size:
        t = high[at_least[0]]
        # of tied scores those at the threshold belong to the rate as well
        upper = clopper_pearson_upper(int(np.sum(inside >= t)), n1, failure / 4)
    return RateReport(
        rate, float(np.mean(inside > threshold)), lower, upper, float(np.mean(outside > threshold)), threshold
    )


def _quantile(level: float, ranks: np.ndarray, number: int) -> np.ndarray:
    from scipy import special

    return special.betaincinv(ranks.astype(float), number - ranks + 1.0, level)
