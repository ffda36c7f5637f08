"""Trade-off curves and groups: against integrals of densities computed here."""

import math

import dp_accounting as da
import numpy as np
import pytest
from scipy import integrate, stats

import dpx
from dpx import accounting
from dpx.accounting import TradeOffCurve, group_epsilon

Q, SIGMA = 0.3, 0.7
ONE_STEP = da.PoissonSampledDpEvent(Q, da.GaussianDpEvent(SIGMA))
Y = np.linspace(-8, 12, 200_001)


def densities(weights, sigma):
    """On the grid `Y`: sum_k weights[k] N(k, sigma), and N(0, sigma)."""
    present = sum(w * stats.norm.pdf(Y, k, sigma) for k, w in enumerate(weights))
    return np.asarray(present), stats.norm.pdf(Y, 0, sigma)


def hockey_sticks(weights, sigma, epsilon):
    """Of removal and of addition."""
    present, absent = densities(weights, sigma)
    return [
        float(integrate.trapezoid(np.maximum(0, p - math.exp(epsilon) * o), Y))
        for p, o in ((present, absent), (absent, present))
    ]


@pytest.fixture(scope="module")
def curve():
    epsilons = np.linspace(0, 6, 61)
    return TradeOffCurve(tuple(epsilons.tolist()), tuple(accounting.delta(ONE_STEP, float(e)) for e in epsilons))


def test_guarantee_the_curve_bounds_both_directions(curve):
    # likelihood ratios increase with y, so that the best tests are thresholds: exact error rates of either null hypothesis
    t = np.linspace(-4, 6, 201)
    with_ = (1 - Q) * stats.norm.sf(t, 0, SIGMA) + Q * stats.norm.sf(t, 1, SIGMA)
    without = stats.norm.sf(t, 0, SIGMA)
    for positive_rate, power in ((without, with_), (1 - with_, 1 - without)):
        found = curve.false_negative_rate(positive_rate)
        assert np.all(found <= 1 - power + 1e-9)
    assert np.max(curve.false_negative_rate(without) - (1 - with_)) > -1e-3  # close in one of them
    assert curve.advantage == pytest.approx(np.max(with_ - without), abs=1e-4)


@pytest.mark.parametrize("prior", [0.01, 0.3, 0.5, 0.8])
def test_guarantee_bayes_risk_is_below_that_of_the_best_attack(curve, prior):
    present, absent = densities([1 - Q, Q], SIGMA)
    risk = min(
        integrate.trapezoid(np.minimum(prior * p, (1 - prior) * o), Y)
        for p, o in ((present, absent), (absent, present))
    )
    found = curve.bayes_risk(prior)
    assert found <= risk + 1e-9
    alpha = np.linspace(0, 1, 200_001)
    searched = np.min(prior * curve.false_negative_rate(alpha) + (1 - prior) * alpha)
    assert found <= searched + 1e-12 and found == pytest.approx(searched, abs=1e-5)


def test_bayes_risk_of_a_gaussian_is_close_to_exact():
    plan = dpx.dp_sgd(10, 10, 1, noise_multiplier=1.0)
    curve = plan.trade_off()
    assert curve.bayes_risk() == pytest.approx((1 - curve.advantage) / 2, abs=1e-15)
    for prior in (0.2, 0.5, 0.7):
        threshold = 0.5 + math.log((1 - prior) / prior)
        exact = prior * stats.norm.cdf(threshold - 1) + (1 - prior) * stats.norm.sf(threshold)
        assert exact - 1e-3 <= curve.bayes_risk(prior) <= exact + 1e-9
    assert TradeOffCurve((0.0,), (1.0,)).bayes_risk(0.3) == 0.0
    assert TradeOffCurve((0.0,), (0.0,)).bayes_risk(0.3) == pytest.approx(0.3)
    assert curve.bayes_risk(0.0) == curve.bayes_risk(1.0) == 0.0
    assert 0 <= curve.bayes_risk(1e-300) <= 1e-300
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="must lie in"):
            curve.bayes_risk(wrong)


