"""Estimators of the audits: reference values, coverage, null leakage, and what they refuse."""

import math
import time
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

import dpx
from audit_reference import VALUES
from dpx import auditing
from dpx.accounting import TradeOffCurve
from dpx.auditing._gaussian import _tail_of_t
from dpx.auditing._thresholds import _counts, epsilon_of_rates

A: Any = auditing  # what a wrong call gives is tested here, and not what an editor says of it

METHODS = ["ranks", "simultaneous", "split", "dkw", A.Threshold(1.5)]


def grid(args):
    size = 1000 if "1000" in args["scores"] else 100
    base = stats.norm.ppf((np.arange(size) + 0.5) / size)
    return base + args["shift"], base


def pure(epsilon, delta):
    """The trade-off curve of one pair of epsilon and delta."""
    at_zero = 1 - 2 * (1 - delta) / (1 + math.exp(epsilon))
    return TradeOffCurve([0.0, epsilon], [max(delta, at_zero), delta])


def of_counts(true_positives, num_in, false_positives, num_out):
    """Scores with so many above 1.5 on each side, all different."""
    low, high = np.linspace(0, 1, num_in + num_out), np.linspace(2, 3, num_in + num_out)
    inside = np.concatenate([high[:true_positives], low[: num_in - true_positives]])
    outside = np.concatenate(
        [high[num_in : num_in + false_positives], low[num_in : num_in + num_out - false_positives]]
    )
    return inside, outside


def guessed(canaries, guesses, correct, seed=0):
    """Coins, and scores by which so many of so many guesses are right: `(coins, scores, (k_in, k_out))`."""
    coins = A.flip_coins(canaries, seed=seed)
    is_in, is_out = np.flatnonzero(coins.included), np.flatnonzero(~coins.included)
    scores = np.zeros(canaries)
    wrong = guesses - correct
    right_in = min(correct, len(is_in))
    scores[is_in[:right_in]] = 2.0
    scores[is_out[:wrong]] = 1.0
    scores[is_out[wrong : wrong + correct - right_in]] = -1.0
    assert len(is_out) >= wrong + correct - right_in
    return coins, scores, (right_in + wrong, correct - right_in)


