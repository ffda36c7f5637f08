"""Accounting of random allocation, bins, fixed sizes, b-min-sep and couplings: against integrals, enumeration and samples made here."""

import itertools
import math
from typing import Any

import dp_accounting as da
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from scipy import integrate, stats

import dpx
from dpx import accounting
from dpx.accounting import LossDistribution
from dpx.accounting.losses import _min_sep, _monte_carlo
from dpx.accounting.losses._allocation import random_allocation
from dpx.accounting.losses._fixed_size import fixed_size_gaussian
from dpx.accounting.losses._gaussian import poisson_gaussian
from dpx.events import (
    CoupledDpEvent,
    FixedSizeSampledGaussianDpEvent,
    GaussianMixtureOfBinsDpEvent,
    MinSepSampledDpEvent,
    RandomAllocationDpEvent,
)
from dpx.sampling import MinSepSampler
from dpx.strategies import BandedToeplitz

times = da.SelfComposedDpEvent
EVENTS = {
    "allocation": (RandomAllocationDpEvent(1.0, 20), "add_or_remove_one"),
    "bins": (GaussianMixtureOfBinsDpEvent(1.0, ((1.0, 0.2), (0.2, 1.0))), "add_or_remove_one"),
    "fixed-size": (FixedSizeSampledGaussianDpEvent(100, 10, 2.0, False), "replace_one"),
    "with-replacement": (FixedSizeSampledGaussianDpEvent(100, 10, 4.0, True), "replace_one"),
}


def loss_distribution(event):
    found = accounting.loss_distribution(event, "add_or_remove_one")
    assert isinstance(found, LossDistribution)
    return found


def hockey_stick(upper, lower, epsilon, low=-40.0, high=40.0):
    """By quadrature in pieces, in one dimension."""
    edges = np.linspace(low, high, 161)
    integrand = lambda y: max(0.0, upper(y) - math.exp(epsilon) * lower(y))
    return sum(
        integrate.quad(integrand, a, b, epsabs=1e-13, epsrel=1e-10, limit=200)[0] for a, b in itertools.pairwise(edges)
    )


def allocation_losses(rng, sigma, bins, samples):
    """Samples of the privacy loss of removing (under P) and adding (under Q), from the definition."""
    y = rng.normal(0, sigma, (samples, bins))
    loss = lambda y: np.log(np.mean(np.exp((2 * y - 1) / (2 * sigma**2)), axis=1))
    add = -loss(y)
    y[:, 0] += 1
    return loss(y), add


def assert_sampled(bound, losses, epsilon, slack):
    """The bound is above what samples show and not far above it; false alarms have probability 1e-6."""
    values = -np.expm1(np.minimum(epsilon - losses, 0.0))
    mean, error = values.mean(), values.std() / math.sqrt(len(values))
    assert mean - 5 * error <= bound <= mean + 5 * error + slack
    assert mean > 10 * error  # the comparison says something


@pytest.mark.parametrize(("sigma", "epsilon"), [(1.0, 0.5), (0.6, 2.0), (2.0, 0.1)])
def test_allocation_to_two_bins_is_the_integral(sigma, epsilon):
    variance, scale = sigma**-2, 1 / sigma

    def call(strike):
        """E[(X - strike)_+] of a log-normal X of mean 1."""
        if strike <= 0:
            return 1 - strike
        d = (-math.log(strike) + variance / 2) / scale
        return stats.norm.cdf(d) - strike * stats.norm.cdf(d - scale)

    def expectation(of):
        density = lambda z: of(math.exp(scale * z - variance / 2)) * stats.norm.pdf(z)
        return integrate.quad(density, -12, 12, points=[-3, 0, 3], epsabs=1e-12, limit=400)[0]

    # S = (X + Y) / 2: integrate over X, and Y has a closed form
    remove = expectation(lambda x: 0.5 * call(2 * math.exp(epsilon) - x))
    put = lambda strike: call(strike) - 1 + strike
    add = expectation(lambda x: 0.5 * math.exp(epsilon) * put(2 * math.exp(-epsilon) - x))
    found = random_allocation(sigma, 2, 1e-4)
    assert remove - 1e-10 <= found.remove.delta(epsilon) <= remove + 1e-6
    assert add - 1e-10 <= found.add.delta(epsilon) <= add + 1e-6


