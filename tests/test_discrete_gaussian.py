"""Discrete Gaussian noise: contributions are integers of bounded norm, the noise is exact, the accounting is that of zCDP."""

import functools
import itertools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

import dpx
from conftest import assert_trees_close, assert_trees_equal, loss, make_batch, make_model, naive_clipped_sum
from dpx.noise import Rounding
from dpx.noise._discrete import discrete_gaussian
from dpx.noise._rounding import squared_norms
from dpx.random._wide import add, multiply

NOISE = dpx.DiscreteGaussian(1.5)
MASK = np.array([1, 0, 1, 1, 1, 1, 0, 1], bool)


def make(noise=NOISE, clipping=dpx.FlatClipping(0.5), loss=loss, **options):
    return dpx.PrivateGradient(loss, clipping, noise, **{"normalizer": 8.0, **options})


# --- Arithmetic ------------------------------------------------------------------------------------------------------------

WORD = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=300)
@given(WORD, WORD)
def test_wide_arithmetic_is_that_of_integers(x, y):
    low, high = multiply(jnp.uint32(x), jnp.uint32(y))
    assert int(high) << 32 | int(low) == x * y
    low, high = add(jnp.uint32(x), jnp.uint32(y))
    assert int(high) << 32 | int(low) == x + y


def exact_norms(leaves):
    rows = [np.asarray(v).reshape(len(v), -1).tolist() for v in leaves]
    return [sum(x * x for row in rows for x in row[i]) for i in range(len(rows[0]))]


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_squared_norms_are_exact(data):
    entry = st.one_of(st.integers(-3, 3), st.integers(-(2**17), 2**17), st.sampled_from([65535, 65536, -65536]))
    draw = lambda n: data.draw(st.lists(entry, min_size=3 * n, max_size=3 * n))
    leaves = [np.array(draw(4), np.int32).reshape(3, 2, 2), np.array(draw(3), np.int32).reshape(3, 3)]
    expected = [min(n, 2**32 - 1) for n in exact_norms(leaves)]
    assert squared_norms([jnp.asarray(v) for v in leaves]).tolist() == expected


@pytest.mark.parametrize("size", [1, 2**15 - 1, 2**15, 2**17 + 3])
def test_squared_norms_of_many_numbers_are_exact(size):
    rng = np.random.default_rng(size)
    top = math.isqrt(2**32 // size)
    rows = np.stack([np.full(size, top), rng.integers(-top, top, size), np.full(size, top + 1)]).clip(-(2**16), 2**16)
    expected = [min(n, 2**32 - 1) for n in exact_norms([rows])]
    assert squared_norms([jnp.asarray(rows, jnp.int32)]).tolist() == expected
    assert expected[2] == 2**32 - 1  # this one overflows


# --- Sensitivity -----------------------------------------------------------------------------------------------------------

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@functools.cache
def contributions(radius):
    """The integers of every row of gradients, clipped and rounded one by one as `PrivateGradient` does."""

    def one(row, norm):
        clipping = dpx.FlatClipping(norm)
        rounding = Rounding(clipping.sensitivity, radius, 9, 1)
        out = dpx.Vectorized().clipped_sum(
            lambda p, x: (jnp.sum(p["a"] * x[:4].reshape(2, 2)) + jnp.sum(p["b"] * x[4:]), None),
            {"a": jnp.zeros((2, 2)), "b": jnp.zeros(5)},
            row[None],
            jnp.ones(1, bool),
            (0, 0),
            2,
            lambda norms: clipping.factors(rounding.tightened(norms), ()),
            rounding.quantise,
        )
        return jax.tree.leaves(out.total)

    return jax.jit(jax.vmap(one, in_axes=(0, None)))


@pytest.mark.parametrize("radius", [2**2, pytest.param(2**6, marks=pytest.mark.slow), 2**16])
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_one_integer_vector_is_inside_the_ball(data, radius):
    """The bound holds exactly, for whatever floats: also just at the clip norm, and where all coordinates round up."""
    norm = data.draw(st.sampled_from([1e-12, 3e-5, 0.7, 1.0, 12345.678, 1e15]))
    free = st.lists(FLOATS, min_size=9, max_size=9)
    half = st.lists(st.integers(-3, 3).map(lambda k: (k + 0.5) * norm / radius), min_size=9, max_size=9)
    edge = st.sampled_from([1.0, 1 - 2**-20, 1 + 2**-20, 0.99]).map(lambda x: [x * norm / 3] * 9)
    rows = [data.draw(st.one_of(free, half, edge)) for _ in range(8)]
    leaves = contributions(radius)(jnp.asarray(rows, jnp.float32), jnp.float32(norm))
    assert all(v.dtype == jnp.int32 for v in leaves)
    assert max(exact_norms(leaves)) <= radius**2


def test_vectors_outside_the_ball_are_left_out():
    """If floats were to fail, the integers are looked at: a vector outside contributes nothing, rather than too much."""
    rounding = Rounding(jnp.float32(1.0), 16, 4, 2)
    inside, outside = rounding.quantise([jnp.array([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.6]])])[0]
    assert inside.tolist() == [8, 8, 8, 8] and outside.tolist() == [0, 0, 0, 0]
    huge = rounding.quantise([jnp.array([[1e30, -1e30, 0, 0], [jnp.nan, jnp.inf, -jnp.inf, 1.0]])])[0]
    assert not np.any(huge)


