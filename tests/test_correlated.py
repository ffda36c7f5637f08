"""Correlated noise: the covariance of its strategy, scaled by its sensitivity, streamed, replayed, sharded, and accounted."""

from typing import Any

import dp_accounting as da
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType

import dpx
import registry
from conftest import assert_trees_close, assert_trees_equal

STEPS = 6
BANDED = dpx.BandedToeplitz([1.0, 0.6, 0.3])
DENSE = dpx.DenseStrategy(np.tril(np.ones((STEPS, STEPS))))
STRATEGIES = registry.by_name([r for r in registry.STRATEGIES if not r.is_variant and not r.has_signs])
PARTICIPATION = dpx.Participation(3, 2)


def make(strategy, width=1, steps: int | None = STEPS, multiplier=2.0, **options):
    def loss(model, x):
        return jnp.sum(model["w"] * x)

    noise = dpx.CorrelatedGaussian(strategy, multiplier, **options)
    private_grad = dpx.PrivateGradient(
        loss, dpx.FlatClipping(0.5), noise, normalizer=4.0, steps=steps, participation=PARTICIPATION
    )
    return private_grad, {"w": jnp.zeros(width)}, (np.zeros((1, width), np.float32),)


def stream(private_grad, model, batch, key, steps=STEPS):
    def body(state, _):
        grads, state, _ = private_grad(model, batch, state, mask=np.zeros(1, bool))
        return state, grads["w"]

    return eqx.filter_jit(lambda state: jax.lax.scan(body, state, None, length=steps))(
        private_grad.init(model, key=key)
    )


@pytest.mark.parametrize("strategy", [dpx.GeometricStrategy(0.7), dpx.BandedInverse.square_root(4), dpx.Identity()])
def test_replay_is_the_buffered_stream_without_buffers(strategy):
    key = jr.key(8)
    kept = stream(*make(strategy, 5), key)
    replayed = stream(*make(strategy, 5, replay=True), key)
    assert_trees_close(kept[1], replayed[1])
    assert replayed[0].noise == ()


@pytest.mark.parametrize(
    "strategy",
    [
        dpx.ColumnNormalizedBanded([1.0, 0.6, 0.3], STEPS),
        dpx.SquareRootToeplitz(STEPS),
        DENSE,
        dpx.TreeAggregation(STEPS),
    ],
    ids=lambda s: type(s).__name__,
)
def test_noise_never_repeats_past_the_horizon(strategy):
    private_grad, model, batch = make(strategy, steps=None)
    assert private_grad.steps == strategy.steps
    state, x = stream(private_grad, model, batch, jr.key(0), STEPS + 2)
    assert np.isfinite(x[:STEPS]).all() and np.isnan(x[STEPS:]).all()
    with pytest.raises(RuntimeError, match="budget"):
        state.raise_if_failed()
    # and the noise by itself, were it called on without a PrivateGradient
    noise = private_grad.noise
    buffers = noise.init({"w": jnp.zeros(2)})
    for step in range(STEPS + 1):
        out, buffers = noise.step({"w": jnp.zeros(2)}, jnp.ones(()), jr.key(0), jnp.asarray(step), buffers)
    assert np.isnan(out["w"]).all()


@pytest.mark.parametrize(
    "strategy",
    [
        dpx.BandedToeplitz.square_root(24),
        dpx.BandedInverse.square_root(24),
        dpx.SquareRootToeplitz(25),
        dpx.BufferedToeplitz([0.9, 0.6, 0.3, 0.1], [0.1, 0.2, 0.3, 0.1]),
        dpx.TreeAggregation(2**20),
    ],
)
def test_the_ring_is_never_copied_where_noise_is_added_to_a_sum(strategy):
    # what is used twice, XLA likes to compute twice, once from a copy of everything that it reads
    def temporary(noise):
        total = jnp.zeros(1 << 16)
        step = lambda total, buffers: noise.step(total, jnp.ones(()), jr.key(0), jnp.int32(3), buffers)
        compiled = jax.jit(step, donate_argnums=1).lower(total, noise.init(total)).compile()
        memory: Any = compiled.memory_analysis()
        return memory.temp_size_in_bytes / total.nbytes

    assert temporary(dpx.CorrelatedGaussian(strategy, 1.0)) <= temporary(dpx.IndependentGaussian(1.0)) + 2.2


