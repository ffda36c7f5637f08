"""Ledgers of disjoint parts, of first steps, and of what knows its neighbours; groups and first releases that fit, or are refused with a reason."""

import json

import dp_accounting as da
import numpy as np
import pytest
from scipy import stats

import dpx
from dpx.accounting import (
    Accountable,
    PrivacyFilter,
    PrivacyLedger,
    Release,
    epsilon,
    group_epsilon,
    search_epsilon,
    search_event,
)
from dpx.events import FixedSizeSampledGaussianDpEvent

GAUSSIAN = da.GaussianDpEvent
SITES = ("bern", "oslo", "rome", "lima", "cork")


def gaussian_delta(epsilon, mu):
    return stats.norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)


def test_disjoint_parts_cost_the_maximum():
    plan = dpx.dp_sgd(1000, 50, 40, noise_multiplier=1.0)
    ledger = PrivacyLedger("add_or_remove_one")
    for site in SITES:
        ledger = ledger.spend(plan, part=site)
    assert ledger.parts == SITES and len(ledger.entries) == 5
    assert ledger.epsilon(1e-6) == plan.epsilon(1e-6) and ledger.delta(1.0) == plan.delta(1.0)
    together = PrivacyLedger("add_or_remove_one").spend(plan, count=5)
    assert together.epsilon(1e-6) > 1.5 * ledger.epsilon(1e-6)
    # what is on all of the data counts for every part, and the worst part decides
    ledger = ledger.spend(GAUSSIAN(2.0)).spend(GAUSSIAN(1.5), part="oslo")
    both = PrivacyLedger("add_or_remove_one").spend(plan).spend(GAUSSIAN(2.0)).spend(GAUSSIAN(1.5))
    assert ledger.epsilon(1e-6) == both.epsilon(1e-6) == ledger.epsilon_by_part(1e-6)["oslo"]
    assert ledger.epsilon_by_part(1e-6)["rome"] < ledger.epsilon(1e-6)
    text = ledger.statement(1e-6)
    assert "(on oslo)" in text and "no example in common" in text and "rome epsilon" in text


@pytest.mark.parametrize("adjacency", ["add_or_remove_one", "replace_special"])
def test_parallel_composition_attains_its_bound_and_never_less(adjacency):
    # the unit is in one of two parts, which the attacker knows: the loss is that of this part and of what is on all
    ledger = PrivacyLedger(adjacency).spend(GAUSSIAN(2.0), part="a").spend(GAUSSIAN(1.0), part="b").spend(GAUSSIAN(3.0))
    for e in (0.1, 1.0, 2.0):
        truth = max(gaussian_delta(e, (s**-2 + 1 / 9) ** 0.5) for s in (1.0, 2.0))
        assert truth * (1 - 1e-9) <= ledger.delta(e) <= truth * (1 + 1e-6)


def test_a_unit_that_moves_would_pay_in_two_parts():
    with pytest.raises(ValueError, match="leaves one part and enters the other.*fixed_parts=True"):
        PrivacyLedger("replace_one").spend(GAUSSIAN(1.0), part="oslo")
    ledger = (
        PrivacyLedger("replace_one", fixed_parts=True)
        .spend(GAUSSIAN(2.0), part="oslo")
        .spend(GAUSSIAN(2.0), part="rome")
    )
    assert ledger.epsilon(1e-6) == epsilon(GAUSSIAN(2.0), 1e-6, adjacency="replace_one")
    assert "does not change when it is replaced" in ledger.statement(1e-6)
    with pytest.raises(ValueError, match="must be the name of a part"):
        PrivacyLedger("add_or_remove_one").spend(GAUSSIAN(1.0), part="")


