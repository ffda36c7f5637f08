"""A sampler of somebody else's with an event of its own, in one file: the event, its loss rule, the sampler. Nothing of dpx is edited."""

import math
from typing import Any, ClassVar

import attr
import dp_accounting as da
import numpy as np
import pytest
from scipy import stats

import dpx
from dpx import accounting

DELTA = 1e-6


# ---- their file


@attr.s(frozen=True, slots=True, auto_attribs=True)
class CoinDpEvent(da.DpEvent):
    """With `probability`, by a coin that everybody sees, a Gaussian mechanism on all of the data; else nothing."""

    noise_multiplier: float
    probability: float

    def check(self):
        if not self.probability <= 1:
            raise ValueError(f"`probability` must be at most 1; got {self.probability}.")

    def reduced(self):
        if self.probability == 0:
            return da.NoOpDpEvent()
        return da.GaussianDpEvent(self.noise_multiplier) if self.probability == 1 else self


def scale(event, adjacency):
    sigma = event.noise_multiplier / (2 if adjacency == "replace_one" else 1)
    return math.sqrt(event.probability) / sigma, 0.5 / sigma**2 + 9 / sigma


def renyi(event, adjacency, orders):
    if adjacency == "replace_one":
        raise ValueError("Not under replacement.")
    own = orders * (orders - 1) / (2 * event.noise_multiplier**2)
    return np.logaddexp(math.log1p(-event.probability), math.log(event.probability) + own) / (orders - 1)


@accounting.loss_rule(CoinDpEvent, scale=scale, renyi=renyi)
def coin_loss(event, adjacency, interval):
    found = accounting.loss_distribution(da.GaussianDpEvent(event.noise_multiplier), adjacency, interval=interval)
    assert isinstance(found, accounting.LossDistribution)

    def mixed(pmf):
        mass = event.probability * pmf.mass
        mass[-pmf.lowest] += 1 - event.probability  # a loss of 0
        return accounting.LossPmf(pmf.interval, pmf.lowest, mass, event.probability * pmf.infinity)

    return accounting.LossDistribution(mixed(found.remove), mixed(found.add))


class CoinSampler(dpx.AbstractSampler):
    """Everybody or nobody, by a public coin."""

    num_examples: int
    steps: int
    probability: float
    unit: ClassVar[str] = "example"

    def __init__(self, num_examples: int, steps: int, probability: float):
        self.num_examples, self.steps, self.probability = num_examples, steps, probability

    @property
    def batch_size(self) -> int:
        return self.num_examples

    @property
    def num_rows(self) -> int:
        return self.num_examples

    @property
    def participation(self):
        return dpx.Participation(1, self.steps)

    @property
    def participation_per_event(self):
        return dpx.Participation(1, 1)

    @property
    def adjacencies(self):
        return ("add_or_remove_one", "replace_one", "replace_special")

    @property
    def physical_batch_size(self) -> int:
        return self.num_examples

    @property
    def assumption(self) -> str:
        return "everybody or nobody, by a public coin"

    def indices(self, seed: int, step: int) -> np.ndarray:
        is_on = np.random.default_rng((seed, step)).random() < self.probability
        return np.arange(self.num_examples if is_on else 0)

    def event(self, mechanism, bands, steps, strategy=None):
        assert isinstance(mechanism, da.GaussianDpEvent)
        return da.SelfComposedDpEvent(CoinDpEvent(mechanism.noise_multiplier, self.probability), steps)


# ---- ours


def exact_delta(sigma, q, steps, epsilon):
    """The coins are seen: a Gaussian mechanism as often as they say."""
    total = 0.0
    for k in range(1, steps + 1):
        mu = math.sqrt(k) / sigma
        own = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
        total += stats.binom.pmf(k, steps, q) * own
    return float(total)


def plan_of(sigma=3.0, **options):
    return dpx.PrivacyPlan(CoinSampler(100, 40, 0.3), dpx.FlatClipping(1.0), dpx.IndependentGaussian(sigma), **options)