def computed(name, a):
    confidence = 1 - a["alpha"] if isinstance(a, dict) and "alpha" in a else None
    counts = lambda: (a["canaries"], a["guesses"], a["correct"])
    match name.split(":")[0]:
        case "clopper_pearson_upper":
            return A.clopper_pearson_upper(*a)
        case "clopper_pearson_lower":
            return A.clopper_pearson_lower(*a)
        case "epsilon_clopper_pearson" | "mu_clopper_pearson":
            pair = of_counts(a["tp"], a["num_in"], a["fp"], a["num_out"])
            if name.startswith("mu"):
                return A.mu_lower_bound(*pair, confidence=confidence, method=A.Threshold(1.5)).value
            return A.epsilon_lower_bound(*pair, delta=a["delta"], confidence=confidence, method=A.Threshold(1.5)).value
        case "gaussian_epsilon":
            return A.gaussian_epsilon(a["mu"], a["delta"])
        case "gaussian_delta":
            return A.gaussian_delta(a["epsilon"], a["mu"])
        case "equal_local_level":
            return A.equal_local_level(a["n"], a["alpha"])
        case "epsilon_lower_bound":
            method = name.split(":")[1]
            return A.epsilon_lower_bound(*grid(a), delta=a["delta"], confidence=confidence, method=method).value
        case "mu_lower_bound":
            return A.mu_lower_bound(*grid(a), confidence=confidence, method=name.split(":")[1]).value
        case "gaussian_mu_noncentral_t":
            return A.mu_lower_bound(*grid(a), confidence=confidence, method="gaussian").value
        case "auc, DeLong logit interval":
            report = A.attack_report(*grid(a), confidence=confidence)
            return [report.auc, *report.auc_interval]
        case name if name.startswith("tpr at fpr .1"):
            inside, outside = grid(a)
            rate = A.attack_report(inside, outside, false_positive_rates=[0.1]).rates[0]
            hits, level = round(rate.true_positive_rate * len(inside)), a["alpha"] / 2
            misses = round(rate.measured_false_positive_rate * len(outside))
            interval = (
                A.clopper_pearson_lower(hits, len(inside), level),
                A.clopper_pearson_upper(hits, len(inside), level),
            )
            upper = A.clopper_pearson_upper(misses, len(outside), level)
            return [rate.true_positive_rate, *interval, rate.measured_false_positive_rate, upper]
        case "interval of TPR at FPR exactly .1":
            rate = A.attack_report(*grid(a), confidence=confidence, false_positive_rates=[0.1]).rates[0]
            return [rate.lower, rate.upper]
        case "one_run_p_value":
            coins, scores, guesses = guessed(*counts())
            options = {"guesses": guesses, "delta": a["delta"], "epsilon": a["epsilon"]}
            return A.one_run(coins, scores, **options).p_value
        case "one_run_epsilon":
            coins, scores, guesses = guessed(*counts())
            return A.one_run(coins, scores, guesses=guesses, delta=a["delta"], confidence=confidence).value
        case "one_run_f_dp_mu" | "one_run_f_dp_epsilon":
            coins, scores, guesses = guessed(*counts())
            bound = A.one_run(coins, scores, guesses=guesses, curve=1.0, confidence=confidence)
            return bound.value if name.endswith("mu") else bound.epsilon(a["delta"])
        case "one_run_f_dp_p_value":
            words = a["curve"].strip("()").replace("gaussian ", "").split(", ")
            numbers = [float(word.split("=")[1]) for word in words]
            coins, scores, guesses = guessed(*counts())
            curve = numbers[0] if len(numbers) == 1 else pure(*numbers)
            return A.one_run(coins, scores, guesses=guesses, curve=curve).p_value
        case "epsilon_bayes_jeffreys":
            rates = (a["tp"], a["num_in"], a["fp"], a["num_out"])
            return A.credible_epsilon(*rates, delta=a["delta"], credibility=confidence)
        case "auc_cap_pure":
            return A.auc_ceiling(epsilon=a["epsilon"])
        case "exposure":
            return A.exposure(a["score"], np.arange(1023) / 400)
        case "epsilon_known_fpr":
            options = {"false_positive_rate": a["fpr"], "delta": a["delta"], "confidence": confidence}
            return A.hits_lower_bound(a["hits"], a["n"], **options).value
        case name if name.startswith("k_ary_one_run"):
            return A.secrets_lower_bound(
                a["secrets"], a["correct"], alphabet=a["alphabet"], confidence=confidence
            ).value
        case name if name.startswith("e_process"):
            return list(A.sequential_test(a["a"], a["b"], epsilon=a["epsilon"], delta=a["delta"]).log_wealth[1:])
        case "two_gaussians_epsilon":
            return A.two_gaussians_epsilon(a["in_mean"], a["in_sd"], a["out_mean"], a["out_sd"], a["delta"])
        case name if name.startswith("log likelihood ratio"):
            return A.log_likelihood_ratio(a["x"], a["noise_multiplier"], sampling_probability=a["q"])
        case name if name.startswith("noise draws to see"):
            return A.noise_draws_to_see(a["rho"])
        case "binomial two-sided p of inclusions":
            return A.binomial_p_value(a["inclusions"], a["trials"], a["q"])
    raise AssertionError(f"{name} is not computed")


def test_reference_values():
    """To 1e-6; every function of the table is one of ours."""
    for name, args, value in VALUES:
        got = computed(name, args)
        # the table's numbers of draws are on a grid of 0.2 %
        exact = 2e-3 if name.startswith("noise draws") else 1e-6
        np.testing.assert_allclose(got, value, rtol=exact, atol=1e-12, err_msg=f"{name} {args}")


# --- coverage -----------------------------------------------------------------------------------------------------------


