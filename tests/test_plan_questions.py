"""What a plan answers: budgets stated as attacks, reports, plots; and what it refuses."""

import json
import math

import numpy as np
import pytest
from scipy.stats import norm

import dpx

CLIP = dpx.FlatClipping(1.0)


@pytest.fixture(scope="module")
def plan():
    # without amplification the run is one Gaussian, of which everything is known in closed form
    sampler = dpx.ShuffleSampler(100, 10, 40)
    return dpx.PrivacyPlan(sampler, CLIP, dpx.IndependentGaussian(4.0), adjacency="replace_special")


def test_calibrates_to_an_attackers_advantage(plan):
    calibrated = plan.calibrate(advantage=0.1)
    mu = math.sqrt(4) / calibrated.noise_multiplier  # four participations
    assert calibrated.trade_off().advantage <= 0.1
    assert 2 * norm.cdf(mu / 2) - 1 == pytest.approx(0.1, rel=1e-4)


def test_calibrates_to_a_true_positive_rate(plan):
    calibrated = plan.calibrate(true_positive_rate=0.05, false_positive_rate=0.01)
    assert float(calibrated.trade_off().true_positive_rate(0.01)) <= 0.05
    mu = math.sqrt(4) / calibrated.noise_multiplier
    # the curve is a bound from finitely many epsilons, so the attack is a little weaker than allowed
    assert norm.cdf(norm.ppf(0.01) + mu) == pytest.approx(0.05, rel=0.02)
    assert norm.cdf(norm.ppf(0.01) + mu) <= 0.05


def test_the_most_steps_for_an_advantage(plan):
    longer = plan.calibrate(advantage=0.5, parameter="steps")
    assert longer.trade_off().advantage <= 0.5
    step = 10  # an epoch more takes part once more
    sampler = dpx.ShuffleSampler(100, 10, longer.steps + step)
    assert dpx.PrivacyPlan(sampler, CLIP, plan.noise, adjacency="replace_special").trade_off().advantage > 0.5


@pytest.mark.parametrize(
    "budget, match",
    [
        ({}, "takes one budget"),
        ({"epsilon": 1.0, "delta": 1e-3, "advantage": 0.1}, "takes one budget"),
        ({"epsilon": 1.0}, "needs a `delta=` too"),
        ({"advantage": 0.1, "delta": 1e-3}, "goes with `epsilon=`"),
        ({"advantage": 1.5}, r"advantage=\.\.\."),
        ({"true_positive_rate": 0.1}, "go together"),
        ({"true_positive_rate": 0.01, "false_positive_rate": 0.01}, "guesses has equal rates"),
    ],
)
def test_bad_budgets(plan, budget, match):
    with pytest.raises(ValueError, match=match):
        plan.calibrate(**budget)


def test_a_report_is_data_and_complete(plan):
    report = json.loads(json.dumps(plan.report(1e-3)))
    assert report["epsilon"] == plan.epsilon(1e-3) and report["noise"]["noise_multiplier"] == 4.0
    assert report["sampling"]["max_participations"] == 4 and report["adjacency"] == "replace_special"
    assert report["statement"] == plan.statement(1e-3)
    assert {"dpx", "jax", "dp-accounting"} <= set(report["versions"])
    spent = [report["epsilon_after_steps"][str(n)] for n in range(5, 45, 5)]
    assert spent == sorted(spent) and spent[-1] == report["epsilon"]
    for rate, power in report["true_positive_rate"].items():
        assert power >= norm.cdf(norm.ppf(float(rate)) + 0.5) - 1e-9  # mu = sqrt(4) / 4: a bound on the best attack
    baseline = dpx.dp_sgd(100, 10, 40, clipping=dpx.NoClipping())
    assert not baseline.report(1e-3)["is_private"]


@pytest.mark.parametrize("suffix", ["png", "pdf"])
def test_plots(plan, suffix, tmp_path):
    path = plan.plot(tmp_path / "new" / f"plan.{suffix}", 1e-3)
    start = path.read_bytes()[:4]
    assert start == {"png": b"\x89PNG", "pdf": b"%PDF"}[suffix]
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no half-written file is left
    with pytest.raises(ValueError, match="NoClipping"):
        dpx.dp_sgd(100, 10, 40, clipping=dpx.NoClipping()).plot(path, 1e-3)


def test_queries_next_to_correlated_noise_are_refused_where_nobody_can_account():
    strategy = dpx.BandedToeplitz(np.array([1.0, 0.5]))
    sampler = dpx.BallsInBinsSampler(100, 10, 20)
    noise = dpx.CorrelatedGaussian(strategy, 2.0)
    assert dpx.PrivacyPlan(sampler, CLIP, noise).event is not None
    for plan in (
        dpx.PrivacyPlan(sampler, dpx.AdaptiveClipping(1.0), noise),
        dpx.PrivacyPlan(sampler, CLIP, noise).with_metrics(n=dpx.metrics.Count(None, noise_multiplier=5.0)),
    ):
        with pytest.raises(ValueError, match="CyclicPoissonSampler"):
            plan.epsilon(1e-3)