def test_sensitivity_by_brute_force():
    """All pairs of neighbouring sets of a few gradients: sums of integers differ by at most the radius."""
    radius = 8
    clipping = dpx.FlatClipping(1.0)
    rounding = Rounding(clipping.sensitivity, radius, 2, 1)
    grid = np.linspace(-1.5, 1.5, 25, dtype=np.float32)
    points = jnp.asarray(list(itertools.product(grid, grid)))
    norms = jnp.linalg.norm(points, axis=1, keepdims=True)
    clipped = clipping.factors(rounding.tightened(norms), ()) * points
    integers = np.asarray(rounding.quantise([clipped])[0], np.int64)
    sizes = np.sqrt((integers**2).sum(1))
    # as far as the theorem allows: not only the bound, some vector comes close to it
    assert radius - 1.5 < sizes.max() <= radius
    assert np.abs(integers - np.asarray(clipped) * radius).max() <= 0.5 + 1e-5


@pytest.mark.parametrize("method", [dpx.Vectorized(), dpx.Vectorized(1), dpx.Vectorized(3), dpx.Auto()], ids=str)
def test_the_sum_is_that_of_tightened_clipping(method):
    model, batch = make_model(), make_batch()
    total = make(method=method).clipped_sum(model, batch, mask=MASK).reveal()
    tightened = 0.5 * (1 - math.sqrt(15) / 2 / 2**16)
    expected = naive_clipped_sum(loss, model, batch, MASK, tightened)
    # six roundings of half a step
    assert_trees_close(total, expected, rtol=0, atol=6 * 0.5 * 0.5 / 2**16 + 1e-5)
    assert_trees_equal(total, make().clipped_sum(model, batch, mask=MASK).reveal())


def test_the_sum_does_not_depend_on_the_order():
    model, (x, y) = make_model(), make_batch(64)
    order = np.random.default_rng(0).permutation(64)
    total = make().clipped_sum(model, (x, y)).reveal()
    assert_trees_equal(total, make(method=dpx.Vectorized(7)).clipped_sum(model, (x[order], y[order])).reveal())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_examples_that_are_not_finite_contribute_nothing(bad):
    model, (x, y) = make_model(), make_batch()
    x[3] = bad
    total = make().clipped_sum(model, (x, y)).reveal()
    assert_trees_equal(total, make().clipped_sum(model, (x, y), mask=np.arange(8) != 3).reveal())


