"""Every event that some accountant of `dp_accounting` takes is accounted for by a bound that is proven, or refused."""

import itertools
import math

import dp_accounting as da
import numpy as np
import pytest
from dp_accounting import dp_event
from scipy import stats

import dpx
from dpx import accounting
from dpx.events import (
    CoupledDpEvent,
    FixedSizeSampledGaussianDpEvent,
    GaussianMixtureOfBinsDpEvent,
    RandomAllocationDpEvent,
)

ADJACENCIES = ("add_or_remove_one", "replace_one", "replace_special")
DELTA = 1e-5
Gaussian, Laplace, Poisson, times = (
    da.GaussianDpEvent,
    da.LaplaceDpEvent,
    da.PoissonSampledDpEvent,
    da.SelfComposedDpEvent,
)
WithoutReplacement, Truncated = da.SampledWithoutReplacementDpEvent, dp_event.TruncatedSubsampledGaussianDpEvent
Repeated, Mixture = dp_event.RepeatAndSelectDpEvent, dp_event.MixtureOfGaussiansDpEvent


def answer(event, adjacency, accountant, delta=DELTA):
    """Epsilon, or None if it is refused; nothing else is an answer."""
    try:
        found = accounting.epsilon(event, delta, adjacency=adjacency, accountant=accountant)
        assert 0 <= accounting.delta(event, 1.0, adjacency=adjacency, accountant=accountant) <= 1
    except ValueError:
        return None
    assert found >= 0
    return found


def gaussian(sigma):
    return pytest.approx(da.get_epsilon_gaussian(sigma, DELTA), rel=1e-6)


def at_least(value):
    """Rényi bounds are looser."""
    return lambda found: value - 1e-9 <= found <= 1.4 * value