def test_users_are_calibrated_like_examples():
    owners = np.arange(300) % 100
    sampler = dpx.UserSampler(dpx.PoissonSampler(100, 10, 20), owners, examples_per_user=2)
    plan = dpx.PrivacyPlan(sampler, CLIP, dpx.IndependentGaussian(2.0)).calibrate(3.0, 1e-3, "steps")
    assert plan.unit == "user" and plan.steps > 20 and plan.epsilon(1e-3) <= 3.0


def test_batch_sizes_that_a_sampler_cannot_take_are_explained():
    plan = dpx.PrivacyPlan(dpx.BallsInBinsSampler(100, 10, 20), CLIP, dpx.IndependentGaussian(2.0))
    with pytest.raises(ValueError, match="cannot search among all integers"):
        plan.calibrate(1.0, 1e-3, "batch_size")


def test_replacement_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="there or contributes nothing"):
        dpx.PrivacyPlan(
            dpx.BallsInBinsSampler(100, 10, 20), CLIP, dpx.IndependentGaussian(1.0), adjacency="replace_one"
        )


def test_the_first_steps_cost_less_than_all():
    plan = dpx.dp_sgd(1000, 50, 40, noise_multiplier=1.0)
    spent = [plan.epsilon(1e-4, n) for n in (1, 10, 40)]
    assert spent == sorted(spent) and spent[0] < spent[-1]


def test_the_gap_of_shuffling_is_printed():
    sampler = dpx.ShuffleSampler(10_000, 1, 10_000)
    plan = dpx.PrivacyPlan(sampler, CLIP, dpx.IndependentGaussian(0.4), adjacency="replace_special")
    with pytest.warns(UserWarning, match="at least 1 / num_examples"):
        assert "no amplification is claimed: one epoch" in plan.statement(1e-3)
    gap = plan.report(1e-5)["shuffling_gap"]
    assert gap["epsilon"] == pytest.approx(4.089, abs=2e-3)  # what a Poisson accountant would say
    assert 0.2 < gap["delta_at_least"] < 0.23
    assert dpx.accounting.shuffling_lower_bound(0.4, 10_000, 4.0) >= 0.226
    assert plan.epsilon(1e-5) > 13.2  # what is stated instead


def test_adjacencies_are_compared():
    plan = dpx.dp_sgd(1000, 50, 40, noise_multiplier=1.0)
    found = plan.epsilon_by_adjacency(1e-4)
    assert set(found) == {"add_or_remove_one", "replace_one", "replace_special"}
    assert found["add_or_remove_one"] == plan.epsilon(1e-4) <= found["replace_one"]
    # a Gaussian, replaced, is moved twice as far
    shuffled = dpx.PrivacyPlan(
        dpx.ShuffleSampler(100, 10, 10), CLIP, dpx.IndependentGaussian(4.0), adjacency="replace_one"
    )
    twice = dpx.PrivacyPlan(shuffled.sampler, CLIP, dpx.IndependentGaussian(2.0), adjacency="replace_special")
    found = shuffled.epsilon_by_adjacency(1e-3)
    assert set(found) == {"replace_one", "replace_special"} and found["replace_one"] == twice.epsilon(1e-3)
    # Rényi accounting doubles the distance too, where it accounts for replacement at all
    renyi = dpx.PrivacyPlan(shuffled.sampler, CLIP, shuffled.noise, adjacency="replace_one", accountant="rdp")
    assert found["replace_one"] <= renyi.epsilon(1e-3) <= 1.3 * found["replace_one"]
    with pytest.raises(ValueError, match="accountant='rdp'"):
        dpx.PrivacyPlan(plan.sampler, CLIP, plan.noise, adjacency="replace_one", accountant="rdp")
    discrete = dpx.PrivacyPlan(dpx.PoissonSampler(100, 10, 4), CLIP, dpx.DiscreteGaussian(8.0), accountant="rdp")
    assert set(discrete.epsilon_by_adjacency(1e-3)) == {"add_or_remove_one", "replace_special"}


@pytest.mark.slow
def test_a_simulated_plan_says_so_and_reports_once():
    plan = dpx.PrivacyPlan(dpx.MinSepSampler(200, 10, 12, 4), CLIP, dpx.IndependentGaussian(2.0))
    report = plan.report(1e-3)
    assert "simulation" in report["tool"] and "simulation" in report["statement"]
    assert list(report["epsilon_after_steps"]) == ["12"] and report["epsilon"] == plan.epsilon(1e-3)
