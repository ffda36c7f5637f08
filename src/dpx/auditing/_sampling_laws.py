"""Whether a sampler draws what its plan accounts for: exact laws of who is in which batch, without data."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ..sampling import (
    AbstractSampler,
    BallsInBinsSampler,
    CyclicPoissonSampler,
    FixedSizeSampler,
    MinSepSampler,
    PoissonSampler,
    RandomAllocationSampler,
    UserSampler,
)
from . import _statistics as statistics
from ._statistics import binomial_p_value, of_binomial, of_hypergeometric, uniform_p_value

_DRAWN = 2_000_000  # examples drawn in all, about
_TRACKED = 200_000  # examples whose participations are counted one by one
_TRIALS = 50_000  # batches drawn, at most


class Found(NamedTuple):
    """What a test found, before it is decided what that means.

    **Arguments:**

    - `code`, `law`, `found`, `where`: as in `AuditedLaw`.
    - `p_value`: None where `holds` is exact.
    - `holds`: whether the law holds; None where the p-value decides.
    - `power`: from the level that it is tested at, what would be seen.
    """

    code: str
    law: str
    found: str
    where: str = ""
    p_value: float | None = None
    holds: bool | None = None
    power: Callable[[float], str] | None = None


class Batches(NamedTuple):
    """Batches of several seeds: `sets[i]` are the units in batch `steps[i]` of seed `seeds[i]`, consecutive within a seed."""

    sets: list[np.ndarray]
    seeds: np.ndarray
    steps: np.ndarray


def sampling_laws(sampler: AbstractSampler, batches: int, seed: int) -> Iterator[Found]:
    """What is found about a sampler, from about so many of its batches.

    Its own class says which laws its batches obey; one that is none of dpx's must keep the participation that it states.
    """
    base = sampler.base if isinstance(sampler, UserSampler) else sampler
    rng = np.random.default_rng([seed, 0x5A])
    drawn = _draw(sampler, base, batches, seed)
    yield _pure(sampler, seed)
    yield from _participation(sampler, seed)
    sizes = np.array([len(s) for s in drawn.sets])
    if isinstance(base, PoissonSampler):
        yield from _poisson(base, drawn, sizes, rng)
    elif isinstance(base, FixedSizeSampler):
        yield from _fixed(base, drawn, sizes, rng)
    elif isinstance(base, CyclicPoissonSampler):
        yield from _cyclic(base, drawn, sizes, rng)
    elif isinstance(base, BallsInBinsSampler | RandomAllocationSampler):
        yield from _allocated(base, drawn, sizes, rng)
    elif isinstance(base, MinSepSampler):
        yield from _rested(base, sampler, seed)


def _draw(sampler: AbstractSampler, base: AbstractSampler, batches: int, seed: int) -> Batches:
    wanted = int(min(_TRIALS, max(batches, min(4 * batches, _DRAWN // max(1, base.batch_size)))))
    # consecutive batches of a seed, and several seeds: a run may be shorter, and what is drawn once a run must be seen more than once
    run = min(base.steps, max(2, math.isqrt(wanted)))
    if isinstance(base, PoissonSampler | FixedSizeSampler):
        run = min(base.steps, wanted)
    elif isinstance(base, CyclicPoissonSampler):
        run = min(base.steps, 3 * base.cycle_length)
    elif isinstance(base, BallsInBinsSampler):
        run = min(base.steps, 2 * base.bins)
    elif isinstance(base, RandomAllocationSampler):
        run = min(base.steps, 2 * base.block)
    seeds, steps, sets = [], [], []
    for number in range(max(1, math.ceil(wanted / run))):
        for step in range(run):
            sets.append(units_of(sampler, sampler.indices(seed + number, step)))
            seeds.append(number)
            steps.append(step)
    return Batches(sets, np.array(seeds), np.array(steps))


def units_of(sampler: AbstractSampler, rows: np.ndarray) -> np.ndarray:
    """Who is in a batch: examples, or those that its rows belong to."""
    if rows.ndim == 1:
        return rows
    owners: Any = getattr(sampler, "user_ids", None)
    return np.asarray(owners)[rows[:, 0]] if owners is not None else np.arange(len(rows))


def _pure(sampler: AbstractSampler, seed: int) -> Found:
    step = min(1, sampler.steps - 1)
    first = sampler.indices(seed, step)
    sampler.indices(seed + 1, step)
    same = np.array_equal(first, sampler.indices(seed, step))
    law = "batch t is a pure function of (seed, t), so that a run can be resumed and is drawn once"
    return Found("S0", law, "the same batch twice" if same else "another batch when it is asked for again", holds=same)


def _participation(sampler: AbstractSampler, seed: int) -> Iterator[Found]:
    separation, most = sampler.participation
    steps = min(sampler.steps, max(600, 2 * separation)) if separation > 1 or most != sampler.steps else 0
    if not steps:
        return
    last: dict[int, int] = {}
    times: dict[int, int] = {}
    nearest = math.inf
    for step in range(steps):
        for unit in np.unique(units_of(sampler, sampler.indices(seed, step))).tolist():
            nearest = min(nearest, step - last.get(unit, -(10**9)))
            last[unit], times[unit] = step, times.get(unit, 0) + 1
        if sum(times.values()) > _DRAWN:
            break
    often = max(times.values(), default=0)
    holds = nearest >= separation and (most is None or often <= most)
    limit = "" if most is None else f" and at most {most} of them"
    law = f"there are at least {separation} steps between two participations{limit}"
    yield Found(
        "S5", law, f"{nearest if nearest < 10**8 else 'no'} steps at least, {often} participations at most", holds=holds
    )


def _poisson(sampler: PoissonSampler, drawn: Batches, sizes: np.ndarray, rng: Any) -> Iterator[Found]:
    n, q, number = sampler.num_examples, sampler.sampling_probability, len(sizes)
    cut = sampler.max_batch_size
    if cut is None or cut >= n:
        total = int(sizes.sum())
        yield Found(
            "S1",
            f"every example is in every batch with probability {q:.6g}",
            f"{total} of {number * n} coins, a rate of {total / (number * n):.6g}",
            p_value=binomial_p_value(total, number * n, min(q, 1.0)),
            power=lambda a: f"a rate {100 * statistics.least_rate_seen(number * n, q, a):.2g} % off",
        )
        uniform = of_binomial(sizes, n, q, rng)
    else:
        from scipy import stats

        below = stats.binom.cdf(sizes - 1, n, q)
        mass = np.where(sizes >= cut, stats.binom.sf(cut - 1, n, q), stats.binom.pmf(sizes, n, q))
        uniform = np.where(sizes > cut, 0.0, statistics.transformed(sizes, below, mass, rng))
    law = "the sizes of batches are those of independent coins" + ("" if cut is None else ", cut where they are full")
    yield Found("S2", law, _sizes(sizes), p_value=uniform_p_value(uniform))
    if cut is None or cut >= n:
        tracked = min(n, _TRACKED)
        # of every seed on its own: an example's coins of one run
        counts = np.zeros(tracked, np.int64)
        for units in drawn.sets:
            counts += np.bincount(units[units < tracked], minlength=tracked)
        yield Found(
            "S3",
            f"how often an example takes part in {number} batches is binomial",
            f"between {counts.min()} and {counts.max()} times",
            p_value=uniform_p_value(of_binomial(counts, number, q, rng)),
        )
    yield from _subsets(n, drawn, sizes, rng)


def _fixed(sampler: FixedSizeSampler, drawn: Batches, sizes: np.ndarray, rng: Any) -> Iterator[Found]:
    holds = bool(np.all(sizes == sampler.batch_size))
    yield Found("S2", f"every batch has exactly {sampler.batch_size} examples", _sizes(sizes), holds=holds)
    if not sampler.replace:
        yield from _subsets(sampler.num_examples, drawn, sizes, rng)
        return
    half = rng.permutation(sampler.num_examples) < sampler.num_examples // 2
    counts = np.array([int(half[s].sum()) for s in drawn.sets])
    p = uniform_p_value(of_binomial(counts, sizes, half.mean(), rng))
    yield Found("S3", "each place of a batch is drawn uniformly", f"{counts.mean():.5g} from a random half", p_value=p)


def _subsets(population: int, drawn: Batches, sizes: np.ndarray, rng: Any) -> Iterator[Found]:
    """Of what size a batch is, it is a uniformly random set, whatever the batch before was."""
    half = np.zeros(population, bool)
    half[rng.permutation(population)[: population // 2]] = True
    inside = np.array([int(half[s].sum()) for s in drawn.sets])
    p = uniform_p_value(of_hypergeometric(inside, population, int(half.sum()), sizes, rng))
    yield Found(
        "S6", "given its size, a batch is a uniformly random set", f"{inside.mean():.5g} from a random half", p_value=p
    )
    follows = np.flatnonzero((np.diff(drawn.seeds) == 0) & (np.diff(drawn.steps) == 1))
    if not len(follows):
        return
    shared = np.array([len(np.intersect1d(drawn.sets[i], drawn.sets[i + 1], assume_unique=True)) for i in follows])
    p = uniform_p_value(of_hypergeometric(shared, population, sizes[follows], sizes[follows + 1], rng))
    found = f"{shared.mean():.5g} examples in two batches that follow each other, on average"
    yield Found("S4", "a batch knows nothing of the one before", found, p_value=p)


def _cyclic(sampler: CyclicPoissonSampler, drawn: Batches, sizes: np.ndarray, rng: Any) -> Iterator[Found]:
    n, cycle, p = sampler.num_examples, sampler.cycle_length, sampler.sampling_probability
    cycles = int(drawn.steps.max() + 1) // cycle
    runs = int(drawn.seeds.max()) + 1
    p = min(p, 1.0)
    if cycles:
        whole = drawn.steps < cycles * cycle
        total = int(sizes[whole].sum())
        trials = n * cycles * runs
        yield Found(
            "S1",
            f"an example is in a batch of its group with probability {p:.6g}",
            f"a rate of {total / trials:.6g}",
            p_value=binomial_p_value(total, trials, p),
            power=lambda a: f"a rate {100 * statistics.least_rate_seen(trials, p, a):.2g} % off",
        )
        tracked = min(n, _TRACKED)
        counts = np.zeros(tracked, np.int64)
        for units, use in zip(drawn.sets, whole, strict=True):
            if use:
                counts += np.bincount(units[units < tracked], minlength=tracked)
        uniform = of_binomial(counts, cycles * runs, p, rng)
        found = f"between {counts.min()} and {counts.max()} times"
        law = f"how often an example takes part in {cycles * runs} cycles is binomial"
        yield Found("S3", law, found, p_value=uniform_p_value(uniform))
    first = sizes[drawn.steps == 0]  # one a seed, so independent
    equal = sampler.partition == "equal"
    uniform = of_binomial(first, n // cycle if equal else n, p if equal else p / cycle, rng)
    yield Found(
        "S2", "the sizes of batches are those of independent coins", _sizes(first), p_value=uniform_p_value(uniform)
    )


def _allocated(sampler: Any, drawn: Batches, sizes: np.ndarray, rng: Any) -> Iterator[Found]:
    n = sampler.num_examples
    block = sampler.bins if isinstance(sampler, BallsInBinsSampler) else sampler.block
    if int(drawn.steps.max()) + 1 >= block:
        inside = (drawn.seeds == 0) & (drawn.steps < block)
        units = np.concatenate([s for s, use in zip(drawn.sets, inside, strict=True) if use])
        counts = np.bincount(units, minlength=n)
        holds = bool(np.all(counts == 1))
        found = f"between {counts.min()} and {counts.max()} times"
        yield Found("S3", f"every example takes part exactly once in {block} steps", found, holds=holds)
    first = sizes[drawn.steps == 0]
    uniform = of_binomial(first, n, 1 / block, rng)
    yield Found("S2", "every example draws its place uniformly", _sizes(first), p_value=uniform_p_value(uniform))
    total = int(first.sum())
    yield Found(
        "S1",
        f"an example is in the first batch with probability {1 / block:.6g}",
        f"a rate of {total / (n * len(first)):.6g}",
        p_value=binomial_p_value(total, n * len(first), 1 / block),
        power=lambda a: f"a rate {100 * statistics.least_rate_seen(n * len(first), 1 / block, a):.2g} % off",
    )


def _rested(base: MinSepSampler, sampler: AbstractSampler, seed: int) -> Iterator[Found]:
    """Of those that do not rest, each is in the next batch by a coin."""
    if base.max_batch_size is not None:
        return
    coins = taken = 0
    for number in range(200):
        resting: list[set[int]] = []
        for step in range(min(base.steps, 3 * base.min_separation)):
            units = set(units_of(sampler, sampler.indices(seed + number, step)).tolist())
            if len(resting) >= base.min_separation - 1:
                rest = (
                    set().union(*resting[len(resting) - base.min_separation + 1 :])
                    if base.min_separation > 1
                    else set()
                )
                coins += base.num_examples - len(rest)
                taken += len(units - rest)
            resting.append(units)
        if coins > _DRAWN:
            break
    p = min(1.0, base.sampling_probability)
    yield Found(
        "S1",
        f"an example that does not rest is in a batch with probability {p:.6g}",
        f"a rate of {taken / max(1, coins):.6g} of {coins} coins",
        p_value=binomial_p_value(taken, coins, p),
        power=lambda a: f"a rate {100 * statistics.least_rate_seen(max(1, coins), p, a):.2g} % off",
    )


def _sizes(sizes: np.ndarray) -> str:
    return f"sizes {sizes.min()} to {sizes.max()}, {sizes.mean():.5g} on average, over {len(sizes)} batches"