# By event: epsilon by privacy losses and by Rényi divergences under each adjacency, None where it must be refused.
NO, NOTHING, ALL = None, 6 * (0.0,), 6 * (math.inf,)
REFUSED = 6 * (NO,)
# of one step at rate 1/2, whose worse direction is removal
sampled = math.log1p(0.5 * math.expm1(da.get_epsilon_gaussian(2.0, 2 * DELTA)))
below = lambda most: lambda found: 0.1 * most < found < most
above = lambda least: lambda found: least < found < one
one, two = da.get_epsilon_gaussian(1.0, DELTA), da.get_epsilon_gaussian(2.0, DELTA)
TABLE = {
    "nothing": (da.NoOpDpEvent(), NOTHING),
    "no privacy": (da.NonPrivateDpEvent(), ALL),
    "unsupported": (da.UnsupportedDpEvent(), REFUSED),
    "gaussian": (
        Gaussian(2.0),
        (gaussian(2.0), at_least(two), gaussian(1.0), at_least(one), gaussian(2.0), at_least(two)),
    ),
    "gaussian of an int": (
        Gaussian(2),
        (gaussian(2.0), at_least(two), gaussian(1.0), at_least(one), gaussian(2.0), at_least(two)),
    ),
    "gaussian of a float32": (
        Gaussian(np.float32(2)),  # pyright: ignore[reportArgumentType]
        (gaussian(2.0), at_least(two), gaussian(1.0), at_least(one), gaussian(2.0), at_least(two)),
    ),
    "gaussian without noise": (Gaussian(0.0), ALL),
    "gaussian of infinite noise": (Gaussian(math.inf), NOTHING),
    "gaussian of negative noise": (Gaussian(-1.0), REFUSED),
    "gaussian of no number": (Gaussian(math.nan), REFUSED),
    "laplace": (Laplace(2.0), (0.5, 0.5, 1.0, NO, 0.5, 0.5)),
    "laplace without noise": (Laplace(0.0), ALL),
    "laplace of negative noise": (Laplace(-1.0), REFUSED),
    "discrete laplace": (dp_event.DiscreteLaplaceDpEvent(0.5, 1), (0.5, NO, NO, NO, 0.5, NO)),
    "discrete laplace of rate 0": (dp_event.DiscreteLaplaceDpEvent(0.0, 1), ALL),
    # of two answers, given at random with probability 1/2: 3/4 against 1/4, or against 1/2
    "randomized response": (da.RandomizedResponseDpEvent(0.5, 2), (NO, NO, math.log(3), NO, 0.6953, 0.6960)),
    "randomized response, truthful": (da.RandomizedResponseDpEvent(0.0, 2), ALL),
    "randomized response, more than always": (da.RandomizedResponseDpEvent(1.5, 2), REFUSED),
    "zCDP": (dp_event.ZCDpEvent(0.125), (NO, at_least(two), NO, NO, NO, at_least(two))),
    "zCDP, negative": (dp_event.ZCDpEvent(-0.1), REFUSED),
    "zCDP on a sample": (
        Poisson(0.1, dp_event.ZCDpEvent(0.125)),
        (NO, below(two), NO, NO, NO, below(two)),
    ),
    "sampled more than always": (Poisson(1.5, Gaussian(2.0)), REFUSED),
    "sampled with no number": (Poisson(math.nan, Gaussian(2.0)), REFUSED),
    "never sampled": (Poisson(0.0, Gaussian(2.0)), NOTHING),
    "sampled without noise": (Poisson(0.1, Gaussian(0.0)), ALL),
    "sample of a sample": (Poisson(0.1, Poisson(0.1, Gaussian(2.0))), REFUSED),
    "laplace on a sample": (
        Poisson(0.1, Laplace(2.0)),
        (math.log1p(0.1 * math.expm1(0.5)), NO, NO, NO, math.log1p(0.1 * math.expm1(0.5)), NO),
    ),
    "different noises on a sample": (Poisson(0.1, da.ComposedDpEvent([Gaussian(2.0), Laplace(1.0)])), REFUSED),
    # an explicit attack: the other examples one way, the replaced one the other
    "fixed size": (WithoutReplacement(1000, 10, Gaussian(1.0)), (NO, NO, 3.0254, 4.9548, 3.0254, 4.9548)),
    "fixed size, several noises": (
        WithoutReplacement(1000, 10, times(Gaussian(2.0), 4)),
        (NO, NO, 3.0254, 4.9548, 3.0254, 4.9548),
    ),
    "fixed size, laplace": (WithoutReplacement(1000, 10, Laplace(1.0)), REFUSED),
    "fixed size above the data's": (WithoutReplacement(10, 100, Gaussian(1.0)), REFUSED),
    "fixed size in a search": (Repeated(WithoutReplacement(1000, 10, Gaussian(1.0)), 10.0, 1.0), REFUSED),
    "with replacement": (
        dp_event.SampledWithReplacementDpEvent(1000, 10, Gaussian(1.0)),
        (NO, NO, 5.5773, NO, 5.5773, NO),
    ),
    "tree": (da.SingleEpochTreeAggregationDpEvent(2.0, 7), (NO, NO, NO, NO, NO, 4.0113)),
    "tree without noise": (da.SingleEpochTreeAggregationDpEvent(0.0, 7), (NO, NO, NO, NO, NO, math.inf)),
    "tree of negative length": (da.SingleEpochTreeAggregationDpEvent(2.0, -7), REFUSED),
    "search": (Repeated(Gaussian(2.0), 10.0, 1.0), (NO, 4.3151, NO, NO, NO, 4.3151)),
    "search of half a run": (Repeated(Gaussian(2.0), 0.5, 1.0), REFUSED),
    "search without noise": (Repeated(Laplace(0.0), 10.0, 1.0), (NO, math.inf, NO, NO, NO, math.inf)),
    "mixture": (Mixture(1.0, [1.0], [1.0]), (at_least(one), NO, NO, NO, at_least(one), NO)),
    "mixture of negative places": (Mixture(1.0, [0.0, -1.0], [0.5, 0.5]), REFUSED),
    "mixture that is none": (Mixture(1.0, [0.0, 1.0], [0.5, 0.4]), REFUSED),
    "cut to nobody": (Truncated(100, 0.1, 0, 2.0), NOTHING),
    "cut, sampled more than always": (Truncated(100, 1.5, 20, 2.0), REFUSED),
    "cut, one example": (Truncated(1, 0.5, 1, 2.0), (sampled, NO, above(sampled), NO, sampled, NO)),
    "not at all": (times(Gaussian(2.0), 0), NOTHING),
    "less than not at all": (da.ComposedDpEvent([times(Gaussian(2.0), 10), times(Gaussian(2.0), -9)]), REFUSED),
    "half a time": (times(Gaussian(2.0), 0.5), REFUSED),  # pyright: ignore[reportArgumentType]
    "allocation": (
        RandomAllocationDpEvent(2.0, 1),
        (gaussian(2.0), at_least(two), gaussian(1.0), at_least(one), gaussian(2.0), at_least(two)),
    ),
    "allocation to nowhere": (RandomAllocationDpEvent(1.0, 0), REFUSED),
    "own fixed size above the data's": (FixedSizeSampledGaussianDpEvent(10, 100, 2.0, False), REFUSED),
    "bins that are none": (GaussianMixtureOfBinsDpEvent(1.0, ((1.0, 2.0), (2.0, 1.0))), REFUSED),
    "fails more than always": (CoupledDpEvent(Gaussian(2.0), 2.0), REFUSED),
}