def test_allocation_meets_the_reference():
    delta = accounting.delta(RandomAllocationDpEvent(1.0, 100), 1.0)
    assert 2.68e-7 <= delta <= 3.42e-7  # between directed roundings, down and up, of a log-domain convolution
    assert delta <= 0.5 * accounting.delta(times(da.PoissonSampledDpEvent(0.01, da.GaussianDpEvent(1.0)), 100), 1.0)
    # and yet random allocation is not always the better one
    two = accounting.delta(RandomAllocationDpEvent(1.0, 2), 0.5)
    assert two == pytest.approx(0.149178, abs=1e-6)
    assert two > accounting.delta(times(da.PoissonSampledDpEvent(0.5, da.GaussianDpEvent(1.0)), 2), 0.5)


@pytest.mark.parametrize("bins", [5, 12])
def test_allocation_is_confirmed_by_samples(bins):
    remove, add = allocation_losses(np.random.default_rng(0), 0.8, bins, 400_000)
    found = random_allocation(0.8, bins, 1e-4)
    for epsilon in (0.1, 0.7):
        assert_sampled(found.remove.delta(epsilon), remove, epsilon, 1e-4)
        assert_sampled(found.add.delta(epsilon), add, epsilon, 1e-4)


def test_blocks_of_allocation_compose_with_each_other_and_with_poisson():
    rng = np.random.default_rng(1)
    (first, first_add), (second, second_add) = (allocation_losses(rng, 1.0, 6, 400_000) for _ in range(2))
    event = da.ComposedDpEvent(
        [times(RandomAllocationDpEvent(1.0, 6), 2), da.PoissonSampledDpEvent(0.3, da.GaussianDpEvent(1.5))]
    )
    y = rng.normal(0, 1.5, 400_000)
    ratio = lambda y: np.log1p(0.3 * np.expm1((2 * y - 1) / (2 * 1.5**2)))
    moved = y + (rng.random(len(y)) < 0.3)
    found = loss_distribution(event)
    assert_sampled(found.remove.delta(0.6), first + second + ratio(moved), 0.6, 1e-4)
    assert_sampled(found.add.delta(0.6), first_add + second_add - ratio(y), 0.6, 1e-4)
    assert accounting.delta(event, 0.6) == found.get_delta(0.6)


def test_one_bin_and_one_example_are_the_gaussian():
    for epsilon in (0.2, 1.0):
        exact = accounting.delta(da.GaussianDpEvent(1.0), epsilon)
        assert exact - 1e-8 <= random_allocation(1.0, 1, 1e-4).get_delta(epsilon) <= exact + 1e-6
        everybody = FixedSizeSampledGaussianDpEvent(5, 5, 2.0, False)
        assert exact - 1e-9 <= accounting.delta(everybody, epsilon, adjacency="replace_one") <= exact + 1e-6


def test_many_bins_and_little_noise_stay_finite():
    assert 0 < accounting.epsilon(RandomAllocationDpEvent(0.3, 1000), 1e-6) < 40
    assert accounting.epsilon(RandomAllocationDpEvent(0.02, 4), 1e-6) < 5000


@pytest.mark.parametrize("others", [-1, 0, 1])
def test_fixed_size_without_replacement_is_above_the_integral(others):
    sigma, share, epsilon = 1.5, 0.2, 0.4
    # one contribution turns from 1 to -1; all others are `others`, and one of them is in the batch wherever this one is not
    mixed = lambda mean: lambda y: (1 - share) * stats.norm.pdf(y, 0, sigma) + share * stats.norm.pdf(y, mean, sigma)
    exact = hockey_stick(mixed(1 - others), mixed(-1 - others), epsilon)
    found = accounting.delta(FixedSizeSampledGaussianDpEvent(10, 2, sigma, False), epsilon, adjacency="replace_one")
    assert exact - 1e-10 <= found
    if others == -1:  # the worst of data sets
        assert found <= exact + 1e-6


