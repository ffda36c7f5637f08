"""Slack clipping: what short gradients leave unused of their norm is released with the sum, under the sensitivity of flat clipping."""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import dpx
from dpx import testing

BOUND = 1 + 1e-6
ZEROS = [jnp.zeros(3), jnp.zeros(2)]


def linear(params, x):
    return jnp.sum(params[0] * x[:3]) + jnp.sum(params[1] * x[3:])


class Tape(dpx.AbstractNoise):
    """No noise: it keeps what noise would be added to."""

    noise_multiplier: jax.Array
    order: ClassVar[int] = 2

    @property
    def bands(self):
        return 1

    @property
    def description(self):
        return "nothing"

    @property
    def horizon(self):
        return None

    def event(self, noise_multiplier):
        return dpx.IndependentGaussian(1.0).event(noise_multiplier)

    def scale(self, sensitivity, steps, participation):
        return sensitivity * self.noise_multiplier

    def variance(self, scale, steps, step):
        return jnp.zeros(())

    def error(self, steps, participation, workload, kind):
        return 0.0

    def init(self, struct):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), struct)

    def step(self, total, scale, key, step, buffers):
        return total, total


METHODS = {
    "vectorized": dpx.Vectorized(),
    "microbatches": dpx.Vectorized(3),
    "ghost": dpx.Ghost(),
    "ghost-pieces": dpx.Ghost(2),
}


def query(clipping, batch, mask=None, state=None, method=None):
    """What the noise is added to, in float64: the gradient and the slack."""
    private_grad = dpx.PrivateGradient(linear, clipping, Tape(jnp.ones(())), method=method or dpx.Vectorized())
    start = private_grad.init(ZEROS, key=jr.key(0))
    if state is not None:
        start = eqx.tree_at(lambda s: s.clipping, start, state)
    _, after, _ = private_grad(ZEROS, (jnp.asarray(batch, jnp.float32),), start, mask=mask)
    total, slack = after.noise
    return np.concatenate([np.asarray(x, np.float64) for x in total]), np.asarray(slack, np.float64)


def definition(norms, norm, first, bins):
    unused = np.maximum(0, 1 - norms / norm)[:, None]
    return (first / np.sqrt(bins) * np.clip(bins * unused - np.arange(bins), 0, 1)).sum(0)


@pytest.mark.parametrize("name", ["vectorized", "microbatches", "ghost", "ghost-pieces"])
def test_gradient_and_slack_are_as_defined_by_every_method(name):
    x = np.random.default_rng(0).normal(size=(7, 5)) * np.array([0.1, 0.2, 0.3, 0.05, 1.0, 3.0, 0.0])[:, None]
    mask = np.array([1, 1, 1, 1, 1, 1, 0], bool)
    clipping = dpx.SlackClipping(0.5, bins=3)
    state = clipping.init(ZEROS)
    state = eqx.tree_at(lambda s: s.norm, state, jnp.float32(0.8))
    total, slack = query(clipping, x, mask, state, METHODS[name])
    x = x[mask]
    norms = np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(total, (x * (0.5 / np.maximum(norms, 0.8))[:, None]).sum(0), atol=2e-4)
    np.testing.assert_allclose(slack, definition(norms, 0.8, 0.5, 3), atol=2e-4)


def test_guarantee_gradient_and_slack_together_keep_the_bound():
    """One example alone, of any size: in float64, and attained at both ends."""
    clipping = dpx.SlackClipping(0.7, bins=4)
    sizes = np.concatenate(
        [0.7 * np.linspace(0, 1.1, 60), 10.0 ** np.arange(-45, 39), 0.7 * (1 - 10.0 ** -np.arange(1, 8))]
    )
    directions = np.random.default_rng(1).normal(size=(len(sizes), 5))
    batch = sizes[:, None] * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    private_grad = dpx.PrivateGradient(linear, clipping, Tape(jnp.ones(())), method=dpx.Ghost())
    start = private_grad.init(ZEROS, key=jr.key(0))
    alone = jax.vmap(lambda row: private_grad(ZEROS, (row[None],), start)[1].noise)
    total, slack = alone(jnp.asarray(batch, jnp.float32))
    flat = np.concatenate([np.asarray(x, np.float64) for x in (*total, slack)], axis=1)
    norms = np.linalg.norm(flat, axis=1)
    assert norms.max() <= 0.7 * BOUND
    assert norms[0] >= 0.7 * 0.9999 and norms[sizes > 0.7].min() >= 0.7 * 0.999


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_guarantee_who_is_left_out_leaves_no_slack(bad):
    x = np.array([[0.1, 0, 0, 0, 0], [bad, bad, bad, bad, -bad], [bad, bad, bad, bad, -bad]])
    clipping = dpx.SlackClipping(0.5)
    mask = np.array([True, not np.isfinite(bad), False])  # 3e38 is a number, longer than anything, and masked
    total, slack = query(clipping, x, mask)
    expected, other = query(clipping, x[:1])
    np.testing.assert_array_equal(total, expected)
    np.testing.assert_array_equal(slack, other)
    assert np.all(query(clipping, x[:0])[1] == 0) and np.all(query(clipping, x, np.zeros(3, bool))[1] == 0)