@pytest.mark.parametrize("name", TABLE)
def test_guarantee_every_event_has_its_bound_or_none(name):
    event, expected = TABLE[name]
    for (adjacency, accountant), right in zip(itertools.product(ADJACENCIES, ("pld", "rdp")), expected, strict=True):
        found = answer(event, adjacency, accountant)
        if callable(right):
            assert found is not None and right(found), (adjacency, accountant, found)
        else:
            right = pytest.approx(right, rel=2e-3) if isinstance(right, float) else right
            assert found == right, (adjacency, accountant, found)


def hockey_stick_attack(event_steps, batch, size, sigma, epsilon):
    """A lower bound on delta of batches without replacement, one example replaced: of the sums, only their log-likelihood ratio is looked at.

    All others hold -1, the example 1 in one data set and -1 in the other: with probability q sums are 2 higher.
    """
    q, width = batch / size, 2e-3
    y = np.linspace(-12 * sigma, 2 + 12 * sigma, 200_001)
    mass = (1 - q) * np.diff(stats.norm.cdf(y, 0, sigma)) + q * np.diff(stats.norm.cdf(y, 2, sigma))
    index = np.floor(np.log1p(q * np.expm1((4 * y[:-1] - 4) / (2 * sigma**2))) / width).astype(int)
    pmf = np.bincount(index - index.min(), mass)
    length = 1 << math.ceil(math.log2(event_steps * len(pmf)))
    total = np.maximum(np.fft.irfft(np.fft.rfft(pmf, length) ** event_steps, length), 0)
    losses = (np.arange(length) + event_steps * index.min()) * width
    return float(np.sum(total * np.maximum(0.0, -np.expm1(np.minimum(epsilon - losses, 0.0)))))


def test_a2_fixed_sizes_of_dp_accounting_cost_what_they_cost_wherever_they_stand():
    step = WithoutReplacement(1000, 10, Gaussian(1.0))
    lower = 5.0598
    assert hockey_stick_attack(100, 10, 1000, 1.0, lower) >= DELTA * 0.99
    spent = accounting.PrivacyLedger("replace_special").spend(times(step, 100))
    both = spent.spend(Gaussian(5.0))
    own = accounting.epsilon(
        times(FixedSizeSampledGaussianDpEvent(1000, 10, 1.0, False), 100), DELTA, adjacency="replace_special"
    )
    for accountant in ("pld", "rdp", None):
        assert lower < spent.epsilon(DELTA, accountant) < both.epsilon(DELTA, accountant)
    assert spent.epsilon(DELTA) == own
    with pytest.raises(ValueError, match="fixed size"):
        accounting.PrivacyLedger("add_or_remove_one").spend(step).epsilon(DELTA)
    nested = da.ComposedDpEvent([times(da.ComposedDpEvent([step, step]), 50)])
    assert accounting.epsilon(nested, DELTA, adjacency="replace_one") == pytest.approx(own)
    # a filter's cost is the divergence at twice the distance
    budget = accounting.PrivacyFilter(epsilon=8.0, delta=1e-6, adjacency="replace_special", hint=step)
    as_own = budget.cost(FixedSizeSampledGaussianDpEvent(1000, 10, 1.0, False))
    assert budget.cost(step) == as_own > 2 * budget.cost(Poisson(0.01, Gaussian(1.0)))
    with pytest.raises(ValueError):
        accounting.PrivacyFilter(epsilon=8.0, delta=1e-6).cost(step)
    groups = accounting.group_epsilon(step, DELTA, (1, 2), adjacency="replace_special")
    assert groups[1] == accounting.epsilon(step, DELTA, adjacency="replace_special")