def test_fixed_size_with_replacement_is_above_the_integral():
    sigma, epsilon, examples, batch = 2.0, 0.3, 10, 4
    weights = stats.binom.pmf(np.arange(batch + 1), batch, 1 / examples)
    upper = lambda y: float(weights @ stats.norm.pdf(y, 2.0 * np.arange(batch + 1), sigma))
    exact = hockey_stick(upper, lambda y: stats.norm.pdf(y, 0, sigma), epsilon)
    event = FixedSizeSampledGaussianDpEvent(examples, batch, sigma, True)
    found = accounting.delta(event, epsilon, adjacency="replace_one")
    assert exact <= found <= 1.5 * exact
    once = accounting.delta(FixedSizeSampledGaussianDpEvent(examples, 1, sigma, True), epsilon, adjacency="replace_one")
    plain = FixedSizeSampledGaussianDpEvent(examples, 1, sigma, False)
    assert once == pytest.approx(accounting.delta(plain, epsilon, adjacency="replace_one"), rel=1e-9)


def test_fixed_size_composes_above_its_worst_pair():
    # others = -1 above: a mixture against one Gaussian, twice as far as Poisson sampling's
    worst = poisson_gaussian(0.75, 0.2, 1e-4).self_compose(20)
    found = fixed_size_gaussian(10, 2, 1.5, False, 1e-4).self_compose(20)
    for epsilon in (0.5, 2.0, 5.0):
        assert worst.get_delta(epsilon) <= found.get_delta(epsilon) <= 2 * worst.get_delta(epsilon)


def test_fixed_size_by_renyi_owns_the_factor_of_two():
    event = times(FixedSizeSampledGaussianDpEvent(10_000, 100, 2.0, False), 200)
    from dp_accounting.rdp import RdpAccountant

    theirs = RdpAccountant(neighboring_relation=da.NeighboringRelation.REPLACE_ONE)
    theirs.compose(da.SampledWithoutReplacementDpEvent(10_000, 100, da.GaussianDpEvent(1.0)), 200)
    for adjacency in ("replace_one", "replace_special"):
        rdp = accounting.epsilon(event, 1e-5, adjacency=adjacency, accountant="rdp")
        assert rdp == pytest.approx(theirs.get_epsilon(1e-5))
        assert accounting.epsilon(event, 1e-5, adjacency=adjacency) <= rdp
    with pytest.raises(ValueError, match="formula in one direction"):
        replaced = FixedSizeSampledGaussianDpEvent(100, 10, 2.0, True)
        accounting.epsilon(replaced, 1e-5, adjacency="replace_one", accountant="rdp")


def test_what_nobody_can_account_for_is_refused():
    for event, name in ((RandomAllocationDpEvent(1.0, 5), "Random alloc"), (EVENTS["bins"][0], "Balls-in-bins")):
        with pytest.raises(ValueError, match=f"{name}.*add_or_remove_one"):
            accounting.epsilon(event, 1e-5, adjacency="replace_one")
        with pytest.raises(ValueError, match="pld"):
            accounting.epsilon(event, 1e-5, accountant="rdp")
        special = accounting.epsilon(event, 1e-5, adjacency="replace_special")
        assert special == accounting.epsilon(event, 1e-5)  # the same pair of distributions
    with pytest.raises(ValueError, match="replace_one.*replace_special"):
        accounting.epsilon(EVENTS["fixed-size"][0], 1e-5)


def bins_gram(bins, coefficients):
    """Inner products of the columns of a circulant matrix, of norm 1."""
    column = np.zeros(bins)
    column[: len(coefficients)] = coefficients
    columns = np.stack([np.roll(column, j) for j in range(bins)], 1)
    return columns.T @ columns / (column @ column)


