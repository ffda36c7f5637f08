"""What DP changes about the update: noise variances, bias-corrected Adam, scaling before clipping, averages of parameters."""

import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import dpx
import registry
from conftest import assert_trees_close, assert_trees_equal
from dpx import optimizers
from dpx.noise._correlated import _row_powers


@pytest.mark.parametrize("record", registry.STRATEGIES, ids=lambda r: r.name)
def test_row_powers_end_at_the_horizon(record):
    strategy = record.value
    for steps in (1, 4):
        expected = np.square(np.linalg.inv(strategy.materialize(steps))).sum(1)
        np.testing.assert_allclose(strategy.inverse_row_power(steps), expected, rtol=1e-9)
    if strategy.steps is not None:
        with pytest.raises(ValueError, match="horizon"):
            strategy.inverse_row_power(strategy.steps + 1)


@pytest.mark.parametrize("options", [{}, {"honaker": False}, {"restart_every": 77}])
def test_row_powers_of_tall_trees(options):
    tree = dpx.TreeAggregation(300, **options)
    expected = np.square(np.linalg.inv(tree.materialize(300))).sum(1)
    np.testing.assert_allclose(tree.inverse_row_power(300), expected, rtol=1e-7)


def test_a_million_steps_are_looked_up_quickly():
    steps = 10**6
    start = time.perf_counter()
    for strategy in (
        dpx.BandedToeplitz.square_root(32),
        dpx.BufferedToeplitz([0.999, 0.9], [0.01, 0.2]),
        dpx.ColumnNormalizedBanded([1.0, 0.5, 0.25], steps),
        dpx.TreeAggregation(steps),
    ):
        noise = dpx.CorrelatedGaussian(strategy, 1.0)
        powers = strategy.inverse_row_power(steps)
        look = jax.jit(lambda t, noise=noise: noise.variance(jnp.float32(3.0), steps, t))
        for t in (0, 1, 777, steps - 2, steps - 1):
            assert float(look(jnp.int32(t))) == pytest.approx(9 * powers[t], rel=1e-6)
        assert _row_powers(strategy, steps) is _row_powers(strategy, steps)
    assert time.perf_counter() - start < 20
    # what has settled is not kept a million times
    assert len(_row_powers(dpx.BandedToeplitz.square_root(32), steps)) < 1000


INDEPENDENT: dict[str, tuple[dpx.AbstractNoise, float]] = {
    # and the variance of the sample variance of one draw, over the squared variance: kurtosis - 1
    "gaussian": (dpx.IndependentGaussian(1.5), 2.0),
    "laplace": (dpx.Laplace(1.5), 5.0),
    "discrete": (dpx.DiscreteGaussian(1.5, 2.0**-4), 2.0),
}


@pytest.mark.parametrize("name", ["gaussian", "laplace", pytest.param("discrete", marks=pytest.mark.slow)])
def test_variance_is_that_of_the_noise(name):
    noise, spread = INDEPENDENT[name]
    number = 200_000
    total = jnp.zeros(number, jnp.int32 if name == "discrete" else jnp.float32)
    scale = noise.scale(jnp.float32(0.5), 10, dpx.Participation(1, None))
    out, _ = jax.jit(lambda key: noise.step(total, scale, key, jnp.int32(3), ()))(jr.key(0))
    variance = float(noise.variance(scale, 10, jnp.int32(3)))
    measured = np.square(np.asarray(out, np.float64)).mean()
    # 6 standard errors: passed once in 5e8
    assert abs(measured / variance - 1) < 6 * np.sqrt(spread / number)


def test_variance_of_the_discrete_gaussian_by_its_probabilities():
    x = np.arange(-60, 61)
    p = np.exp(-np.square(x) / 2.0)
    exact = (p * x**2).sum() / p.sum()  # parameter 1 on the grid: the worst case
    noise = dpx.DiscreteGaussian(1.0, 1.0)
    stated = noise.variance(noise.scale(jnp.float32(1.0), None, dpx.Participation(1, None)), None, jnp.int32(0))
    assert 0 <= float(stated) - exact < 3e-7


