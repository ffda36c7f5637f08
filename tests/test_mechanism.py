"""Clipping, noise and metrics together: what goes with what, and what their numbers are."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpx
from conftest import loss
from dpx import metrics
from dpx.mechanism import Mechanism

EVERY = dpx.Participation(1, None)
MEAN: dict[str, Any] = {"loss": metrics.Mean("losses", 0.0, 1.0, noise_multiplier=2.0)}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((dpx.FlatClipping(1.0), dpx.Laplace(1.0), {}, 5), "order=1"),
        ((dpx.AdaptiveClipping(1.0), dpx.DiscreteGaussian(1.0), {}, 5), "cannot make room for the private counts"),
        ((dpx.FlatClipping(1.0, order=1), dpx.Laplace(1.0), MEAN, 5), "Metrics add Gaussian noise"),
        ((dpx.FlatClipping(1.0), dpx.CorrelatedGaussian(dpx.SquareRootToeplitz(4), 1.0), {}, 5), "horizon"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_by_whoever_is_made_of_them(parts, message):
    clipping, noise, metrics, steps = parts
    with pytest.raises(ValueError, match=message):
        Mechanism(clipping, noise, metrics, steps, EVERY)
    with pytest.raises(ValueError, match=message):
        dpx.PrivateGradient(loss, clipping, noise, metrics=metrics, steps=steps)
    if not metrics:
        with pytest.raises(ValueError, match=message):
            dpx.PrivateSum(lambda m, x, y: x, clipping, noise, steps=steps)


def test_without_clipping_nothing_is_private():
    import dp_accounting as da

    total = {"w": jnp.arange(3.0)}
    for noise in (dpx.IndependentGaussian(), dpx.DiscreteGaussian(1.0)):
        mechanism = Mechanism(dpx.NoClipping(), noise, {}, 5, EVERY)
        noisy, buffers = mechanism.step(total, jax.random.key(0), jnp.int32(0), ())
        assert not mechanism.is_private and mechanism.is_calibrated
        assert noisy is total and buffers == ()
        assert mechanism.noise_multiplier == mechanism.scale() == mechanism.variance(jnp.int32(0)) == 0
        assert mechanism.rounding(total) is None
        assert isinstance(mechanism.event(5), da.NonPrivateDpEvent)


def test_the_event_without_sampling_counts_every_step_and_every_metric():
    import dp_accounting as da

    mechanism = Mechanism(dpx.FlatClipping(3.0), dpx.IndependentGaussian(1.5), MEAN, 7, EVERY)
    expected = da.GaussianDpEvent((1.5**-2 + 2.0**-2) ** -0.5)
    assert mechanism.event(4) == da.SelfComposedDpEvent(expected, 4)
    # the noise of a matrix is scaled to the participations, each of which is measured
    noise = dpx.CorrelatedGaussian(dpx.SquareRootToeplitz(8), 1.5)
    of_run = Mechanism(dpx.FlatClipping(3.0), noise, MEAN, 8, dpx.Participation(4, 2)).event(8)
    assert isinstance(of_run, da.GaussianDpEvent)
    assert of_run.noise_multiplier == pytest.approx((1.5**-2 + 2 * 2.0**-2) ** -0.5)


def test_the_scale_is_that_of_the_noise_that_is_added():
    mechanism = Mechanism(dpx.FlatClipping(3.0), dpx.IndependentGaussian(1.5), {}, 7, EVERY)
    total = jnp.zeros(200_000)
    noisy, _ = mechanism.step(total, jax.random.key(3), jnp.int32(2), ())
    assert 4.5 <= float(mechanism.scale()) <= 4.5 * (1 + 1e-6)
    assert float(mechanism.variance(jnp.int32(2))) == pytest.approx(4.5**2, rel=1e-6)
    # eight standard deviations of the estimate
    assert float(jnp.std(noisy)) == pytest.approx(4.5, rel=8 / math.sqrt(2 * total.size))
    assert mechanism.with_noise_multiplier(2.0).noise_multiplier == 2.0


def test_guarantee_numbers_that_no_run_could_have_give_no_noise_scale_at_all():
    # a search looks at them, and so may whoever changes leaves by hand
    clipping = dpx.AdaptiveClipping(1.0, count_noise_multiplier=2.0)
    mechanism = Mechanism(clipping, dpx.IndependentGaussian(1.0), {}, 5, EVERY)
    mechanism.check_budget()
    more = mechanism.with_noise_multiplier(5.0)
    assert math.isnan(float(more.scale()))
    with pytest.raises(ValueError, match="count_noise_multiplier"):
        more.check_budget()
    negative = eqx.tree_at(lambda m: m.noise.noise_multiplier, mechanism, jnp.asarray(-1.0, jnp.float32))
    assert math.isnan(float(negative.scale()))


def test_a_plan_its_gradient_and_its_sum_have_one_mechanism():
    plan = dpx.PrivacyPlan(
        dpx.CyclicPoissonSampler(100, 5, 12, 3),
        dpx.AdaptiveClipping(0.7),
        dpx.CorrelatedGaussian(dpx.BandedToeplitz.square_root(3), 1.2),
    )
    made = [plan.private_gradient(loss).mechanism, plan.private_sum(lambda m, x: x).mechanism]
    assert all(eqx.tree_equal(plan.mechanism, mechanism) for mechanism in made)


def test_statement_report_and_plot_ask_the_accountant_once(monkeypatch, tmp_path):
    plan = dpx.dp_sgd(1000, 50, 10, noise_multiplier=2.0)
    asked: list[Any] = []
    deltas = dpx.accounting.deltas
    monkeypatch.setattr(dpx.accounting, "deltas", lambda *args: asked.append(args) or deltas(*args))
    report = plan.report(1e-6)
    assert len(asked) == 1
    assert report["statement"] == plan.statement(1e-6)
    assert len(asked) == 2
    pytest.importorskip("matplotlib")
    plan.plot(tmp_path / "plot.png", 1e-6)
    assert len(asked) == 3


def test_a_keyword_that_the_batch_fills_is_no_key():
    """`loss(model, x, key)`, of which the batch's second array is called `key`, wants no randomness, whoever calls it."""

    def of_keys(model, x, key):
        return jnp.sum(model * x) * key

    model = jnp.array([1.0, 2.0])
    batch = (np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]], np.float32), np.array([1.0, -1.0, 0.5], np.float32))
    expected = batch[1] @ batch[0]
    gradient = lambda loss: dpx.PrivateGradient(loss, 100.0, dpx.IndependentGaussian(1.0))
    np.testing.assert_allclose(gradient(of_keys).clipped_sum(model, batch).reveal(), expected, rtol=1e-4)

    def shifted(x, number, *, key):
        return x + 0 * jax.random.normal(key, x.shape), number

    augmented = dpx.augment(of_keys, shifted, 2)
    found = gradient(augmented).clipped_sum(model, batch, key=jax.random.key(0)).reveal()
    np.testing.assert_allclose(found, expected, rtol=1e-4)

    private_sum = dpx.PrivateSum(lambda model, x, key: model * x * key, 100.0, dpx.IndependentGaussian(1.0))
    total = private_sum.clipped_sum(model, batch).reveal()
    np.testing.assert_allclose(total, model * expected, rtol=1e-4)
    state = private_sum.init(model, batch, key=jax.random.key(1))
    assert bool(jnp.all(jnp.isfinite(private_sum(model, batch, state)[0])))


def test_paths_of_before_still_import():
    from dpx.augmentation import augment
    from dpx.private_sum import PrivateSum, model_update

    assert (augment, PrivateSum, model_update) == (dpx.augment, dpx.PrivateSum, dpx.model_update)


def test_guarantee_no_event_is_of_more_steps_than_the_noise_is_made_for():
    noise = dpx.CorrelatedGaussian(dpx.SquareRootToeplitz(8), 1.5)
    for mechanism in (
        Mechanism(dpx.FlatClipping(3.0), noise, {}, 8, EVERY),
        Mechanism(dpx.FlatClipping(3.0), noise, {}, None, EVERY),
        Mechanism(dpx.FlatClipping(3.0), dpx.IndependentGaussian(1.5), {}, 8, EVERY),
    ):
        mechanism.event(8)
        with pytest.raises(ValueError, match="past the mechanism's end, 8"):
            mechanism.event(9)