@pytest.mark.parametrize("coefficients", [(1.0, 0.5), pytest.param((1.0, 0.6, 0.4, 0.2), marks=pytest.mark.slow)])
def test_correlated_bins_are_confirmed_by_samples_from_below(coefficients):
    bins, sigma, epsilon, samples = 12, 1.0, 0.5, 200_000
    gram = bins_gram(bins, coefficients)
    rng = np.random.default_rng(2)
    noise = rng.multivariate_normal(np.zeros(bins), gram, samples, method="eigh") / sigma
    loss = lambda u: np.log(np.mean(np.exp(u - 0.5 / sigma**2), axis=1))
    add = -loss(noise)
    remove = loss(noise + gram[0] / sigma**2)
    found = loss_distribution(GaussianMixtureOfBinsDpEvent(sigma, tuple(map(tuple, gram))))
    # the gap is the price of a bound without samples; it is less than that of giving the bands up
    for losses, bound in ((remove, found.remove.delta(epsilon)), (add, found.add.delta(epsilon))):
        values = -np.expm1(np.minimum(epsilon - losses, 0.0))
        mean, error = values.mean(), values.std() / math.sqrt(samples)
        assert 10 * error < mean - 5 * error <= bound <= 20 * mean
    fewer = RandomAllocationDpEvent(sigma, bins // len(coefficients))
    assert found.get_epsilon(1e-5) <= accounting.epsilon(fewer, 1e-5) + 1e-3


def test_bins_reduce_to_what_is_known():
    identity = GaussianMixtureOfBinsDpEvent(0.9, tuple(map(tuple, np.eye(10))))
    assert accounting.delta(identity, 0.5) == pytest.approx(
        accounting.delta(RandomAllocationDpEvent(0.9, 10), 0.5), rel=1e-9
    )
    one = GaussianMixtureOfBinsDpEvent(0.9, tuple(map(tuple, np.ones((4, 4)))))
    assert accounting.delta(one, 0.5) == pytest.approx(accounting.delta(da.GaussianDpEvent(0.9), 0.5), abs=1e-6)


@pytest.mark.parametrize("name", EVENTS)
def test_epsilon_falls_with_noise_and_grows_with_repetition(name):
    event, adjacency = EVENTS[name]
    epsilon = lambda event, count=1: accounting.epsilon(times(event, count), 1e-5, adjacency=adjacency, interval=1e-3)
    noisier = type(event)(
        **{f: getattr(event, f) for f in event.__slots__ if f != "__weakref__"}
        | {"noise_multiplier": 1.2 * event.noise_multiplier}
    )
    assert 0 < epsilon(noisier) < epsilon(event) < epsilon(event, 3) < epsilon(event, 10)


def test_allocation_to_more_bins_and_smaller_batches_cost_less():
    found = [accounting.epsilon(RandomAllocationDpEvent(1.0, bins), 1e-5) for bins in (2, 5, 20)]
    assert found[0] > found[1] > found[2]
    sizes = [FixedSizeSampledGaussianDpEvent(100, size, 2.0, False) for size in (5, 20, 100)]
    found = [accounting.epsilon(event, 1e-5, adjacency="replace_one") for event in sizes]
    assert found[0] < found[1] < found[2]


def test_coupling_costs_its_probability():
    base = times(da.PoissonSampledDpEvent(0.05, da.GaussianDpEvent(1.0)), 40)
    tau = 1e-8
    coupled = CoupledDpEvent(base, tau)
    assert accounting.delta(coupled, 1.0) == pytest.approx(accounting.delta(base, 1.0) + tau * (1 + math.e), rel=1e-9)
    for accountant in ("pld", "rdp"):
        epsilon = accounting.epsilon(coupled, 1e-6, accountant=accountant)
        assert epsilon > accounting.epsilon(base, 1e-6, accountant=accountant)
        assert accounting.delta(coupled, epsilon, accountant=accountant) <= 1e-6 * (1 + 1e-4)
        assert accounting.epsilon(CoupledDpEvent(base, 1e-5), 1e-6, accountant=accountant) == math.inf
    # a run of coupled mechanisms fails if one of them does
    each = CoupledDpEvent(da.PoissonSampledDpEvent(0.05, da.GaussianDpEvent(1.0)), tau / 40)
    assert accounting.delta(times(each, 40), 1.0) == pytest.approx(accounting.delta(coupled, 1.0), rel=1e-6)
    assert accounting.epsilon(times(each, 40), 1e-6, accountant="rdp") == pytest.approx(
        accounting.epsilon(coupled, 1e-6, accountant="rdp"), rel=1e-6
    )


def patterns(steps, separation, p, is_warm):
    """All participation patterns with their probabilities, by walking the definition."""
    found: dict[tuple[int, ...], float] = {}

    def walk(step, rest, taken, probability):
        if step == steps:
            found[taken] = found.get(taken, 0.0) + probability
        elif rest:
            walk(step + 1, rest - 1, taken, probability)
        else:
            walk(step + 1, separation - 1, (*taken, step), probability * p)
            walk(step + 1, 0, taken, probability * (1 - p))

    cycle = separation - 1 + 1 / p
    starts = {0: 1 / p / cycle} | {r: 1 / cycle for r in range(1, separation)} if is_warm else {0: 1.0}
    for rest, probability in starts.items():
        walk(0, rest, (), probability)
    return found


@pytest.mark.parametrize("is_warm", [False, True])
def test_min_sep_ratios_are_those_of_all_patterns(is_warm):
    steps, separation, p, sigma = 7, 3, 0.3, 0.9
    coefficients = np.array([0.8, 0.5, 0.33])
    matrix = np.sum([np.diag([c] * (steps - k), -k) for k, c in enumerate(coefficients)], 0)
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(steps, 5))
    participates = np.zeros((steps, 5))
    participates[[0, 3, 6], 0] = participates[[2, 5], 1] = participates[1, 2] = 1
    means = {pattern: matrix[:, list(pattern)].sum(1) for pattern in patterns(steps, separation, p, is_warm)}

    def ratio(y):
        terms = patterns(steps, separation, p, is_warm).items()
        return sum(w * math.exp((2 * means[x] @ y - means[x] @ means[x]) / (2 * sigma**2)) for x, w in terms)

    single = [np.asarray(x, np.float32) for x in (noise, participates, coefficients)]
    norms = _min_sep._norms(tuple(coefficients.tolist()), steps).astype(np.float32)
    found = _min_sep._ratios(*single, norms, np.float32(sigma), np.float32(p), separation, is_warm)
    for column in range(5):
        y = matrix @ participates[:, column] + sigma * noise[:, column]
        assert float(found[0, column]) == pytest.approx(ratio(y), rel=1e-4)
        assert float(found[1, column]) == pytest.approx(ratio(sigma * noise[:, column]), rel=1e-4)
    assert sum(patterns(steps, separation, p, is_warm).values()) == pytest.approx(1)


