"""Ledgers and filters: composition against integrals computed here, files that survive, budgets that hold under adaptive choices."""

import json
import math
import os

import dp_accounting as da
import numpy as np
import pytest
from scipy import integrate, special, stats

import dpx
from dpx import accounting, events
from dpx.accounting import PrivacyFilter, PrivacyLedger

GAUSSIAN = da.GaussianDpEvent
SAMPLED = da.PoissonSampledDpEvent(0.05, GAUSSIAN(1.0))
EVERY_KIND = [
    GAUSSIAN(0.1 + 0.2),
    da.LaplaceDpEvent(1e-300),
    da.PoissonSampledDpEvent(1 / 3, da.SelfComposedDpEvent(GAUSSIAN(math.pi), 7)),
    da.ComposedDpEvent([GAUSSIAN(1.0), da.NoOpDpEvent()]),
    da.SampledWithoutReplacementDpEvent(100, 7, GAUSSIAN(2.0)),
    da.TruncatedSubsampledGaussianDpEvent(100, 0.1, 30, 1.5),
    da.SingleEpochTreeAggregationDpEvent(3.0, 5),
    da.SingleEpochTreeAggregationDpEvent(3.0, [5, 6]),
    da.dp_event.ZCDpEvent(0.1, 0.0),
    da.dp_event.RepeatAndSelectDpEvent(GAUSSIAN(3.0), 4.0, math.inf),
    da.dp_event.MixtureOfGaussiansDpEvent(1.0, [0.0, 1.0], [0.7, 0.3]),
    da.NonPrivateDpEvent(),
    events.RandomAllocationDpEvent(2.0, 10),
    events.FixedSizeSampledGaussianDpEvent(100, 10, 2.0, False),
    events.GaussianMixtureOfBinsDpEvent(1.0, ((1.0, 0.1), (0.1, 1.0))),
    events.MinSepSampledDpEvent(1.0, (0.8, 0.6), 20, 2, 0.1, True),
    events.CoupledDpEvent(SAMPLED, 1e-9),
]


def ledger_of(*events, adjacency="add_or_remove_one"):
    ledger = PrivacyLedger(adjacency)  # pyright: ignore[reportArgumentType]
    for event in events:
        ledger = ledger.spend(event)
    return ledger


def test_single_steps_cost_what_their_plan_costs():
    plan = dpx.dp_sgd(1000, 50, 40, noise_multiplier=1.0)
    steps = ledger_of(*[SAMPLED] * 40)
    assert steps.epsilon(1e-6) == plan.epsilon(1e-6) == PrivacyLedger("add_or_remove_one").spend(plan).epsilon(1e-6)
    assert steps.delta(1.0) == plan.delta(1.0)
    assert PrivacyLedger("add_or_remove_one").epsilon(1e-6) == 0 == PrivacyLedger("add_or_remove_one").delta(1.0)


def test_equal_events_are_composed_once_wherever_they_stand():
    # one by one, 300 steps cost 300 convolutions of growing distributions
    other = da.LaplaceDpEvent(5.0)
    ledger = ledger_of(*[SAMPLED] * 150, other, *[SAMPLED] * 150)
    assert [entry.count for entry in ledger.entries] == [150, 1, 150]
    assert ledger.event == da.ComposedDpEvent((da.SelfComposedDpEvent(SAMPLED, 300), other))  # pyright: ignore[reportArgumentType]
    nested = ledger_of(da.SelfComposedDpEvent(da.ComposedDpEvent([SAMPLED, da.SelfComposedDpEvent(SAMPLED, 2)]), 10))
    assert nested.event == da.SelfComposedDpEvent(SAMPLED, 30)


def test_gaussians_together_are_one_gaussian():
    ledger = ledger_of(GAUSSIAN(2.0), GAUSSIAN(3.0)).spend(GAUSSIAN(4.0), count=5)
    multiplier = (1 / 4 + 1 / 9 + 5 / 16) ** -0.5
    exact = da.get_epsilon_gaussian(multiplier, 1e-6)
    assert exact <= ledger.epsilon(1e-6) <= exact * (1 + 1e-6)
    replaced = ledger_of(GAUSSIAN(2.0), GAUSSIAN(3.0), adjacency="replace_one")
    exact = da.get_epsilon_gaussian((1 / 4 + 1 / 9) ** -0.5 / 2, 1e-6)
    assert exact <= replaced.epsilon(1e-6) <= exact * (1 + 1e-6)