def laplace_run(rng, n, epsilon=1.0):
    return rng.laplace(size=n) / epsilon + 1, rng.laplace(size=n) / epsilon


def misses(bound, truth, replications, seed):
    rng = np.random.default_rng(seed)
    return sum(bound(rng) > truth * (1 + 1e-9) for _ in range(replications))


def allowed(replications, failure):
    """More misses than this have probability 1e-6, if each has at most `failure`."""
    return int(stats.binom.isf(1e-6, replications, failure))


BOUNDS = {
    **{
        f"epsilon, {method}": (
            lambda rng, method=method: A.epsilon_lower_bound(*laplace_run(rng, 120), delta=0.0, method=method).value,
            1.0,
        )
        for method in ["ranks", "simultaneous", "split", "dkw", A.Threshold(1.0)]
    },
    **{
        f"mu, {method}": (
            lambda rng, method=method: (
                A.mu_lower_bound(rng.normal(1.0, 1.0, 80), rng.normal(0.0, 1.0, 150), method=method).value
            ),
            1.0,
        )
        for method in ["ranks", "simultaneous", "split", "dkw", "gaussian"]
    },
    "hits": (
        lambda rng: A.hits_lower_bound(int(rng.binomial(100, 0.3)), 100, false_positive_rate=0.01, delta=0.0).value,
        math.log(30),
    ),
    "secrets": (
        lambda rng: A.secrets_lower_bound(100, int(rng.binomial(100, 1 / (1 + 9 * math.exp(-2)))), alphabet=10).value,
        1.0,
    ),
}


def response(rng, m, epsilon, delta=0.0):
    """Randomised response of every coin, which reaches the bound; with probability delta it tells all."""
    coins = A.flip_coins(m, seed=int(rng.integers(2**60)))
    truth = rng.random(m) < special.expit(epsilon)
    tells = rng.random() < m * delta
    return coins, np.where(truth | tells, coins.included, ~coins.included) * 2.0 - 1 + rng.random(m) / 2


def one_run_bound(rng, m=100, epsilon=1.0, delta=0.0):
    coins, scores = response(rng, m, epsilon, delta)
    return A.one_run(coins, scores, guesses=(m // 4, m // 4), delta=delta).value


def one_run_mu_bound(rng, m=80, mu=1.0):
    coins = A.flip_coins(m, seed=int(rng.integers(2**60)))
    scores = rng.normal(size=m) + mu * coins.included
    return A.one_run(coins, scores, guesses=((8, 8), (20, 20)), curve=mu).value


BOUNDS["one run"] = (one_run_bound, 1.0)
BOUNDS["one run, delta"] = (lambda rng: one_run_bound(rng, 100, 1.0, 2e-4), 1.0)
BOUNDS["one run, curve"] = (one_run_mu_bound, 1.0)


def check_coverage(name, replications):
    bound, truth = BOUNDS[name]
    missed = misses(bound, truth, replications, seed=1)
    assert missed <= allowed(replications, 0.05), f"{name}: {missed} of {replications}"


@pytest.mark.parametrize("name", BOUNDS)
def test_coverage(name):
    check_coverage(name, 20 if "curve" in name else 100)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDS)
def test_coverage_over_2000_replications(name):
    check_coverage(name, 2000)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "gaussian"], ids=str)
def test_null_leakage_is_certified_in_five_per_cent_at_most(method):
    """At two designs, one of them very unbalanced, and for both bounds."""
    for n1, n0 in ((100, 100), (500, 20)):
        rng = np.random.default_rng(5)
        found = np.zeros(2)
        for _ in range(2000):
            inside, outside = rng.normal(size=n1), rng.normal(size=n0)
            if method != "gaussian":
                found[0] += A.epsilon_lower_bound(inside, outside, delta=1e-5, method=method).value > 0
            found[1] += A.mu_lower_bound(inside, outside, method=method).value > 0
        assert (found <= allowed(2000, 0.05)).all(), found


