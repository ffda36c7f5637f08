"""Samplers at scale: rows of many users, batches that depend on those before, and resuming without a replay."""

import itertools
import os
import stat

import numpy as np
import pytest
from scipy import stats

import dpx
from dpx.sampling import MinSepSampler, UserSampler, _renewal, _user_index, resume, resume_state

# --- Rows of users ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "number"), [(5, 1), (5, 2), (5, 3), (5, 4), (6, 3), (7, 5)])
def test_every_subset_is_as_likely_as_another(size, number):
    """Chi-squared over all subsets; false alarm 1e-7."""
    drawn = _user_index.random_subsets(np.full(40_000, size), number, np.random.default_rng(size * number))
    subsets = {subset: i for i, subset in enumerate(itertools.combinations(range(size), number))}
    counts = np.bincount([subsets[tuple(row)] for row in drawn.tolist()], minlength=len(subsets))
    assert stats.chisquare(counts).pvalue > 1e-7


def test_subsets_of_many_sizes_at_once():
    rng = np.random.default_rng(0)
    sizes = np.concatenate([[9, 10, 17, 2**40], rng.integers(9, 100, 500)])
    drawn = _user_index.random_subsets(sizes, 8, rng)
    assert (drawn >= 0).all() and (drawn < sizes[:, None]).all() and (np.diff(drawn) > 0).all()
    # neighbours in the array do not depend on each other: means of 500 users, in standard deviations
    shares = (drawn[4:].mean(axis=1) + 0.5) / sizes[4:]
    assert abs(shares.mean() - 0.5) * np.sqrt(500) < 5.5 * shares.std()
    assert _user_index.random_subsets(np.zeros(0, np.int64), 3, rng).shape == (0, 3)


def test_rows_of_ten_thousand_users_are_drawn_at_once():
    """No loop over users: a few calls of the generator, however many users there are."""
    calls = []

    class Counting(np.random.Generator):
        def integers(self, *arguments, **options):
            calls.append(1)
            return super().integers(*arguments, **options)

    _user_index.random_subsets(np.full(10_000, 1_000), 16, Counting(np.random.Philox(0)))
    assert 0 < len(calls) < 20


IDS = np.random.default_rng(0).permutation(np.repeat(np.arange(30), np.arange(1, 31)))
BASE = dpx.PoissonSampler(30, 10, 50)


def test_an_index_in_a_file_is_the_one_in_memory(tmp_path, monkeypatch):
    plain = UserSampler(BASE, IDS, 4)
    monkeypatch.setattr(_user_index, "_CHUNK", 7)
    np.save(tmp_path / "ids.npy", IDS.astype(np.int32))
    ids = np.load(tmp_path / "ids.npy", mmap_mode="r")
    kept = UserSampler(BASE, ids, 4, index=tmp_path / "index")
    assert isinstance(kept._index.rows, np.memmap) and np.shares_memory(kept.user_ids, ids)
    written = os.stat(tmp_path / "index" / "rows.npy")
    assert stat.S_IMODE(written.st_mode) == 0o600  # who owns what
    again = UserSampler(BASE, ids, 4, index=str(tmp_path / "index"))
    assert os.stat(tmp_path / "index" / "rows.npy").st_mtime_ns == written.st_mtime_ns
    for step in range(5):
        rows = plain.indices(3, step)
        assert (kept.indices(3, step) == rows).all() and (again.indices(3, step) == rows).all()
        assert rows.dtype == np.int64
    np.testing.assert_array_equal(plain._index.rows, kept._index.rows)


def test_an_index_of_others_or_a_changed_one_is_refused(tmp_path):
    UserSampler(BASE, IDS, 4, index=tmp_path)
    with pytest.raises(ValueError, match=r"UserSampler\(index=.*other `user_ids`"):
        UserSampler(BASE, IDS[::-1], 4, index=tmp_path)
    rows = np.load(tmp_path / "rows.npy")
    for changed in (rows[::-1], rows + 10**9, np.zeros_like(rows)):
        np.save(tmp_path / "rows.npy", changed)
        with pytest.raises(ValueError, match="rows that are not theirs"):
            UserSampler(BASE, IDS, 4, index=tmp_path).indices(0, 0)
    np.save(tmp_path / "rows.npy", rows[:-1])
    with pytest.raises(ValueError, match="no index"):
        UserSampler(BASE, IDS, 4, index=tmp_path)


def test_an_index_that_was_half_written_is_written_again(tmp_path):
    (tmp_path / "rows.npy").write_bytes(b"half")
    sampler = UserSampler(BASE, IDS, 4, index=tmp_path)
    assert (sampler.indices(0, 0) == UserSampler(BASE, IDS, 4).indices(0, 0)).all()


def test_rows_that_are_sorted_by_user_need_no_index():
    ids = np.sort(IDS)
    sampler = UserSampler(BASE, ids, 4)
    assert sampler._index.rows is None
    for step in range(5):
        rows, users = sampler.indices(1, step), BASE.indices(1, step)
        assert ((ids[rows] == users[:, None]) | (rows < 0)).all()
        assert ((rows >= 0).sum(axis=1) == np.minimum(users + 1, 4)).all()


# --- Batches that depend on those before --------------------------------------------------------------------------------


@pytest.fixture
def forgotten():
    """Makes this process forget what was drawn, as a new one."""
    _renewal._memory.cache_clear()
    yield _renewal._memory.cache_clear
    _renewal._memory.cache_clear()


