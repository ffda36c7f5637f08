"""Clipping by groups, by normalising, by a quantile: the bounds hold for all inputs, and each does what its paper says."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import Phase, given, settings

import dpx
from conftest import assert_trees_close, loss, make_batch, make_model, norm64
from dpx import testing
from dpx.testing._clipping import before_rescaling, private_gradient_of
from registry import GROUPS, Linear

BOUND = 1 + 1e-6


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    gradient=testing.gradients([jax.ShapeDtypeStruct((2, 2), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.bfloat16)])
)
def test_guarantee_every_clipping_bounds_every_input(gradient):
    params = [jnp.zeros(x.shape, x.dtype) for x in gradient]
    is_finite = all(np.isfinite(x.astype(np.float64)).all() for x in gradient)
    for clipping in (dpx.FlatClipping(0.5), dpx.GroupClipping([1e-6, 10.0]), dpx.NormalizedClipping(0.7)):
        noised = before_rescaling(clipping, clipped(clipping, params, gradient), params)
        assert norm64(noised) <= float(clipping.sensitivity) * BOUND if is_finite else norm64(noised) == 0.0


@eqx.filter_jit
def clipped(clipping, params, gradient):
    return private_gradient_of(clipping).clipped_sum(params, tuple(x[None] for x in gradient)).reveal()


def test_reference_values_of_psac():
    clipping = dpx.PSACClipping(1.0, r=0.1)
    norms = jnp.array([[0.01], [0.1], [1.0], [10.0]])
    out = np.asarray(norms * clipping.factors(norms, ()))[:, 0]
    np.testing.assert_allclose(out, [0.01088, 0.16667, 0.91667, 0.99901], atol=6e-6)


def test_normalising_without_gamma_leaves_out_what_float32_cannot_measure():
    clipping = dpx.NormalizedClipping(1.0, gamma=0)
    # squares of single numbers below 1e-19 vanish in float32, so a vector of many may be far longer than it seems
    norms = jnp.array([[0.0], [1e-11], [1e-9], [3.0]])
    out = np.asarray(norms * clipping.factors(norms, ()))[:, 0]
    np.testing.assert_allclose(out, [0, 0, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("allocation", ["global", "equal", "optimal"])
def test_noise_is_allotted_as_stated(allocation):
    norms, sizes = np.array([0.3, 2.0]), np.array([4.0, 900.0])
    gamma = {
        "global": np.full(2, norm64([norms])),
        "equal": norms * np.sqrt(2),
        "optimal": np.sqrt(norms / np.sqrt(sizes) * np.sum(norms * np.sqrt(sizes))),
    }[allocation]
    assert np.sum((norms / gamma) ** 2) == pytest.approx(1)  # the accounting of one Gaussian is unchanged
    params = [jnp.zeros(4), jnp.zeros(900)]
    clipping = dpx.GroupClipping([0.3, 2.0], allocation=allocation)
    private_grad = dpx.PrivateGradient(
        lambda p, x: jnp.sum(p[0]) + jnp.sum(p[1]) + x, clipping, dpx.IndependentGaussian(1.5)
    )
    state = private_grad.init(params, key=jr.key(0))
    variance = private_grad.noise_variance(params, state)
    np.testing.assert_allclose([float(v) for v in variance], (1.5 * gamma) ** 2, rtol=1e-5)
    noisy, _, _ = private_grad(params, (jnp.zeros(1),), state, mask=np.zeros(1, bool))
    # 900 squares: relative deviation 0.0471, so 5.5 of them is exceeded with probability below 1e-6
    assert np.mean(np.asarray(noisy[1], np.float64) ** 2) == pytest.approx((1.5 * gamma[1]) ** 2, rel=0.26)


def test_optimal_allocation_adds_the_least_noise():
    norms, sizes = np.array([0.3, 2.0]), np.array([4.0, 900.0])
    total = {}
    for allocation in ("global", "equal", "optimal"):
        clipping = dpx.GroupClipping([0.3, 2.0], allocation=allocation)
        gains = np.asarray(clipping.init([jnp.zeros(4), jnp.zeros(900)]), np.float64)
        gamma = norm64([norms]) / gains
        total[allocation] = float(np.sum(sizes * gamma**2))
    assert total["optimal"] < min(total["global"], total["equal"])
    # Cauchy-Schwarz: no allocation with sum (C/gamma)^2 = 1 has less than (sum C sqrt d)^2
    assert total["optimal"] == pytest.approx(np.sum(norms * np.sqrt(sizes)) ** 2, rel=1e-5)


def test_groups_of_layers_and_blocks():
    model = eqx.nn.MLP(3, 2, 4, 2, key=jr.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    layers = dpx.GroupClipping.per_layer(model, 0.9)
    assert layers.labels(params) == (0, 0, 1, 1, 2, 2)
    assert float(layers.sensitivity) == pytest.approx(0.9, rel=1e-6) and float(layers.sensitivity) >= np.float32(0.9)
    pair = {"encoder": [model, model], "head": model.layers[0]}
    blocks = dpx.GroupClipping.per_block(pair, 1.0)
    assert len(blocks.norms) == 2
    both = dpx.GroupClipping.per_block([model, model.layers[0]], 1.0)
    assert both.labels(eqx.filter([model, model.layers[0]], eqx.is_inexact_array)) == (0,) * 6 + (1,) * 2
    frozen = dpx.GroupClipping.per_layer(model, 1.0, filter_spec=lambda x: eqx.is_array(x) and x.ndim == 2)
    assert len(frozen.norms) == 3
    assert len(dpx.AdaptiveClipping.per_layer(model, 1.0).initial_norms) == 3
    assert len(dpx.AdaptiveClipping.per_block(pair, 1.0).initial_norms) == 2


def test_norms_must_be_a_prefix_of_the_model(model, batch):
    def run(norms):
        clipping = dpx.GroupClipping(norms)
        return dpx.PrivateGradient(loss, clipping, dpx.IndependentGaussian(1.0)).clipped_sum(model, batch)

    run(0.5)  # one number is a prefix of every tree
    with pytest.raises(ValueError, match=r"differs from it at `\.bias`: the model has a trainable leaf there"):
        run(Linear(0.3, None, None, None))
    with pytest.raises(ValueError, match=r"differs from it at `\.count`: a norm is there"):
        run(Linear(0.3, 0.4, 0.1, None))
    with pytest.raises(ValueError, match=r"differs from it at `\.weight`.*have \.weight\[0\]"):
        run(Linear([0.3, 0.2], 0.4, None, None))
    with pytest.raises(ValueError, match=r"array of shape \(3, 4\) at `\.weight`"):
        dpx.GroupClipping(model)
    for bad in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match=r"GroupClipping\(norms\.\.\.\.bias=\.\.\.\)"):
            dpx.GroupClipping(Linear(0.3, bad, None, None))
    with pytest.raises(ValueError, match="contains no norm"):
        dpx.GroupClipping([])


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: dpx.GroupClipping([1.0], allocation="best"), "allocation"),
        (lambda: dpx.GroupClipping.per_layer(eqx.nn.Identity(), 1.0), "selects no leaf"),
        (lambda: dpx.NormalizedClipping(0.0), r"NormalizedClipping\(norm=\.\.\.\)"),
        (lambda: dpx.NormalizedClipping(1.0, gamma=-1.0), r"NormalizedClipping\(gamma=\.\.\.\)"),
        (lambda: dpx.NormalizedClipping(1.0, gamma=1e-12), "must be 0 or at least"),
        (lambda: dpx.PSACClipping(1.0, r=0.0), r"PSACClipping\(r=\.\.\.\)"),
        (lambda: dpx.HardThresholdClipping(1.0, -2.0), r"HardThresholdClipping\(threshold=\.\.\.\)"),
        (lambda: dpx.AdaptiveClipping(0.0), r"AdaptiveClipping\(initial_norm=\.\.\.\)"),
        (lambda: dpx.AdaptiveClipping(1.0, quantile=1.0), r"AdaptiveClipping\(quantile=\.\.\.\)"),
        (lambda: dpx.AdaptiveClipping(1.0, quantile=0.0), r"AdaptiveClipping\(quantile=\.\.\.\)"),
        (lambda: dpx.AdaptiveClipping(1.0, learning_rate=-0.2), r"AdaptiveClipping\(learning_rate=\.\.\.\)"),
        (lambda: dpx.AdaptiveClipping(1.0, count_noise_multiplier=0), "count_noise_multiplier"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_counts_must_leave_something_for_the_gradient():
    with pytest.raises(ValueError, match=r"count_noise_multiplier.*must exceed 3"):
        dpx.PrivateGradient(loss, dpx.AdaptiveClipping(1.0, count_noise_multiplier=1.4), dpx.IndependentGaussian(3.0))


# --- adaptive clipping -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_adaptive_clipping_finds_the_quantile(quantile):
    clipping = dpx.AdaptiveClipping([0.1, 60.0], quantile=quantile, count_noise_multiplier=12.8)

    def step(state, t):
        norms = jnp.exp(jr.normal(jr.fold_in(jr.key(1), t), (256, 2)) + jnp.array([[0.0, 2.0]]))
        new = clipping.update(state, norms, jnp.ones(256, bool), jnp.float32(256), jr.fold_in(jr.key(2), t))
        return new, jnp.mean(norms <= state.norms[None], axis=0)

    _, fractions = jax.lax.scan(step, clipping.init([jnp.zeros(1)] * 2), jnp.arange(150))
    # after 100 steps; the average of 50 counts of 256, noise included, deviates by less than 0.02 but once in a million
    np.testing.assert_allclose(np.mean(np.asarray(fractions[100:]), axis=0), quantile, atol=0.05)


def test_a_count_moves_by_one_half_and_is_divided_by_the_expected_batch():
    clipping = dpx.AdaptiveClipping(1.0, count_noise_multiplier=1e-6, learning_rate=1.0)
    state = clipping.init([jnp.zeros(1)])
    norms = jnp.array([[0.5], [2.0], [jnp.nan], [jnp.inf], [0.1], [0.3]])

    def fraction(mask):
        new = clipping.update(state, norms, jnp.asarray(mask), jnp.float32(50), jr.key(0))
        return float(clipping.quantile) - np.log(float(new.norms[0])) - 0.5

    everyone = np.ones(6, bool)
    for i, vote in enumerate([0.5, -0.5, -0.5, -0.5, 0.5, 0.5]):
        without = everyone.copy()
        without[i] = False
        assert 50 * (fraction(everyone) - fraction(without)) == pytest.approx(vote, abs=1e-4)
    assert fraction(np.zeros(6, bool)) == pytest.approx(0.0, abs=1e-6)  # an empty batch says nothing


def test_guarantee_an_adapted_norm_leaves_the_sensitivity_as_it_is():
    clipping = dpx.AdaptiveClipping([0.3, 0.4])
    sizes = np.logspace(-3, 3, 25)
    for now in ([0.3, 0.4], [7.0, 0.01], [1e-3, 50.0]):
        state = eqx.tree_at(lambda s: s.norms, clipping.init([jnp.zeros(1)] * 2), jnp.array(now))
        norms = jnp.asarray(np.stack([sizes, sizes[::-1]], axis=1), jnp.float32)
        contributed = np.asarray(norms * clipping.factors(norms, state), np.float64)
        # what the noise is added to is bounded by the norm that the noise was scaled for
        assert np.sqrt((contributed**2).sum(1)).max() <= float(clipping.sensitivity) * BOUND
        assert (contributed.max(0) >= np.array([0.3, 0.4]) * (1 - 1e-5)).all()
        published = contributed * np.asarray(clipping.rescale(state), np.float64)
        np.testing.assert_allclose(published, np.minimum(np.asarray(norms), np.array(now)), rtol=1e-5)


def test_the_adapted_norm_is_used_and_noise_follows_it(model):
    clipping = dpx.AdaptiveClipping(0.5, learning_rate=1.0, count_noise_multiplier=100.0)
    private_grad = dpx.PrivateGradient(loss, clipping, dpx.IndependentGaussian(1.0), normalizer=8.0)
    state = private_grad.init(model, key=jr.key(0))
    _, state, _ = private_grad(model, make_batch(), state)
    now = float(state.clipping.norms[0])
    assert now != 0.5
    variance = jax.tree.leaves(private_grad.noise_variance(model, state))
    expected = (now / 8) ** 2 / (1 - 1 / 200**2)
    np.testing.assert_allclose([float(v) for v in variance], expected, rtol=1e-5)
    before = state
    spent = dpx.PrivateGradient(loss, clipping, dpx.IndependentGaussian(1.0), normalizer=8.0, steps=1)
    grads, state, _ = spent(model, make_batch(), before)
    assert state.result == dpx.Result.budget_spent
    assert float(state.clipping.norms[0]) == now  # a step without budget teaches the clipping nothing


# --- with every engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", [dpx.GroupClipping(GROUPS), dpx.AdaptiveClipping(GROUPS), dpx.PSACClipping(0.5)])
def test_engines_agree(clipping):
    model, batch = make_model(), make_batch()
    mask = np.arange(8) != 2
    totals = [
        dpx.PrivateGradient(loss, clipping, dpx.IndependentGaussian(1.0), method=method)
        .clipped_sum(model, batch, mask=mask)
        .reveal()
        for method in (dpx.Vectorized(), dpx.Ghost(3))
    ]
    assert_trees_close(*totals)


def test_scaled_gradients_are_clipped_and_unscaled(model, batch):
    scaling = jax.tree.map(
        lambda x: jr.uniform(jr.key(5), x.shape, minval=0.1, maxval=3.0), eqx.filter(model, eqx.is_inexact_array)
    )
    expected = [np.zeros((3, 4)), np.zeros(3)]
    s = [np.asarray(x, np.float64) for x in jax.tree.leaves(scaling)]
    for i in range(8):
        grad = eqx.filter_grad(loss)(model, *jax.tree.map(lambda leaf, i=i: leaf[i], batch))
        scaled = [np.asarray(g, np.float64) * t for g, t in zip(jax.tree.leaves(grad), s, strict=True)]
        factor = min(1.0, 0.5 / norm64(scaled))
        expected = [e + factor * g / t for e, g, t in zip(expected, scaled, s, strict=True)]
    for method in (dpx.Vectorized(), dpx.Ghost()):
        private_grad = dpx.PrivateGradient(loss, dpx.FlatClipping(0.5), dpx.IndependentGaussian(1e-9), method=method)
        state = private_grad.init(model, key=jr.key(0))
        grads, _, _ = private_grad(model, batch, state, scaling=scaling)
        assert_trees_close(jax.tree.leaves(grads), expected)
    variance = private_grad.noise_variance(model, state, scaling=scaling)
    np.testing.assert_allclose(variance.bias, (0.5e-9 / s[1]) ** 2, rtol=1e-5)
    with pytest.raises(ValueError, match=r"scaling.*shape"):
        private_grad(model, batch, state, scaling=jax.tree.map(lambda x: x[:1], scaling))
    with pytest.raises(ValueError, match="structure"):
        private_grad(model, batch, state, scaling=1.0)