def test_a_private_gradient_tells_its_noise_variance():
    def loss(model, x):
        return jnp.sum(model["w"] * x)

    model, steps = {"w": jnp.zeros(3), "b": None}, 5
    strategy = dpx.BandedToeplitz([1.0, 0.6, 0.3])
    noise = dpx.CorrelatedGaussian(strategy, 2.0)
    participation = dpx.Participation(3, 2)
    private_grad = dpx.PrivateGradient(
        loss, dpx.FlatClipping(0.5), noise, normalizer=4.0, steps=steps, participation=participation
    )
    state = private_grad.init(model, key=jr.key(0))
    powers = np.square(np.linalg.inv(strategy.materialize(steps))).sum(1)
    for power in powers:
        variance = private_grad.noise_variance(model, state)
        expected = (2.0 * 0.5 * strategy.sensitivity(steps, 3, 2) / 4.0) ** 2 * power
        assert float(variance["w"]) == pytest.approx(expected, rel=1e-5)
        _, state, _ = private_grad(model, (np.zeros((1, 3), np.float32),), state, mask=np.zeros(1, bool))


def reference_adam_bc(grads, variances, b1, b2, eps, floor):
    """The definition, in float64, from the whole history at every step."""
    out = []
    for t in range(1, len(grads) + 1):
        age = np.arange(t)[::-1]
        w1, w2 = (1 - b1) * b1**age, (1 - b2) * b2**age
        w1, w2 = w1 / w1.sum(), w2 / w2.sum()
        m, v, phi = w1 @ grads[:t], w2 @ np.square(grads[:t]), w2 @ variances[:t]
        least = phi * np.sqrt(2 * np.square(w2).sum()) if floor is None else floor
        out.append(m / (np.sqrt(np.maximum(v - phi, least)) + eps))
    return np.array(out)


def run_transform(transform, params, grads, **extra):
    """The updates of every step, compiled as one."""

    def body(state, x):
        g, args = x
        updates, state = transform.update(g, state, params, **args)
        return state, updates

    return jax.jit(lambda g, e: jax.lax.scan(body, transform.init(params), (g, e))[1])(grads, extra)


@pytest.mark.parametrize("floor, b2", [(None, 0.9), (0.05, 0.9), (None, 0.9999)])
def test_adam_bc_is_its_definition(floor, b2):
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(12, 3)).astype(np.float32)
    variances = rng.uniform(0.2, 1.5, 12).astype(np.float32)
    transform = optimizers.scale_by_adam_bc(0.8, b2, 1e-4, floor)
    out = run_transform(transform, {"w": jnp.zeros(3)}, {"w": grads}, noise_variance=variances)["w"]
    expected = reference_adam_bc(grads.astype(np.float64), variances.astype(np.float64), 0.8, b2, 1e-4, floor)
    np.testing.assert_allclose(out, expected, rtol=2e-4 if b2 < 0.999 else 5e-3, atol=1e-6)


def test_adam_bc_without_noise_is_adam():
    params = {"w": jnp.ones((2, 2)), "b": (jnp.ones(3), None)}
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: rng.normal(size=(6, *x.shape)).astype(np.float32), params)
    mine = run_transform(optimizers.scale_by_adam_bc(), params, grads, noise_variance=np.zeros(6, np.float32))
    with jax.numpy_dtype_promotion("standard"):
        theirs = run_transform(optax.scale_by_adam(), params, grads)
    assert_trees_close(mine, theirs, rtol=1e-4)


def test_adam_bc_takes_a_prefix_of_variances_and_half_precision():
    params = {"w": jnp.ones(2, jnp.bfloat16), "b": (jnp.ones(3), None)}
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, jnp.float32), params)
    optim = optimizers.adam_bc(optax.constant_schedule(0.1), floor=0.01)
    state = jax.jit(optim.init)(params)
    update = jax.jit(lambda g, s, v: optim.update(g, s, noise_variance={"w": 0.0, "b": v}))
    updates, state = update(grads, state, jnp.float32(0.21))
    assert updates["w"].dtype == jnp.float32
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["b"][0], -0.1 * 0.5 / 0.2, rtol=1e-5)  # 0.25 - 0.21 = 0.2^2
    for wrong in ({"w": 0.0}, {"w": 0.0, "b": (0.0, 0.0, 0.0)}, {"w": 0.0, "b": jnp.zeros(3)}):
        with pytest.raises(ValueError, match="noise_variance"):
            optim.update(grads, state, noise_variance=wrong)
    with pytest.raises(ValueError, match="private_grad.noise_variance"):
        optim.update(grads, state)


