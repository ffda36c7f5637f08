"""No strategy understates its sensitivity, whatever its coefficients, the prefix and the participation: brute force is the judge."""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dpx.strategies import (
    AbstractStrategy,
    BandedInverse,
    BandedToeplitz,
    BufferedToeplitz,
    ColumnNormalizedBanded,
    DenseStrategy,
    GeometricStrategy,
    Identity,
    SquareRootToeplitz,
    TreeAggregation,
    _column_normalized,
    _geometric,
    _sensitivity,
    _tree,
)

_MOST = 7


@functools.cache
def contributions(steps: int, separation: int, k: int) -> np.ndarray:
    """All vectors with entries -1, 0 and 1 (up to the sign) that participate at most `k` times, `separation` apart."""
    rows = np.array(list(itertools.product((0, 1, -1), repeat=steps)), np.int8)
    first = np.take_along_axis(rows, np.argmax(rows != 0, axis=1)[:, None], 1)[:, 0]
    rows = rows[first == 1]
    taking = rows != 0
    allowed = taking.sum(1) <= k
    for gap in range(1, min(separation, steps)):
        allowed &= ~(taking[:, gap:] & taking[:, :-gap]).any(1)
    return rows[allowed]


def brute_force(matrix: np.ndarray, separation: int, k: int) -> float:
    return math.sqrt(np.square(contributions(len(matrix), separation, k) @ matrix.T).sum(1).max())


def vectors_in_general_position(matrix: np.ndarray, separation: int, k: int, seed: int) -> float:
    """The most that contributions which are vectors, rather than signs, were found to reach: each in turn follows the others."""
    rng = np.random.default_rng(seed)
    gram, most = matrix.T @ matrix, 0.0
    patterns = {tuple(np.flatnonzero(row)) for row in contributions(len(matrix), separation, k)}
    for pattern in patterns:
        part = gram[np.ix_(pattern, pattern)]
        g = rng.normal(size=(len(pattern), len(pattern)))
        g /= np.linalg.norm(g, axis=1, keepdims=True)
        for _ in range(20):
            for i in range(len(pattern)):
                pull = part[i] @ g - part[i, i] * g[i]
                if np.linalg.norm(pull) > 0:
                    g[i] = pull / np.linalg.norm(pull)
        most = max(most, float(np.einsum("ij,ik,jk->", part, g, g)))
    return math.sqrt(most)


def made(kind: str, steps: int, rng: np.random.Generator) -> AbstractStrategy:
    """A strategy with the horizon `steps`, from coefficients that are negative, rising, tiny and huge as often as not."""
    wild = lambda size: rng.normal(size=size) * 10.0 ** rng.uniform(-3, 1, size)
    positive = lambda size: np.abs(wild(size))
    bands = int(rng.integers(1, steps + 1))
    draw = wild if rng.random() < 0.5 else positive
    coefficients = [float(positive(())) + 1e-3, *draw(bands - 1).tolist()]
    match kind:
        case "identity":
            return Identity()
        case "banded":
            return BandedToeplitz(coefficients)
        case "normalized":
            return ColumnNormalizedBanded(coefficients, steps)
        case "inverse":
            return BandedInverse([1.0, *np.clip(draw(bands - 1), -2, 2).tolist()])
        case "geometric":
            decay = float(rng.choice([0.0, 1.0, rng.random()]))
            return GeometricStrategy(decay, normalize_columns=bool(rng.random() < 0.7), steps=steps)
        case "square-root":
            return SquareRootToeplitz(
                steps, momentum=float(rng.random()) * 0.99, weight_decay=float(rng.random()) * 0.9
            )
        case "buffered":
            size = int(rng.integers(1, 4))
            return BufferedToeplitz(rng.random(size).tolist(), rng.uniform(-1, 1, size).tolist())
        case "dense":
            matrix = np.tril(wild((steps, steps)))
            np.fill_diagonal(matrix, positive(steps) + 1e-3)
            return DenseStrategy(np.where(np.tri(steps) - np.tri(steps, k=-bands) > 0, matrix, 0.0))
    restart = None if rng.random() < 0.5 else int(rng.integers(1, steps + 1))
    tight, honaker = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    return TreeAggregation(steps, restart_every=restart, tight=tight, honaker=honaker or tight)


KINDS = ["identity", "banded", "normalized", "inverse", "geometric", "square-root", "buffered", "dense", "tree"]


@pytest.mark.parametrize("is_long", [False, True], ids=["gram", "closed-form"])
@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_no_sensitivity_is_below_brute_force(kind, is_long, seed):
    rng = np.random.default_rng(seed)
    horizon = int(rng.integers(1, _MOST + 1))
    strategy = made(kind, horizon, rng)
    steps = int(rng.integers(1, horizon + 1))
    separation, k = int(rng.integers(1, _MOST + 2)), int(rng.integers(1, _MOST + 3))
    matrix = strategy.materialize(steps)
    with pytest.MonkeyPatch.context() as patch:
        if is_long:  # the bounds of runs that are too long for a Gram matrix
            for module in (_sensitivity, _column_normalized, _geometric, _tree):
                patch.setattr(module, "GRAM_STEPS", 0)
        claimed = strategy.sensitivity(steps, separation, k)
    truth = max(
        brute_force(matrix, separation, k),
        vectors_in_general_position(matrix, separation, k, seed) if seed % 4 == 0 else 0.0,
    )
    assert claimed >= truth * (1 - 1e-11), (strategy, steps, separation, k)
    if strategy.bands is not None and separation >= strategy.bands and kind != "tree":
        assert claimed <= truth * (1 + 1e-9), (strategy, steps, separation, k)


def test_the_worst_pattern_of_a_prefix_need_not_begin_at_its_beginning():
    # columns 0, 1 and 2 of 5 keep the entry of 10 that columns 3 and 4 have lost: (0, 3) is worse than (1, 4), and both than (0, 4)
    strategy = ColumnNormalizedBanded([1.0, 0.001, 10.0], 6)
    assert strategy.sensitivity(5, 3, 2) == pytest.approx(brute_force(strategy.materialize(5), 3, 2), rel=1e-12)
    assert strategy.sensitivity(5, 3, 2) == pytest.approx(1.41421, abs=1e-5)