@pytest.mark.parametrize(("adjacency", "distance"), [("add_or_remove_one", 1), ("replace_one", 2)])
def test_a_plan_is_accounted_for_by_their_rule(adjacency, distance):
    plan = plan_of(adjacency=adjacency)
    for epsilon in (0.5, 2.0):
        exact = exact_delta(3.0 / distance, 0.3, 40, epsilon)
        assert exact * (1 - 1e-9) <= plan.delta(epsilon) <= exact * 1.01
    spent = plan.epsilon(DELTA)
    assert exact_delta(3.0 / distance, 0.3, 40, spent) <= DELTA < exact_delta(3.0 / distance, 0.3, 40, 0.99 * spent)


def test_all_questions_have_answers():
    plan = plan_of()
    spent = plan.epsilon(DELTA)
    found = plan.calibrate(2.0, DELTA)
    assert 1.999 < found.epsilon(DELTA) <= 2.0
    assert spent < plan_of(accountant="rdp").epsilon(DELTA) < 1.5 * spent
    assert 0.9 * spent < accounting.rough_epsilon(plan.event, DELTA) < 1.1 * spent
    assert not accounting.is_monte_carlo(plan.event)
    # nothing is attacked, and the rest of a composition is
    assert accounting.attained_epsilon(plan.event, DELTA) == 0.0
    both = da.ComposedDpEvent([plan.event, da.GaussianDpEvent(3.0)])
    assert accounting.attained_epsilon(both, DELTA) == pytest.approx(da.get_epsilon_gaussian(3.0, DELTA), rel=1e-2)
    ledger = accounting.PrivacyLedger("add_or_remove_one").spend(plan).spend(da.GaussianDpEvent(3.0))
    assert spent < ledger.epsilon(DELTA) == accounting.epsilon(both, DELTA)
    assert len(list(plan.batches((np.zeros(100),), seed=3))) == 40


def test_their_event_is_checked_and_reduced():
    with pytest.raises(ValueError, match="at most 1"):
        accounting.epsilon(CoinDpEvent(1.0, 1.5), DELTA)
    assert accounting.epsilon(CoinDpEvent(1.0, 0.0), DELTA) == 0.0
    assert accounting.epsilon(CoinDpEvent(1.0, 1.0), DELTA) == accounting.epsilon(da.GaussianDpEvent(1.0), DELTA)


def test_without_a_scale_the_grid_is_measured():
    @attr.s(frozen=True, slots=True, auto_attribs=True)
    class MeasuredDpEvent(CoinDpEvent):
        pass

    accounting.loss_rule(MeasuredDpEvent)(coin_loss)
    found = accounting.epsilon(da.SelfComposedDpEvent(MeasuredDpEvent(3.0, 0.3), 40), DELTA)
    assert found == pytest.approx(plan_of().epsilon(DELTA), rel=1e-3)
    with pytest.raises(ValueError, match="no|know"):
        accounting.epsilon(MeasuredDpEvent(3.0, 0.3), DELTA, accountant="rdp")


def test_an_event_without_a_rule_is_refused_by_name():
    @attr.s(frozen=True, slots=True, auto_attribs=True)
    class UnruledDpEvent(da.DpEvent):
        noise_multiplier: float

    questions = [
        lambda e: accounting.epsilon(e, DELTA),
        lambda e: accounting.epsilon(e, DELTA, accountant="rdp"),
        lambda e: accounting.delta(e, 1.0),
        lambda e: accounting.rough_epsilon(e, DELTA, "add_or_remove_one"),
        lambda e: accounting.attained_epsilon(e, DELTA),
        accounting.is_monte_carlo,
        lambda e: accounting.with_side_queries(e, 1.0, 1.0),
    ]
    for question in questions:
        with pytest.raises(ValueError, match="`UnruledDpEvent` costs.*loss_rule"):
            question(da.SelfComposedDpEvent(UnruledDpEvent(1.0), 2))


def test_rules_are_not_replaced():
    for known in (CoinDpEvent, da.GaussianDpEvent):
        with pytest.raises(ValueError, match="cannot be replaced"):
            accounting.loss_rule(known)(coin_loss)


@pytest.mark.parametrize("wrong", [CoinDpEvent(1.0, 0.5), int, "CoinDpEvent"])
def test_rules_are_of_event_classes(wrong):
    with pytest.raises(ValueError, match="`loss_rule\\(event_class=...\\)` must be a class"):
        accounting.loss_rule(wrong)
    with pytest.raises(ValueError, match="`loss_rule\\(of=...\\)` must be a class"):
        accounting.loss_rule(CoinDpEvent, of=wrong)