# --- Distribution ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 3, 20))])
def test_samples_have_the_exact_distribution(sigma):
    number = 100_000
    x = jnp.zeros((100, number // 100), jnp.int32)
    samples = np.asarray(jax.jit(discrete_gaussian)(jr.key(sigma), x, jnp.uint32(sigma))).ravel()
    values = np.arange(-12 * sigma, 12 * sigma + 1)
    weights = [mpmath.exp(-(mpmath.mpf(int(v)) ** 2) / (2 * sigma**2)) for v in values]
    total = mpmath.nsum(lambda v: mpmath.exp(-(v**2) / (2 * sigma**2)), [-mpmath.inf, mpmath.inf])
    expected = number * np.array([float(w / total) for w in weights])
    observed = np.array([(samples == v).sum() for v in values])
    assert observed.sum() == number
    is_common = expected > 8
    rest = [number - observed[is_common].sum(), number - expected[is_common].sum()]
    # a false alarm once in a million keys; the key is fixed
    test = stats.chisquare([*observed[is_common], rest[0]], [*expected[is_common], rest[1]])
    assert test.pvalue > 1e-6
    moved = np.roll(expected, 1)[is_common]
    off = stats.chisquare(observed[is_common], moved * observed[is_common].sum() / moved.sum())
    assert off.pvalue < 1e-6  # and one step off would be noticed


def test_noise_has_the_stated_scale():
    model = {"w": jnp.zeros(100_000)}
    private_grad = make(clipping=dpx.FlatClipping(0.25), loss=lambda m, x: jnp.sum(m["w"] * x))
    nobody = np.zeros(1, bool)
    grads, _, _ = private_grad(
        model, (np.ones((1, 1), np.float32),), private_grad.init(model, key=jr.key(5)), mask=nobody
    )
    z = np.asarray(grads["w"], np.float64) / (1.5 * 0.25 / 8.0)
    assert stats.kstest(z, "norm").pvalue > 1e-6  # a hundred thousand steps to a standard deviation look continuous
    assert stats.kstest(z * 1.03, "norm").pvalue < 1e-6
    steps = np.asarray(grads["w"], np.float64) * 8.0 / (0.25 / 2**16)
    np.testing.assert_allclose(steps, np.round(steps), rtol=1e-6)


def test_jit_is_eager():
    x = jnp.zeros(50, jnp.int32)
    compiled = jax.jit(discrete_gaussian)(jr.key(0), x, jnp.uint32(9))
    np.testing.assert_array_equal(compiled, discrete_gaussian(jr.key(0), x, jnp.uint32(9)))


def test_vmap_over_keys_and_multipliers_is_a_stack():
    model, batch = make_model(), make_batch()
    keys, sigmas = jr.split(jr.key(0), 2), jnp.array([0.5, 2.0])

    def one(key, sigma):
        private_grad = make(dpx.DiscreteGaussian(sigma))
        return private_grad(model, batch, private_grad.init(model, key=key), mask=MASK)[0]

    swept = eqx.filter_vmap(one)(keys, sigmas)
    for i in range(2):
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], swept), one(keys[i], sigmas[i]))


def test_steps_and_leaves_and_runs_have_noise_of_their_own():
    model, batch = make_model(), make_batch()
    private_grad = make(steps=2)
    draws = []
    for key in (jr.key(0), jr.key(1), jr.key(0)):
        state = private_grad.init(model, key=key)
        for _ in range(2):
            grads, state, _ = private_grad(model, batch, state)
            draws.append(np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)]))
        state.raise_if_failed()
    assert all(not np.any(a == b) for a, b in itertools.combinations(draws[:4], 2))
    np.testing.assert_array_equal(draws[0], draws[4])