@pytest.mark.parametrize(
    ("epsilons", "deltas"),
    [((0.1,), (0.5,)), ((0.0, 1.0), (0.5,)), ((0.0, 1.0, 0.5), (0.5, 0.4, 0.3)), ((0.0,), (1.5,)), ((), ())],
)
def test_what_is_no_curve_is_refused(epsilons, deltas):
    with pytest.raises(ValueError, match="ascending from 0"):
        TradeOffCurve(epsilons, deltas)


# ---- groups


def test_a_group_under_gaussian_noise_is_one_unit_with_less_noise():
    event = da.SelfComposedDpEvent(da.GaussianDpEvent(10.0), 4)
    for adjacency, factor in (("add_or_remove_one", 1), ("replace_one", 2)):
        found = group_epsilon(event, 1e-6, (3, 1, 2), adjacency=adjacency)
        assert list(found) == [1, 2, 3]
        for size, epsilon in found.items():
            exact = da.get_epsilon_gaussian(10.0 / (2 * size * factor), 1e-6)
            assert exact <= epsilon <= exact * (1 + 1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_guarantee_a_sampled_group_is_a_mixture(size):
    delta = 1e-3
    epsilon = group_epsilon(ONE_STEP, delta, (size,))[size]
    weights = stats.binom.pmf(np.arange(size + 1), size, Q)
    assert max(hockey_sticks(weights, SIGMA, epsilon)) <= delta
    assert max(hockey_sticks(weights, SIGMA, epsilon * 0.99)) > delta


def test_groups_of_one_are_units_and_larger_groups_lose_more():
    plan = dpx.dp_sgd(1000, 50, 20, noise_multiplier=2.0)
    found = group_epsilon(plan, 1e-6, (1, 2, 5))
    assert found[1] == pytest.approx(plan.epsilon(1e-6), rel=1e-9)
    assert 2 * found[1] < found[2] * 1.05 and found[1] < found[2] < found[5]
    truncated = dpx.dp_sgd(1000, 50, 20, noise_multiplier=2.0, max_batch_size=150)
    assert group_epsilon(truncated, 1e-6, (2,))[2] > found[2]  # no mixture is known to dominate it


def test_groups_that_take_turns_are_no_mixture():
    plan = dpx.dp_mf(1000, 50, 20, bands=2, noise_multiplier=2.0)
    assert plan.sampler.participation.min_separation == 2
    assert group_epsilon(plan, 1e-6, (2,))[2] > 1.02 * group_epsilon(plan.event, 1e-6, (2,))[2]


def test_guarantee_the_conversion_bounds_laplace_noise():
    b, delta = 3.0, 1e-2
    found = group_epsilon(da.LaplaceDpEvent(b), delta, (1, 2, 4))
    for size, epsilon in found.items():
        reached = -math.expm1((epsilon - size / b) / 2) if epsilon < size / b else 0.0
        assert reached <= delta and epsilon <= size / b * (1 + 1e-3)


def test_groups_of_wrong_sizes_or_neighbours():
    plan = dpx.dp_sgd(1000, 50, 20, noise_multiplier=2.0)
    for make, message in (
        (lambda: group_epsilon(plan, 1e-6, (0,)), "at least 1"),
        (lambda: group_epsilon(plan, 0.0), "strictly between"),
        (lambda: group_epsilon(plan, 1e-6, adjacency="replace_one"), "Leave `adjacency` out"),
        (lambda: group_epsilon("plan", 1e-6), "event of `dp_accounting`"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert group_epsilon(da.NoOpDpEvent(), 1e-6, (2,)) == {2: 0.0}
    assert group_epsilon(da.NonPrivateDpEvent(), 1e-6, (2,)) == {2: math.inf}