def test_ledgers_with_parts_are_written_and_read(tmp_path):
    plain = PrivacyLedger("add_or_remove_one").spend(GAUSSIAN(2.0), label="age")
    assert json.loads(plain.to_json())["version"] == 1 and PrivacyLedger.from_json(plain.to_json()) == plain
    ledger = plain.spend(GAUSSIAN(0.1 + 0.2), 3, part="oslo")
    ledger.save(tmp_path / "ledger.json")
    again = PrivacyLedger.load(tmp_path / "ledger.json")
    assert again == ledger and again.epsilon(1e-6) == ledger.epsilon(1e-6) and again.entries[1].part == "oslo"
    fixed = PrivacyLedger("replace_one", fixed_parts=True).spend(GAUSSIAN(2.0), part="oslo")
    assert PrivacyLedger.from_json(fixed.to_json()) == fixed
    record = json.loads(fixed.to_json())
    for changes, message in (
        ({"fixed_parts": False}, "leaves one part"),
        ({"fixed_parts": 1}, "has the fields"),
        ({"version": 3}, "version 3"),
        ({"entries": [{**record["entries"][0], "part": 7}]}, "name of a part"),
    ):
        with pytest.raises(ValueError, match=message):
            PrivacyLedger.from_json(json.dumps({**record, **changes}))


def test_a_ledger_with_parts_has_no_single_event():
    ledger = PrivacyLedger("add_or_remove_one").spend(GAUSSIAN(2.0), part="oslo")
    with pytest.raises(ValueError, match="'oslo'.*event_of"):
        PrivacyLedger("add_or_remove_one").spend(ledger)
    assert ledger.event_of("oslo") == GAUSSIAN(2.0) and ledger.event_of("rome") == da.NoOpDpEvent()


