"""Numbers that the host refuses are NaN where they cannot be looked at: gradients are NaN then, and the result says so."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import dpx
from conftest import loss, make_batch, make_model
from dpx import metrics

MODEL, BATCH = make_model(), make_batch()
F, G = dpx.FlatClipping, dpx.IndependentGaussian
BAD = [0.0, -1.0, np.nan, np.inf]


def gradient(clipping: Any = F(0.5), noise: Any = G(1.0), **options):
    # what is tested does not depend on the method, and this one compiles quickly
    return dpx.PrivateGradient(loss, clipping, noise, **{"method": dpx.Vectorized(), **options})


# every constructor that takes a number, as a function of it, and a good value
TRACED: dict[str, Any] = {
    "IndependentGaussian": (lambda v: gradient(noise=G(v)), 1.0),
    "Laplace": (lambda v: gradient(F(0.5, order=1), dpx.Laplace(v)), 1.0),
    "CorrelatedGaussian": (
        lambda v: gradient(noise=dpx.CorrelatedGaussian(dpx.BandedToeplitz([1.0, 0.5]), v), steps=3),
        1.0,
    ),
    "DiscreteGaussian": (lambda v: gradient(noise=dpx.DiscreteGaussian(v)), 1.0),
    "FlatClipping": (lambda v: gradient(F(v)), 1.0),
    "FlatClipping, unit norm": (lambda v: gradient(F(v, unit_norm=True)), 1.0),
    "GroupClipping": (lambda v: gradient(dpx.GroupClipping(type(MODEL)(v, 0.4, None, None))), 1.0),
    "GroupClipping, unit norm": (
        lambda v: gradient(dpx.GroupClipping(type(MODEL)(0.4, v, None, None), unit_norm=True)),
        1.0,
    ),
    "per layer": (lambda v: gradient(dpx.GroupClipping.per_layer(MODEL, v)), 1.0),
    "NormalizedClipping": (lambda v: gradient(dpx.NormalizedClipping(v)), 1.0),
    "gamma": (lambda v: gradient(dpx.NormalizedClipping(1.0, gamma=v)), 0.1),
    "PSACClipping": (lambda v: gradient(dpx.PSACClipping(v)), 1.0),
    "r": (lambda v: gradient(dpx.PSACClipping(1.0, r=v)), 0.1),
    "HardThresholdClipping": (lambda v: gradient(dpx.HardThresholdClipping(v, 9.0)), 1.0),
    "threshold": (lambda v: gradient(dpx.HardThresholdClipping(1.0, v)), 9.0),
    "AdaptiveClipping": (lambda v: gradient(dpx.AdaptiveClipping(v)), 1.0),
    "slack norm": (lambda v: gradient(dpx.SlackClipping(v)), 1.0),
    "slack quantile": (lambda v: gradient(dpx.SlackClipping(1.0, quantile=v)), 0.5),
    "slack learning rate": (lambda v: gradient(dpx.SlackClipping(1.0, learning_rate=v)), 0.2),
    "quantile": (lambda v: gradient(dpx.AdaptiveClipping(1.0, quantile=v)), 0.5),
    "learning rate": (lambda v: gradient(dpx.AdaptiveClipping(1.0, learning_rate=v)), 0.2),
    "counts": (lambda v: gradient(dpx.AdaptiveClipping(1.0, count_noise_multiplier=v)), 10.0),
    "normalizer": (lambda v: gradient(normalizer=v), 8.0),
    "metric": (lambda v: gradient(metrics={"m": metrics.Count(None, v)}), 10.0),
    "metric's range": (lambda v: gradient(metrics={"m": metrics.Mean("losses", -2.0, v, 5.0)}), 3.0),
    "metric's quantile": (lambda v: gradient(metrics={"m": metrics.Quantile("losses", v, 0.0, 1.0, 5.0)}), 0.5),
}
FINE = {("gamma", 0.0), ("metric's range", 0.0), ("metric's range", -1.0), ("quantile", 1.0)}
KEY = jr.key(0)


def is_bad(grads, state):
    nan = [bool(np.isnan(g).all()) for g in jax.tree.leaves(grads)]
    assert all(nan) or not any(nan)
    assert all(nan) == (state.result == dpx.Result.non_finite)
    return all(nan)


@pytest.mark.parametrize("name", TRACED)
def test_a_traced_number_that_the_host_would_refuse_is_marked(name):
    make, good = TRACED[name]

    @jax.jit
    def run(value, mask):
        private_grad = make(value)
        state = private_grad.init(MODEL, key=KEY)
        grads, after, _ = private_grad(MODEL, BATCH, state, mask=mask)
        return grads.weight, after, (state.clipping, state.metrics)

    # whatever the batch holds, nothing at all included: what is public decides
    for mask in (np.ones(8, bool), np.zeros(8, bool)):
        assert not is_bad(*run(good, mask)[:2])
        for value in BAD:
            if (name, value) in FINE:
                continue
            grads, after, before = run(value, mask)
            assert is_bad(grads, after), value
            # nothing that the step saw is learnt by clipping or metrics
            for x, y in zip(jax.tree.leaves((after.clipping, after.metrics)), jax.tree.leaves(before), strict=True):
                np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("name", TRACED)
def test_the_host_refuses_the_same_numbers(name):
    make, good = TRACED[name]
    make(good)
    for value in BAD:
        if (name, value) not in FINE:
            with pytest.raises(ValueError):
                make(value)


def test_lanes_of_a_sweep_are_marked_one_by_one():
    noises = eqx.filter_vmap(lambda s: G(s))(jnp.array([1.0, 0.0, -2.0, jnp.nan, 3.0]))
    clippings = eqx.filter_vmap(lambda c: F(c))(jnp.array([1.0, 1.0, 1.0, 1.0, 0.0]))
    assert np.isnan(noises.noise_multiplier).tolist() == [False, True, True, True, False]
    assert np.isnan(clippings.norm).tolist() == [False] * 4 + [True]
    keys = jr.split(jr.key(1), 5)

    def one(noise, clipping, key):
        private_grad = gradient(clipping, noise)
        return private_grad(MODEL, BATCH, private_grad.init(MODEL, key=key))[:2]

    grads, states = eqx.filter_vmap(one)(noises, clippings, keys)
    bad = np.isnan(np.asarray(grads.weight)).all((1, 2))
    np.testing.assert_array_equal(bad, [False, True, True, True, True])
    is_marked = jax.vmap(lambda s: s.result == dpx.Result.non_finite)(states)
    np.testing.assert_array_equal(is_marked, bad)


# numbers of a finished module, which `eqx.tree_at` reaches
LEAVES: dict[str, Any] = {
    "multiplier": (gradient(), lambda p: p.noise.noise_multiplier),
    "norm": (gradient(), lambda p: p.clipping.norm),
    "norm, unit": (gradient(F(0.5, unit_norm=True)), lambda p: p.clipping.norm),
    "norms": (gradient(dpx.GroupClipping(type(MODEL)(0.3, 0.4, None, None))), lambda p: p.clipping.norms),
    "r": (gradient(dpx.PSACClipping(1.0)), lambda p: p.clipping.r),
    "threshold": (gradient(dpx.HardThresholdClipping(1.0, 2.0)), lambda p: p.clipping.threshold),
    "initial norms": (gradient(dpx.AdaptiveClipping(1.0)), lambda p: p.clipping.initial_norms),
    "counts": (gradient(dpx.AdaptiveClipping(1.0)), lambda p: p.clipping.count_noise_multiplier),
    "normalizer": (gradient(), lambda p: p.normalizer),
    "discrete": (gradient(noise=dpx.DiscreteGaussian(1.0)), lambda p: p.noise.noise_multiplier),
    "metric": (gradient(metrics={"m": metrics.Count(None, 9.0)}), lambda p: p.metrics["m"].noise_multiplier),
}


@pytest.mark.parametrize("name", LEAVES)
def test_a_number_changed_behind_the_constructor_is_marked(name):
    private_grad, where = LEAVES[name]
    state = private_grad.init(MODEL, key=KEY)
    for value in BAD:
        leaf = jnp.full_like(where(private_grad), value)
        leaf = leaf if leaf.ndim == 0 else leaf.at[1:].set(1.0)  # one bad group is enough
        grads, after, _ = eqx.tree_at(where, private_grad, leaf)(MODEL, BATCH, state)
        assert is_bad(grads, after), value
        values = private_grad.metric_values(after)
        assert all(np.isnan(v) for v in values.values())  # as before the first step


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_scaling_that_is_not_positive_is_marked(value):
    private_grad = gradient()
    scaling = jax.tree.map(jnp.ones_like, eqx.filter(MODEL, eqx.is_inexact_array))
    state = private_grad.init(MODEL, key=KEY)
    assert not is_bad(*private_grad(MODEL, BATCH, state, scaling=scaling)[:2])
    scaling = eqx.tree_at(lambda s: s.bias, scaling, jnp.array([1.0, value, 1.0]))
    assert is_bad(*private_grad(MODEL, BATCH, state, scaling=scaling)[:2])


def test_metrics_and_releases_without_noise_are_nan():
    for make in (
        lambda v: metrics.Count(None, v),
        lambda v: metrics.Mean(None, 0.0, 1.0, v),
        lambda v: metrics.Dropped(v),
        lambda v: metrics.Histogram(None, [0, 1, 2], v),
    ):
        release = eqx.filter_jit(lambda m: m.release(np.ones(3, np.float32), expected_size=3, key=KEY))
        made = jax.jit(lambda v, make=make, release=release: release(make(v)))
        assert np.isfinite(made(1.0)).all()
        for value in (0.0, -1.0, np.nan, np.inf):
            assert np.isnan(made(value)).all()
            swapped = eqx.tree_at(lambda m: m.noise_multiplier, make(1.0), jnp.float32(value))
            assert np.isnan(release(swapped)).all()


def test_traced_multipliers_are_rounded_up():
    with jax.enable_x64(True):
        value = jnp.float64(1.1)
        stored = jax.jit(lambda v: G(v).noise_multiplier)(value)
        assert stored.dtype == jnp.float32 and float(stored) >= 1.1
        assert float(stored) == float(jnp.asarray(G(1.1).noise_multiplier))


# --- Parameters that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", [dpx.Auto(), dpx.Vectorized()])
def test_parameters_that_are_not_finite_are_marked_whatever_the_batch(value, method):
    broken = eqx.tree_at(lambda m: m.bias, MODEL, jnp.array([0.0, value, 0.0]))
    private_grad = gradient(method=method)
    state = private_grad.init(MODEL, key=KEY)
    for mask in (np.ones(8, bool), np.zeros(8, bool)):
        assert is_bad(*private_grad(broken, BATCH, state, mask=mask)[:2])
    _, after, _ = private_grad(broken, BATCH, state)
    with pytest.raises(RuntimeError, match="parameters"):
        after.raise_if_failed()
    # a frozen NaN makes every loss NaN too; a frozen infinity may be meant
    spec = eqx.tree_at(lambda m: m.weight, jax.tree.map(lambda _: False, MODEL), True)
    frozen = gradient(method=method, filter_spec=spec)
    assert is_bad(*frozen(broken, BATCH, state)[:2]) == np.isnan(value)


def test_sums_of_outputs_of_a_broken_model_are_marked():
    private_sum = dpx.PrivateSum(lambda w, x, y: w * jnp.sum(x), F(1.0), G(1.0))
    state = private_sum.init(jnp.ones(2), BATCH, key=KEY)
    assert not is_bad(*private_sum(jnp.ones(2), BATCH, state)[:2])
    for value in (np.nan, np.inf):
        assert is_bad(*private_sum(jnp.array([1.0, value]), BATCH, state)[:2])


def test_losses_that_are_not_finite_decide_nothing():
    # it depends on the examples, so it must not be seen in what is published: neither in the result nor in the gradients
    private_grad = gradient()
    state = private_grad.init(MODEL, key=KEY)
    x, y = BATCH
    for bad in (np.nan * x, np.where(np.arange(8)[:, None] == 3, np.inf, x).astype(np.float32)):
        grads, after, _ = private_grad(MODEL, (bad, y), state)
        assert not is_bad(grads, after)
