"""How much a model remembers of secrets that were drawn at random, in bits; and bounds from secrets whose odds are known."""

import math
from typing import Any

import numpy as np

from .._checks import positive_int, probability, real_number
from .._types import Integer, RealScalarLike
from ._binomial import clopper_pearson_lower
from ._inputs import count, delta_of, failure, scores
from ._lower_bound import LowerBound
from ._roots import largest_refuted

_RUNS = "each of {runs} independent runs had a secret drawn like its references, and was hit with probability {rate:.6g} if it was not in"
_SECRETS = (
    "each of {secrets} secrets was drawn uniformly from {alphabet} and independently, was used nowhere else, and was guessed once; neighbours add or "
    "remove one of them, and delta is 0"
)


def exposure(score: RealScalarLike, reference_scores: Any) -> float:
    r"""$\log_2 \frac{N + 1}{1 + \#\{\text{references scored at least as high}\}}$: how far a secret stands out among $N$ that could have been it.

    !!! success "Guarantee"

        `2 ** -exposure` is a p-value: without memorisation it is below $p$ with probability $p$ at most, exactly, whatever the scores are.

    ```python
    bits = dpx.auditing.exposure(score=7.0, reference_scores=range(1000))
    ```

    **Arguments:**

    - `score`: of the secret in the training data; high where the model likes it, such as its log-likelihood.
    - `reference_scores`: of secrets drawn like it that were NOT in the data.

    ??? cite "Reference"

        Carlini et al., *The secret sharer*, USENIX Security 2019; with the 1 in both places that makes it a p-value.
    """
    own = real_number("exposure(score=...)", score)
    if math.isnan(own):
        raise ValueError("`exposure(score=...)` must be a number; got nan.")
    others = scores("exposure(reference_scores=...)", np.asarray(reference_scores))
    return math.log2((len(others) + 1) / (1 + int(np.sum(others >= own))))


def hits_lower_bound(
    hits: Integer,
    runs: Integer,
    *,
    false_positive_rate: RealScalarLike,
    delta: RealScalarLike,
    confidence: RealScalarLike = 0.95,
) -> LowerBound:
    r"""A lower bound on $\varepsilon$ from hits whose odds without the secret are KNOWN: $\log((\text{TPR} - \delta) / \text{FPR})$, all of the
    confidence for
    one rate.

    A secret drawn like its $N$ references is among the $k$ highest scores with probability $k / (N + 1)$ if it was not in the data.

    **Arguments:**

    - `hits`, `runs`: in how many of so many INDEPENDENT runs the secret was among them.
    - `false_positive_rate`: $k / (N + 1)$.
    - `delta`, `confidence`: as for `epsilon_lower_bound`.
    """
    n = positive_int("hits_lower_bound(runs=...)", runs)
    k = count("hits_lower_bound(hits=...)", hits)
    if k > n:
        raise ValueError(f"`hits_lower_bound(hits, runs)`: at most one hit a run; got {k} of {n}.")
    rate = probability("hits_lower_bound(false_positive_rate=...)", false_positive_rate)
    delta = delta_of("hits_lower_bound(delta=...)", delta)
    alpha = failure("hits_lower_bound(confidence=...)", confidence)
    bound = lambda k: max(0.0, math.log(max(clopper_pearson_lower(k, n, alpha) - delta, rate)) - math.log(rate))
    words = _RUNS.format(runs=n, rate=rate)
    return LowerBound("epsilon", bound(k), 1 - alpha, bound(n), words, delta=delta)


def secrets_lower_bound(
    secrets: Integer, correct: Integer, *, alphabet: Integer, confidence: RealScalarLike = 0.95
) -> LowerBound:
    r"""A lower bound on $\varepsilon$ (at $\delta = 0$) from ONE run with many secrets, each drawn from an alphabet of $K$ and guessed once.

    Under adding or removing a secret, correct guesses are dominated by $\mathrm{Bin}(n, e^\varepsilon / (e^\varepsilon + (K - 1) e^{-\varepsilon}))$.

    **Arguments:**

    - `secrets`, `correct`: how many there were, and were guessed.
    - `alphabet`: $K$, from which each was drawn uniformly and independently.
    - `confidence`: of the bound.
    """
    from scipy import special

    n, v = positive_int("secrets_lower_bound(secrets=...)", secrets), count("secrets_lower_bound(correct=...)", correct)
    size = positive_int("secrets_lower_bound(alphabet=...)", alphabet)
    if v > n or size < 2:
        raise ValueError(
            f"`secrets_lower_bound(secrets, correct, alphabet=...)`: one guess a secret, of two choices; got {n}, {v} and {size}."
        )
    alpha = failure("secrets_lower_bound(confidence=...)", confidence)

    def bound(v: int) -> float:
        if v == 0:
            return 0.0
        rate = lambda e: 1 / (1 + (size - 1) * math.exp(-2 * e))
        return largest_refuted(lambda e: float(special.betainc(v, n - v + 1.0, rate(e))), alpha)

    return LowerBound("epsilon", bound(v), 1 - alpha, bound(n), _SECRETS.format(secrets=n, alphabet=size), delta=0.0)


def credible_epsilon(
    true_positives: Integer,
    num_in: Integer,
    false_positives: Integer,
    num_out: Integer,
    *,
    delta: RealScalarLike,
    credibility: RealScalarLike = 0.95,
) -> float:
    r"""The $\varepsilon$ that is exceeded with posterior probability `credibility`, if both error rates have Jeffreys' priors.

    CREDIBLE, and no confidence bound: over repetitions it may be wrong more often. For a point in a report; not for an assertion.

    **Arguments:**

    - `true_positives`, `num_in`, `false_positives`, `num_out`: counts at a threshold fixed beforehand, of independent runs.
    - `delta`: $\delta$.
    - `credibility`: of the bound.

    ??? cite "Reference"

        Zanella-Béguelin et al., *Bayesian estimation of differential privacy*, ICML 2023.
    """
    from scipy import special

    n1, n0 = (
        positive_int("credible_epsilon(num_in=...)", num_in),
        positive_int("credible_epsilon(num_out=...)", num_out),
    )
    tp, fp = (
        count("credible_epsilon(true_positives=...)", true_positives),
        count("credible_epsilon(false_positives=...)", false_positives),
    )
    if tp > n1 or fp > n0:
        raise ValueError(f"`credible_epsilon`: no more positives than runs; got {tp} of {n1} and {fp} of {n0}.")
    delta = delta_of("credible_epsilon(delta=...)", delta)
    alpha = failure("credible_epsilon(credibility=...)", credibility)
    # the false-positive rate at the middles of so many parts of equal posterior probability
    levels = (np.arange(20_000) + 0.5) / 20_000
    rates = special.betaincinv(0.5 + fp, 0.5 + n0 - fp, levels)

    def below(epsilon: float) -> float:
        """The posterior probability that the rates allow this epsilon."""
        least = np.maximum(1 - delta - math.exp(epsilon) * rates, (1 - delta - rates) * math.exp(-epsilon))
        return float(np.mean(special.betaincc(0.5 + n1 - tp, 0.5 + tp, np.clip(least, 0.0, 1.0))))

    return largest_refuted(below, alpha)
