"""Bounds from the scores of independent runs, at thresholds that may be chosen with the scores in hand."""

import math
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import numpy as np

from .._checks import choice, described, instance, real_number
from .._types import RealScalarLike, Unchecked
from ..plan import PrivacyPlan
from . import _gaussian
from ._binomial import clopper_pearson_lower, clopper_pearson_upper, equal_local_level
from ._inputs import delta_of, failure, two_samples
from ._lower_bound import LowerBound
from ._shapes import why_not_gaussian

EpsilonMethod = Literal["ranks", "simultaneous", "split", "dkw"]
MuMethod = Literal["ranks", "simultaneous", "split", "dkw", "gaussian"]

_INDEPENDENT = "the scores are of independent runs of the mechanism, each with one canary that was in or out"
_NORMAL = (
    "the scores are independent and normal with one variance given the coins, as those of Dirac canaries in Gaussian noise without sampling are "
    "(canaries of one run will do then)"
)


class Threshold(eqx.Module):
    """A threshold that was fixed BEFORE the scores were known: a score above it says "in".

    **Arguments:**

    - `value`: the threshold.
    """

    value: float = eqx.field(static=True)

    def __init__(self, value: RealScalarLike):
        self.value = real_number("Threshold(value=...)", value)
        if math.isnan(self.value):
            raise ValueError("`Threshold(value=...)` must be a number; got nan.")


class Rates(NamedTuple):
    """Bounds of error rates, at one or several thresholds, that hold together.

    **Arguments:**

    - `true_positive`: lower bounds.
    - `false_positive`: upper bounds.
    - `name`: how the thresholds were chosen, in words.
    """

    true_positive: np.ndarray
    false_positive: np.ndarray
    name: str