def test_guarantee_a_divergence_that_rounding_made_negative_proves_nothing():
    # dp_accounting answers 0 where its sum came out below 1
    from dpx.accounting._renyi import renyi_curve

    event = Poisson(1e-9, Gaussian(100.0))
    curve = renyi_curve(event, "add_or_remove_one")
    assert np.all(curve.divergences > 0)
    assert np.all(curve.divergences[curve.orders >= 2] >= curve.orders[curve.orders >= 2] * 1e-18 / 2e4)


def cut_poisson(size, q, most, sigma, steps, epsilon, present, width=1e-3):
    """A lower bound on delta of cut batches: `size` other examples of -1 each, and one of 1 that is there in the data set that `present` tells.

    The output is the sum plus normal noise, whose distribution is an explicit mixture, over how many are sampled and whether the example is kept.
    """
    others = np.arange(size + 1)
    weights = stats.binom.pmf(others, size, q)
    alone = [(w, -min(n, most)) for n, w in zip(others, weights, strict=True)]
    joined = [((1 - q) * w, -min(n, most)) for n, w in zip(others, weights, strict=True)]
    for n, w in zip(others, weights, strict=True):
        kept = min(1.0, most / (n + 1))
        joined += [(q * w * kept, 1 - min(n, most - 1)), (q * w * (1 - kept), -min(n, most))]
    y = np.linspace(-size - 10 * sigma, 2 + 10 * sigma, 20_001)
    cells = lambda mixture: np.sum(
        [w * np.diff(stats.norm.cdf(y, place, sigma)) for w, place in mixture if w > 0], axis=0
    )
    with_it, without = cells(joined), cells(alone)
    p, other = (with_it, without) if present else (without, with_it)
    keep = (p > 0) & (other > 0)
    index = np.floor(np.log(p[keep] / other[keep]) / width).astype(int)
    pmf = np.bincount(index - index.min(), p[keep])
    length = 1 << math.ceil(math.log2(steps * len(pmf)))
    total = np.maximum(np.fft.irfft(np.fft.rfft(pmf, length) ** steps, length), 0)
    losses = (np.arange(length) + steps * index.min()) * width
    return float(np.sum(total * np.maximum(0.0, -np.expm1(np.minimum(epsilon - losses, 0.0)))))


@pytest.mark.parametrize(
    ("size", "batch", "most", "sigma", "steps"),
    [(10, 10, 10, 2.0, 10), (12, 6, 8, 2.0, 8), (11, 11, 10, 3.0, 6), (9, 6, 9, 1.5, 4), (6, 2, 3, 1.0, 3)],
)
def test_a3_guarantee_cut_batches_bound_who_is_added_and_who_is_removed(size, batch, most, sigma, steps):
    q = batch / size
    sampler = dpx.PoissonSampler(size, batch, steps, most) if batch <= most else None
    if sampler is None:
        event = times(Truncated(size + 1, q, most, sigma), steps)
    else:
        plan = dpx.PrivacyPlan(sampler, dpx.FlatClipping(1.0), dpx.IndependentGaussian(sigma))
        event = plan.event
    for epsilon in (0.5, 3.0, 8.0):
        bound = accounting.delta(event, epsilon)
        for others in (size - 1, size):  # who is removed has so many others; who is added, one more
            for present in (True, False):
                # the grid of the attack errs by a few thousandths
                assert cut_poisson(others, q, most, sigma, steps, epsilon, present) <= bound * (1 + 1e-6) + 1e-12


def test_a3_who_is_added_may_be_the_first_who_does_not_fit():
    plan = lambda most: dpx.dp_sgd(10, 10, 10, max_batch_size=most, noise_multiplier=2.0)
    assert 16.649 <= plan(10).epsilon(1e-5) <= 16.66
    assert dpx.dp_sgd(100, 100, 50, max_batch_size=100, noise_multiplier=5.0).epsilon(1e-6) == pytest.approx(
        16.6753, abs=2e-3
    )
    # nobody is ever cut
    assert plan(11).event == dpx.dp_sgd(10, 10, 10, noise_multiplier=2.0).event
    event = plan(10).event
    assert isinstance(event, times) and isinstance(event.event, Truncated) and event.event.dataset_size == 11