@pytest.mark.parametrize("is_warm", [False, True])
def test_min_sep_participations_have_their_distribution(is_warm):
    """Under P the mean of 1 / ratio is 1, and under Q that of the ratio, if and only if the patterns drawn are those of the ratio."""
    remove, add = _min_sep.min_sep_losses(1.5, (0.8, 0.6), 12, 3, 0.3, is_warm, samples=2**17, seed=7)
    for losses in (remove, add):
        inverse = np.exp(-losses)
        assert abs(inverse.mean() - 1) <= 5 * inverse.std() / math.sqrt(len(inverse)) + 2e-4


@pytest.fixture
def few_samples(monkeypatch):
    monkeypatch.setattr(_monte_carlo, "_LEAST_SAMPLES", 2**16)
    monkeypatch.setattr(_monte_carlo, "_MOST_SAMPLES", 2**16)
    monkeypatch.setattr(_min_sep, "_seed", lambda structure: 11)


def test_min_sep_bound_is_above_the_integral_and_says_the_same_twice(few_samples):
    # one step: Poisson sampling
    event = MinSepSampledDpEvent(1.0, (1.0,), 1, 4, 0.3, False)
    poisson = da.PoissonSampledDpEvent(0.3, da.GaussianDpEvent(1.0))
    for epsilon in (0.2, 0.5):
        exact = accounting.delta(poisson, epsilon)
        assert exact <= accounting.delta(event, epsilon) <= 1.25 * exact + 1e-3
    found = accounting.epsilon(event, 0.01)
    assert accounting.epsilon(poisson, 0.01) <= found <= 1.3 * accounting.epsilon(poisson, 0.01)
    assert found == accounting.epsilon(event, 0.01)
    assert accounting.delta(event, found) <= 0.01
    # what is rounded to a grid is rounded up
    assert accounting.epsilon(MinSepSampledDpEvent(1.003, (1.0,), 1, 4, 0.3, False), 0.01) == found
    coupled = CoupledDpEvent(event, 1e-4)
    assert accounting.delta(coupled, 0.2) == pytest.approx(accounting.delta(event, 0.2) + 1e-4 * (1 + math.exp(0.2)))
    assert accounting.epsilon(coupled, 0.01) >= found


def test_min_sep_refuses_what_samples_cannot_show(few_samples):
    event = MinSepSampledDpEvent(1.0, (1.0,), 3, 2, 0.3, True)
    with pytest.raises(ValueError, match="cannot be certified from 65,536 samples.*CyclicPoissonSampler"):
        accounting.epsilon(event, 1e-6)
    with pytest.raises(ValueError, match="replace_special"):
        accounting.epsilon(event, 0.01, adjacency="replace_one")