def test_mixed_events_lie_above_the_integral():
    q, sigma, b, epsilon = 0.3, 0.8, 2.0, 0.6
    ledger = ledger_of(da.PoissonSampledDpEvent(q, GAUSSIAN(sigma)), da.LaplaceDpEvent(b))

    def laplace_delta(x):
        """Hockey-stick divergence of Laplace distributions a sensitivity apart, at any real x."""
        return np.where(x <= -1 / b, -np.expm1(x), np.maximum(0, -np.expm1((x - 1 / b) / 2)))

    y = np.linspace(-8, 9, 400_001)
    absent = stats.norm.pdf(y, 0, sigma)
    present = (1 - q) * absent + q * stats.norm.pdf(y, 1, sigma)
    reached = [
        integrate.trapezoid(p * laplace_delta(epsilon - np.log(p / o)), y)
        for p, o in ((present, absent), (absent, present))
    ]
    assert max(reached) - 1e-8 <= ledger.delta(epsilon) <= max(reached) + 2e-5
    assert min(reached) > 0.01


def test_nested_gaussians_are_accounted_whatever_the_type_of_the_multiplier():
    inner = da.SelfComposedDpEvent(GAUSSIAN(np.float32(2)), 4)  # pyright: ignore[reportArgumentType]
    ledger = PrivacyLedger("add_or_remove_one").spend(da.PoissonSampledDpEvent(0.1, inner), count=100)
    assert ledger.epsilon(1e-5, accountant="rdp") == pytest.approx(7.9039, abs=1e-3)


def test_what_only_renyi_accounting_knows_is_answered_by_it():
    zero_concentrated = da.dp_event.ZCDpEvent(0.1, 0.0)
    ledger = ledger_of(zero_concentrated, SAMPLED)
    assert ledger.epsilon(1e-6) == ledger.epsilon(1e-6, accountant="rdp") > ledger_of(SAMPLED).epsilon(1e-6)
    with pytest.raises(ValueError, match="know"):
        ledger_of(zero_concentrated, adjacency="replace_one").epsilon(1e-6)
    with pytest.raises(ValueError, match="No accountant knows all"):
        ledger_of(da.UnsupportedDpEvent()).epsilon(1e-6)
    with pytest.raises(ValueError, match="half of what it is"):
        ledger_of(SAMPLED, adjacency="replace_one").epsilon(1e-6, accountant="rdp")
    assert ledger_of(da.NonPrivateDpEvent()).epsilon(1e-6) == math.inf


def test_other_neighbours_do_not_add_up():
    plan = dpx.dp_sgd(1000, 50, 40, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="`adjacency` is 'replace_one'.*'add_or_remove_one'"):
        PrivacyLedger("replace_one").spend(plan)
    with pytest.raises(ValueError, match="`unit` is 'user'.*'example'"):
        PrivacyLedger("add_or_remove_one", "user").spend(plan)
    with pytest.raises(ValueError, match="`adjacency` must be one of"):
        PrivacyLedger("neighbours")  # pyright: ignore[reportArgumentType]
    both = ledger_of(SAMPLED).spend(ledger_of(SAMPLED, GAUSSIAN(2.0)), count=2)  # a ledger may be spent, too
    assert both.event == ledger_of(*[SAMPLED] * 3, *[GAUSSIAN(2.0)] * 2).event


@pytest.mark.parametrize(
    ("event", "message"),
    [("training", "event of `dp_accounting`"), (GAUSSIAN(-1.0), "at least 0"), (GAUSSIAN(math.nan), "at least 0")],
)
def test_what_is_no_event_is_refused(event, message):
    with pytest.raises(ValueError, match=message):
        ledger_of(event)
    for count in (0, -1, 1.5):
        with pytest.raises(ValueError, match="count"):
            ledger_of(SAMPLED).spend(SAMPLED, count=count)  # pyright: ignore[reportArgumentType]


def test_guarantee_json_keeps_every_bit():
    ledger = PrivacyLedger("replace_special", "user")
    for i, event in enumerate(EVERY_KIND):
        ledger = ledger.spend(event, count=i + 1, label=f"run {i}" if i % 2 else None)
    text = ledger.to_json()
    assert json.loads(text)["entries"][0]["event"] == {"type": "GaussianDpEvent", "noise_multiplier": 0.1 + 0.2}
    again = PrivacyLedger.from_json(text)
    assert again == ledger and again.to_json() == text and again.event == ledger.event
    assert len(again.entries) == len(EVERY_KIND) and again.unit == "user"


def test_statement_names_everything():
    ledger = PrivacyLedger("add_or_remove_one", "patient").spend(GAUSSIAN(2.0), 3, "mean age")
    text = ledger.statement(1e-6)
    for part in ("for one patient", "1e-06", "mean age: 3 x Gaussian", "added to or removed"):
        assert part in text, part
    stated = float(text.split("(")[1].split(",")[0])
    assert ledger.epsilon(1e-6) <= stated <= ledger.epsilon(1e-6) + 1e-4


class Unheard(da.DpEvent):
    pass