def test_the_best_threshold_at_the_full_level_would_be_caught():
    """The invalid estimator that the others replace: counting of misses refutes it, at a confidence of one half."""

    def bound(rng):
        inside, outside = laplace_run(rng, 120)
        hits, misses = _counts(inside, outside)
        lower, upper = A.clopper_pearson_lower(hits, 120, 0.25), A.clopper_pearson_upper(misses, 120, 0.25)
        return float(np.max(epsilon_of_rates(lower, upper, 0.0)))

    assert misses(bound, 1.0, 300, seed=1) > allowed(300, 0.5)


# --- conditions ---------------------------------------------------------------------------------------------------------


def test_a_design_is_needed_in_one_run():
    scores = np.random.default_rng(0).normal(size=100)
    for bare in (scores > 0, scores, [True] * 100):
        with pytest.raises(ValueError, match="needs the coins"):
            A.one_run(bare, scores, guesses=(10, 10), delta=1e-5)


def test_exactly_half_in_is_refused():
    """Two canaries, one of them in: both are guessed with probability 1/2, where the bound says 1/4."""
    half = np.arange(10) < 5
    with pytest.raises(ValueError, match="exactly half"):
        A.Coins(half)
    assert A.Coins(half, independent=True).number == 10


def test_unfair_coins_are_refused_unless_they_are_stated():
    """Canaries in with probability 1/4, all guessed out, no leakage: fair coins would certify 0.917 every time."""
    rng = np.random.default_rng(0)
    included = rng.random(1000) < 0.25
    with pytest.raises(ValueError, match="probability"):
        A.Coins(included)
    coins = A.Coins(included, probability=0.25)
    assert A.one_run(coins, rng.random(1000), guesses=(0, 1000), delta=0.0).value < 0.2
    with pytest.raises(ValueError, match="delta=0"):
        A.one_run(coins, rng.random(1000), guesses=(0, 1000), delta=1e-5)
    with pytest.raises(ValueError, match="fair"):
        A.one_run(coins, rng.random(1000), guesses=(0, 1000), curve=1.0)


def test_coins_do_not_show_how_they_fell():
    coins = A.flip_coins(64, seed=3)
    assert repr(coins) == str(coins) == "Coins(64 canaries, each in with probability 0.5)"
    assert np.array_equal(coins.included, A.flip_coins(64, seed=3).included)
    assert not np.array_equal(coins.included, A.flip_coins(64).included)
    with pytest.raises(ValueError, match="read-only"):
        coins.included[0] = True


def test_every_canary_counts_also_without_a_guess():
    few, many = (A.one_run_p_value(m, 50, 45, epsilon=1.0, delta=1e-3) for m in (50, 500))
    assert many > 2 * few


def test_several_numbers_of_guesses_are_paid_for():
    coins = A.flip_coins(200, seed=1)
    scores = coins.included + np.random.default_rng(0).normal(size=200)
    alone = A.one_run(coins, scores, guesses=(40, 40), delta=1e-5, epsilon=0.1)
    both = A.one_run(coins, scores, guesses=((40, 40), (1, 0)), delta=1e-5, epsilon=0.1)
    assert both.value < alone.value
    assert alone.p_value is not None and both.p_value == pytest.approx(2 * alone.p_value)


def test_mu_is_translated_for_gaussian_mechanisms_only():
    rng = np.random.default_rng(0)
    scores = rng.normal(2, 1, 200), rng.normal(0, 1, 200)
    gaussian = dpx.PrivacyPlan(dpx.PoissonSampler(100, 100, 5), 1.0, dpx.IndependentGaussian(1.0))
    sampled = dpx.PrivacyPlan(dpx.PoissonSampler(100, 1, 1), 1.0, dpx.IndependentGaussian(0.3))
    laplace = dpx.PrivacyPlan(dpx.PoissonSampler(100, 100, 5), dpx.FlatClipping(1.0, order=1), dpx.Laplace(1.0))
    bound = A.mu_lower_bound(*scores, plan=gaussian, method="gaussian", delta=1e-5)
    assert bound.epsilon() == bound.epsilon(1e-5) == A.gaussian_epsilon(bound.value, 1e-5) > 0
    for plan in (sampled, laplace):
        with pytest.raises(ValueError, match="Gaussian"):
            A.mu_lower_bound(*scores, plan=plan).epsilon(1e-5)
    with pytest.raises(ValueError, match="translates"):
        A.epsilon_lower_bound(*scores, delta=0.0).epsilon(1e-5)
    with pytest.raises(ValueError, match="delta"):
        A.mu_lower_bound(*scores).epsilon()


