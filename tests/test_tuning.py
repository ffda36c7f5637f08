"""The cost of hyperparameter search: against the exact law of the best of a random number of runs."""

import math

import dp_accounting as da
import numpy as np
import pytest
from scipy import special, stats

import dpx
from dpx import accounting
from dpx.accounting import fixed_search_epsilon, number_of_runs, search_epsilon, search_event

LAWS = ["logarithmic", "geometric", 0.5, 3.0, "poisson"]


def eta_of(shape):
    return {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}[shape] if isinstance(shape, str) else shape


def probabilities(mean, eta, size=4000):
    """P[K = 0], P[K = 1], ...: Papernot and Steinke 2022, definition 1, its parameter found by bisection on the summed mean."""
    k = np.arange(1, size)
    if math.isinf(eta):
        return stats.poisson.pmf(np.arange(size), mean)

    def of(gamma):
        logs = k * math.log1p(-gamma) + special.gammaln(k + eta) - special.gammaln(k + 1)
        weights = np.exp(logs - logs.max())
        return weights / weights.sum()

    low, high = 1e-3, 1 - 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.sum(k * of(middle)) > mean else (low, middle)
    return np.concatenate([[0.0], of(low)])


def best_of(law, density, y):
    """Density of the best (largest) of K draws, without the chance that there is none."""
    step = y[1] - y[0]
    below = np.clip(np.cumsum(density) * step - density * step / 2, 0, 1)
    k = np.arange(len(law))
    # sum_k P[K = k] k q^(k - 1), by Horner's rule
    slope = np.zeros_like(y)
    for weight in (law * k)[:0:-1]:
        slope = slope * below + weight
    return density * slope


@pytest.mark.parametrize("shape", LAWS)
def test_guarantee_the_best_run_keeps_the_bound(shape):
    mean, sigma, delta = 4.0, 1.0, 1e-4
    law = probabilities(mean, eta_of(shape), 400)
    y = np.linspace(-8, 9, 20_001)
    absent, present = (best_of(law, stats.norm.pdf(y, m, sigma), y) for m in (0.0, 1.0))
    assert absent.sum() * (y[1] - y[0]) == pytest.approx(1 - law[0], abs=1e-3)
    epsilon = search_epsilon(da.GaussianDpEvent(sigma), delta, mean, shape)
    for mirrored in (present, absent):
        other = absent if mirrored is present else present
        reached = lambda e, p=mirrored, o=other: np.maximum(0, p - math.exp(e) * o).sum() * (y[1] - y[0])
        assert reached(epsilon) <= delta
    alone = accounting.epsilon(da.GaussianDpEvent(sigma), delta)
    assert alone < epsilon < 4 * alone
    assert max(reached(alone), np.maximum(0, present - math.exp(alone) * absent).sum() * (y[1] - y[0])) > delta


@pytest.mark.parametrize("shape", LAWS)
def test_guarantee_of_rare_good_runs_is_nearly_attained(shape):
    # Every 1-DP pair is a function of randomised response. Of three outcomes, "better" moves by the most that is allowed one way and a rare
    # "good" the other: the best of many runs is good where it does not find better.
    mean, delta = 40.0, 1e-10
    law = probabilities(mean, eta_of(shape), 8000)
    k = np.arange(len(law))
    better, good = np.array([1, math.e]) / (1 + math.e), 1e-4 * np.array([1.0, math.exp(-1)])
    first, second = (np.dot(law, (1 - b) ** k - (1 - b - g) ** k) for b, g in zip(better, good, strict=True))
    response = da.RandomizedResponseDpEvent(2 / (1 + math.e), 2)
    found = search_epsilon(response, delta, mean, shape, adjacency="replace_one")
    reached = math.log((first - delta) / second)
    assert 1.5 < 0.75 * found < reached <= found