# A sparse problem: coordinates that many examples have (their gradients are dominated by sampling noise of deviation 10) and rare
# ones, whose gradients are a quarter of the privacy noise. Adam sees the same second moment, that of the noise, in all rare ones.
FREQUENT, RARE, STEPS = 200, 100, 300


def sparse_loss(w):
    rare = w[FREQUENT:] - 5.0
    return 1.5 * jnp.sum(jnp.square(w[:FREQUENT] - 1.0)) + 0.25 * jnp.sum(jnp.sqrt(1.0 + rare * rare) - 1.0)


@pytest.fixture(scope="module")
def sparse_runs():
    """Final loss over initial loss, of Adam and its correction, for every learning rate (each a factor 2 apart) and seed."""
    rates, rng = 0.016 * np.array([1, 2, 4, 8], np.float32), np.random.default_rng(0)
    # sampling noise and privacy noise, one draw of both for each seed
    deviation = np.where(np.arange(FREQUENT + RARE) < FREQUENT, np.sqrt(10.0**2 + 1), 1.0)
    noises = (deviation * rng.normal(size=(5, STEPS, FREQUENT + RARE))).astype(np.float32)

    def run(transform, extra):
        def one(rate, noise):
            def body(carry, xi):
                w, state = carry
                updates, state = transform.update(jax.grad(sparse_loss)(w) + xi, state, w, **extra)
                return (w - rate * updates, state), None

            w = jnp.zeros(FREQUENT + RARE)
            (last, _), _ = jax.lax.scan(body, (w, transform.init(w)), noise)
            return sparse_loss(last) / sparse_loss(w)

        return np.asarray(jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(rates, noises))

    with jax.numpy_dtype_promotion("standard"):
        adam = run(optax.scale_by_adam(), {})
    return adam, run(optimizers.scale_by_adam_bc(), {"noise_variance": 1.0})


def test_the_correction_beats_adam_where_noise_dominates(sparse_runs):
    adam, corrected = sparse_runs
    # each at the learning rate that is best for it: half the loss, and more than a third less on every seed
    assert corrected.mean(1).min() < 0.6 * adam.mean(1).min()
    best = adam[adam.mean(1).argmin()], corrected[corrected.mean(1).argmin()]
    assert (best[1] < 0.65 * best[0]).all()
    # and at a small learning rate, where it still moves
    assert (corrected[0] < 0.65 * adam[0]).all()


def test_scales_are_those_of_the_second_moment():
    params = {"w": jnp.ones((2, 2)), "b": None, "nu": jnp.ones(3)}
    with jax.numpy_dtype_promotion("standard"):
        optim = optimizers.scale_then_privatize(optax.chain(optax.clip(9.0), optax.adam(0.1, b2=0.5)), eps=0.1)
        plain = optimizers.scale_then_privatize(optim.optimizer, eps=0.1, normalize=False)
        state = jax.jit(optim.init)(params)
        assert_trees_close(jax.jit(optim.scaling)(state), jax.tree.map(jnp.ones_like, params))
        grads = jax.tree.map(lambda x: jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape), params)
        updates, state = jax.jit(optim.update)(grads, state, params)
        expected, _ = jax.jit(optim.optimizer.update)(grads, jax.jit(optim.optimizer.init)(params), params)
    assert_trees_equal(updates, expected)
    sizes = jax.tree.map(lambda g: np.sqrt(0.5 * np.square(g)) + 0.1, grads)
    published, ours = jax.jit(lambda state: (plain.scaling(state), optim.scaling(state)))(state)
    assert_trees_close(published, jax.tree.map(lambda x: 1 / x, sizes))
    inverse_squares = np.concatenate([np.ravel(1 / np.square(x)) for x in jax.tree.leaves(ours)])
    assert inverse_squares.mean() == pytest.approx(1.0, rel=1e-5)
    ratio = jax.tree.map(lambda a, b: np.asarray(a) / np.asarray(b), ours, published)
    assert np.ptp(np.concatenate([np.ravel(x) for x in jax.tree.leaves(ratio)])) < 1e-4