def epsilon_of_rates(true_positive: Any, false_positive: Any, delta: float) -> Any:
    r"""$\max(0, \log \frac{\text{TPR} - \delta}{\text{FPR}}, \log \frac{1 - \text{FPR} - \delta}{1 - \text{TPR}})$: the event and its complement,
    which
    use the same two bounds."""
    tpr, fpr = np.asarray(true_positive, np.float64), np.asarray(false_positive, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        event = np.where(tpr > delta, np.log(np.maximum(tpr - delta, 0)) - np.log(fpr), 0.0)
        rest = 1 - fpr - delta
        complement = np.where(rest > 0, np.log(np.maximum(rest, 0)) - np.log1p(-tpr), 0.0)
    found = np.maximum(0.0, np.maximum(event, complement))
    return float(found) if found.ndim == 0 else found


def epsilon_lower_bound(
    scores_in: Any,
    scores_out: Any,
    *,
    delta: RealScalarLike,
    confidence: RealScalarLike = 0.95,
    method: Unchecked[EpsilonMethod | Threshold] = "ranks",
) -> LowerBound:
    r"""A lower bound on $\varepsilon$ from scores of INDEPENDENT runs with and without a canary; large scores mean "in".

    Scores of the canaries of one run are not independent: give those to `one_run`, with the coins that chose them.

    | method | threshold | best for |
    |---|---|---|
    | `"ranks"` | scores of the runs without the canary, at ranks 1, 2, 4, ... from both ends (Bonferroni) | small false-positive rates |
    | `"simultaneous"` | any, at the equal local level | no rate in particular |
    | `"split"` | the best of one half, drawn at random, measured on the other | many scores |
    | `"dkw"` | any, by the inequality of Dvoretzky, Kiefer and Wolfowitz | rates in the middle |
    | `Threshold(t)` | t, fixed beforehand | a known attack |

    !!! success "Guarantee"

        With probability `confidence` the value is at most the $\varepsilon$ of any mechanism that is $(\varepsilon, \delta)$-DP, whatever the scores
        are (coverage over 2,000 replications is a test). No bound comes from a bootstrap, and no threshold is chosen for free.

    **Arguments:**

    - `scores_in`, `scores_out`: one score a run, of any numbers of runs; infinite ones are allowed.
    - `delta`: $\delta$ in [0, 1).
    - `confidence`: of the bound.
    - `method`: how the threshold is chosen.

    **Raises:** `ValueError` for NaN, for no scores, for twice the same scores.

    ??? cite "Reference"

        Jagielski et al., *Auditing differentially private machine learning*, NeurIPS 2020; Berk and Jones 1979 (the local level).
    """
    inside, outside = two_samples("epsilon_lower_bound", scores_in, scores_out)
    alpha = failure("epsilon_lower_bound(confidence=...)", confidence)
    delta = delta_of("epsilon_lower_bound(delta=...)", delta)
    _check_method("epsilon_lower_bound", method, get_args(EpsilonMethod))
    score = lambda rates: epsilon_of_rates(rates.true_positive, rates.false_positive, delta)
    rates, best = _measured(inside, outside, alpha, method, score)
    return LowerBound(
        "epsilon",
        float(np.max(score(rates))),
        1 - alpha,
        float(np.max(score(best))),
        f"{_INDEPENDENT} ({rates.name})",
        delta=delta,
    )


def mu_lower_bound(
    scores_in: Any,
    scores_out: Any,
    *,
    confidence: RealScalarLike = 0.95,
    method: Unchecked[MuMethod | Threshold] = "ranks",
    delta: RealScalarLike | None = None,
    mu: RealScalarLike | None = None,
    plan: Unchecked[PrivacyPlan | None] = None,
) -> LowerBound:
    r"""A lower bound on the least $\mu$ for which the mechanism is $\mu$-GDP.

    `"gaussian"` is exact and nearly tight (7.36 of a true epsilon 8 with 1,000 canaries) where scores are independent and NORMAL with one variance:
    white-box
    scores of Dirac canaries in Gaussian noise without sampling. The others assume nothing but independent runs.

    **Arguments:**

    - `scores_in`, `scores_out`, `confidence`, `method`: as for `epsilon_lower_bound`; or `"gaussian"`, by the noncentral t distribution.
    - `delta`: at which `bound.epsilon()` translates, where it is not told.
    - `mu`: a claim; the bound then has its `p_value` (`"gaussian"` only).
    - `plan`: whose mechanism it is; `bound.epsilon(delta)` then refuses where that is not a Gaussian one.

    ??? cite "Reference"

        Nasr et al., *Tight auditing of differentially private machine learning*, USENIX Security 2023; Dong, Roth and Su 2022.
    """
    inside, outside = two_samples("mu_lower_bound", scores_in, scores_out)
    alpha = failure("mu_lower_bound(confidence=...)", confidence)
    _check_method("mu_lower_bound", method, get_args(MuMethod))
    delta = None if delta is None else delta_of("mu_lower_bound(delta=...)", delta)
    claim = None if mu is None else real_number("mu_lower_bound(mu=...)", mu)
    why_not = ""
    if plan is not None:
        why_not = why_not_gaussian(instance("mu_lower_bound(plan=...)", plan, PrivacyPlan, "dpx.dp_sgd(...)"))
    if isinstance(method, str) and method == "gaussian":
        if len(inside) + len(outside) < 3:
            raise ValueError(
                "`mu_lower_bound(method='gaussian')` estimates a variance, and needs three scores at least in all."
            )
        if np.isinf(inside).any() or np.isinf(outside).any():
            raise ValueError(
                "`mu_lower_bound(method='gaussian')` needs finite scores: normal numbers are. Use `method='ranks'`."
            )
        value = _gaussian.noncentral_t_bound(inside, outside, alpha)
        p_value = None if claim is None else _gaussian.noncentral_t_p_value(inside, outside, claim)
        return LowerBound("mu", value, 1 - alpha, math.inf, _NORMAL, p_value, delta, why_not)
    if claim is not None:
        raise ValueError("`mu_lower_bound(mu=...)` has a p-value with `method='gaussian'` only.")
    score = lambda rates: _gaussian.mu_of_rates(rates.true_positive, rates.false_positive)
    rates, best = _measured(inside, outside, alpha, method, score)
    words = f"{_INDEPENDENT} ({rates.name})"
    return LowerBound(
        "mu", float(np.max(score(rates))), 1 - alpha, float(np.max(score(best))), words, None, delta, why_not
    )


def _check_method(name: str, method: Any, names: tuple[str, ...]) -> None:
    if isinstance(method, Threshold):
        return
    if not isinstance(method, str):
        raise ValueError(
            f"`{name}(method=...)` must be one of {', '.join(map(repr, names))}, or `Threshold(t)`; got {described(method)}."
        )
    choice(f"{name}(method=...)", method, names)


def _measured(inside: np.ndarray, outside: np.ndarray, alpha: float, method: Any, score: Any) -> tuple[Rates, Rates]:
    """The rates that were measured, and those of a perfect attack."""
    n1, n0 = len(inside), len(outside)
    perfect = np.full(n1, 1.0), np.arange(n0) / (2.0 * n0)
    if isinstance(method, Threshold):
        t = method.value
        lower, upper = clopper_pearson_lower, clopper_pearson_upper
        found = lower(int(np.sum(inside > t)), n1, alpha / 2), upper(int(np.sum(outside > t)), n0, alpha / 2)
        best = lower(n1, n1, alpha / 2), upper(0, n0, alpha / 2)
        name = "at a threshold fixed beforehand"
        return Rates(np.array([found[0]]), np.array([found[1]]), name), Rates(
            np.array([best[0]]), np.array([best[1]]), name
        )
    if method == "split":
        return _split(inside, outside, alpha, score), _split(*perfect, alpha, score)
    rates = {"ranks": _ranks, "simultaneous": _simultaneous, "dkw": _dkw}[method]
    return rates(inside, outside, alpha), rates(*perfect, alpha)


def ranks_looked_at(number: int) -> np.ndarray:
    """1, 2, 4, ... up to half of them, and as many from the other end."""
    powers = 2 ** np.arange(int(math.log2(max(number // 2, 1))) + 1)
    return np.unique(np.concatenate([powers, number + 1 - powers]))


def _ranks(inside: np.ndarray, outside: np.ndarray, alpha: float) -> Rates:
    # The rate above the k-th largest of the scores outside is Beta(k, n0 - k + 1), or smaller where scores tie, and the threshold knows nothing of
    # the scores inside.
    n1, n0 = len(inside), len(outside)
    ranks = ranks_looked_at(n0)
    each = alpha / (2 * len(ranks))
    thresholds = np.sort(outside)[::-1][ranks - 1]
    hits = n1 - np.searchsorted(np.sort(inside), thresholds, side="right")
    return Rates(
        np.atleast_1d(clopper_pearson_lower(hits, n1, each)),
        np.atleast_1d(clopper_pearson_upper(ranks - 1, n0, each)),
        f"thresholds at {len(ranks)} ranks fixed beforehand",
    )


def _counts(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many lie above each score, and above none."""
    thresholds = np.concatenate([[-np.inf], np.unique(np.concatenate([inside, outside]))])
    above = lambda x: len(x) - np.searchsorted(np.sort(x), thresholds, side="right")
    return above(inside), above(outside)


def _simultaneous(inside: np.ndarray, outside: np.ndarray, alpha: float) -> Rates:
    hits, misses = _counts(inside, outside)
    n1, n0 = len(inside), len(outside)
    return Rates(
        clopper_pearson_lower(hits, n1, equal_local_level(n1, alpha / 2)),
        clopper_pearson_upper(misses, n0, equal_local_level(n0, alpha / 2)),
        "any threshold, at the equal local level",
    )


def _dkw(inside: np.ndarray, outside: np.ndarray, alpha: float) -> Rates:
    hits, misses = _counts(inside, outside)
    margin = lambda n: math.sqrt(max(math.log(2 / alpha), math.log(2)) / (2 * n))
    n1, n0 = len(inside), len(outside)
    return Rates(
        np.maximum(0.0, hits / n1 - margin(n1)),
        np.minimum(1.0, misses / n0 + margin(n0)),
        "any threshold, by the inequality of Dvoretzky, Kiefer and Wolfowitz",
    )


def _split(inside: np.ndarray, outside: np.ndarray, alpha: float, score: Any) -> Rates:
    n1, n0 = len(inside), len(outside)
    if min(n1, n0) < 2:
        raise ValueError("`method='split'` needs two scores of each kind at least. Use `method='ranks'`.")
    # drawn at random, not by position: scores may come sorted
    rng = np.random.default_rng(0x5EED)
    mixed = rng.permutation(inside), rng.permutation(outside)
    guess, test = (mixed[0][: n1 // 2], mixed[1][: n0 // 2]), (mixed[0][n1 // 2 :], mixed[1][n0 // 2 :])
    hits, misses = _counts(*guess)
    bound = lambda hits, n1, misses, n0: Rates(
        np.atleast_1d(clopper_pearson_lower(hits, n1, alpha / 2)),
        np.atleast_1d(clopper_pearson_upper(misses, n0, alpha / 2)),
        "the threshold chosen on one half, measured on the other",
    )
    at = int(np.argmax(score(bound(hits, len(guess[0]), misses, len(guess[1])))))
    threshold = np.concatenate([[-np.inf], np.unique(np.concatenate(guess))])[at]
    return bound(int(np.sum(test[0] > threshold)), len(test[0]), int(np.sum(test[1] > threshold)), len(test[1]))