@pytest.mark.parametrize("shape", LAWS)
def test_renyi_bound_is_that_of_the_theorems(shape):
    # an int, which dp_accounting would take for no noise multiplier in a nested event
    event = da.SelfComposedDpEvent(da.GaussianDpEvent(8), 4)
    mean, delta, eta = 10.0, 1e-6, eta_of(shape)
    orders = np.concatenate([1 + np.arange(1, 100) / 10, np.arange(11, 64), [128, 256, 512, 1024]])
    rdp = orders / (2 * 16.0)
    if math.isinf(eta):
        hats = np.log1p(1 / (orders - 1))
        bound = lambda e: (orders - 1) * (rdp - e + np.log1p(-1 / orders)) - np.log(orders)
        to_delta = lambda e: np.min(np.minimum(np.exp(np.minimum(bound(e), 0)), np.sqrt(-np.expm1(-rdp))))
        total = rdp + mean * np.array([to_delta(e) for e in hats]) + math.log(mean) / (orders - 1)
    else:
        law = probabilities(mean, eta)
        gamma = 1 - law[-1] / law[-2] * (len(law) - 1) / (len(law) - 2 + eta) if law[-2] > 0 else None
        if gamma is None:  # the tail underflows: from the first two, whose ratio is (1 - gamma) (1 + eta) / 2
            gamma = 1 - law[2] / law[1] * 2 / (1 + eta)
        constant = (1 + eta) * np.min((1 - 1 / orders) * rdp - math.log(gamma) / orders)
        total = np.minimum.accumulate((rdp + math.log(mean) / (orders - 1) + constant)[::-1])[::-1]
    expected = np.min(total + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1))
    found = accounting.epsilon(search_event(event, mean, shape), delta, accountant="rdp")
    assert found == pytest.approx(expected, rel=1e-4)
    assert search_epsilon(event, delta, mean, shape) <= found


def test_pure_privacy_doubles_or_triples():
    for shape, factor in (("logarithmic", 2), ("geometric", 3)):
        found = search_epsilon(da.LaplaceDpEvent(2.0), 1e-9, 1000, shape)
        assert found <= factor / 2.0 * (1 + 1e-3)
    assert search_epsilon(da.LaplaceDpEvent(2.0), 1e-9, 1000) > 0.75  # and it is far from free


def test_a_random_number_of_runs_is_far_cheaper_than_a_fixed_one():
    plan = dpx.dp_sgd(1000, 50, 20, noise_multiplier=2.0)
    one, fixed = plan.epsilon(1e-6), fixed_search_epsilon(plan, 1e-6, 30)
    found = search_epsilon(plan, 1e-6, 30)
    assert one < found < 2.3 * one < 0.5 * fixed
    assert fixed == dpx.dp_sgd(1000, 50, 600, noise_multiplier=2.0).epsilon(1e-6)
    assert search_epsilon(plan, 1e-6, 1) == one == fixed_search_epsilon(plan, 1e-6, 1)
    ledger = accounting.PrivacyLedger("add_or_remove_one").spend(search_event(plan, 30))
    assert ledger.epsilon(1e-6) >= found


@pytest.mark.parametrize("shape", LAWS)
def test_the_number_of_runs_has_its_law(shape):
    # chi-square with a false-alarm probability of 1e-7 in each of five cases
    mean, draws = 5.0, 4000
    law = probabilities(mean, eta_of(shape), 400)
    counts = np.bincount([number_of_runs(mean, shape, seed=s) for s in range(draws)], minlength=400)[:400]
    cells, expected = [], []
    start = 0
    for k in range(400):
        if draws * law[start : k + 1].sum() >= 20 and draws * law[k + 1 :].sum() >= 20:
            cells.append(counts[start : k + 1].sum())
            expected.append(draws * law[start : k + 1].sum())
            start = k + 1
    cells.append(draws - sum(cells))
    expected.append(draws - sum(expected))
    assert len(cells) >= 5
    statistic = np.sum((np.array(cells) - expected) ** 2 / expected)
    assert stats.chi2.sf(statistic, len(cells) - 1) > 1e-7


def test_the_number_of_runs_is_fresh_unless_it_is_resumed():
    assert number_of_runs(1e6, seed=7) == number_of_runs(1e6, seed=7)
    assert len({number_of_runs(1e6, "geometric") for _ in range(8)}) > 1
    assert {number_of_runs(1, shape) for shape in ("logarithmic", "geometric", 0.3)} == {1}
    assert max(number_of_runs(1 + 1e-9, shape) for shape in ("logarithmic", "geometric", 0.3)) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: search_epsilon(da.GaussianDpEvent(1.0), 1e-6, 0.5), "at least 1"),
        (lambda: search_epsilon(da.GaussianDpEvent(1.0), 1e-6, math.inf), "at least 1"),
        (lambda: search_epsilon(da.GaussianDpEvent(1.0), 1e-6, 5, -0.5), "at least 0"),
        (lambda: search_epsilon(da.GaussianDpEvent(1.0), 1e-6, 5, "uniform"), "one of 'logarithmic'"),
        (lambda: search_epsilon(da.GaussianDpEvent(1.0), 2.0, 5), "strictly between"),
        (lambda: search_epsilon(da.UnsupportedDpEvent(), 1e-6, 5), "no bound is known"),
        (lambda: fixed_search_epsilon(da.GaussianDpEvent(1.0), 1e-6, 0), "at least 1"),
        (lambda: number_of_runs(5, seed=-1), "must lie between"),
    ],
)
def test_wrong_searches_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