@pytest.mark.parametrize(
    "strategy", [dpx.BandedToeplitz.square_root(32), dpx.BufferedToeplitz([0.9, 0.6, 0.3, 0.1], [0.1, 0.2, 0.3, 0.1])]
)
def test_a_donated_step_neither_copies_nor_tests_its_buffers(strategy):
    def temporary(noise):
        private_grad, model, batch = make(strategy, 1 << 16)
        private_grad = eqx.tree_at(lambda p: p.noise, private_grad, noise)
        state = private_grad.init(model, key=jr.key(0))

        def step(model, state):
            grads, state, _ = private_grad(model, batch, state)
            return jax.tree.map(jnp.subtract, model, grads), state

        compiled: Any = jax.jit(step, donate_argnums=(0, 1)).lower(model, state).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves((model, state.noise)))
        return memory.temp_size_in_bytes / model["w"].nbytes

    correlated = dpx.CorrelatedGaussian(strategy, 2.0)
    # 1.25 when this was written; the whole ring of 31 and its mask otherwise
    assert temporary(correlated) <= temporary(dpx.IndependentGaussian(2.0)) + 1.5


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_buffer_that_is_not_finite_is_flagged_by_the_gradients(name):
    private_grad, model, batch = make(STRATEGIES[name], 3)
    state = private_grad.init(model, key=jr.key(0))
    if not jax.tree.leaves(state.noise):
        return  # there is nothing to break
    for _ in range(2):
        _, state, _ = private_grad(model, batch, state)
    state.raise_if_failed()
    is_kept = lambda x: jnp.issubdtype(x.dtype, jnp.inexact) and x.ndim > 1
    assert any(map(is_kept, jax.tree.leaves(state.noise)))
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if is_kept(x) else x, state.noise)
    grads, state, _ = private_grad(model, batch, eqx.tree_at(lambda s: s.noise, state, broken))
    assert np.isnan(grads["w"]).all() and state.result == dpx.Result.non_finite


def test_mechanisms_are_the_same_on_four_devices():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,))
    for strategy in (BANDED, dpx.GeometricStrategy(0.7), dpx.TreeAggregation(STEPS)):
        private_grad, model, batch = make(strategy, 8)
        _, x = stream(private_grad, model, batch, jr.key(1))
        with jax.set_mesh(mesh):
            sharded = jax.device_put(model, jax.P("model"))
            state, y = stream(private_grad, sharded, batch, jr.key(1))
            assert all("model" in str(jax.typeof(b).sharding.spec) for b in jax.tree.leaves(state.noise) if b.ndim > 1)
        assert_trees_equal(x, y)


def test_a_stopped_run_goes_on_bit_for_bit():
    private_grad, model, batch = make(BANDED, 3)
    _, whole = stream(private_grad, model, batch, jr.key(2))
    state, first = stream(private_grad, model, batch, jr.key(2), 3)
    rows = []
    for _ in range(3):
        grads, state, _ = private_grad(model, batch, state, mask=np.zeros(1, bool))
        rows.append(grads["w"])
    assert_trees_close(jnp.concatenate([first, jnp.stack(rows)]), whole, rtol=1e-6)


def test_amplified_plans_reproduce_the_reference():
    # Choquette-Choo et al. 2023: N = 10,000, B = 100, n = 1,024, (8, 1e-6)
    for bands, multiplier, error in ((16, 1.1646, 7.387),):
        plan = dpx.dp_mf(10_000, 100, 1024, bands=bands, epsilon=8.0, delta=1e-6)
        assert plan.noise_multiplier == pytest.approx(multiplier, abs=2e-4)
        assert plan.error() * 100 == pytest.approx(error, abs=2e-3)
        assert plan.epsilon(1e-6) <= 8.0


def test_amplified_event_and_scale_speak_of_the_same_participation():
    strategy = BANDED
    plan = dpx.dp_mf(1000, 10, 100, strategy=strategy, noise_multiplier=1.5, clipping=dpx.FlatClipping(0.5))
    assert plan.event == da.SelfComposedDpEvent(da.PoissonSampledDpEvent(0.03, da.GaussianDpEvent(1.5)), 34)
    private_grad = plan.private_gradient(lambda m, x: jnp.sum(m * x))
    assert private_grad.participation == dpx.Participation(3, 1)
    scale = plan.noise.scale(plan.clipping.sensitivity, 100, private_grad.participation)
    column = np.sqrt(1 + 0.36 + 0.09)
    assert column * 0.75 <= float(scale) <= column * 0.75 * (1 + 1e-5)
    assert plan.sampler.participation == dpx.Participation(3, 34)


