"""Strategies: the stream is C^-1 z, the sensitivity is never understated, the error is what materialising gives."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import registry
from dpx.strategies import (
    BandedInverse,
    BandedToeplitz,
    BufferedToeplitz,
    ColumnNormalizedBanded,
    DenseStrategy,
    GeometricStrategy,
    Identity,
    SquareRootToeplitz,
    TreeAggregation,
    momentum_workload,
)
from dpx.strategies._buffered_optimize import closed_form_error, squared_sensitivity as buffered_sensitivity
from dpx.strategies._optimize import banded_error, inverse_banded_error, squared_sensitivity
from dpx.strategies._sensitivity import best_pattern, gram_sensitivity, toeplitz, toeplitz_sensitivity
from registry import random_lower

N = registry.HORIZON
STRATEGIES = registry.by_name(registry.STRATEGIES)
each_strategy = pytest.mark.parametrize("name", STRATEGIES)
each_class = pytest.mark.parametrize("name", [r.name for r in registry.STRATEGIES if not r.is_variant])


def draw(seed, steps):
    keys = jr.split(jr.key(seed))
    return {"a": jr.normal(keys[0], (steps, 2, 3)), "b": (jr.normal(keys[1], (steps, 2), jnp.bfloat16), None)}


def at(tree, t):
    return jax.tree.map(lambda x: x[t], tree)


def struct_of(z):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), z)


def stream(strategy, z):
    """Every step of the stream, by `scan`."""
    return jax.lax.scan(lambda buffers, z: strategy.step(z, buffers)[::-1], strategy.init(struct_of(z)), z)[1]


def assert_is_inverse(strategy, z, x):
    matrix = strategy.materialize(len(jax.tree.leaves(z)[0]))
    for leaf, out in zip(jax.tree.leaves(z), jax.tree.leaves(x), strict=True):
        assert out.dtype == leaf.dtype and out.shape == leaf.shape
        flat = np.asarray(leaf, np.float64).reshape(len(leaf), -1)
        expected = np.linalg.solve(matrix, flat)
        tolerance = (3e-6 if leaf.dtype == jnp.float32 else 1e-2) * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(np.asarray(out, np.float64).reshape(flat.shape), expected, rtol=0, atol=tolerance)


@functools.cache
def patterns(size):
    """Every vector of contributions with entries -1, 0 and 1, the first of them 1."""
    rows = np.array(list(itertools.product((0, 1, -1), repeat=size)), np.int8)
    first = np.take_along_axis(rows, np.argmax(rows != 0, axis=1)[:, None], 1)[:, 0]
    return rows[first == 1]


def brute_force(matrix, separation, k):
    """Sensitivity by trying all patterns and signs."""
    u = patterns(len(matrix))
    taking = u != 0
    allowed = taking.sum(1) <= k
    for gap in range(1, separation):
        allowed &= ~(taking[:, gap:] & taking[:, :-gap]).any(1)
    return math.sqrt(np.square(u[allowed] @ matrix.T).sum(1).max())


def test_deep_rings_are_read_in_one_product():
    strategy = BandedToeplitz.square_root(80)
    z = draw(2, 170)["a"]
    assert_is_inverse(strategy, z, stream(strategy, z))
    tree = TreeAggregation(170, restart_every=40)
    assert_is_inverse(tree, z, stream(tree, z))


@each_class
def test_vmap_is_stack(name):
    strategy = STRATEGIES[name]
    runs = [draw(seed, N)["a"] for seed in (4, 5)]
    batched = jax.vmap(lambda z: stream(strategy, z))(jnp.stack(runs))
    for x, z in zip(batched, runs, strict=True):
        assert_is_inverse(strategy, z, x)


@each_class
def test_replay_is_refused_where_the_inverse_is_not_banded(name):
    strategy = STRATEGIES[name]
    if strategy.replay_depth is not None:
        return
    with pytest.raises(ValueError, match="not banded"):
        strategy.replay(lambda age: jnp.zeros(2), jnp.array(0))


def test_replay_past_the_horizon_is_nan():
    strategy = GeometricStrategy(0.5, steps=3)
    assert np.isnan(strategy.replay(lambda age: jnp.ones(2), jnp.array(3))).all()


IN_PLACE = {
    "banded-2": BandedToeplitz.square_root(2),
    "banded-32": BandedToeplitz.square_root(32),
    "normalized": ColumnNormalizedBanded([1.0, 0.5, 0.25, 0.1], 100),
    "inverse": BandedInverse.square_root(8),
    "geometric": GeometricStrategy(0.9),
    "square-root": SquareRootToeplitz(40),
    "buffered": BufferedToeplitz([0.9, 0.6, 0.3], [0.1, 0.2, 0.3]),
    "dense": DenseStrategy(np.tril(np.ones((20, 20)))),
    "tree": TreeAggregation(100),
    "tree-naive": TreeAggregation(100, honaker=False),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_step_writes_in_place_and_never_copies_the_ring(name):
    strategy, z = IN_PLACE[name], jnp.ones(1 << 16)
    buffers = strategy.init(z)
    memory = jax.jit(strategy.step, donate_argnums=1).lower(z, buffers).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 1.1 * z.nbytes
    assert memory.alias_size_in_bytes >= buffers.slots.nbytes
    if name != "buffered":
        assert str(jax.make_jaxpr(strategy.step)(z, buffers)).count("dynamic_update_slice") == 1


def test_buffers_are_float32_for_half_precision_noise_and_follow_float64():
    strategy = BandedToeplitz([1.0, 0.5, 0.25])
    assert strategy.init(jax.ShapeDtypeStruct((3,), jnp.bfloat16)).slots.dtype == jnp.float32
    with jax.enable_x64(True):
        z = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)))
        x = stream(strategy, z)
        assert x.dtype == jnp.float64
        np.testing.assert_allclose(x, np.linalg.solve(strategy.materialize(20), np.asarray(z)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["banded-3", "inverse-5", "buffered-3", "tree-honaker", "dense", "square-root"])
def test_buffers_shard_like_the_noise_and_give_the_same_bits(name):
    strategy = STRATEGIES[name]
    z = np.random.default_rng(1).normal(size=(N, 8, 2)).astype(np.float32)

    def run(z, buffers):
        outs = []
        step = jax.jit(strategy.step)
        for t in range(N):
            x, buffers = step(z[t], buffers)
            outs.append(np.asarray(x))
        return np.stack(outs), buffers

    alone, _ = run(jnp.asarray(z), strategy.init(jnp.asarray(z[0])))
    with jax.set_mesh(jax.make_mesh((4,), ("data",))):
        shards = [jax.device_put(x, jax.P("data", None)) for x in z]
        for init in (strategy.init, jax.jit(strategy.init)):
            buffers = init(shards[0])
            assert buffers.slots.sharding.spec == jax.P(None, "data", None)
            together, buffers = run(shards, buffers)
            np.testing.assert_array_equal(together, alone)
            assert buffers.slots.sharding.spec == jax.P(None, "data", None)


# --- sensitivity


@given(
    st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=7),
    st.integers(1, 5),
    st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_toeplitz_sensitivity_is_never_below_brute_force(tail, separation, k):
    c = np.array([1.0, *tail])
    k = min(k, -(-len(c) // separation))
    assert toeplitz_sensitivity(c, separation, k) >= brute_force(toeplitz(c), separation, k) * (1 - 1e-12)


@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_gram_sensitivity_is_never_below_brute_force(seed, size, separation, k):
    matrix = random_lower(size, seed)
    assert gram_sensitivity(matrix.T @ matrix, separation, k) >= brute_force(matrix, separation, k) * (1 - 1e-12)


def test_best_pattern_is_the_best_pattern():
    values = np.abs(np.random.default_rng(2).normal(size=8))
    for separation, k in itertools.product((1, 2, 3, 8), (1, 2, 5)):
        truth = max(
            values[list(chosen)].sum()
            for size in range(1, k + 1)
            for chosen in itertools.combinations(range(8), size)
            if all(b - a >= separation for a, b in itertools.pairwise(chosen))
        )
        assert best_pattern(values, separation, k) == pytest.approx(truth)


def test_golden_sensitivities_of_three_bands():
    c = np.array([1.0, 0.5, 0.25])
    strategy = BandedToeplitz(c / np.linalg.norm(c))
    assert strategy.sensitivity(12, 3, 3) == pytest.approx(math.sqrt(3), rel=1e-9)
    assert strategy.sensitivity(12, 2, 3) == pytest.approx(1.93956, abs=1e-5)
    assert strategy.sensitivity(12, 1, 2) == pytest.approx(1.71825, abs=1e-5)


def test_a_column_normalised_strategy_is_scaled_by_its_own_norm():
    strategy = ColumnNormalizedBanded([10.0, 8.0, 6.0], 50)
    np.testing.assert_allclose(np.linalg.norm(strategy.materialize(50), axis=0), 1.0)
    assert strategy.sensitivity(50) == pytest.approx(1.0)
    assert strategy.sensitivity(50, 3, 7) == pytest.approx(math.sqrt(7))
    # whatever the scale of the coefficients, the noise is the same
    other = ColumnNormalizedBanded([5.0, 4.0, 3.0], 50)
    z = draw(8, 20)["a"]
    np.testing.assert_allclose(stream(strategy, z), stream(other, z), rtol=1e-5, atol=1e-6)


def test_long_runs_have_closed_form_bounds():
    strategy = ColumnNormalizedBanded([1.0, 0.5, 0.25], 5000)
    assert 2.0 <= strategy.sensitivity(5000, 2, 4) < 2.6
    geometric = GeometricStrategy(0.9, normalize_columns=True, steps=5000)
    assert geometric.sensitivity(5000, 10, 3) == pytest.approx(math.sqrt(3 + 4 * 0.9**10 + 2 * 0.9**20), rel=1e-9)
    tree = TreeAggregation(5000)
    assert tree.sensitivity(5000) == pytest.approx(math.sqrt(13))
    assert tree.sensitivity(5000, 1000, 5) >= math.sqrt(5 * 13)
    assert SquareRootToeplitz().sensitivity(5000, 1000, 5) == pytest.approx(
        np.linalg.norm(sum(np.eye(5000, k=-1000 * i) @ SquareRootToeplitz().coefficients(5000) for i in range(5))),
        rel=1e-9,
    )


# --- error


@each_strategy
@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("workload", ["prefix", "momentum", "schedule"])
def test_error_is_that_of_the_materialised_matrix(name, kind, workload):
    strategy = STRATEGIES[name]
    queries = {
        "prefix": "prefix",
        "momentum": momentum_workload(N, 0.9, 0.05),
        "schedule": momentum_workload(N, 0.5, 0.01, np.linspace(1, 0.1, N)),
    }[workload]
    matrix = np.tril(np.ones((N, N))) if isinstance(queries, str) else queries
    matrix = toeplitz(matrix) if matrix.ndim == 1 else matrix
    rows = np.square(matrix @ np.linalg.inv(strategy.materialize(N))).sum(1)
    expected = math.sqrt(rows.mean() if kind == "mean" else rows.max())
    participations: tuple[Any, ...] = (dict(), dict(min_separation=3, max_participations=2))
    for participation in participations:
        error = strategy.error(N, queries, kind, **participation)
        assert error == pytest.approx(strategy.sensitivity(N, **participation) * expected, rel=1e-9)


def test_error_of_runs_longer_than_a_block():
    n = 700
    queries = momentum_workload(n, 0.9, 0.0, np.linspace(1, 0, n))
    for strategy in (BandedToeplitz.square_root(5), ColumnNormalizedBanded([1, 0.5], n), BandedInverse.square_root(4)):
        for workload in ("prefix", queries):
            matrix = np.tril(np.ones((n, n))) if isinstance(workload, str) else workload
            rows = np.square(matrix @ np.linalg.inv(strategy.materialize(n))).sum(1)
            assert strategy.error(n, workload) == pytest.approx(
                strategy.sensitivity(n) * math.sqrt(rows.mean()), rel=1e-9
            )


def test_momentum_workload_is_what_the_optimizer_does():
    n, momentum, decay = 7, 0.8, 0.1
    rates = np.linspace(1.0, 0.2, n)
    gradients = np.random.default_rng(3).normal(size=n)
    for learning_rates in (None, rates):
        velocity = weights = 0.0
        trajectory = []
        for t in range(n):
            velocity = momentum * velocity + gradients[t]
            weights = (1 - decay) * weights - (1.0 if learning_rates is None else rates[t]) * velocity
            trajectory.append(weights)
        workload = momentum_workload(n, momentum, decay, learning_rates)
        matrix = toeplitz(workload) if workload.ndim == 1 else workload
        np.testing.assert_allclose(-matrix @ gradients, trajectory, rtol=1e-12)


def test_the_square_root_of_a_momentum_workload_is_its_square_root():
    matrix = SquareRootToeplitz(momentum=0.9, weight_decay=0.02).materialize(20)
    np.testing.assert_allclose(matrix @ matrix, toeplitz(momentum_workload(20, 0.9, 0.02)), rtol=1e-12)
    inverse = BandedInverse.square_root(20, momentum=0.9, weight_decay=0.02).materialize(20)
    np.testing.assert_allclose(inverse, matrix, rtol=1e-9)
    banded = BandedToeplitz.square_root(20, momentum=0.9, weight_decay=0.02).materialize(20)
    np.testing.assert_allclose(banded, matrix, rtol=1e-12)


GOLDEN_1024 = {
    "identity": (lambda: Identity(), 22.638),
    "bsr-2": (lambda: BandedToeplitz.square_root(2), 16.890),
    "bsr-16": (lambda: BandedToeplitz.square_root(16), 7.218),
    "bsr-64": (lambda: BandedToeplitz.square_root(64), 4.376),
    "banded-2": (lambda: BandedToeplitz.optimize(1024, 2), 16.108),
    "banded-4": (lambda: BandedToeplitz.optimize(1024, 4), 11.563),
    "banded-8": (lambda: BandedToeplitz.optimize(1024, 8), 8.444),
    "banded-16": (lambda: BandedToeplitz.optimize(1024, 16), 6.343),
    "banded-32": (lambda: BandedToeplitz.optimize(1024, 32), 4.956),
    "normalized-8": (lambda: ColumnNormalizedBanded.optimize(1024, 8), 8.4435),
    "normalized-16": (lambda: ColumnNormalizedBanded.optimize(1024, 16), 6.3407),
    "normalized-32": (lambda: ColumnNormalizedBanded.optimize(1024, 32), 4.9509),
    "bisr-2": (lambda: BandedInverse.square_root(2), 13.109),
    "bisr-16": (lambda: BandedInverse.square_root(16), 5.097),
    "bisr-64": (lambda: BandedInverse.square_root(64), 3.448),
    "geometric": (lambda: GeometricStrategy.optimize(1024), 4.8085),
    "geometric-0.95675": (lambda: GeometricStrategy(0.95675), 4.8085),
    "geometric-normalized": (lambda: GeometricStrategy.optimize(1024, normalize_columns=True), 4.7958),
    "square-root": (lambda: SquareRootToeplitz(), 3.1098),
    "tree-naive": (lambda: TreeAggregation(1024, honaker=False), 7.417),
    "tree-honaker": (lambda: TreeAggregation(1024), 5.650),
    "output-perturbation": (lambda: GeometricStrategy(1.0), 32.0),
}


@pytest.mark.parametrize("name", GOLDEN_1024)
def test_golden_errors_of_1024_steps_in_one_participation(name):
    build, golden = GOLDEN_1024[name]
    assert build().error(1024) == pytest.approx(golden, abs=0.6 * 10.0 ** -(len(str(golden).split(".")[1])))


def test_golden_maximum_errors():
    assert Identity().error(1024, kind="max") == pytest.approx(32.0)
    assert SquareRootToeplitz().error(1024, kind="max") == pytest.approx(3.2725542, abs=1e-7)
    f = SquareRootToeplitz().coefficients(1024)
    assert SquareRootToeplitz().error(1024, kind="max") == pytest.approx(np.square(f).sum())


@pytest.mark.parametrize(
    ("build", "n", "separation", "k", "golden"),
    [
        (lambda: Identity(), 1024, 256, 4, 45.28),
        (lambda: GeometricStrategy.optimize(1024, min_separation=256, max_participations=4), 1024, 256, 4, 9.617),
        (lambda: BandedInverse.square_root(16), 1024, 256, 4, 10.19),
        (lambda: BandedInverse.square_root(64), 1024, 256, 4, 6.980),
        (lambda: SquareRootToeplitz(), 1024, 256, 4, 7.543),
        (lambda: Identity(), 1024, 64, 16, 90.55),
        (lambda: BandedInverse.square_root(64), 1024, 64, 16, 17.73),
        (lambda: SquareRootToeplitz(), 1024, 64, 16, 23.90),
        (lambda: Identity(), 2052, 342, 6, 78.48),
        (lambda: BandedToeplitz.optimize(2052, 8, min_separation=342, max_participations=6), 2052, 342, 6, 28.71),
        (lambda: BandedToeplitz.optimize(2052, 32, min_separation=342, max_participations=6), 2052, 342, 6, 16.05),
        (lambda: BandedToeplitz.optimize(2052, 128, min_separation=342, max_participations=6), 2052, 342, 6, 10.50),
        (lambda: BandedToeplitz.optimize(2052, 342, min_separation=342, max_participations=6), 2052, 342, 6, 8.804),
        (lambda: SquareRootToeplitz(), 2052, 342, 6, 10.87),
    ],
)
def test_golden_errors_in_several_participations(build, n, separation, k, golden):
    error = build().error(n, min_separation=separation, max_participations=k)
    assert error == pytest.approx(golden, rel=6e-4)


# --- optimisers


def finite_difference(loss, x, h=1e-6):
    return np.array([(loss(x + h * e)[0] - loss(x - h * e)[0]) / (2 * h) for e in np.eye(len(x))])


@pytest.mark.parametrize("power", [1.0, 6.0])
@pytest.mark.parametrize("workload", ["prefix", "schedule"])
@pytest.mark.parametrize("loss", [banded_error, inverse_banded_error])
def test_gradients_of_errors_are_derivatives(loss, workload, power):
    queries = np.ones(30) if workload == "prefix" else momentum_workload(30, 0.9, 0.01, np.linspace(1, 0.1, 30))
    for kind in ("mean", "max"):
        function = lambda c, kind=kind: loss(c, queries, kind, power)
        c = np.array([1.0, 0.6, 0.3, 0.35, 0.1])
        np.testing.assert_allclose(function(c)[1], finite_difference(function, c), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("separation", "k"), [(1, 1), (3, 4), (5, 4), (1, 30)])
@pytest.mark.parametrize("decreasing", [False, True])
def test_gradients_of_sensitivities_are_derivatives(separation, k, decreasing):
    function = lambda c: squared_sensitivity(c, 30, separation, k, decreasing)
    c = np.array([1.0, 0.6, 0.3, 0.35, 0.1])
    np.testing.assert_allclose(function(c)[1], finite_difference(function, c), rtol=1e-6, atol=1e-6)
    smaller = np.sort(np.abs(c))[::-1]
    padded = np.concatenate([smaller, np.zeros(25)])
    assert function(smaller)[0] == pytest.approx(toeplitz_sensitivity(padded, separation, k) ** 2)


def test_closed_forms_of_buffers_are_sums():
    strategy = BufferedToeplitz([0.995, 0.9, 0.5], [0.03, 0.1, 0.3])
    gaps, omega = 1 - np.array(strategy.decays), np.array(strategy.scales)
    poles = np.linalg.eigvals(np.diag(strategy.decays) - np.outer(np.ones(3), omega))
    for n, separation, k in ((600, 600, 1), (600, 100, 4), (600, 100, 6), (7, 3, 3), (1, 1, 1)):
        exact = toeplitz_sensitivity(strategy.coefficients(n), separation, k)
        assert math.sqrt(buffered_sensitivity(gaps, omega, n, separation, k)) == pytest.approx(exact, rel=1e-9)
        rows = np.cumsum(np.square(np.cumsum(np.linalg.inv(strategy.materialize(n))[:, 0])))
        for kind, squared in (("mean", rows.mean()), ("max", rows[-1])):
            assert closed_form_error(gaps, np.sort(1 - poles.real), n, kind) == pytest.approx(squared, rel=1e-8)


def test_golden_buffers_of_100000_steps():
    strategy = BufferedToeplitz.optimize(100_000, 2, kind="max")
    np.testing.assert_allclose(strategy.decays, (0.9999528892, 0.9857068667), atol=1e-7)
    np.testing.assert_allclose(strategy.scales, (0.0122853238, 0.1878393665), atol=1e-6)
    assert strategy.error(100_000, kind="max") == pytest.approx(5.29675, abs=1e-5)
    assert strategy.error(100_000, kind="max") / (1 + math.log(100_000) / math.pi) == pytest.approx(1.1355, abs=1e-4)
    errors = [BufferedToeplitz.optimize(100_000, m, kind="max").error(100_000, kind="max") for m in (1, 3)]
    root = SquareRootToeplitz().error(100_000, kind="max")
    assert errors[0] > 5.29675 > errors[1] > root and errors[1] < 1.03 * root


@pytest.mark.slow
def test_buffers_for_other_workloads():
    n = 40
    explicit = BufferedToeplitz.optimize(n, 2, workload=np.ones(n))
    assert explicit.error(n) == pytest.approx(BufferedToeplitz.optimize(n, 2).error(n), rel=1e-6)
    schedule = momentum_workload(n, 0.9, 0.0, np.linspace(1, 0, n))
    for kind in ("mean", "max"):
        best = BufferedToeplitz.optimize(n, 2, workload=schedule, kind=kind)
        assert best.error(n, schedule, kind) <= BufferedToeplitz.optimize(n, 2).error(n, schedule, kind)


@pytest.mark.parametrize(("separation", "k"), [(1, 1), pytest.param(10, 3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "workload"),
    [("mean", "prefix"), ("max", "prefix"), ("mean", "momentum"), ("mean", "schedule"), ("max", "schedule")],
)
def test_optimised_is_at_least_as_good_as_the_closed_form(kind, workload, separation, k):
    n, bands = 40, 5
    queries = {
        "prefix": "prefix",
        "momentum": momentum_workload(n, 0.9),
        "schedule": momentum_workload(n, 0.9, 0.0, np.linspace(1, 0.1, n)),
    }[workload]
    error = lambda s: s.error(n, queries, kind, min_separation=separation, max_participations=k)
    options: Any = dict(workload=queries, kind=kind)
    participation: Any = dict(min_separation=separation, max_participations=k)
    for cls in (BandedToeplitz, BandedInverse):
        best = error(cls.optimize(n, bands, **options, **participation))
        assert best <= error(cls.square_root(bands)) * (1 + 1e-6)
        assert k == 1 or best <= error(cls.optimize(n, bands, **options)) * (1 + 1e-6)
    best = error(GeometricStrategy.optimize(n, **options, **participation))
    assert all(best <= error(GeometricStrategy(decay)) * (1 + 1e-6) for decay in (0.0, 0.5, 0.9, 0.99, 1.0))


@pytest.mark.parametrize(
    ("n", "golden"), [(1, 1.0), (2, 1.14412), (4, 1.31093), (8, 1.49441), (16, 1.68940), (64, 2.09986)]
)
def test_golden_optimal_dense_matrices(n, golden):
    strategy = DenseStrategy.optimize(n)
    assert strategy.error(n) == pytest.approx(golden, abs=6e-6)
    matrix = strategy.materialize(n)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=0), 1.0)
    if n == 2:
        assert (matrix.T @ matrix)[0, 1] == pytest.approx((3 - math.sqrt(5)) / 2, abs=1e-6)


def test_dense_optimum_is_a_lower_bound_of_everything():
    dense = DenseStrategy.optimize(16).error(16)
    best = DenseStrategy.optimize(16, kind="max").error(16, kind="max")
    for other in (
        SquareRootToeplitz(),
        BandedToeplitz.optimize(16, 16),
        BufferedToeplitz.optimize(16, 3),
        TreeAggregation(16, tight=True),
    ):
        assert other.error(16) > dense and other.error(16, kind="max") > best
    # the norm of triangular truncation of two by two matrices
    assert DenseStrategy.optimize(2, kind="max").error(2, kind="max") == pytest.approx(2 / math.sqrt(3), rel=3e-4)


def test_dense_with_separated_participations_has_disjoint_bands():
    strategy = DenseStrategy.optimize(30, min_separation=6, max_participations=5)
    assert strategy.bands == 6
    assert strategy.sensitivity(30, 6, 5) == pytest.approx(math.sqrt(5))
    participation: Any = dict(min_separation=6, max_participations=5)
    toeplitz_best = ColumnNormalizedBanded.optimize(30, 6, **participation)
    assert strategy.error(30, **participation) <= toeplitz_best.error(30, **participation) * (1 + 1e-9)
    with pytest.raises(ValueError, match="at most 6 bands"):
        DenseStrategy.optimize(30, bands=7, **participation)


def test_the_number_of_bands_is_chosen_under_amplification():
    # noise multipliers of cyclic Poisson sampling with 10 000 examples, batches of 100, epsilon 8, delta 1e-6
    table = {1: 0.6185, 2: 0.6941, 4: 0.7988, 8: 0.9485, 16: 1.1646, 32: 1.4671, 64: 1.8483}
    scores = {b: table[b] * BandedToeplitz.optimize(1024, b).error(1024) for b in table}
    assert scores[32] == pytest.approx(7.270, abs=2e-3) and scores[1] == pytest.approx(14.001, abs=2e-3)
    chosen = BandedToeplitz.optimize(1024, list(table), noise_multiplier_for_bands=table.__getitem__)
    assert chosen.bands == 32
    assert BandedToeplitz.optimize(16, noise_multiplier_for_bands=lambda bands: 4.0**bands).bands == 1
    assert ColumnNormalizedBanded.optimize(64, [2, 4], noise_multiplier_for_bands=lambda bands: 1.0).bands == 4


def test_tight_trees_release_less_than_their_nodes():
    loose, tight = TreeAggregation(256), TreeAggregation(256, tight=True)
    assert loose.sensitivity(256) == pytest.approx(3.0)
    assert tight.sensitivity(256) == pytest.approx(np.linalg.norm(tight.materialize(256), axis=0).max())
    assert tight.sensitivity(256) == pytest.approx(math.sqrt(7.778544714842193))
    naive = TreeAggregation(256, honaker=False, tight=True)
    assert naive.sensitivity(256) == pytest.approx(3.0)


# --- what a caller may get wrong


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BandedToeplitz([]), "at least one number"),
        (lambda: BandedToeplitz([0.0, 1.0]), "begin with a positive"),
        (lambda: BandedToeplitz([1.0, math.nan]), "must be finite"),
        (lambda: BandedToeplitz.optimize(8, 9), "at most `steps`"),
        (lambda: BandedToeplitz.optimize(8, 0), "at least 1"),
        (lambda: BandedToeplitz.optimize(8), "noise_multiplier_for_bands"),
        (lambda: BandedToeplitz.optimize(8, [], noise_multiplier_for_bands=lambda b: 1.0), "at least one"),
        (lambda: BandedToeplitz.optimize(8, 2, kind="median"), '"mean"'),
        (lambda: BandedToeplitz.optimize(8, 2, workload="sum"), "prefix"),
        (lambda: BandedToeplitz.optimize(8, 2, min_separation=0), "min_separation"),
        (lambda: BandedToeplitz.optimize(8, 2, workload=np.ones(7)), r"\(7,\)"),
        (lambda: ColumnNormalizedBanded([1.0, 0.5], 1), "at most `steps`"),
        (lambda: ColumnNormalizedBanded([1.0, 0.5], 0), "at least 1"),
        (lambda: ColumnNormalizedBanded([1.0, 0.5], 4).error(5), "built for 4 steps"),
        (lambda: BandedInverse([-1.0]), "begin with a positive"),
        (lambda: BandedInverse.optimize(4, 5), "at most `steps`"),
        (lambda: GeometricStrategy(1.5), r"\[0, 1\]"),
        (lambda: GeometricStrategy(math.nan), r"\[0, 1\]"),
        (lambda: GeometricStrategy(0.5, normalize_columns=True), "give `steps"),
        (lambda: SquareRootToeplitz().init(jnp.ones(2)), "build `SquareRootToeplitz"),
        (lambda: SquareRootToeplitz(momentum=1.0), r"\[0, 1\)"),
        (lambda: BufferedToeplitz([1.0], [0.5]), r"\[0, 1\)"),
        (lambda: BufferedToeplitz([0.5, 0.5], [0.1, 0.1]), "distinct"),
        (lambda: BufferedToeplitz([0.5], [0.1, 0.2]), "same length"),
        (lambda: BufferedToeplitz([0.5], [math.inf]), "finite"),
        (lambda: BufferedToeplitz.optimize(8, 0), "at least 1"),
        (lambda: DenseStrategy(np.ones((2, 2))), "lower triangular"),
        (lambda: DenseStrategy(np.ones((2, 3))), "square"),
        (lambda: DenseStrategy(np.array([[1.0, 0.0], [0.0, 0.0]])), "positive diagonal"),
        (lambda: DenseStrategy(np.array([[math.nan]])), "finite"),
        (lambda: DenseStrategy(np.eye(3)).sensitivity(4), "built for 3 steps"),
        (lambda: DenseStrategy(np.eye(3)).materialize(4), "built for 3 steps"),
        (lambda: TreeAggregation(0), "at least 1"),
        (lambda: TreeAggregation(4, restart_every=5), "at most `steps`"),
        (lambda: TreeAggregation(4).error(5), "built for 4 steps"),
        (lambda: Identity().sensitivity(4, 0), "min_separation"),
        (lambda: Identity().sensitivity(4, 1, 0), "max_participations"),
        (lambda: Identity().sensitivity(0), "steps"),
        (lambda: Identity().error(4, np.ones((4, 4))), "lower triangular"),
        (lambda: Identity().error(2, np.array([1.0, math.inf])), "finite"),
        (lambda: momentum_workload(4, 1.0), r"\[0, 1\)"),
        (lambda: momentum_workload(4, 0.9, 0.0, np.ones(3)), "4 finite numbers"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_strategies_are_static_hashable_and_comparable():
    for name, strategy in STRATEGIES.items():
        assert not jax.tree.leaves(strategy) and hash(strategy) is not None, name
    assert DenseStrategy(np.eye(3)) == DenseStrategy(np.eye(3)) != DenseStrategy(2 * np.eye(3))
    traces = []

    @jax.jit
    def step(strategy, z, buffers):
        traces.append(None)
        return strategy.step(z, buffers)

    for _ in range(2):
        strategy = DenseStrategy(random_lower(4))
        step(strategy, jnp.ones(2), strategy.init(jnp.ones(2)))
    assert len(traces) == 1


# --- several participations


def least_squared_error(queries, found, separation, k, bands):
    """A bound that no banded matrix's squared mean error is below: the dual of the convex problem at the multipliers of `found`."""
    n = len(queries)
    gram = found.T @ found / found.shape[0]
    solved = np.linalg.solve(gram, queries.T)
    slope = solved @ solved.T
    lag = np.abs(np.arange(n)[:, None] - np.arange(n))
    slope = np.where((lag > 0) & (lag < bands), 0.0, slope)  # zero at the optimum
    # any D that is positive semidefinite and costs at most 1 on every pattern
    weight = np.diag(slope)
    slope = slope / best_pattern_cost(weight, separation, k)
    scale = np.sqrt(np.diag(slope))
    lowest = np.linalg.eigvalsh(slope / scale[:, None] / scale)[0]
    assert lowest > 0
    values, vectors = np.linalg.eigh(slope)
    root = vectors * np.sqrt(values)
    return np.linalg.svd(queries @ root, compute_uv=False).sum() ** 2 / n