def test_kullback_leibler_bound_is_the_exact_one_where_there_is_one():
    questions = _monte_carlo._QUESTIONS / _monte_carlo.FAILURE
    none, low = _monte_carlo._kl_uppers(np.array([0.0, 1e-3]), math.log(questions) / 10**6).tolist()
    # no sample above: (1 - d)^n = failure
    assert none == pytest.approx(-math.expm1(-math.log(questions) / 10**6), rel=1e-9)
    gap = 1e-3 * math.log(1e-3 / low) + 0.999 * math.log(0.999 / (1 - low))
    assert gap == pytest.approx(math.log(questions) / 10**6, rel=1e-6) and low > 1e-3


def test_min_sep_composes_and_lies_above_the_integral(few_samples):
    # one step of it is Poisson sampling, of which the composition is known
    event, poisson = (
        MinSepSampledDpEvent(1.0, (1.0,), 1, 4, 0.3, False),
        da.PoissonSampledDpEvent(0.3, da.GaussianDpEvent(1.0)),
    )
    for others in ([da.GaussianDpEvent(5.0)], [da.LaplaceDpEvent(4.0), times(poisson, 2)], [event]):
        together: Any = da.ComposedDpEvent([event, *others])
        exact: Any = da.ComposedDpEvent([poisson, *(poisson if e is event else e for e in others)])
        for epsilon in (0.1, 0.5, 1.5):
            truth = accounting.delta(exact, epsilon)
            assert truth <= accounting.delta(together, epsilon) <= 1.3 * truth + 6e-3
        assert accounting.epsilon(together, 0.02) >= accounting.epsilon(exact, 0.02)
    # the coupling of batches that are cut, and steps of everybody beside it, in a ledger
    ledger = (
        accounting.PrivacyLedger("add_or_remove_one").spend(CoupledDpEvent(event, 1e-5)).spend(da.GaussianDpEvent(8.0))
    )
    assert ledger.delta(0.5) >= accounting.delta(da.ComposedDpEvent([poisson, da.GaussianDpEvent(8.0)]), 0.5) + 1e-5
    # twice the same question is one question
    assert accounting.delta(together, 0.3) == accounting.delta(together, 0.3)


def test_metrics_beside_min_sep_are_part_of_every_participation(few_samples):
    # one step: the gradient and the metric are one Gaussian of the sum of their precisions
    event = MinSepSampledDpEvent(1.0, (1.0,), 1, 4, 0.3, False, 0.5**2)
    joint = da.PoissonSampledDpEvent(0.3, da.GaussianDpEvent((1 + 0.5**2) ** -0.5))
    for epsilon in (0.2, 0.6):
        exact = accounting.delta(joint, epsilon)
        assert exact <= accounting.delta(event, epsilon) <= 1.25 * exact + 1e-3
    strategy = BandedToeplitz([0.8, 0.6])
    sampler, noise = MinSepSampler(200, 10, 12, 4), dpx.CorrelatedGaussian(strategy, 2.0)
    plain = dpx.PrivacyPlan(sampler, dpx.FlatClipping(1.0), noise)
    watched = plain.with_metrics(n=dpx.metrics.Count(None, noise_multiplier=4.0))
    seen: Any = watched.event
    assert seen.side_precision == 1 / 16 and seen.noise_multiplier == 2.0
    assert plain.epsilon(0.004) < watched.epsilon(0.004)
    adaptive = dpx.PrivacyPlan(sampler, dpx.AdaptiveClipping(1.0, count_noise_multiplier=5.0), noise)
    # twice the multiplier of the count is that of a query of sensitivity 1
    counted: Any = adaptive.event
    assert counted.side_precision == pytest.approx(1 / 100)
    assert counted.noise_multiplier == pytest.approx((1 / 4 - 1 / 100) ** -0.5)


