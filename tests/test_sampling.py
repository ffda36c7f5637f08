"""Samplers: pure functions of (seed, step) with the stated distribution, at a cost proportional to the batch."""

import time
import tracemalloc
from typing import ClassVar

import numpy as np
import pytest
from scipy import stats

import dpx
import registry
from dpx import sampling
from dpx.data import gather_batches
from dpx.sampling._permutation import permuted
from dpx.testing._sampler import units_of

SAMPLERS = registry.by_name(registry.SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_resumed_batches_are_those_of_a_run_that_never_stopped(name):
    sampler = SAMPLERS[name]
    rows = np.arange(sampler.num_rows)
    whole = list(gather_batches(sampler, (rows, 1 + rows[:, None]), seed=23))
    for other in range(8):
        sampler.indices(other, 5)  # whatever the process remembered of that run is gone
    for start in (399, 123, 397):
        rest = list(gather_batches(sampler, (rows, 1 + rows[:, None]), seed=23, start=start))[:4]
        for ((x, y), mask), ((x2, y2), mask2) in zip(whole[start : start + 4], rest, strict=True):
            np.testing.assert_array_equal(x, x2)
            np.testing.assert_array_equal(mask, mask2)
            np.testing.assert_array_equal(y, y2)
            assert y.shape == (*mask.shape, 1) and x.shape == mask.shape and not y[~mask].any()
            np.testing.assert_array_equal(y[mask][:, 0], 1 + x[mask])


@pytest.mark.parametrize("name", SAMPLERS)
def test_nobody_is_left_out(name):
    sampler = SAMPLERS[name]
    taken = [np.unique(units_of(sampler, sampler.indices(0, step))) for step in range(sampler.steps)]
    assert len(np.unique(np.concatenate(taken))) == sampler.num_examples


def test_cyclic_groups_are_independent_draws_and_their_coins_fair():
    sampler = SAMPLERS["cyclic"]
    members = np.zeros((60, 50), int)
    sizes = []
    for seed in range(60):
        for step in range(75):  # whoever was never taken would look like one of group 0: once in 1e7 runs
            rows = sampler.indices(seed, step)
            members[seed, rows] = step % 5
            sizes.append(len(rows))
    # 3,000 draws of a group, uniform and, between neighbours, independent: chi-square, false alarm 1e-7
    assert stats.chisquare(np.bincount(members.ravel(), minlength=5)).pvalue > 1e-7
    pairs = np.bincount((members[:, :-1] * 5 + members[:, 1:]).ravel(), minlength=25)
    assert stats.chisquare(pairs).pvalue > 1e-7
    # mean 8 with a standard deviation below 2 within, and 10 / 5 between groups of one seed
    assert abs(np.mean(sizes) - 8) < 6 * (2 / np.sqrt(4_500) + 3 / np.sqrt(300))
    equal = SAMPLERS["cyclic-equal"]
    groups = [set() for _ in range(5)]
    for step in range(75):
        groups[step % 5] |= set(equal.indices(0, step).tolist())
    assert [len(g) for g in groups] == [10] * 5


def test_shuffling_passes_over_the_data():
    fixed, fresh = SAMPLERS["shuffle"], SAMPLERS["reshuffle"]
    counts = np.bincount(np.concatenate([fixed.indices(0, t) for t in range(25)]), minlength=50)
    assert set(counts) == {4}  # 25 batches of 8 are four passes over 50
    first, second = ([fresh.indices(0, 6 * epoch + t) for t in range(6)] for epoch in (0, 1))
    for epoch in (first, second):
        assert len(np.unique(np.concatenate(epoch))) == 48
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("size", [7, 1000, 2**20 + 77])
def test_permutations_are_bijections(size):
    out = permuted(np.arange(size), size, seed=5)
    np.testing.assert_array_equal(np.sort(out), np.arange(size))
    np.testing.assert_array_equal(permuted(np.arange(3), size, seed=5), out[:3])
    first = np.arange(min(size, 1000))
    assert not np.array_equal(permuted(first, size, seed=6), out[first])
    assert abs(np.corrcoef(np.arange(size), out)[0, 1]) < 6 / np.sqrt(size)


BILLION = {
    "cyclic": dpx.CyclicPoissonSampler(10**9, 1000, 100, 16),
    "shuffle": dpx.ShuffleSampler(10**9, 1000, 100),
    "balls-in-bins": sampling.BallsInBinsSampler(10**9, 1000, 100),
    "random-allocation": sampling.RandomAllocationSampler(10**9, 1000, 10**6),
    "fixed-size": sampling.FixedSizeSampler(10**9, 1000, 100),
    "min-sep": sampling.MinSepSampler(10**9, 1000, 100, 16),
}


@pytest.mark.parametrize("name", BILLION)
def test_a_batch_of_a_billion_examples_costs_time_and_memory_of_the_batch(name):
    sampler = BILLION[name]
    sampler.indices(0, 0)
    tracemalloc.start()
    rows = sampler.indices(0, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seconds = []
    for step in range(2, 7):
        begin = time.perf_counter()
        sampler.indices(0, step)
        seconds.append(time.perf_counter() - begin)
    assert len(np.unique(rows)) == len(rows) and rows.max() < 10**9 and rows.min() >= 0
    assert len(rows) <= sampler.physical_batch_size
    assert peak < 2e6 and min(seconds) < 0.05  # measured: 0.2 to 2.1 ms; the margin is for busy machines


def test_bad_cyclic_and_shuffle_samplers():
    with pytest.raises(ValueError, match=r"at most `num_examples / batch_size` = 10"):
        dpx.CyclicPoissonSampler(100, 10, 50, 11)
    with pytest.raises(ValueError, match="partition"):
        dpx.CyclicPoissonSampler(100, 10, 50, 5, partition="random")
    with pytest.raises(ValueError, match="got 200 of 100"):
        dpx.ShuffleSampler(100, 200, 50)


@pytest.mark.parametrize("name", ["poisson", "poisson-truncated"])
def test_inclusion_frequencies_are_the_sampling_probability(name):
    sampler = SAMPLERS[name]
    rows = np.zeros((400, 50), bool)
    for step in range(400):
        rows[step, sampler.indices(3, step)] = True
    q = 0.2
    if sampler.max_batch_size:
        sizes = np.arange(51)
        q = np.sum(stats.binom.pmf(sizes, 50, 0.2) * np.minimum(sizes, 14)) / 50
    # 50 counts, each beyond these quantiles once in 1e8
    counts = rows.sum(0)
    assert stats.binom.ppf(5e-9, 400, q) <= counts.min() and counts.max() <= stats.binom.isf(5e-9, 400, q)
    total = rows.sum()
    assert abs(total - 20_000 * q) < 6 * np.sqrt(20_000 * q * (1 - q))


def test_poisson_sizes_are_binomial_and_coins_independent():
    sampler = dpx.PoissonSampler(30, 9, 3000)
    rows = np.zeros((3000, 30), bool)
    for step in range(3000):
        rows[step, sampler.indices(5, step)] = True
    sizes = np.bincount(rows.sum(1), minlength=31)
    expected = 3000 * stats.binom.pmf(np.arange(31), 30, 0.3)
    keep = expected > 5
    observed = np.append(sizes[keep], sizes[~keep].sum())
    assert stats.chisquare(observed, np.append(expected[keep], expected[~keep].sum())).pvalue > 1e-7
    # coins of different examples, and of the same example in consecutive steps: 6 standard deviations, passed once in 1e9 a pair
    correlation = np.corrcoef(rows.T) - np.eye(30)
    assert np.abs(correlation).max() < 7 / np.sqrt(3000)
    assert np.abs(np.corrcoef(rows[1:].ravel(), rows[:-1].ravel())[0, 1]) < 6 / np.sqrt(rows.size)


def test_truncation_keeps_a_uniform_subset():
    sampler = dpx.PoissonSampler(20, 10, 2000, max_batch_size=10)
    sizes = np.array([len(sampler.indices(1, step)) for step in range(2000)])
    assert sizes.max() == 10
    share = stats.binom.sf(9, 20, 0.5)
    assert abs((sizes == 10).mean() - share) < 6 * np.sqrt(share * (1 - share) / 2000)


def test_a_batch_from_a_billion_examples_costs_milliseconds_and_little_memory():
    sampler = dpx.PoissonSampler(10**9, 1000, 100)
    sampler.indices(0, 0)
    tracemalloc.start()
    begin = time.perf_counter()
    for step in range(10):
        sampler.indices(0, step)
    seconds = (time.perf_counter() - begin) / 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6 and seconds < 0.1  # measured: 0.3 ms; the margin is for busy machines


def test_physical_size_covers_the_tail():
    for n, b in ((60_000, 256), (100, 10), (10**9, 1000), (50, 49)):
        size = dpx.PoissonSampler(n, b, 1).physical_batch_size
        assert stats.binom.sf(size, n, b / n) <= 1e-9
        assert size <= n and size < 3 * b + 100


def test_batches_are_padded_resumable_and_complete():
    sampler = SAMPLERS["poisson"]
    data = (np.arange(50), {"y": np.arange(50.0)[:, None]})
    whole = list(gather_batches(sampler, data, seed=4))
    rest = list(gather_batches(sampler, data, seed=4, start=390))
    assert len(whole) == 400 and len(rest) == 10
    for (a, mask_a), (b, mask_b) in zip(whole[390:], rest, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(mask_a, mask_b)
    assert len({mask.shape for _, mask in whole}) == 1
    for step in (0, 17):
        (x, y), mask = whole[step]
        np.testing.assert_array_equal(x[mask], sampler.indices(4, step))
        np.testing.assert_array_equal(y["y"][mask, 0], x[mask])
        assert not x[~mask].any()
    assert list(gather_batches(sampler, data, seed=4, start=400)) == []


def test_padding_grows_rather_than_drop_an_example():
    class Physical(dpx.AbstractSampler):
        num_examples: int = 50
        batch_size: int = 1
        steps: int = 2
        unit: ClassVar[str] = "example"

        @property
        def num_rows(self):
            return 50

        @property
        def participation(self):
            return dpx.Participation(1, None)

        @property
        def participation_per_event(self):
            return dpx.Participation(1, None)

        @property
        def adjacencies(self):
            return ()

        @property
        def physical_batch_size(self):
            return 8

        @property
        def assumption(self):
            return ""

        def indices(self, seed, step):
            return np.arange(5 + 20 * step)

        def event(self, mechanism, bands, steps, strategy=None):
            raise AssertionError

    sizes = [(mask.sum(), mask.shape[0]) for _, mask in gather_batches(Physical(), (np.arange(50),), seed=0)]
    assert sizes == [(5, 8), (25, 32)]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((100, 512, 10), "must be at most `num_examples`; got 512 of 100"),
        ((100, 10, 0), r"steps=\.\.\.\)` must be at least 1"),
        ((100, 0, 10), "batch_size"),
        ((0, 1, 10), "num_examples"),
        ((100, 2.5, 10), "must be an integer"),
        ((100, 50, 10, 20), "max_batch_size"),
    ],
)
def test_bad_samplers(arguments, match):
    with pytest.raises(ValueError, match=match):
        dpx.PoissonSampler(*arguments)


def test_steps_and_seeds_out_of_range():
    sampler = SAMPLERS["poisson"]
    for step in (-1, 400):
        with pytest.raises(ValueError, match="400 steps"):
            sampler.indices(0, step)
    for seed in (-1, 2**128):
        with pytest.raises(ValueError, match="seed"):
            sampler.indices(seed, 0)


def test_data_of_another_length_is_refused():
    sampler = SAMPLERS["poisson"]
    with pytest.raises(ValueError, match=r"`data\[0\]` must have `num_examples` = 50 rows"):
        gather_batches(sampler, (np.zeros(49),), seed=0)
    with pytest.raises(ValueError, match="must be a tuple"):
        gather_batches(sampler, np.zeros(50), seed=0)
    with pytest.raises(ValueError, match="400 steps"):
        gather_batches(sampler, (np.zeros(50),), seed=0, start=401)


def test_batches_are_cut_under_either_name():
    cut = dpx.PoissonSampler(1000, 10, 5, max_batch_size=20)
    assert dpx.PoissonSampler(1000, 10, 5, truncated_batch_size=20) == cut
    assert dpx.dp_sgd(1000, 10, 5, noise_multiplier=1.0, truncated_batch_size=20).sampler == cut
    separated = dpx.MinSepSampler(1000, 10, 5, 4, truncated_batch_size=40)
    assert separated == dpx.MinSepSampler(1000, 10, 5, 4, max_batch_size=40)
    for make in (dpx.PoissonSampler, lambda *sizes, **cut: dpx.dp_sgd(*sizes, noise_multiplier=1.0, **cut)):
        with pytest.raises(ValueError, match="Give one of them"):
            make(1000, 10, 5, max_batch_size=20, truncated_batch_size=20)
        with pytest.raises(ValueError, match=r"truncated_batch_size=\.\.\.\)` must be at least"):
            make(1000, 10, 5, truncated_batch_size=5)


def test_neighbours_are_named_by_members_of_dp_accounting():
    import dp_accounting as da

    for member in da.NeighboringRelation:
        plan = dpx.PrivacyPlan(
            dpx.PoissonSampler(100, 10, 5), dpx.FlatClipping(1.0), dpx.IndependentGaussian(1.0), adjacency=member
        )
        assert plan.adjacency == member.name.lower()
        assert dpx.accounting.PrivacyLedger(member).spend(plan).adjacency == plan.adjacency


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert dpx.__version__ == version("dpx")