@pytest.mark.parametrize("start", ["warm", "cold"])
@pytest.mark.parametrize("separation", [1, 2, 4])
def test_a_table_of_bits_gives_the_batches_of_looking_up(separation, start, monkeypatch, forgotten):
    sampler = MinSepSampler(700, 40, 60, separation, start)
    batches = {}
    for bytes_of_one in (0, 1e9):
        monkeypatch.setattr(_renewal, "_BYTES_PER_RESTING", bytes_of_one)
        forgotten()
        batches[bytes_of_one] = [sampler.indices(5, step) for step in range(60)]
        memory = _renewal._memory(sampler._renewal(5))
        assert (memory.bits is not None) == (bytes_of_one > 0 and separation > 1)
    for a, b in zip(*batches.values(), strict=True):
        np.testing.assert_array_equal(a, b)
    for step in range(60):  # nobody is back too early, and a batch is sorted
        before = np.concatenate([np.zeros(0, int), *batches[0][max(0, step - separation + 1) : step]])
        assert not np.isin(batches[0][step], before).any() and (np.diff(batches[0][step]) > 0).all()


SAMPLERS = {
    "min-sep": MinSepSampler(700, 40, 60, 4),
    "cold": MinSepSampler(700, 40, 60, 4, "cold"),
    "cut": MinSepSampler(700, 40, 60, 4, max_batch_size=45),
    "of users": UserSampler(MinSepSampler(30, 3, 60, 4), IDS, 2),
    "no separation": MinSepSampler(700, 40, 60, 1),
    "Poisson": dpx.PoissonSampler(700, 40, 60),
}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("step", [0, 2, 37, 60])
def test_a_resumed_sampler_replays_nothing_and_gives_the_same_batches(name, step, monkeypatch, forgotten):
    sampler = SAMPLERS[name]
    whole = [sampler.indices(9, t) for t in range(60)]
    forgotten()
    state = resume_state(sampler, 9, step)
    assert all(isinstance(x, np.ndarray) for x in state.values()) and bool(state) == (name != "Poisson")
    forgotten()
    advanced = []
    monkeypatch.setattr(
        _renewal._Memory,
        "_advanced",
        lambda self, recent, go=_renewal._Memory._advanced: advanced.append(1) or go(self, recent),
    )
    resume(sampler, 9, step, state)
    for t in range(step, 60):
        np.testing.assert_array_equal(sampler.indices(9, t), whole[t])
    assert len(advanced) == (60 - step if state else 0)
    np.testing.assert_array_equal(sampler.indices(9, 1), whole[1])  # whatever was handed over, a pure function


def test_a_checkpoint_behind_a_feed_that_works_ahead_costs_no_replay(monkeypatch, forgotten):
    sampler = SAMPLERS["min-sep"]
    [sampler.indices(9, t) for t in range(41)]
    monkeypatch.setattr(_renewal._Memory, "_advanced", None)
    states = [resume_state(sampler, 9, t) for t in (41, 40, 35, 33)]
    assert [len(s["sizes"]) for s in states] == [3] * 4


def test_what_is_handed_over_is_of_this_run_and_step_and_unchanged(forgotten):
    sampler = SAMPLERS["min-sep"]
    state = resume_state(sampler, 9, 20)
    changed = state["batches"].copy()
    changed[3] += 1
    other = MinSepSampler(700, 40, 60, 3)
    for who, seed, step, wrong in [
        (sampler, 10, 20, state),
        (sampler, 9, 21, state),
        (other, 9, 20, state),
        (sampler, 9, 20, state | {"batches": changed}),
        (sampler, 9, 20, state | {"sizes": state["sizes"][::-1]}),
        (sampler, 9, 20, state | {"seal": np.zeros(32, np.uint8)}),
    ]:
        with pytest.raises(ValueError, match="another run than this, of another step"):
            resume(who, seed, step, wrong)
    for wrong in ({}, {"batches": state["batches"]}, {"batches": "x", "sizes": 1, "seal": 2}):
        with pytest.raises(ValueError, match="must be what `resume_state` gave|another run"):
            resume(sampler, 9, 20, wrong)
    for call in (lambda: resume(sampler, 9, 61, state), lambda: resume_state(sampler, 9, -1)):
        with pytest.raises(ValueError, match="between 0 and 60"):
            call()
    with pytest.raises(ValueError, match="of another sampler: a PoissonSampler needs nothing"):
        resume(SAMPLERS["Poisson"], 9, 20, state)
    seed = 9
    assert str(seed).encode() not in state["seal"].tobytes()


def test_an_interruption_leaves_batches_as_they_are(monkeypatch, forgotten):
    sampler = MinSepSampler(700, 40, 60, 4)
    monkeypatch.setattr(_renewal, "_BYTES_PER_RESTING", 1e9)
    whole = [sampler.indices(2, t) for t in range(20)]
    forgotten()
    clear, left = _renewal._clear, [12]

    def interrupted(bits, numbers):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        clear(bits, numbers)

    monkeypatch.setattr(_renewal, "_clear", interrupted)
    got = []
    while len(got) < 20:
        try:
            got.append(sampler.indices(2, len(got)))
        except KeyboardInterrupt:
            assert len(got) > 5
    assert left[0] < 0
    for a, b in zip(got, whole, strict=True):
        np.testing.assert_array_equal(a, b)


def test_waits_between_heads_are_those_of_independent_coins():
    """Every pair of coins, over 20,000 throws; false alarm 1e-7 a test."""
    for rate in (0.05, 0.4, 0.9):
        rng = np.random.default_rng(1)
        table = np.zeros((20_000, 6), bool)
        for row in table:
            row[_renewal._heads(6, rate, rng)] = True
        for i in range(6):
            assert stats.binomtest(int(table[:, i].sum()), 20_000, rate).pvalue > 1e-7
            for j in range(i):
                assert stats.binomtest(int((table[:, i] & table[:, j]).sum()), 20_000, rate**2).pvalue > 1e-7