def test_the_band_of_samples_holds_at_every_threshold():
    # a loss whose tail is known: of 300 bands that fail with probability 1e-3 more than 6 are bad with probability 4e-8
    rng, bad = np.random.default_rng(5), 0
    thresholds = _monte_carlo.THRESHOLDS
    inside = (thresholds > -3) & (thresholds < 6)
    room = math.log(inside.sum() / 1e-3) / 500
    truth = stats.norm.sf(thresholds, 0.5, 1.0)
    for _ in range(300):
        counts = np.bincount(np.searchsorted(thresholds, rng.normal(0.5, 1.0, 500)), minlength=len(thresholds) + 1)
        above = (500 - np.cumsum(counts)[:-1]) / 500
        bad += bool(np.any(_monte_carlo._kl_uppers(above, room)[inside] < truth[inside]))
    assert bad <= 6
    pmf = _monte_carlo.pessimistic(counts, 500, room, 1e-3)  # pyright: ignore[reportPossiblyUnboundVariable]
    grid = (np.arange(len(pmf.mass)) + pmf.lowest) * pmf.interval
    tail = lambda x: pmf.infinity + pmf.mass[grid > x].sum()
    assert all(tail(x) >= stats.norm.sf(x, 0.5, 1.0) - 1e-12 for x in np.linspace(-2, 6, 50))
    assert pmf.mass.sum() + pmf.infinity >= 1 - 1e-12


def test_the_failure_is_divided_among_all_structures(monkeypatch):
    monkeypatch.setattr(_monte_carlo, "_asked", {})
    shares = [1 / (2 * _monte_carlo._STRUCTURES * _monte_carlo._dearer(("structure", i))) for i in range(20_000)]
    assert sum(shares) < 1 and shares[0] == shares[1023] == 4 * shares[1024] == 16 * shares[3072]
    assert _monte_carlo._dearer(("structure", 5)) == 1  # asked before
    bound = 2 * len(_monte_carlo.THRESHOLDS) * 17 * _monte_carlo.MULTIPLIERS
    assert _monte_carlo._QUESTIONS >= bound * 2 * _monte_carlo._STRUCTURES


def test_shuffling_is_far_from_poisson():
    bound = accounting.shuffling_lower_bound(0.4, 10_000, 4.0)
    assert bound == pytest.approx(0.2261, abs=1e-4)
    poisson = times(da.PoissonSampledDpEvent(1e-4, da.GaussianDpEvent(0.4)), 10_000)
    assert accounting.delta(poisson, 4.0) == pytest.approx(1.168e-5, rel=1e-2)
    # one step is no shuffling at all: the bound is the Gaussian mechanism's own, of a replacement against an empty example at worst
    for epsilon in (0.5, 2.0):
        assert 0 < accounting.shuffling_lower_bound(0.8, 1, epsilon)
        unamplified = accounting.delta(da.GaussianDpEvent(0.8), epsilon)
        assert accounting.shuffling_lower_bound(0.8, 1, epsilon) == pytest.approx(unamplified, rel=1e-4)
    with pytest.raises(ValueError, match="noise_multiplier"):
        accounting.shuffling_lower_bound(0.0, 10, 1.0)


def test_grids_match_dp_accounting_and_blocks_match_one_transform():
    for adjacency in ("add_or_remove_one", "replace_one"):
        event = times(da.PoissonSampledDpEvent(0.05, da.GaussianDpEvent(1.5)), 30)
        theirs = PLDAccountant(da.NeighboringRelation[adjacency.upper()]).compose(event).get_epsilon(1e-6)
        assert accounting.epsilon(event, 1e-6, adjacency=adjacency) == pytest.approx(theirs, abs=1e-5)
    one = poisson_gaussian(2.0, 0.01, 1e-4)
    blocks, direct = one.self_compose(20_000), one.remove._power(20_000)
    assert direct.interval == 1e-4 and blocks.remove.interval > 1e-4
    assert blocks.remove.epsilon(1e-6) == pytest.approx(direct.epsilon(1e-6), rel=1e-4)
    for epsilon in (0.5, 2.0, 4.0):
        assert blocks.remove.delta(epsilon) >= direct.delta(epsilon) - 1e-10
    wide = one.remove.coarsen(7)
    for epsilon in (0.0, 0.01, 0.1003):
        assert one.remove.delta(epsilon) <= wide.delta(epsilon) + 1e-15
    assert float(wide.mass.sum()) == pytest.approx(float(one.remove.mass.sum()), abs=1e-14)


def test_composition_of_gaussians_is_the_closed_form():
    one = poisson_gaussian(20.0, 1.0, 1e-4)
    for epsilon in (0.1, 1.0, 3.0):
        exact = accounting.delta(da.GaussianDpEvent(1.0), epsilon)
        assert exact <= one.self_compose(400).get_delta(epsilon) <= exact * (1 + 1e-3) + 1e-9