def test_simulated_losses_need_a_guess():
    with pytest.raises(ValueError, match="needs a `guess`"):
        accounting.loss_rule(CoinDpEvent, is_simulated=True)


def test_correlated_noise_with_side_queries_is_refused_unless_the_rule_knows():
    with pytest.raises(ValueError, match="`CoinDpEvent`: its loss rule has no `with_side_queries`"):
        accounting.with_side_queries(plan_of().event, 1.0, 1.0)
    gaussian = da.SelfComposedDpEvent(da.GaussianDpEvent(1.0), 3)
    assert accounting.with_side_queries(gaussian, 2.0, 1.0) == gaussian


def test_every_event_of_ours_has_a_rule_with_all_that_guesses_need():
    """A rule without a scale is measured, which is slow; one that is simulated says by what it is guessed."""
    from dpx.accounting._rules import rule_of
    from dpx.events import _kinds

    ours = [
        _kinds.RandomAllocationDpEvent(1.0, 2),
        _kinds.FixedSizeSampledGaussianDpEvent(10, 2, 1.0, False),
        _kinds.GaussianMixtureOfBinsDpEvent(1.0, ((1.0,),)),
        _kinds.MinSepSampledDpEvent(1.0, (1.0,), 2, 1, 0.5, True),
        _kinds.CoupledDpEvent(da.GaussianDpEvent(1.0), 0.1),
    ]
    classes = {c for c in vars(_kinds).values() if isinstance(c, type) and c.__module__ == _kinds.__name__}
    assert {type(event) for event in ours} == classes
    for event in ours:
        rule = rule_of(event)
        assert rule.loss.__module__.startswith("dpx.accounting.losses."), event
        assert rule.wraps is not None or rule.scale is not None, event
        assert rule.with_side_queries is not None, event


def ruled(loss, **options):
    """An event class of its own with that rule."""

    @attr.s(frozen=True, slots=True, auto_attribs=True)
    class OwnDpEvent(da.DpEvent):
        noise_multiplier: float

    accounting.loss_rule(OwnDpEvent, scale=lambda e, a: (1.0, 20.0), **options)(loss)
    return OwnDpEvent(1.0)


def gaussian_loss(event, adjacency, interval):
    found = accounting.loss_distribution(da.GaussianDpEvent(event.noise_multiplier), adjacency, interval=interval)
    assert isinstance(found, accounting.LossDistribution)
    return found


def test_guarantee_a_rule_that_would_not_always_be_asked_is_refused():
    """A subclass of a Gaussian's event is merged with other Gaussians, and composition is taken apart: whatever its rule says was ignored."""

    @attr.s(frozen=True, slots=True, auto_attribs=True)
    class LeakingDpEvent(da.GaussianDpEvent):
        pass

    @attr.s(frozen=True, slots=True, auto_attribs=True)
    class FailingDpEvent(dpx.events.CoupledDpEvent):
        pass

    known = (LeakingDpEvent, FailingDpEvent, da.SelfComposedDpEvent, da.dp_event.RepeatAndSelectDpEvent, da.DpEvent)
    for event_class in known:
        with pytest.raises(ValueError, match="would not always be asked"):
            accounting.loss_rule(event_class)(gaussian_loss)
    with pytest.raises(ValueError, match="would not always be asked"):
        accounting.loss_rule(da.PoissonSampledDpEvent, of=LeakingDpEvent)(gaussian_loss)


def test_what_it_costs_to_sample_an_event_of_theirs_may_have_a_rule():
    own = ruled(gaussian_loss)

    @accounting.loss_rule(da.PoissonSampledDpEvent, of=type(own))
    def sampled(event, adjacency, interval):
        gaussian = da.GaussianDpEvent(event.event.noise_multiplier)
        once = da.PoissonSampledDpEvent(event.sampling_probability, gaussian)
        found = accounting.loss_distribution(once, adjacency, interval=interval)
        assert isinstance(found, accounting.LossDistribution)
        return found

    expected = accounting.epsilon(da.PoissonSampledDpEvent(0.1, da.GaussianDpEvent(1.0)), DELTA)
    assert accounting.epsilon(da.PoissonSampledDpEvent(0.1, own), DELTA) == pytest.approx(expected, rel=1e-2)