def test_a_bound_prints_value_confidence_ceiling_and_assumption():
    inside, outside = of_counts(500, 1000, 10, 1000)
    text = str(A.epsilon_lower_bound(inside, outside, delta=1e-5, method=A.Threshold(1.5)))
    assert text.startswith(
        "epsilon >= 3.241 at delta 1e-05 (95 %, ceiling 5.601) if the scores are of independent runs"
    )
    coins = A.flip_coins(100, seed=0)
    bound = A.one_run(coins, coins.included * 1.0, guesses=(20, 20), curve=1.0)
    assert "mu >= " in str(bound) and "p-value" in str(bound) and "independent coin" in str(bound)
    assert float(bound) == bound.value <= bound.ceiling


def test_the_ceiling_is_reached_by_a_perfect_attack():
    inside, outside = np.arange(100.0) + 200, np.arange(100.0)
    for method in ["ranks", "simultaneous", "split", "dkw"]:
        bound = A.epsilon_lower_bound(inside, outside, delta=1e-5, method=method)
        assert bound.value == pytest.approx(bound.ceiling) and bound.value > 0.5
        bound = A.mu_lower_bound(inside, outside, method=method)
        assert bound.value == pytest.approx(bound.ceiling)


# --- pitfalls -----------------------------------------------------------------------------------------------------------


def test_both_directions_are_looked_at():
    """An attack that is sure of who is out, at a high false-positive rate."""
    inside, outside = of_counts(1000, 1000, 900, 1000)
    value = A.epsilon_lower_bound(inside, outside, delta=0.0, method=A.Threshold(1.5)).value
    assert value == pytest.approx(3.10452412, rel=1e-6)


def test_scores_with_the_wrong_sign_certify_nothing():
    """A bound that takes |mu| is positive here."""
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(-2, 1, 200), rng.normal(0, 1, 200)
    for method in ["ranks", "simultaneous", "split", "dkw", "gaussian", A.Threshold(0.0)]:
        assert A.mu_lower_bound(inside, outside, method=method).value == 0


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_degenerate_scores_give_zero(method):
    zeros = np.zeros(20)
    for inside, outside in [
        (zeros, np.zeros(30)),
        (np.full(5, np.inf), np.full(6, np.inf)),
        (np.full(20, -1.0), np.full(20, 1.0)),
    ]:
        assert A.epsilon_lower_bound(inside, outside, delta=1e-5, method=method).value == 0
        assert A.mu_lower_bound(inside, outside, method=method).value == 0
    if method != "split":
        assert A.epsilon_lower_bound([1.0], [0.0], delta=0.0, method=method).value < 1e-9


def test_a_delta_above_every_rate_gives_zero():
    inside, outside = of_counts(30, 100, 1, 100)
    assert A.epsilon_lower_bound(inside, outside, delta=0.9999).value == 0
    assert A.hits_lower_bound(3, 10, false_positive_rate=0.001, delta=0.99).value == 0


def test_scores_without_noise_have_a_bound_too():
    """Where the noise is missing, t is as large as rounding lets it be."""
    rng = np.random.default_rng(0)
    for size in (1e-2, 1e-3, 1e-8, 1e-14, 0.0):
        inside, outside = 1 + size * rng.normal(size=50), size * rng.normal(size=50)
        bound = A.mu_lower_bound(inside, outside, method="gaussian", mu=1.0)
        assert bound.value > min(0.5 / max(size, 1e-300), 1e12) and bound.p_value < 1e-100
    near = _tail_of_t(99.99, 90, 95.0), _tail_of_t(100.01, 90, 95.0)  # two ways to compute it meet
    # a density of about .04 between them
    assert 0 < near[0] - near[1] < 0.02 * 0.06