def broken(**changes):
    record = json.loads(ledger_of(SAMPLED).to_json())
    return json.dumps({**record, **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no privacy ledger"),
        (broken(format="something"), "no privacy ledger"),
        (broken(version=2), "version 2"),
        (broken(adjacency="cousins"), "`adjacency` must be one of"),
        (broken(extra=1), "has the fields"),
        (broken(entries=[{"event": {"type": "os.system"}, "count": 1, "label": None}]), "'os.system' are not known"),
        (broken(entries=[{"event": {"type": "GaussianDpEvent"}, "count": 1, "label": None}]), "has the fields"),
        (broken(entries=[{"event": 3, "count": 1, "label": None}]), "An event was expected"),
        (broken(entries=[{"event": {"type": "NoOpDpEvent"}, "count": 0, "label": None}]), "at least 1"),
        (broken(entries=[{"event": {"type": "NoOpDpEvent"}, "count": True, "label": None}]), "integer count"),
        (broken(entries=[{"event": {"type": "NoOpDpEvent"}, "label": None}]), "an entry has"),
        (
            broken(entries=[{"event": {"type": "GaussianDpEvent", "noise_multiplier": -1}, "count": 1, "label": None}]),
            "at least 0",
        ),
        (
            broken(entries=[{"event": {"type": "GaussianDpEvent", "noise_multiplier": "x"}, "count": 1, "label": ""}]),
            "must be a number",
        ),
    ],
)
def test_broken_files_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        PrivacyLedger.from_json(text)


def test_events_that_nobody_could_read_again_are_not_written():
    import attr

    with pytest.raises(ValueError, match="Unheard.*cannot be written"):
        ledger_of(attr.s(frozen=True)(Unheard)()).to_json()


def test_guarantee_a_crash_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "ledger.json"
    old, new = ledger_of(SAMPLED), ledger_of(SAMPLED, GAUSSIAN(1.0))
    old.save(path)
    assert PrivacyLedger.load(path) == old

    def crash(*arguments):
        raise OSError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power"):
            new.save(path)
    assert PrivacyLedger.load(path) == old and list(tmp_path.iterdir()) == [path]
    new.save(str(path))
    assert PrivacyLedger.load(path) == new and list(tmp_path.iterdir()) == [path]


# ---- filters


def gaussian_delta(epsilon, mu):
    """Hockey-stick divergence of N(mu, 1) and N(0, 1) at any real epsilon."""
    return stats.norm.cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)


def reached_delta(epsilon, first, second):
    """Of a step at mean `first` against 0, after which, if it is positive, one follows at distance `second`, and else nothing."""

    def integrand(y):
        left = epsilon - first * (y - first / 2)
        return stats.norm.pdf(y, first) * (gaussian_delta(left, second) if y > 0 else max(0.0, -math.expm1(left)))

    return sum(integrate.quad(integrand, *ends, limit=200)[0] for ends in ((-12, 0), (0, 12)))


def renyi_of_sampled_gaussian(order, q, sigma):
    """Mironov, Talwar and Zhang 2019, for integer orders."""
    k = np.arange(order + 1)
    terms = np.log(special.binom(order, k)) + k * np.log(q) + (order - k) * np.log1p(-q) + (k * k - k) / (2 * sigma**2)
    return special.logsumexp(terms) / (order - 1)


@pytest.mark.parametrize("adjacency", ["add_or_remove_one", "replace_special", "replace_one"])
def test_gaussian_filter_admits_exactly_the_budget(adjacency):
    event = GAUSSIAN(20.0)
    budget = PrivacyFilter(1.0, 1e-6, adjacency, accountant="gdp")
    count = budget.room_for(event)
    of = lambda n: accounting.epsilon(da.SelfComposedDpEvent(event, n), 1e-6, adjacency=adjacency)
    assert of(count) <= 1.0 < of(count + 1)
    full = budget.spend(event, count)
    assert not full.can_spend(event) and full.can_spend(GAUSSIAN(1e9)) and 0.85 < full.fraction_spent <= 1
    with pytest.raises(RuntimeError, match="does not fit"):
        full.spend(event)
    assert budget.spent == 0  # filters are values


@pytest.mark.parametrize("accountant", ["gdp", "rdp"])
def test_guarantee_adaptive_choices_keep_the_budget(accountant):
    # Of four strategies: a first step, then, if the first result points to a member, all that is left, and else nothing.
    epsilon, delta = 1.0, 1e-3
    for share in (0.1, 0.5):
        budget = PrivacyFilter(epsilon, delta, accountant=accountant, order=8 if accountant == "rdp" else None)
        scale = 1.0 if budget.order is None else budget.order / 2
        first = (share * budget.budget / scale) ** 0.5
        rest = budget.spend(GAUSSIAN(1 / first))
        second = ((rest.budget - rest.spent) / scale * (1 - 1e-9)) ** 0.5
        assert rest.can_spend(GAUSSIAN(1 / second)) and not rest.can_spend(GAUSSIAN(1 / (1.01 * second)))
        for sign in (1, -1):
            assert 0 < reached_delta(epsilon, sign * first, second) <= delta
    if accountant == "gdp":
        assert gaussian_delta(epsilon, budget.budget**0.5) == pytest.approx(delta, rel=1e-5)