def test_guarantee_masses_that_are_none_are_refused():
    """NaN in a loss passed for perfect privacy, epsilon 0, and so did mass that was missing."""

    def spoilt(spoil):
        def loss(event, adjacency, interval):
            pmf = gaussian_loss(event, adjacency, interval).remove
            bad = accounting.LossPmf(pmf.interval, pmf.lowest, spoil(pmf.mass.copy()), pmf.infinity)
            return accounting.LossDistribution(pmf, bad)

        return loss

    def negative(mass):
        mass[0] = -1.0
        mass[-1] += 1.0
        return mass

    for spoil in (lambda m: m * np.nan, lambda m: 0.999 * m, negative):
        event = ruled(spoilt(spoil))
        for question in (accounting.epsilon, accounting.delta):
            with pytest.raises(ValueError, match="gives no privacy loss: its masses"):
                question(event, DELTA)
    with pytest.raises(ValueError, match="no `LossDistribution`"):
        accounting.epsilon(ruled(lambda event, adjacency, interval: 1.0), DELTA)

    def failing(coupling, other=None):
        def loss(event, adjacency, interval):
            pmf = gaussian_loss(event, adjacency, interval).remove
            return accounting.LossDistribution(pmf, pmf, coupling, other and other(event, adjacency, interval))

        return loss

    for loss in (failing(-0.1), failing(0.0, spoilt(lambda m: m * np.nan))):
        with pytest.raises(ValueError, match="gives no privacy loss"):
            accounting.epsilon(ruled(loss), DELTA)


def test_guarantee_other_numbers_of_a_rule_that_are_no_bounds_prove_nothing():
    for number in (-3.0, math.nan):
        with pytest.raises(ValueError, match="its `pure` epsilon"):
            accounting.epsilon(ruled(gaussian_loss, pure=lambda e, a, n=number: n), DELTA)
        event = ruled(gaussian_loss, renyi=lambda e, a, orders, n=number: np.full(len(orders), n))
        both = da.ComposedDpEvent([event, da.GaussianDpEvent(1.0)])
        assert accounting.epsilon(both, DELTA, accountant="rdp") == math.inf


def test_guarantee_what_holds_for_presence_says_nothing_of_replacement():
    event = ruled(
        gaussian_loss, only_presence="It", pure=lambda e, a: 1.0, renyi=lambda e, a, orders: np.ones(len(orders))
    )
    assert accounting.epsilon(event, 0.0) == 1.0
    for delta in (0.0, DELTA):
        with pytest.raises(ValueError, match="not for 'replace_one'|does not have"):
            accounting.epsilon(event, delta, adjacency="replace_one")
    with pytest.raises(ValueError, match="not for 'replace_one'"):
        accounting.epsilon(event, DELTA, adjacency="replace_one", accountant="rdp")
    with pytest.raises(ValueError, match="not for 'replace_one'"):
        accounting.delta(event, 2.0, adjacency="replace_one")


def test_what_an_event_is_reduced_to_is_reduced_in_its_turn():
    @attr.s(frozen=True, slots=True, auto_attribs=True)
    class TwiceDpEvent(da.DpEvent):
        noise_multiplier: float

        def reduced(self):
            multiplier: Any = np.float32(self.noise_multiplier)
            twice: list[da.DpEvent] = [da.GaussianDpEvent(multiplier)] * 2
            return da.PoissonSampledDpEvent(0.5, da.ComposedDpEvent(twice))

    expected = da.PoissonSampledDpEvent(0.5, da.SelfComposedDpEvent(da.GaussianDpEvent(1.0), 2))
    for accountant in ("pld", "rdp"):
        found = accounting.epsilon(TwiceDpEvent(1.0), DELTA, accountant=accountant)
        assert found == accounting.epsilon(expected, DELTA, accountant=accountant)
    assert accounting.epsilon(TwiceDpEvent(0.0), DELTA, accountant="rdp") == math.inf
