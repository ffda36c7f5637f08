"""The user's own loop and step: `Recorder`, `assert_only_private`, and mechanisms that are not dpx's."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import dpx
from dpx import auditing
from registry import Linear

A: Any = auditing  # what a wrong call gives is tested here, and not what an editor says of it

N, B, STEPS = 2000, 50, 40


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def net():
    return Linear(jr.normal(jr.key(1), (3, 20)), jnp.ones(3), jnp.array(7))


RNG = np.random.default_rng(0)
DATA = RNG.normal(size=(N, 20)).astype(np.float32), RNG.normal(size=(N, 3)).astype(np.float32)
PLAN = dpx.PrivacyPlan(dpx.PoissonSampler(N, B, STEPS), 0.5, dpx.IndependentGaussian(1.0))
GRADIENT = PLAN.private_gradient(loss)


@eqx.filter_jit
def step(private_grad, model, batch, state, mask):
    grads, state, _ = private_grad(model, batch, state, mask=mask)
    return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads)), state


def record(loop, plan=PLAN, gradient=GRADIENT):
    recorder = A.Recorder(gradient)
    loop(recorder, net(), recorder.init(net(), key=jr.key(0)))
    return recorder.report(plan)


def batches(plan=PLAN, seed=0):
    return plan.batches(DATA, seed=seed)


def sound(recorder, model, state):
    for batch, mask in batches():
        model, state = step(recorder, model, batch, state, mask)
    state.raise_if_failed()


def unthreaded(recorder, model, state):
    for batch, mask in batches():
        model, _ = step(recorder, model, batch, state, mask)


def one_key(recorder, model, state):
    for batch, mask in batches():
        model, _ = step(recorder, model, batch, recorder.init(model, key=jr.key(0)), mask)


def unmasked(recorder, model, state):
    for batch, mask in batches():
        model, state = step(recorder, model, batch, state, np.ones_like(mask))


def fixed(recorder, model, state):
    size = PLAN.sampler.physical_batch_size
    for t in range(STEPS):
        take = np.random.default_rng(t).permutation(N)[:size]
        model, state = step(recorder, model, tuple(x[take] for x in DATA), state, np.arange(size) < B)


def doubled(recorder, model, state):
    size, twice = PLAN.sampler.physical_batch_size, dpx.PoissonSampler(N, 2 * B, 8)
    size = max(size, twice.physical_batch_size)
    for t in range(8):
        rows = twice.indices(0, t)
        take = np.concatenate([rows, np.zeros(size - len(rows), int)])
        model, state = step(recorder, model, tuple(x[take] for x in DATA), state, np.arange(size) < len(rows))


def too_long(recorder, model, state):
    sound(recorder, model, state)
    for (batch, mask), _ in zip(batches(seed=1), range(5), strict=False):
        model, state = step(recorder, model, batch, state, mask)


def fresh(recorder, model, state):
    for t, (batch, mask) in enumerate(batches()):
        model, state = step(recorder, model, batch, recorder.init(model, key=jr.key(t)), mask)


def test_a_sound_loop_passes():
    report = record(sound)
    assert report.passed, report
    assert {law.code for law in report.laws} >= {"R1", "R2", "S1", "S2", "N0", "N1", "N2", "I1", "I2"}


slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
LOOPS = [
    (unthreaded, "R1"),
    slow(unmasked, "S1"),
    slow(one_key, "R1"),
    slow(fixed, "S2"),
    slow(doubled, "S1"),
    slow(too_long, "R2"),
    slow(fresh, "R3"),
]


@pytest.mark.parametrize(("loop", "code"), LOOPS, ids=lambda x: getattr(x, "__name__", x))
def test_mistakes_in_a_loop_are_found(loop, code):
    report = record(loop)
    assert code in {law.code for law in report.failures}, report
    with pytest.raises(A.PrivacyAuditError):
        report.raise_if_failed()


@pytest.mark.slow
def test_another_noise_than_the_plan_states_is_found():
    weak = dpx.PrivateGradient(loss, 0.5, dpx.IndependentGaussian(0.8), normalizer=B, steps=STEPS)
    report = record(sound, gradient=weak)
    assert "N1" in {law.code for law in report.failures}


def test_a_recorder_returns_what_the_gradient_does_and_shows_nothing():
    recorder = A.Recorder(GRADIENT)
    state = recorder.init(net(), key=jr.key(0))
    batch, mask = next(iter(batches()))
    one = GRADIENT(net(), batch, state, mask=mask)
    other = recorder(net(), batch, state, mask=mask)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)
    jax.effects_barrier()
    assert recorder.sensitivity == GRADIENT.sensitivity and recorder.steps == STEPS
    assert "a log of 1 calls" in repr(recorder) and "0." not in repr(recorder)


def test_a_recorder_that_saw_nothing_says_so():
    with pytest.raises(ValueError, match="nothing was recorded"):
        A.Recorder(GRADIENT).report(PLAN)
    with pytest.raises(ValueError, match="private_grad"):
        A.Recorder(loss)


@pytest.mark.slow
def test_a_scan_and_correlated_noise_are_recorded():
    plan = dpx.PrivacyPlan(
        dpx.ShuffleSampler(60, 5, 12),
        0.5,
        dpx.CorrelatedGaussian(dpx.BandedToeplitz([1.0, 0.5, 0.3]), 1.0),
        adjacency="replace_special",
    )
    recorder = A.Recorder(plan.private_gradient(loss))
    pairs = list(plan.batches(tuple(x[:60] for x in DATA), seed=0))
    stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(i) for i in x]), *pairs)

    @eqx.filter_jit
    def run(recorder, state, stacked):
        def body(state, pair):
            _, state, _ = recorder(net(), pair[0], state, mask=pair[1])
            return state, None

        return jax.lax.scan(body, state, stacked)[0]

    run(recorder, recorder.init(net(), key=jr.key(0)), stacked)
    report = recorder.report(plan)
    assert report.passed, report


# --- nothing beside -----------------------------------------------------------------------------------------------------

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def arguments(rows, mask=None):
    model = net()
    state = GRADIENT.init(model, key=jr.key(0))
    mask = np.ones(4, bool) if mask is None else mask
    return model, OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array)), state, tuple(x[rows] for x in DATA), mask


def honest(private_grad, model, opt_state, state, batch, mask):
    grads, state, diagnostics = private_grad(model, batch, state, mask=mask)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), opt_state, state, diagnostics


def scaled_by_the_loss(private_grad, model, opt_state, state, batch, mask):
    grads, state, _ = private_grad(model, batch, state, mask=mask)
    value = jnp.mean(jax.vmap(loss, (None, 0, 0))(model, *batch))
    return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * value * g, grads)), state


def with_diagnostics(private_grad, model, opt_state, state, batch, mask):
    grads, state, diagnostics = private_grad(model, batch, state, mask=mask)
    return grads, state, jnp.mean(diagnostics.reveal().losses)


def by_batch_size(private_grad, model, opt_state, state, batch, mask):
    grads, state, _ = private_grad(model, batch, state, mask=mask)
    size = jnp.sum(mask).astype(jnp.float32)
    return jax.tree.map(lambda g: g * 4.0 / size, grads), state


def never(private_grad, model, opt_state, state, batch, mask):
    return GRADIENT(model, batch, state, mask=mask)[0]


A_ROWS, B_ROWS = slice(0, 4), slice(4, 8)


def test_an_honest_step_passes():
    assert A.assert_only_private(honest, GRADIENT, arguments(A_ROWS), arguments(B_ROWS)).passed


@pytest.mark.slow
def test_a_compiled_step_passes():
    jitted = eqx.filter_jit(honest)
    assert A.assert_only_private(jitted, GRADIENT, arguments(A_ROWS), arguments(B_ROWS)).passed


@pytest.mark.parametrize("leak", [scaled_by_the_loss, slow(with_diagnostics), slow(by_batch_size)])
def test_what_gets_around_the_private_gradient_is_found(leak):
    few = np.arange(4) < 3
    with pytest.raises(A.PrivacyAuditError, match="X") as error:
        A.assert_only_private(leak, GRADIENT, arguments(A_ROWS), arguments(B_ROWS, few))
    assert all(law.where for law in error.value.report.failures)


def test_a_vacuous_question_is_refused():
    with pytest.raises(ValueError, match="never called"):
        A.assert_only_private(never, GRADIENT, arguments(A_ROWS), arguments(B_ROWS))
    with pytest.raises(ValueError, match="the same"):
        A.assert_only_private(honest, GRADIENT, arguments(A_ROWS), arguments(A_ROWS))
    with pytest.raises(ValueError, match="tuple"):
        A.assert_only_private(honest, GRADIENT, list(arguments(A_ROWS)), arguments(B_ROWS))


@pytest.mark.slow
def test_metrics_and_adaptive_norms_are_private_releases():
    plan = dpx.PrivacyPlan(dpx.PoissonSampler(N, B, STEPS), dpx.AdaptiveClipping(0.5), dpx.IndependentGaussian(1.0))
    plan = plan.with_metrics(loss=dpx.metrics.Mean("losses", 0.0, 5.0, noise_multiplier=5.0))
    gradient = plan.private_gradient(loss)

    def with_values(private_grad, state, batch):
        grads, state, _ = private_grad(net(), batch, state, mask=np.ones(4, bool))
        return grads, private_grad.metric_values(state), state

    args = lambda rows: (gradient.init(net(), key=jr.key(0)), tuple(x[rows] for x in DATA))
    assert A.assert_only_private(with_values, gradient, args(A_ROWS), args(B_ROWS)).passed


# --- mechanisms of others -----------------------------------------------------------------------------------------------

W = jnp.ones(40)
ROWS = RNG.normal(size=(4, 40)).astype(np.float32), RNG.normal(size=4).astype(np.float32)


def own_step(clip=1.0, sigma=2.0, masked=True, divisor=None, laplace=False):
    order = 1 if laplace else 2

    @jax.jit
    def step(batch, mask, key):
        x, y = batch
        grads = jax.vmap(jax.grad(lambda w, x, y: (w @ x - y) ** 2), (None, 0, 0))(W, x, y)
        norms = jnp.linalg.norm(grads, ord=order, axis=1)
        keep = (mask if masked else jnp.ones_like(mask)) & jnp.isfinite(norms)
        scale = jnp.minimum(1.0, clip / jnp.maximum(norms, 1e-30))
        total = jnp.sum(jnp.where(keep[:, None], grads * scale[:, None], 0.0), axis=0)
        draw = jr.laplace if laplace else jr.normal
        by = 100.0 if divisor is None else jnp.maximum(jnp.sum(mask), 1).astype(jnp.float32)
        return {"w": (total + sigma * draw(key, total.shape)) / by}

    return step


STATED: dict[str, Any] = {"sensitivity": 1.0, "noise_multiplier": 2.0, "normalizer": 100.0}


def test_a_step_of_ones_own_passes():
    assert A.assert_private_step(own_step(), ROWS, **STATED).passed


@pytest.mark.slow
def test_other_steps_of_ones_own_pass():
    assert A.assert_private_step(own_step(sigma=3.0), ROWS, **STATED).passed, "more noise than is stated"
    assert A.assert_private_step(own_step(laplace=True), ROWS, noise="laplace", **STATED).passed
    assert A.assert_private_step(own_step(masked=False), ROWS, masks=False, **STATED).passed


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"clip": 2.0}, "D1"),
        ({"sigma": 0.0}, "N0"),
        slow({"sigma": 1.8}, "N1"),
        slow({"masked": False}, "D2"),
        slow({"divisor": "realised"}, "D1"),
    ],
)
def test_a_broken_step_of_ones_own_is_refuted(options, code):
    with pytest.raises(A.PrivacyAuditError) as error:
        A.assert_private_step(own_step(**options), ROWS, **STATED)
    assert code in {law.code for law in error.value.report.failures}, error.value


def test_the_same_key_for_every_step_is_seen():
    step = own_step()

    def constant(batch, mask, key):
        return step(batch, mask, jr.key(0))

    with pytest.raises(A.PrivacyAuditError, match="same noise"):
        A.assert_private_step(constant, ROWS, **STATED)


def optax_step(multiplier=2.0, clip=1.0):
    def step(batch, mask, key):
        x, y = batch
        grads = jax.vmap(jax.grad(lambda w, x, y: (w @ x - y) ** 2), (None, 0, 0))(W, x, y)
        aggregate = optax.contrib.differentially_private_aggregate(clip, multiplier, 0)
        initial: Any = aggregate.init(W)
        state = initial._replace(rng_key=key)
        update, _ = aggregate.update(grads, state)
        return update * x.shape[0]  # it divides by the size of the batch

    return step


@pytest.mark.slow
def test_optax_is_audited_as_it_comes():
    """Its sum is bounded for finite gradients; one that is not finite makes all of it NaN, and D1 says so."""
    with pytest.raises(A.PrivacyAuditError) as error:
        A.assert_private_step(optax_step(), ROWS, masks=False, sensitivity=1.0, noise_multiplier=2.0)
    assert {law.code for law in error.value.report.failures} == {"D1"}
    assert "infinities" in str(error.value) or "NaN" in str(error.value)