def test_renyi_filter_adds_up_one_order():
    budget = PrivacyFilter(3.0, 1e-6, hint=SAMPLED)
    order = budget.order
    assert order is not None and order >= 2
    rng, total = np.random.default_rng(0), 0.0
    while True:
        q, sigma = float(rng.uniform(0.01, 0.1)), float(rng.uniform(0.8, 2))
        event = da.PoissonSampledDpEvent(q, GAUSSIAN(sigma))
        if not budget.can_spend(event, 5):
            break
        budget = budget.spend(event, 5)
        total += 5 * renyi_of_sampled_gaussian(order, q, sigma)
    assert budget.spent == pytest.approx(total, rel=1e-9)
    converted = total + math.log1p(-1 / order) - math.log(order * 1e-6) / (order - 1)
    assert 2.0 < converted <= 3.0
    resumed = PrivacyFilter(3.0, 1e-6, order=order, spent=budget.spent)
    assert resumed == budget


def test_the_hint_only_decides_how_much_fits():
    rare = da.PoissonSampledDpEvent(0.01, GAUSSIAN(1.0))
    hinted, blind = PrivacyFilter(2.0, 1e-5, hint=rare), PrivacyFilter(2.0, 1e-5)
    assert hinted.order != blind.order and hinted.room_for(rare) > 100 + blind.room_for(rare)
    many = da.SelfComposedDpEvent(rare, hinted.room_for(rare))
    assert accounting.epsilon(many, 1e-5) <= accounting.epsilon(many, 1e-5, accountant="rdp") <= 2.0
    plan = dpx.dp_sgd(1000, 50, 40, noise_multiplier=8.0)
    assert PrivacyFilter(1.0, 1e-5, hint=plan).cost(plan) == pytest.approx(
        PrivacyFilter(1.0, 1e-5, hint=plan).cost(plan.event)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrivacyFilter(1.0, 1e-6, "replace_one"), "no Rényi bound"),
        (lambda: PrivacyFilter(0.0, 1e-6), "must be positive"),
        (lambda: PrivacyFilter(1.0, 1.0), "strictly between"),
        (lambda: PrivacyFilter(1.0, 1e-6, accountant="pld"), "'rdp' or 'gdp'"),
        (lambda: PrivacyFilter(1.0, 1e-6, accountant="gdp", order=3), "only `'rdp'`"),
        (lambda: PrivacyFilter(1.0, 1e-6, order=2), "nothing fits"),
        (lambda: PrivacyFilter(1.0, 1e-6, order=1), "nothing fits"),
        (lambda: PrivacyFilter(1.0, 1e-6, spent=-1.0), "at least 0"),
        (lambda: PrivacyFilter(1.0, 1e-6, accountant="gdp").spend(SAMPLED), "without sampling"),
        (lambda: PrivacyFilter(1.0, 1e-6).spend(da.UnsupportedDpEvent()), "does not know"),
        (lambda: PrivacyFilter(1.0, 1e-6).room_for(da.NoOpDpEvent()), "costs nothing"),
        (
            lambda: PrivacyFilter(1.0, 1e-6, unit="user").spend(dpx.dp_sgd(1000, 50, 40, noise_multiplier=8.0)),
            "must agree",
        ),
    ],
)
def test_filters_refuse_what_is_not_proven(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_events_without_a_bound_do_not_fit():
    budget = PrivacyFilter(1.0, 1e-6)
    assert not budget.can_spend(da.NonPrivateDpEvent())
    with pytest.raises(RuntimeError):
        budget.spend(da.NonPrivateDpEvent())


def test_guarantee_entries_made_by_hand_count_at_least_once():
    """Five and minus four of one event were one."""
    entries = tuple(accounting.LedgerEntry(da.GaussianDpEvent(1.0), count, None) for count in (5, -4))
    with pytest.raises(ValueError, match="count` must be at least 1"):
        accounting.PrivacyLedger("add_or_remove_one", entries=entries)


@pytest.mark.parametrize("version", ["[]", "{}", "1.0", "true", "null", "3"])
def test_versions_that_are_none_are_refused_by_name(version):
    text = accounting.PrivacyLedger("replace_one").to_json().replace('"version": 1', f'"version": {version}')
    with pytest.raises(ValueError, match="version .* of the format"):
        accounting.PrivacyLedger.from_json(text)