def test_first_steps_are_spent():
    plan = dpx.dp_sgd(1000, 50, 40, noise_multiplier=1.0)
    ledger = PrivacyLedger("add_or_remove_one").spend(plan, steps=10)
    assert ledger.epsilon(1e-6) == plan.epsilon(1e-6, steps=10) < plan.epsilon(1e-6)
    twice = ledger.spend(plan, steps=5, part="oslo").spend(plan, steps=7, part="rome")
    assert twice.epsilon(1e-6) == plan.epsilon(1e-6, steps=17)
    correlated = dpx.dp_mf(1000, 50, 40, bands=4, noise_multiplier=2.0)
    spent = PrivacyLedger("add_or_remove_one").spend(correlated, steps=9)
    assert spent.epsilon(1e-6) == correlated.epsilon(1e-6, steps=9)
    for wrong, message in (
        (lambda: ledger.spend(plan, steps=41), "past the plan's end"),
        (lambda: ledger.spend(plan, steps=0), "at least 1|positive"),
        (lambda: ledger.spend(GAUSSIAN(1.0), steps=3), "goes with a plan"),
        (lambda: ledger.spend(ledger, steps=3), "goes with a plan"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_a_search_keeps_its_neighbours_and_its_unit():
    plan = dpx.dp_sgd(1000, 50, 20, noise_multiplier=2.0, unit="patient")
    found = search_event(plan, 30)
    assert isinstance(found, Release) and isinstance(found, Accountable) and isinstance(plan, Accountable)
    assert (found.adjacency, found.unit) == ("add_or_remove_one", "patient")
    assert PrivacyLedger("add_or_remove_one", "patient").spend(found).epsilon(1e-6) >= search_epsilon(plan, 1e-6, 30)
    assert PrivacyFilter(20.0, 1e-6, unit="patient", hint=found).can_spend(found)
    for other in (PrivacyLedger("replace_special", "patient"), PrivacyLedger("add_or_remove_one")):
        with pytest.raises(ValueError, match="do not add up"):
            other.spend(found)
    with pytest.raises(ValueError, match="adjacency"):
        epsilon(found, 1e-6, adjacency="replace_special", accountant="rdp")  # pyright: ignore[reportArgumentType]
    once = search_event(plan, 1)
    assert isinstance(once, Release) and once.event == plan.event
    assert isinstance(search_event(GAUSSIAN(2.0), 5), da.dp_event.RepeatAndSelectDpEvent)


def test_groups_are_no_larger_than_the_data():
    plan = dpx.dp_sgd(100, 10, 5, noise_multiplier=4.0)
    with pytest.raises(ValueError, match="at most the number of units, 100.*got 101"):
        group_epsilon(plan, 1e-4, sizes=(1, 101))
    whole = group_epsilon(plan, 1e-4, sizes=(1, 100))
    assert whole[1] == plan.epsilon(1e-4) < whole[100]
    # taking part surely costs no less than being sampled
    assert whole[100] <= epsilon(da.SelfComposedDpEvent(GAUSSIAN(4.0 / 100), 5), 1e-4) * (1 + 1e-9)
    users = dpx.PrivacyPlan(
        dpx.UserSampler(dpx.PoissonSampler(20, 4, 5), np.arange(60) % 20, 2),
        dpx.FlatClipping(1.0),
        dpx.IndependentGaussian(4.0),
    )
    with pytest.raises(ValueError, match="number of units, 20"):
        group_epsilon(users, 1e-4, sizes=(21,))
    with pytest.raises(ValueError, match="number of units, 50"):
        group_epsilon(FixedSizeSampledGaussianDpEvent(50, 5, 3.0, False), 1e-4, (51,), adjacency="replace_one")


def test_huge_groups_of_a_bare_event_cost_no_memory():
    event = da.PoissonSampledDpEvent(0.01, GAUSSIAN(1.0))
    found = group_epsilon(event, 1e-5, sizes=(1, 10**9))
    assert found[1] < found[10**9]


# ---- filters


def test_a_first_release_chooses_the_order_if_nobody_did():
    # without a hint the order is that of unsampled Gaussians, at which this does not fit, though it costs half of the budget
    plan = dpx.dp_sgd(60_000, 256, 2_000, noise_multiplier=1.0)
    alone = epsilon(plan.event, 1e-6, accountant="rdp")
    blind, hinted = PrivacyFilter(2.0, 1e-6), PrivacyFilter(2.0, 1e-6, hint=plan)
    assert alone < 2.0 and blind.cost(plan) > blind.budget and hinted.can_spend(plan)
    assert blind.can_spend(plan)
    spent = blind.spend(plan)
    assert spent.order == hinted.order and spent.spent == hinted.spend(plan).spent
    assert PrivacyFilter(2.0, 1e-6, order=spent.order, spent=spent.spent) == spent
    # from then on it is fixed, and whoever does not fit is told about the hint
    assert not spent.is_order_open and not spent.can_spend(plan, 3)
    with pytest.raises(RuntimeError, match="hint="):
        spent.spend(plan, 3)
    chosen = PrivacyFilter(2.0, 1e-6, order=blind.order)
    with pytest.raises(RuntimeError, match="order, .*`order=`"):
        chosen.spend(plan)


def test_the_order_stays_once_something_is_spent():
    rare = da.PoissonSampledDpEvent(0.01, GAUSSIAN(1.0))
    budget = PrivacyFilter(2.0, 1e-5)
    default = budget.order
    budget = budget.spend(GAUSSIAN(10.0))
    assert budget.order == default and not budget.is_order_open
    count = budget.room_for(rare)
    assert budget.can_spend(rare, count) and not budget.can_spend(rare, count + 1)


def test_a_plan_whose_counts_cost_more_than_its_noise_is_refused_when_it_is_made():
    sampler, noise = dpx.PoissonSampler(1000, 50, 40), dpx.IndependentGaussian
    clipping = dpx.AdaptiveClipping(1.0, count_noise_multiplier=1.0)
    with pytest.raises(ValueError, match="nothing is left for the gradient"):
        dpx.PrivacyPlan(sampler, clipping, noise(2.0))
    open_plan = dpx.PrivacyPlan(sampler, clipping, noise())
    for refused in (
        lambda: open_plan.with_noise_multiplier(2.5),
        lambda: open_plan.calibrate(0.5, 1e-4),
        lambda: dpx.dp_sgd(1000, 50, 40, epsilon=0.5, delta=1e-4, clipping=clipping),
    ):
        with pytest.raises(ValueError, match="nothing is left for the gradient"):
            refused()
    # a search may look at such numbers on its way to one that works
    found = open_plan.calibrate(8.0, 1e-4)
    assert found.noise_multiplier < 2.0 and 7.99 < found.epsilon(1e-4) <= 8.0