def test_infinite_scores_are_scores_and_nan_is_none():
    inside, outside = np.full(200, np.inf), np.full(200, -np.inf)
    assert A.epsilon_lower_bound(inside, outside, delta=1e-5).value > 3
    with pytest.raises(ValueError, match="finite"):
        A.mu_lower_bound(inside, outside, method="gaussian")
    inside[3] = np.nan
    with pytest.raises(ValueError, match=r"scores_in=.*1 NaN"):
        A.epsilon_lower_bound(inside, outside, delta=1e-5)
    coins = A.flip_coins(200, seed=0)
    with pytest.raises(ValueError, match=r"one_run\(scores=.*NaN"):
        A.one_run(coins, inside, guesses=(1, 1), delta=0.0)
    with pytest.raises(ValueError, match="NaN"):
        A.exposure(1.0, [1.0, math.nan])
    with pytest.raises(ValueError, match="NaN"):
        A.attack_report(inside, outside)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: A.epsilon_lower_bound(x, x, delta=0.0), "twice the same"),
        (lambda x: A.epsilon_lower_bound(x, x.copy(), delta=0.0), "twice the same"),
        (lambda x: A.mu_lower_bound([], x), "at least one score"),
        (lambda x: A.mu_lower_bound(x, x + 1, method="best"), "method"),
        (lambda x: A.mu_lower_bound(x, x + 1, method=0.5), "Threshold"),
        (lambda x: A.epsilon_lower_bound(x, x + 1, delta=1.0), "delta"),
        (lambda x: A.epsilon_lower_bound(x, x + 1, delta=0.1, confidence=95), "confidence"),
        (lambda x: A.epsilon_lower_bound(x[None], x + 1, delta=0.1), "vector"),
        (lambda x: A.epsilon_lower_bound("high", x, delta=0.1), "vector of scores"),
        (lambda x: A.Threshold(math.nan), "nan"),
        (lambda x: A.one_run(A.flip_coins(9), x, guesses=(1, 1), delta=0.0), "9 coins"),
        (lambda x: A.one_run(A.flip_coins(10), x, guesses=(6, 6), delta=0.0), "guesses"),
        (lambda x: A.one_run(A.flip_coins(10), x, guesses=(0, 0), delta=0.0), "guesses"),
        (lambda x: A.one_run(A.flip_coins(10), x, guesses=3, delta=0.0), "guesses"),
        (lambda x: A.one_run(A.flip_coins(10), x, guesses=(2, 2)), "neither"),
        (lambda x: A.one_run(A.flip_coins(10), x, guesses=(2, 2), delta=0.0, curve=1.0), "both"),
        (lambda x: A.one_run(A.flip_coins(10), x, guesses=(2, 2), curve="steep"), "curve"),
        (lambda x: A.flip_coins(0), "at least 1"),
        (lambda x: A.Coins(x), "booleans"),
        (lambda x: A.sequential_test(x, x, epsilon=1.0, delta=0.0), r"\[0, 1\]"),
        (lambda x: A.sequential_test([1], [0, 1], epsilon=1.0, delta=0.0), "pairs"),
        (lambda x: A.secrets_lower_bound(3, 4, alphabet=10), "one guess a secret"),
        (lambda x: A.attack_report(x, x + 1, false_positive_rates=0.1), "sequence"),
    ],
)
def test_mistakes_are_refused_by_name(call, words):
    with pytest.raises(ValueError, match=words):
        call(np.arange(10.0))


# --- others -------------------------------------------------------------------------------------------------------------