def test_sharded_noise_is_that_of_one_device():
    model, batch = make_model(), make_batch()
    private_grad = make()
    alone = private_grad(model, batch, private_grad.init(model, key=jr.key(2)), mask=MASK)[0]
    with jax.set_mesh(jax.make_mesh((4,), ("data",))):
        place = lambda tree, spec: jax.tree.map(lambda x: jax.device_put(x, spec) if eqx.is_array(x) else x, tree)
        sharded = eqx.tree_at(lambda m: m.weight, place(model, jax.P()), place(model.weight, jax.P(None, "data")))
        state = private_grad.init(sharded, key=jr.key(2))
        grads = private_grad(sharded, place(batch, jax.P("data")), state, mask=MASK)[0]
        assert jax.typeof(grads.weight).sharding.spec == jax.P(None, "data")
    assert_trees_equal(grads, alone)  # sums of integers are equal to the bit, too


def test_it_runs_on_chacha_keys_and_in_half_precision():
    model, (x, y) = make_model(jnp.bfloat16), make_batch()
    private_grad = make(clipping=dpx.FlatClipping(0.5, unit_norm=True))
    state = private_grad.init(model, key=dpx.random.chacha_key())
    half = (jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16))
    grads, state, _ = private_grad(model, half, state)
    state.raise_if_failed()
    assert all(g.dtype == jnp.float32 and np.isfinite(np.asarray(g)).all() for g in jax.tree.leaves(grads))


# --- Accounting ------------------------------------------------------------------------------------------------------------


def zcdp_delta(rho: float, epsilon: float) -> float:
    """Canonne, Kamath and Steinke 2020, Corollary 13: the best order, by search."""
    orders = 1 + np.logspace(-3, 4, 20_001)
    exponent = (orders - 1) * (orders * rho - epsilon) + (orders - 1) * np.log1p(-1 / orders) - np.log(orders)
    return math.exp(exponent.min())


@pytest.mark.parametrize("steps", [1, 40])
def test_accounting_is_the_closed_formula(steps):
    sampler = dpx.PoissonSampler(1000, 1000, steps)
    plan = dpx.PrivacyPlan(sampler, dpx.FlatClipping(0.3), dpx.DiscreteGaussian(8.0), accountant="rdp")
    rho = steps / (2 * 8.0**2)
    epsilon = plan.epsilon(1e-6)
    # dp_accounting looks at fixed orders, so it may only be above
    assert zcdp_delta(rho, epsilon) <= 1e-6 * (1 + 1e-6) and zcdp_delta(rho, epsilon * 0.99) > 1e-6
    assert plan.epsilon(1e-6, steps=steps) == epsilon


def test_sampling_is_counted_and_the_statement_says_how():
    options: Any = {"accountant": "rdp"}
    sampled = dpx.PrivacyPlan(dpx.PoissonSampler(1000, 50, 20), dpx.FlatClipping(0.3), NOISE, **options)
    everybody = dpx.PrivacyPlan(dpx.PoissonSampler(1000, 1000, 20), dpx.FlatClipping(0.3), NOISE, **options)
    assert sampled.epsilon(1e-5) < everybody.epsilon(1e-5) / 3
    text = sampled.statement(1e-5)
    assert "Poisson sampling" in text and "Zhu and Wang" in text and "discrete Gaussian" in text
    assert "floating-point" not in text
    assert 0 < sampled.trade_off().advantage <= 1


def test_calibration_keeps_the_budget():
    plan = dpx.PrivacyPlan(
        dpx.PoissonSampler(1000, 100, 30), dpx.FlatClipping(1.0), dpx.DiscreteGaussian(), accountant="rdp"
    ).calibrate(epsilon=4.0, delta=1e-5)
    assert 3.99 < plan.epsilon(1e-5) <= 4.0
    assert isinstance(plan.noise, dpx.DiscreteGaussian) and plan.noise.granularity == 2.0**-16
    assert float(plan.noise_multiplier) * 2**16 % 1 == 0
    private_grad = plan.private_gradient(loss)
    model = make_model()
    _, state, _ = private_grad(model, make_batch(), private_grad.init(model), mask=np.ones(8, bool))
    state.raise_if_failed()


