"""The laws of samplers."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import accounting
from .._checks import instance
from ..sampling import AbstractSampler
from ..strategies import AbstractStrategy, BandedToeplitz
from ._report import check_false_alarm, name_of, require
from ._statistics import log_evidence, tail

_PURE = "batch t is a pure function of (seed, t)"
_EVENT = "`event` costs no less than what `indices` does"
_ALTOGETHER = 600  # steps whose participations are counted
_TRACKED = 50_000  # units
_LEVELS = (1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.2, 0.5)
_MULTIPLIERS = (0.15, 1.0)  # participations are seen, and hidden
_EPSILONS = (0.1, 0.5, 1.0, 2.0, 4.0)


def check_sampler(
    sampler: AbstractSampler,
    *,
    distinct: bool = True,
    has_mean_size: bool = True,
    window: int = 8,
    seeds: int = 300,
    seed: int = 0,
    false_alarm: float = 1e-6,
) -> None:
    r"""Checks that a sampler draws what it says, and that its `event` accounts for it.

    !!! success "Laws"

        - Batches are pure functions of seed and step, in any order, sorted int64 in range; other seeds and steps give others.
        - Nobody takes part more densely than `participation` says.
        - The mean size of a batch is `batch_size`, by which sums are divided.
        - The event costs no less than what is drawn, for every adjacency that it is declared for. One unit contributes 1 where it takes part, all
          others nothing, and an attacker sees the noisy sums of a few steps: one sum, the largest, or their sum. Whether it exceeds a threshold
          has a known probability if the unit is absent, and one that follows from its participations if it is there; the two may not lie further
          apart than the event's $\delta$ at each $\varepsilon$ allows. With small noise that is a test of how often units take part; with correlated
          noise (where the sampler accounts for it) of `participation_per_event` too.

    The units of one batch depend on each other, those of different seeds do not. So from every seed only the average over units is taken, of the
    probability of the attack given what the unit did: it is between 0 and 1, its mean over seeds is at most that of the worst unit, and a bet against
    it (Ville's inequality) needs to know no more. A rate that is 2 % too small is refuted by 1500 seeds of batches of a thousand.

    **Arguments:**

    - `sampler`: the sampler; a small one, of which every batch is quick.
    - `distinct`: whether a unit is at most once in a batch; False for schemes that draw with replacement.
    - `has_mean_size`: whether the mean size is `batch_size` (in schemes that cut batches it is less).
    - `window`: how many steps the attacker sees, at most: a whole cycle, where the sampler has one.
    - `seeds`: how many are drawn for the last two laws. More have more power.
    - `seed`: the first of them.
    - `false_alarm`: the probability with which a sound sampler is refuted.

    **Raises:** `AssertionError` that names the law, with seeds, steps or the attack.
    """
    instance("check_sampler(sampler=...)", sampler, AbstractSampler, "dpx.PoissonSampler(50, 10, 400)")
    failure = check_false_alarm("check_sampler", false_alarm) / 2
    _check_pure(sampler, distinct, seed)
    _check_participation(sampler, seed)
    window = max(1, min(window, sampler.steps))
    tables, sizes = _tables(sampler, window, seeds, seed)
    if has_mean_size:
        _check_mean_size(sampler, sizes, failure)
    _check_event(sampler, tables, failure)


def units_of(sampler: AbstractSampler, rows: np.ndarray) -> np.ndarray:
    """Who is in a batch: examples, or those that its rows belong to."""
    if rows.ndim == 1:
        return rows
    owners: Any = getattr(sampler, "user_ids", None)
    if owners is None:
        raise ValueError(
            f"{name_of(sampler)} draws units of several rows, so it must have `user_ids`, the unit of each row."
        )
    return owners[rows[:, 0]]


def _check_pure(sampler: AbstractSampler, distinct: bool, seed: int) -> None:
    steps = sorted({0, sampler.steps - 1, sampler.steps // 2, min(7, sampler.steps - 1)})
    first = {}
    for step in steps:
        rows = first[step] = sampler.indices(seed, step)
        where = f"batch {step} of seed {seed}"
        require(rows.dtype == np.int64, sampler, "batches are int64", f"{where} is {rows.dtype}")
        low = 0 if rows.ndim == 1 else -1
        require(
            rows.min(initial=0) >= low and rows.max(initial=0) < sampler.num_rows,
            sampler,
            "batches are rows of the data",
            f"{where} has {rows.min(initial=0)} to {rows.max(initial=0)}, of {sampler.num_rows} rows",
        )
        units = units_of(sampler, rows)
        gaps = np.diff(units)
        require((gaps >= 0).all(), sampler, "batches are sorted", f"{where} is {units.tolist()[:20]}")
        repeated = units[1:][gaps == 0]
        require(
            not distinct or len(repeated) == 0,
            sampler,
            "nobody is twice in a batch",
            f"{where} has {repeated[:3].tolist()} more than once: their contributions add up, and the event knows of one",
        )
        require(
            len(rows) <= sampler.physical_batch_size,
            sampler,
            "batches fit into `physical_batch_size`",
            f"{where} has {len(rows)}, of {sampler.physical_batch_size}",
        )
    for other in range(8):
        sampler.indices(seed + 1 + other, steps[-1])  # whatever was remembered of that seed is gone
    for step in reversed(steps):
        again = sampler.indices(seed, step)
        require(
            np.array_equal(first[step], again),
            sampler,
            _PURE,
            f"batch {step} of seed {seed} is {first[step].ravel().tolist()[:8]} at first and {again.ravel().tolist()[:8]} when it is asked for again",
        )
    if not 0 < sampler.batch_size < sampler.num_examples:
        return
    law = "other seeds and steps give other batches"
    batches = [[sampler.indices(seed + s, t).tobytes() for t in range(min(5, sampler.steps))] for s in range(5)]
    for s, of_seed in enumerate(batches):
        # schemes that pass over the data come back to a batch, so it is asked only that not all are alike
        require(
            len(set(of_seed)) > 1 or len(of_seed) == 1,
            sampler,
            law,
            f"the first {len(of_seed)} batches of seed {seed + s} are alike",
        )
    if _subsets(sampler.num_examples, sampler.batch_size) >= 24:  # then two are alike by chance at most once in 1e6
        firsts = {of_seed[0] for of_seed in batches}
        require(
            len(firsts) == len(batches), sampler, law, f"{len(firsts)} different first batches of {len(batches)} seeds"
        )


def _subsets(population: int, size: int) -> float:
    return (math.lgamma(population + 1) - math.lgamma(size + 1) - math.lgamma(population - size + 1)) / math.log(2)


def _check_participation(sampler: AbstractSampler, seed: int) -> None:
    separation, most = sampler.participation
    for s in range(seed, seed + 2):
        last: dict[int, int] = {}
        times: dict[int, int] = {}
        for step in range(min(sampler.steps, _ALTOGETHER)):
            for unit in np.unique(units_of(sampler, sampler.indices(s, step))).tolist():
                gap = step - last.get(unit, -separation)
                require(
                    gap >= separation,
                    sampler,
                    "nobody comes back before `participation.min_separation` steps",
                    f"unit {unit} takes part in steps {last.get(unit)} and {step} of seed {s}, and the separation is {separation}",
                )
                last[unit], times[unit] = step, times.get(unit, 0) + 1
        if times and most is not None:
            unit = max(times, key=lambda u: times[u])
            require(
                times[unit] <= most,
                sampler,
                "nobody takes part more often than `participation.max_participations`",
                f"unit {unit} takes part {times[unit]} times with seed {s}, and {most} is the most",
            )


def _tables(sampler: AbstractSampler, window: int, seeds: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """For every seed how often each unit is in each of the first batches, and the sizes of these."""
    tracked = min(sampler.num_examples, _TRACKED)
    tables, sizes = [], np.zeros((seeds, window))
    for number in range(seeds):
        table = np.zeros((window, tracked), np.int16)
        for step in range(window):
            units = units_of(sampler, sampler.indices(1_000 + seed + number, step))
            sizes[number, step] = len(units)
            table[step] = np.bincount(units[units < tracked], minlength=tracked)
        tables.append(table)
    return tables, sizes


def _check_mean_size(sampler: AbstractSampler, sizes: np.ndarray, failure: float) -> None:
    law = "the mean size of a batch is `batch_size`, by which sums are divided"
    from scipy import stats

    means = sizes.mean(axis=1)  # of different seeds, so independent
    margin = float(stats.t.isf(failure / 4, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means)))
    allowed = 0.5 + margin  # `batch_size` is an integer
    require(
        abs(means.mean() - sampler.batch_size) <= allowed,
        sampler,
        law,
        f"{means.mean():.5g} over {sizes.size} batches, where {margin:.2g} would be chance, and `batch_size` is {sampler.batch_size}",
    )


def _check_event(sampler: AbstractSampler, tables: list[np.ndarray], failure: float) -> None:
    window = len(tables[0])
    tried = 0
    refusals = []
    cases: list[tuple[int, AbstractStrategy | None]] = [(window, None), (1, None), (window, BandedToeplitz([1.0, 0.5]))]
    simulated = 0
    for steps, strategy in cases if window > 1 else cases[1:]:
        for multiplier in _MULTIPLIERS:
            try:
                event = _event(sampler, multiplier, steps, strategy)
            except ValueError as error:
                refusals.append(str(error))
                continue
            slow = accounting.is_monte_carlo(event)
            if slow and simulated:
                continue  # one such event costs seconds
            simulated += slow
            for adjacency in sampler.adjacencies[:1] if slow else sampler.adjacencies:
                try:
                    claimed = accounting.deltas(event, np.array(_EPSILONS), adjacency, "pld")
                except ValueError as error:
                    refusals.append(str(error))
                    continue
                tried += 1
                _attack(
                    sampler, tables, steps, strategy, multiplier, claimed, f"{event} under {adjacency!r}", failure / 16
                )
    require(tried, sampler, "somebody can account for it", f"only refusals: {refusals[:1]}")


def _event(sampler: AbstractSampler, multiplier: float, steps: int, strategy: AbstractStrategy | None) -> Any:
    from dp_accounting import GaussianDpEvent

    mechanism = GaussianDpEvent(multiplier)
    return (
        sampler.event(mechanism, 1, steps)
        if strategy is None
        else sampler.event(mechanism, strategy.bands, steps, strategy)
    )


def _attacks(
    sampler: AbstractSampler, steps: int, strategy: AbstractStrategy | None, multiplier: float
) -> Iterator[tuple[str, float, Any]]:
    """What exceeds a threshold, with what probability without the unit, and with it from a table of its participations."""
    matrix = np.eye(steps)
    if strategy is not None:
        scale = strategy.sensitivity(sampler.steps, *sampler.participation_per_event)
        matrix = strategy.materialize(steps) / scale
    directions = {"the first noisy sum": matrix[:, 0]}
    if steps > 1:
        directions["the sum of all noisy sums"] = matrix.sum(1)
    for name, direction in directions.items():
        weights = direction / np.linalg.norm(direction) @ matrix
        for level in _LEVELS:
            threshold = multiplier * _threshold(level)
            yield (
                f"{name} exceeds {threshold:.4g}",
                level,
                lambda table, w=weights, t=threshold: tail((t - w @ table) / multiplier),
            )
    if steps > 1 and strategy is None:
        for level in _LEVELS:
            threshold = multiplier * _threshold(-math.expm1(math.log1p(-level) / steps))
            yield (
                f"the largest of {steps} noisy sums exceeds {threshold:.4g}",
                level,
                lambda table, t=threshold: 1 - np.prod(1 - tail((t - table) / multiplier), axis=0),
            )


def _threshold(level: float) -> float:
    from ._statistics import quantile

    return quantile(level)


def _attack(
    sampler: AbstractSampler,
    tables: list[np.ndarray],
    steps: int,
    strategy: AbstractStrategy | None,
    multiplier: float,
    claimed: np.ndarray,
    event: str,
    failure: float,
) -> None:
    # the first seeds choose the attack, the others carry it out
    first = max(1, len(tables) // 5)
    best = (-math.inf, None)
    for name, level, exceeds in _attacks(sampler, steps, strategy, multiplier):
        guess = np.mean([np.mean(exceeds(table[:steps])) for table in tables[:first]])
        for epsilon, delta in zip(_EPSILONS, claimed, strict=True):
            allowed = min(1.0, math.exp(epsilon) * level * (1 + 1e-9) + float(delta) + 1e-9)
            if guess / allowed > best[0]:
                best = (guess / allowed, (name, level, exceeds, epsilon, float(delta), allowed))
    assert best[1] is not None
    name, level, exceeds, epsilon, delta, allowed = best[1]
    reached = np.array([np.mean(exceeds(table[:steps])) for table in tables[first:]])
    correlated = ", correlated noise" if strategy is not None else ""
    require(
        log_evidence(reached, allowed) <= -math.log(failure),
        sampler,
        _EVENT,
        f"whether {name} (noise multiplier {multiplier:g}, {steps} steps{correlated}) tells that a unit is there: "
        f"probability {reached.mean():.6g} if so, {level:.3g} if not, so delta is about {reached.mean() - math.exp(epsilon) * level:.6g} at epsilon "
        f"{epsilon:g}; {delta:.6g} claimed by {event}",
    )