def test_scaling_before_clipping_fits_the_noise_to_the_gradients():
    # two coordinates of gradients 1 and 0.01: without scaling the second is lost in the noise of the first
    def loss(model, x):
        return jnp.sum(model * x)

    model, examples = jnp.zeros(2), np.tile(np.array([1.0, 0.01], np.float32), (200, 1))
    private_grad = dpx.PrivateGradient(
        loss, dpx.FlatClipping(2.0), dpx.IndependentGaussian(5.0), normalizer=200, method=dpx.Vectorized()
    )
    with jax.numpy_dtype_promotion("standard"):
        optim = optimizers.scale_then_privatize(optax.adam(0.1, b2=0.9), eps=0.001)

        @eqx.filter_jit
        def run(key, scaled):
            def body(carry, _):
                state, opt_state = carry
                scaling = jax.tree.map(lambda s: jnp.where(scaled, s, 1.0), optim.scaling(opt_state))
                grads, state, _ = private_grad(model, (examples,), state, scaling=scaling)
                _, opt_state = optim.update(grads, opt_state, model)
                return (state, opt_state), grads

            start = (private_grad.init(model, key=key), optim.init(model))
            return jax.lax.scan(body, start, None, length=60)[1][30:]

        noise = {scaled: np.asarray(run(jr.key(1), jnp.asarray(scaled)).std(0)) for scaled in (False, True)}
    assert noise[False][1] > 0.03  # 5 * 2 / 200 = 0.05
    assert noise[True][1] < 0.5 * noise[False][1] and noise[True][0] < 2 * noise[False][0]


def test_ema_warms_up():
    average = optimizers.ema(0.999)
    decay = 1 - jax.jit(jax.vmap(average.weight))(jnp.array([0, 9, 99, 999, 10**6]))
    np.testing.assert_allclose(decay, [0.1, 10 / 19, 100 / 109, 1000 / 1009, 0.999], rtol=1e-5)
    assert float(optimizers.ema(0.9, warm_up=False).weight(jnp.int32(0))) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["ema", "tail"])
def test_averages_are_their_definitions(kind):
    average = optimizers.ema(0.8) if kind == "ema" else optimizers.tail_average(4)
    values = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    params = lambda v: {"w": jnp.asarray(v), "h": jnp.asarray(v, jnp.bfloat16), "s": None}
    state = average.init(params(values[0]))
    step = jax.jit(average.step)
    expected = np.float64(values[0])
    for t, value in enumerate(values[1:]):
        state = step(state, params(value))
        mu = min(0.8, (1 + t) / (10 + t))
        tail = values[1 + 4 : t + 2].mean(0) if t >= 4 else value
        expected = mu * expected + (1 - mu) * value if kind == "ema" else tail
        np.testing.assert_allclose(state.average["w"], expected, rtol=1e-5, atol=1e-6)
    assert state.average["h"].dtype == jnp.float32 and state.average["s"] is None
    model = state.apply_to({"w": jnp.zeros(3), "h": jnp.zeros(3, jnp.bfloat16), "s": "name"})
    assert model["h"].dtype == jnp.bfloat16 and model["s"] == "name"
    assert_trees_equal(model["w"], state.average["w"])


def test_averages_in_half_precision_move():
    average = optimizers.ema(0.999, warm_up=False)
    state = average.init(jnp.ones(1, jnp.bfloat16))
    state = jax.jit(average.step)(state, jnp.full(1, 2.0, jnp.bfloat16))
    assert float(state.average[0]) == pytest.approx(1.001, rel=1e-6)  # bfloat16 has no number between 1 and 1.0078


BAD: list[tuple[Any, str]] = [
    (lambda: optimizers.scale_by_adam_bc(b1=1.0), r"b1=...\)` must lie in \[0, 1\)"),
    (lambda: optimizers.scale_by_adam_bc(b2=-0.1), r"b2=...\)` must lie in \[0, 1\)"),
    (lambda: optimizers.adam_bc(0.1, eps=0.0), "positive"),
    (lambda: optimizers.adam_bc(0.1, floor=-1.0), "positive"),
    (lambda: optimizers.scale_then_privatize(0.1), "optax transformation"),
    (lambda: optimizers.scale_then_privatize(optax.adam(0.1), eps=0.0), "positive"),
    (lambda: optimizers.scale_then_privatize(optax.sgd(0.1)).init(jnp.ones(2)), "one second moment"),
    (lambda: optimizers.ema(1.0), r"\[0, 1\)"),
    (lambda: optimizers.tail_average(-1), "at least 1"),
    (
        lambda: dpx.CorrelatedGaussian(dpx.Identity(), 1.0).variance(jnp.float32(1), None, jnp.int32(0)),
        "how many steps",
    ),
]


@pytest.mark.parametrize("make, match", BAD)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()