def test_multipliers_are_rounded_up_to_the_grid():
    noise = dpx.DiscreteGaussian(1.03, granularity=0.25)
    assert noise.noise_multiplier is not None and float(noise.noise_multiplier) == 1.25
    assert dpx.DiscreteGaussian(0.01, granularity=0.25).event(0.25).rho == 8.0  # pyright: ignore[reportAttributeAccessIssue]


# --- Bad input -------------------------------------------------------------------------------------------------------------


def test_a_grid_too_coarse_names_one_that_works():
    model, batch = {"w": jnp.zeros(1000)}, (np.ones((2, 1000), np.float32),)
    private_grad = make(dpx.DiscreteGaussian(1.0, granularity=2**-3), loss=lambda m, x: jnp.sum(m["w"] * x))
    with pytest.raises(ValueError, match=r"too coarse for 1000 parameters.*at most 2\*\*-4"):
        private_grad.clipped_sum(model, batch)
    fine = make(dpx.DiscreteGaussian(1.0, granularity=2**-4), loss=lambda m, x: jnp.sum(m["w"] * x))
    fine.clipped_sum(model, batch)
    with pytest.raises(ValueError, match="No granularity is fine enough"):
        Rounding(jnp.float32(1.0), 2**16, 2**40, 1)


def test_a_batch_that_could_overflow_is_refused():
    Rounding(jnp.float32(1.0), 2**16, 10, 2**14)
    with pytest.raises(ValueError, match="batches of at most 16384"):
        Rounding(jnp.float32(1.0), 2**16, 10, 2**14 + 1)


@pytest.mark.parametrize("granularity", [0.3, 2.0, 2**-17, 1 / 3])
def test_bad_granularities(granularity):
    with pytest.raises(ValueError, match=r"power of two.*Try 2\*\*"):
        dpx.DiscreteGaussian(1.0, granularity=granularity)


def test_bad_multipliers():
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(
            ValueError, match=r"`DiscreteGaussian\(noise_multiplier=\.\.\.\)` must be positive and finite"
        ):
            dpx.DiscreteGaussian(value)
    with pytest.raises(ValueError, match="at most 1024"):
        dpx.DiscreteGaussian(1025.0)
    model = make_model()
    traced = eqx.tree_at(lambda p: p.noise.noise_multiplier, make(), jnp.float32(5000.0))
    with pytest.raises(RuntimeError, match="infinite or NaN"):
        traced(model, make_batch(), traced.init(model))[1].raise_if_failed()


def test_plans_that_nobody_can_account_for():
    sampler, clipping = dpx.PoissonSampler(100, 10, 5), dpx.FlatClipping(1.0)
    with pytest.raises(ValueError, match="accountant='rdp'"):
        dpx.PrivacyPlan(sampler, clipping, NOISE)
    for accountant in ("pld", "rdp"):
        with pytest.raises(ValueError, match="'add_or_remove_one' or 'replace_special'"):
            dpx.PrivacyPlan(sampler, clipping, NOISE, adjacency="replace_one", accountant=accountant)
    cut = dpx.PrivacyPlan(dpx.PoissonSampler(100, 10, 5, 12), clipping, NOISE, accountant="rdp")
    with pytest.raises(ValueError, match="Truncated Poisson"):
        cut.epsilon(1e-5)
    with pytest.raises(ValueError, match="l2 norm"):
        dpx.PrivacyPlan(sampler, dpx.FlatClipping(1.0, order=1), NOISE, accountant="rdp")


def test_sums_that_are_not_integers_are_refused():
    with pytest.raises(ValueError, match="sums of integers"):
        NOISE.step({"w": jnp.zeros(3)}, jnp.float32(1.0), jr.key(0), jnp.int32(0), ())
    with pytest.raises(ValueError, match="no noise multiplier yet"):
        make(dpx.DiscreteGaussian())(make_model(), make_batch(), make().init(make_model()))