def test_unamplified_plans_are_one_gaussian():
    plan = dpx.dp_mf(1000, 10, 250, strategy=dpx.SquareRootToeplitz(), epsilon=1.0, delta=1e-6)
    assert isinstance(plan.sampler, dpx.ShuffleSampler) and plan.sampler.participation == dpx.Participation(100, 3)
    assert plan.noise_multiplier == pytest.approx(da.get_sigma_gaussian(1.0, 1e-6), rel=1e-4)
    assert plan.epsilon(1e-6) <= 1.0
    expected = dpx.SquareRootToeplitz().sensitivity(250, 100, 3)
    assert float(plan.noise.scale(plan.clipping.sensitivity, 250, plan.sampler.participation)) == pytest.approx(
        plan.noise_multiplier * expected, rel=1e-5
    )
    assert plan.adjacency == "replace_special"
    plan.private_gradient(lambda m, x: m * x).init(jnp.ones(()))  # the strategy knows the steps of the plan
    halved = dpx.dp_mf(1000, 10, 250, strategy=dpx.SquareRootToeplitz(), noise_multiplier=8.0, adjacency="replace_one")
    assert halved.epsilon(1e-6) == pytest.approx(da.get_epsilon_gaussian(4.0, 1e-6), rel=1e-6)


def test_shuffled_independent_noise_is_composed_over_participations():
    sampler = dpx.ShuffleSampler(100, 10, 35)
    plan = dpx.PrivacyPlan(sampler, dpx.FlatClipping(1.0), dpx.IndependentGaussian(5.0), adjacency="replace_special")
    assert plan.epsilon(1e-6) == pytest.approx(da.get_epsilon_gaussian(5.0 / 2, 1e-6), rel=1e-6)  # four participations
    assert plan.epsilon(1e-6, steps=10) == pytest.approx(da.get_epsilon_gaussian(5.0, 1e-6), rel=1e-6)


@pytest.mark.parametrize(
    ("make_plan", "match"),
    [
        (lambda: dpx.dp_mf(1000, 10, 50, noise_multiplier=1.0), "both or neither"),
        (lambda: dpx.dp_mf(1000, 10, 50, bands=51, noise_multiplier=1.0), "at most `steps`"),
        (lambda: dpx.dp_mf(1000, 10, 50, bands=0, noise_multiplier=1.0), "bands"),
        (lambda: dpx.dp_mf(1000, 10, 50, bands=3, noise_multiplier=-1.0), "noise_multiplier"),
        (lambda: dpx.dp_mf(1000, 10, 50, bands=3), "got neither"),
        (
            lambda: dpx.dp_mf(1000, 10, 50, strategy=dpx.SquareRootToeplitz(), amplified=True, noise_multiplier=1.0),
            "needs a banded",
        ),
        (lambda: dpx.dp_mf(1000, 10, 7, strategy=DENSE, noise_multiplier=1.0), "must agree"),
        (lambda: dpx.dp_mf(1000, 10, 5, strategy=DENSE, noise_multiplier=1.0), "must agree"),
        (lambda: dpx.dp_mf(1000, 200, 50, bands=8, amplified=True, noise_multiplier=1.0), "cycle_length"),
        (
            lambda: (
                dpx.PrivacyPlan(
                    dpx.PoissonSampler(100, 10, 5),
                    dpx.FlatClipping(1.0),
                    dpx.CorrelatedGaussian(BANDED, 1.0),
                ).event
            ),
            "plain Poisson sampling",
        ),
        (
            lambda: (
                dpx.PrivacyPlan(
                    dpx.CyclicPoissonSampler(100, 10, 5, 2),
                    dpx.FlatClipping(1.0),
                    dpx.CorrelatedGaussian(BANDED, 1.0),
                ).event
            ),
            "at most that many bands",
        ),
        (
            lambda: dpx.PrivacyPlan(
                dpx.ShuffleSampler(100, 10, 5), dpx.FlatClipping(1.0), dpx.IndependentGaussian(1.0)
            ),
            "none can be added or removed",
        ),
        (lambda: dpx.CorrelatedGaussian(BANDED, replay=True), "not banded"),
        (lambda: make(DENSE, steps=7), "horizon"),
    ],
)
def test_bad_input(make_plan, match):
    with pytest.raises(ValueError, match=match):
        make_plan()


def test_steps_must_be_known():
    private_grad, model, batch = make(BANDED, steps=None)
    with pytest.raises(ValueError, match="for how many steps"):
        private_grad(model, batch, private_grad.init(model))