def test_a_decision_by_a_curve_takes_a_second_at_ten_thousand_canaries():
    curve = dpx.PrivacyPlan(dpx.PoissonSampler(1000, 100, 50), 1.0, dpx.IndependentGaussian(2.0)).trade_off()
    begin = time.process_time()
    assert A.is_refuted(10_000, 4_000, 3_990, curve=curve, failure=1e-6)
    assert not A.is_refuted(10_000, 4_000, 2_000, curve=curve, failure=0.05)
    assert time.process_time() - begin < 4  # two of them, on a loaded machine


def test_p_values_of_curves_agree_with_the_decision():
    curve = pure(0.5, 1e-3)
    p = A.one_run_curve_p_value(200, 50, 45, curve=curve)
    assert A.is_refuted(200, 50, 45, curve=curve, failure=p * 1.0001)
    assert not A.is_refuted(200, 50, 45, curve=curve, failure=p * 0.9999)


def test_exposure_is_a_p_value():
    rng = np.random.default_rng(0)
    bits = np.array([A.exposure(x[0], x[1:]) for x in rng.normal(size=(4000, 64))])
    assert np.mean(bits >= 5) <= 2**-5 + 5 * math.sqrt(2**-5 / 4000)
    # integer ranks: with ties, never fewer references count
    assert A.exposure(1.0, np.ones(7)) == 0 == math.log2(8 / 8)


def test_a_sequential_test_may_stop_at_any_time():
    """Randomised response at the boundary is given up in 5 % of runs at most; a leak is found."""
    rng = np.random.default_rng(0)
    stopped = 0
    p = special.expit(1.0)
    for _ in range(200):
        a, b = rng.random(600) < p, rng.random(600) < 1 - p
        stopped += A.sequential_test(a, b, epsilon=1.0, delta=0.0).rejected_at is not None
    assert stopped <= allowed(200, 0.05)
    p = special.expit(2.0)
    a, b = rng.random(2000) < p, rng.random(2000) < 1 - p
    found = A.sequential_test(a, b, epsilon=1.0, delta=0.0, confidence=1 - 1e-6)
    assert found.rejected_at is not None and found.p_value <= 1e-6 and "refuted" in str(found)


def test_intervals_of_rates_cover():
    """What an attack reaches at exactly one false-positive rate, in 300 replications."""
    rng, missed = np.random.default_rng(0), 0
    truth = stats.norm.sf(stats.norm.isf(0.1) - 1)
    for _ in range(300):
        rate = A.attack_report(rng.normal(1, 1, 200), rng.normal(0, 1, 200), false_positive_rates=[0.1]).rates[0]
        missed += not rate.lower <= truth <= rate.upper
    assert missed <= allowed(300, 0.05)
    assert A.attack_report(np.arange(30.0) + 9, np.arange(30.0), false_positive_rates=[1e-3]).rates[0].lower == 0


def test_a_report_of_an_attack_has_no_epsilon():
    report = A.attack_report(np.arange(30.0) + 9.5, np.arange(30.0))
    assert "no bound on epsilon" in str(report) and "TPR at FPR 0.01" in repr(report)
    assert not hasattr(report, "epsilon")
    low, high = A.attack_report(np.arange(9.0) + 10, np.arange(9.0)).auc_interval
    assert 0.5 < low < high == 1


def test_credible_and_fitted_are_called_so():
    for function in (A.credible_epsilon, A.two_gaussians_epsilon):
        assert "no confidence" in " ".join(str(function.__doc__).split())


@pytest.mark.slow
def test_the_level_of_all_order_statistics_by_simulation():
    rng = np.random.default_rng(0)
    for number in (10, 100):
        level = A.equal_local_level(number, 0.025)
        ranks = np.arange(1, number + 1)
        bounds = stats.beta.isf(level, ranks, number + 1 - ranks)
        crossed = np.mean([(np.sort(rng.random(number)) > bounds).any() for _ in range(40_000)])
        assert abs(crossed - 0.025) < 5 * math.sqrt(0.025 / 40_000)