@pytest.mark.parametrize(
    "noise", [dpx.IndependentGaussian(0.5), dpx.CorrelatedGaussian(dpx.BandedToeplitz([1.0, 0.5]), 0.5)]
)
def test_the_norm_finds_the_quantile_and_the_fractions_those_of_the_norms(noise):
    x = jnp.exp(jr.normal(jr.key(1), (1000, 1))) * jnp.eye(5)[:1]
    clipping = dpx.SlackClipping(20.0, quantile=0.6, bins=5)
    private_grad = dpx.PrivateGradient(linear, clipping, noise, normalizer=1000.0, steps=80)

    def step(state, _):
        _, state, _ = private_grad(ZEROS, (x,), state)
        return state, state.clipping.fractions

    state, fractions = jax.lax.scan(step, private_grad.init(ZEROS, key=jr.key(2)), jnp.arange(80))
    state.raise_if_failed()
    norms, now = np.linalg.norm(x, axis=1), float(state.clipping.norm)
    # noise of standard deviation at most .5 sqrt(5) (1 + .5) / 1000 = .0017: six of them, and what a bin leaves open
    assert np.mean(norms <= 0.9 * now) == pytest.approx(0.6, abs=0.04)
    expected = definition(norms, now, 1.0, 5) * np.sqrt(5) / 1000
    np.testing.assert_allclose(fractions[-1], expected, atol=0.03)


def test_slack_gets_the_noise_of_the_gradient():
    """In units of the first norm: a ratio of variances of 40,000 numbers, off by 4 % but once in a million."""
    clipping = dpx.SlackClipping(2.0, bins=8)
    private_grad = dpx.PrivateGradient(linear, clipping, dpx.IndependentGaussian(3.0), normalizer=10.0)
    empty = (jnp.zeros((2, 5)),)
    state = private_grad.init(ZEROS, key=jr.key(0))

    def released(key):
        start = eqx.tree_at(lambda s: s.key_data, state, jr.key_data(key))
        _, after, _ = private_grad(ZEROS, empty, start, mask=jnp.zeros(2, bool))
        return after.clipping.fractions * 2.0 / np.sqrt(8) * 10.0

    found = np.asarray(jax.vmap(released)(jr.split(jr.key(3), 5000)), np.float64)
    assert np.std(found) == pytest.approx(6.0, rel=0.02)
    assert abs(np.corrcoef(found.T) - np.eye(8)).max() < 0.08


def test_it_costs_what_flat_clipping_costs():
    plan = lambda clipping: dpx.PrivacyPlan(dpx.PoissonSampler(100, 10, 5), clipping, dpx.IndependentGaussian(1.0))
    slack, flat = plan(dpx.SlackClipping(0.3)), plan(dpx.FlatClipping(0.3))
    assert slack.event == flat.event and slack.epsilon(1e-3) == flat.epsilon(1e-3)
    assert float(slack.mechanism.scale()) == float(flat.mechanism.scale())
    assert "follows quantile 0.5" in slack.statement(1e-3)


def test_a_step_without_budget_teaches_nothing():
    private_grad = dpx.PrivateGradient(linear, dpx.SlackClipping(0.5), dpx.IndependentGaussian(1.0), steps=1)
    batch = (jnp.ones((4, 5)),)
    _, state, _ = private_grad(ZEROS, batch, private_grad.init(ZEROS, key=jr.key(0)))
    _, after, _ = private_grad(ZEROS, batch, state)
    assert after.result == dpx.Result.budget_spent
    np.testing.assert_array_equal(after.clipping.fractions, state.clipping.fractions)


def test_a_method_that_bounds_nothing_is_refused():
    class Silent(dpx.AbstractGradientMethod):
        def clipped_sum(self, *args, **kwargs):
            return eqx.tree_at(lambda s: s.bounds, dpx.Vectorized().clipped_sum(*args, **kwargs), None)

        def explain(self, loss, params, examples):
            return dpx.Vectorized().explain(loss, params, examples)

    with pytest.raises(ValueError, match=r"`SlackClipping` learns from the slack.*must return `bounds`"):
        query(dpx.SlackClipping(0.5), np.ones((2, 5)), method=Silent())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: dpx.SlackClipping(0.0), r"SlackClipping\(norm=\.\.\.\)"),
        (lambda: dpx.SlackClipping(1.0, quantile=1.0), r"SlackClipping\(quantile=\.\.\.\)"),
        (lambda: dpx.SlackClipping(1.0, learning_rate=0.0), r"SlackClipping\(learning_rate=\.\.\.\)"),
        (lambda: dpx.SlackClipping(1.0, bins=0), r"SlackClipping\(bins=\.\.\.\)"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_sound_one_passes_its_laws():
    testing.check_clipping(dpx.SlackClipping(0.5, bins=1))