def best_pattern_cost(weight, separation, k):
    """The least factor that puts weights into the hull of patterns: all windows sum to at most 1 and the total to at most k."""
    windows = np.convolve(weight, np.ones(separation), "valid") if separation <= len(weight) else [weight.sum()]
    return max(*windows, weight.sum() / k)


@pytest.mark.parametrize(("n", "separation", "k"), [(16, 4, 4), (24, 4, 3), (30, 6, 5), (18, 2, 9)])
def test_the_banded_optimum_of_several_participations_meets_its_dual_bound(n, separation, k):
    strategy = DenseStrategy.optimize(n, bands=separation, min_separation=separation, max_participations=k)
    assert strategy.bands is not None and strategy.bands <= separation
    assert strategy.sensitivity(n, separation, k) == pytest.approx(math.sqrt(k))
    squared = strategy.error(n, min_separation=separation, max_participations=k) ** 2
    bound = least_squared_error(np.tri(n), strategy.materialize(n), separation, k, separation)
    assert bound <= squared * (1 + 1e-9) and squared <= bound * (1 + 1e-5)


def test_the_dense_optimum_of_several_participations():
    participation: Any = dict(min_separation=4, max_participations=4)
    best = DenseStrategy.optimize(16, **participation)
    # the optimum of the convex problem is 13.6704; that of unit columns 14.4840, and of four bands 13.7181
    assert 13.6703 < best.error(16, **participation) ** 2 < 13.6704 * (1 + 2e-4)
    banded = DenseStrategy.optimize(16, bands=4, **participation)
    assert banded.error(16, **participation) ** 2 == pytest.approx(13.7181, abs=1e-4)
    assert best.sensitivity(16, 4, 4) == pytest.approx(2.0) == pytest.approx(banded.sensitivity(16, 4, 4))
    small = DenseStrategy.optimize(6, min_separation=2, max_participations=3)
    assert small.sensitivity(6, 2, 3) == pytest.approx(brute_force(small.materialize(6), 2, 3), rel=1e-4)
    worst = DenseStrategy.optimize(10, kind="max", min_separation=3, max_participations=2)
    assert worst.error(10, kind="max", min_separation=3, max_participations=2) ** 2 < 6.546  # the bound is 6.5445
