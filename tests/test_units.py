"""What is clipped as one: an example with its views, a user with several examples, any function's output."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import dpx
from conftest import assert_trees_close, contribution64, loss, make_batch, make_model, norm64

CLIP = dpx.FlatClipping(0.5)
QUIET = dpx.IndependentGaussian(1e-9)


# --- augmentation multiplicity -------------------------------------------------------------------------------------------


def jitter(x, y, *, key):
    return x * (1 + jr.normal(key, x.shape)), y


def views(x, y, key, multiplicity):
    keys = [jr.fold_in(jr.fold_in(key, k), 0) for k in range(multiplicity)]
    return [jitter(x, y, key=k) for k in keys]


@pytest.mark.parametrize("method", [dpx.Vectorized(), dpx.Ghost(3)], ids=["vectorized", "ghost"])
def test_the_average_over_views_is_clipped(method):
    model, (x, y) = make_model(), make_batch(4)
    key = jr.key(7)
    private_grad = dpx.PrivateGradient(dpx.augment(loss, jitter, 3), CLIP, QUIET, method=method)
    total = private_grad.clipped_sum(model, (x, y), key=key).reveal()
    expected = [np.zeros((3, 4)), np.zeros(3)]
    for i in range(4):
        grads = [
            jax.tree.leaves(eqx.filter_grad(loss)(model, *view)) for view in views(x[i], y[i], jr.fold_in(key, i), 3)
        ]
        mean = [np.mean(np.asarray(g, np.float64), axis=0) for g in zip(*grads, strict=True)]
        expected = [e + c for e, c in zip(expected, contribution64(CLIP, mean, (0, 0)), strict=True)]
    assert_trees_close(total, expected)


def test_views_take_a_sequence_axis_not_a_gradient_each():
    width, multiplicity, batch = 128, 16, 8
    model = eqx.nn.MLP(32, 4, width, 2, key=jr.key(0))

    def classify(model, x, y):
        return jnp.sum((model(x) - y) ** 2)

    augmented = dpx.augment(classify, jitter, multiplicity)
    private_grad = dpx.PrivateGradient(augmented, CLIP, QUIET, method=dpx.Ghost())
    x, y = jnp.ones((batch, 32)), jnp.ones((batch, 4))
    state = private_grad.init(model, key=jr.key(0))
    compiled = eqx.filter_jit(lambda m, b, s: private_grad(m, b, s)[0]).lower(model, (x, y), state).compile()  # pyright: ignore[reportFunctionMemberAccess]
    held = compiled.compiled.memory_analysis().temp_size_in_bytes
    one = 4 * sum(p.size for p in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
    assert held < batch * multiplicity * one / 8


def test_losses_with_aux_and_keys_can_be_augmented():
    def noisy(model, x, y, key):
        return loss(model, x + jr.normal(key, x.shape), y), jnp.sum(x)

    private_grad = dpx.PrivateGradient(dpx.augment(noisy, jitter, 2, has_aux=True), CLIP, QUIET, has_aux=True)
    model, batch = make_model(), make_batch(3)
    _, _, diagnostics = private_grad(model, batch, private_grad.init(model, key=jr.key(0)))
    aux = diagnostics.reveal().aux
    assert aux.shape == (3, 2) and len(set(np.asarray(aux).ravel().tolist())) == 6


def test_bad_augmentations():
    for multiplicity in (0, -1, 1.5):
        with pytest.raises(ValueError, match=r"dpx\.augment\(multiplicity=\.\.\.\)"):
            dpx.augment(loss, jitter, multiplicity)
    with pytest.raises(ValueError, match=r"dpx\.augment\(augmentation=\.\.\.\)"):
        dpx.augment(loss, 3, 2)
    model, batch = make_model(), make_batch(2)
    bad = dpx.PrivateGradient(dpx.augment(loss, lambda x, y, *, key: x, 2), CLIP, QUIET)
    with pytest.raises(ValueError, match="must return a tuple"):
        bad.clipped_sum(model, batch, key=jr.key(0))


# --- users ---------------------------------------------------------------------------------------------------------------


def users_batch(users=4, examples=3):
    x, y = make_batch(users * examples)
    mask = np.array([[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]], bool)
    return (x.reshape(users, examples, 4), y.reshape(users, examples, 3)), mask


def user_total(model, batch, mask, within):
    expected = [np.zeros((3, 4)), np.zeros(3)]
    for u in range(mask.shape[0]):
        rows = np.flatnonzero(mask[u])
        if len(rows):
            grads = [jax.tree.leaves(eqx.filter_grad(loss)(model, batch[0][u, e], batch[1][u, e])) for e in rows]
            total = [np.sum(np.asarray(g, np.float64), axis=0) for g in zip(*grads, strict=True)]
            user = [g / (len(rows) if within == "mean" else 1) for g in total]
            expected = [e + c for e, c in zip(expected, contribution64(CLIP, user, (0, 0)), strict=True)]
    return expected


@pytest.mark.parametrize(
    "within, method",
    [("mean", dpx.Vectorized()), ("sum", dpx.Ghost()), ("mean", dpx.Ghost(3))],
    ids=["mean-vectorized", "sum-ghost", "mean-ghost-3"],
)
def test_a_users_gradient_is_clipped_as_one(within, method):
    model = make_model()
    batch, mask = users_batch()
    private_grad = dpx.PrivateGradient(loss, CLIP, QUIET, unit="user", within_user=within, method=method)
    total = private_grad.clipped_sum(model, batch, mask=mask).reveal()
    expected = user_total(model, batch, mask, within)
    assert_trees_close(total, expected)
    # what padding contains changes nothing
    for junk in (np.nan, np.inf, 1e30):
        dirty = tuple(np.where(mask[..., None], x, np.float32(junk)) for x in batch)
        assert_trees_close(private_grad.clipped_sum(model, dirty, mask=mask).reveal(), total, rtol=0, atol=0)
    # one bad example takes its user out, and nobody else
    broken = (batch[0].copy(), batch[1])
    broken[0][0, 1] = np.nan
    without = mask.copy()
    without[0] = False
    clean = private_grad.clipped_sum(model, batch, mask=without).reveal()
    assert_trees_close(private_grad.clipped_sum(model, broken, mask=mask).reveal(), clean)


def test_users_diagnostics_and_randomness():
    def keyed(model, x, y, key):
        return loss(model, x, y), jr.uniform(key)

    model = make_model()
    batch, mask = users_batch()
    private_grad = dpx.PrivateGradient(keyed, CLIP, QUIET, unit="user", has_aux=True)
    _, _, diagnostics = private_grad(model, batch, private_grad.init(model, key=jr.key(0)), mask=mask)
    out = diagnostics.reveal()
    assert out.losses.shape == (4,) and out.aux.shape == (4, 3)
    drawn = np.asarray(out.aux)
    assert len(set(drawn[mask].tolist())) == 6 and not drawn[~mask].any()
    mean = np.mean([float(loss(model, batch[0][2, e], batch[1][2, e])) for e in (1, 2)])
    assert float(out.losses[2]) == pytest.approx(mean, rel=1e-5)


def test_user_batches_without_a_proper_axis_are_refused():
    model = make_model()
    (x, y), mask = users_batch()
    private_grad = dpx.PrivateGradient(loss, CLIP, QUIET, unit="user")
    with pytest.raises(ValueError, match=r"same number of examples for each user.*`batch\[1\]`: 2"):
        private_grad.clipped_sum(model, (x, y[:, :2]))
    with pytest.raises(ValueError, match="two leading axes"):
        private_grad.clipped_sum(model, (x, np.arange(4)))
    with pytest.raises(ValueError, match=r"shape \(users, examples\) = \(4, 3\)"):
        private_grad.clipped_sum(model, (x, y), mask=mask[0])  # of three, for four users
    with pytest.raises(ValueError, match="boolean"):
        private_grad.clipped_sum(model, (x, y), mask=mask.astype(np.float32))
    with pytest.raises(ValueError, match=r"within_user"):
        dpx.PrivateGradient(loss, CLIP, QUIET, unit="user", within_user="max")  # pyright: ignore[reportArgumentType]


def test_users_that_are_rows_need_no_second_axis_in_the_mask():
    model = make_model()
    batch, _ = users_batch()
    plan = dpx.dp_sgd(4, 2, 3, noise_multiplier=1.0, clipping=CLIP, unit="user")
    private_grad = plan.private_gradient(loss)
    whole = np.array([True, False, True, True])
    total = private_grad.clipped_sum(model, batch, mask=whole).reveal()
    expected = user_total(model, batch, np.repeat(whole[:, None], 3, axis=1), "mean")
    assert_trees_close(total, expected)
    for padded, mask in plan.batches(batch, seed=0):  # as a plan's batches are
        private_grad(model, padded, private_grad.init(model), mask=mask)


def test_a_plan_for_users_runs_from_rows_to_gradients():
    rng = np.random.default_rng(0)
    owners = np.concatenate([np.arange(30), rng.integers(0, 30, 50)])
    x, y = make_batch(80)
    sampler = dpx.UserSampler(dpx.PoissonSampler(30, 6, 4), owners, examples_per_user=2)
    plan = dpx.PrivacyPlan(sampler, CLIP, dpx.IndependentGaussian(1.0))
    assert plan.unit == "user" and "for one user" in plan.statement(1e-3)
    assert plan.epsilon(1e-3) == dpx.PrivacyPlan(sampler.base, CLIP, plan.noise).epsilon(1e-3)
    private_grad = plan.private_gradient(loss)
    model = make_model()
    state = private_grad.init(model)
    for batch, mask in plan.batches((x, y), seed=3):
        assert batch[0].shape[:2] == mask.shape and mask.shape[1] == 2
        _, state, _ = private_grad(model, batch, state, mask=mask)
    assert state.result == dpx.Result.successful
    with pytest.raises(ValueError, match="draws users"):
        dpx.PrivacyPlan(sampler, CLIP, plan.noise, unit="example")


# --- sums of anything ----------------------------------------------------------------------------------------------------


def summary(model, x, y):
    return {"mean": jnp.mean(x) * model, "outer": jnp.outer(x, y)}


@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_any_output_is_clipped_and_summed(microbatch_size):
    batch = make_batch()
    private_sum = dpx.PrivateSum(summary, CLIP, QUIET, normalizer=4.0, microbatch_size=microbatch_size)
    model = jnp.float32(2.0)
    expected = [np.zeros(()), np.zeros((4, 3))]
    mask = np.arange(8) != 5
    for i in np.flatnonzero(mask):
        out = [2 * np.mean(batch[0][i], dtype=np.float64), np.outer(batch[0][i], batch[1][i]).astype(np.float64)]
        expected = [e + c for e, c in zip(expected, contribution64(CLIP, out, (0, 0)), strict=True)]
    assert_trees_close(jax.tree.leaves(private_sum.clipped_sum(model, batch, mask=mask).reveal()), expected)
    state = private_sum.init(model, batch, key=jr.key(0))
    noisy, state, diagnostics = private_sum(model, batch, state, mask=mask)
    assert_trees_close(jax.tree.leaves(noisy), [e / 4 for e in expected])
    assert diagnostics.reveal().norms.shape == (8,) and int(state.step) == 1
    batch[0][2] = np.inf
    mask[2] = False
    clean = private_sum.clipped_sum(model, make_batch(), mask=mask).reveal()
    mask[2] = True
    assert_trees_close(private_sum.clipped_sum(model, batch, mask=mask).reveal(), clean, rtol=0, atol=0)


def test_sums_have_noise_and_horizons_like_gradients():
    strategy = dpx.BandedToeplitz(np.array([1.0, 0.5]))
    private_sum = dpx.PrivateSum(
        lambda model, x: jnp.zeros(4000) * x, dpx.FlatClipping(2.0), dpx.CorrelatedGaussian(strategy, 3.0), steps=2
    )
    batch = (np.ones(2, np.float32),)
    state = private_sum.init(None, batch, key=jr.key(0))
    out, state, _ = private_sum(None, batch, state)
    # both participations: sensitivity of the strategy is that of columns (1, .5) and (0, 1) together
    expected = 3 * 2 * norm64([np.array([1.0, 1.5])])
    assert np.std(np.asarray(out)) == pytest.approx(expected, rel=0.06)  # 4000 numbers: beyond 5.3 deviations, 1e-7
    _, state, _ = private_sum(None, batch, state)
    out, state, _ = private_sum(None, batch, state)
    assert np.isnan(out).all() and state.result == dpx.Result.budget_spent


def test_model_updates_are_those_of_local_training():
    model = make_model()
    (x, y), _ = users_batch()
    update = dpx.model_update(loss, optax.sgd(0.1), steps=3)
    private_sum = dpx.PrivateSum(update, dpx.FlatClipping(1e3), QUIET)
    total = private_sum.clipped_sum(model, (x[:2], y[:2])).reveal()
    expected = [np.zeros((3, 4)), np.zeros(3)]
    for u in range(2):
        local = model
        for _ in range(3):
            grads = eqx.filter_grad(lambda m, u=u: jnp.mean(jax.vmap(loss, (None, 0, 0))(m, x[u], y[u])))(local)
            local = eqx.apply_updates(local, jax.tree.map(lambda g: -0.1 * g, grads))
        delta = jax.tree.map(
            jnp.subtract, eqx.filter(local, eqx.is_inexact_array), eqx.filter(model, eqx.is_inexact_array)
        )
        expected = [e + np.asarray(d, np.float64) for e, d in zip(expected, jax.tree.leaves(delta), strict=True)]
    assert_trees_close(total, expected, rtol=1e-4)


def test_a_plan_hands_out_sums():
    plan = dpx.dp_sgd(8, 4, 3, noise_multiplier=1.0, clipping=CLIP)
    private_sum = plan.private_sum(summary, microbatch_size=2)
    assert private_sum.steps == 3 and private_sum.sensitivity == plan.private_gradient(loss).sensitivity
    state = private_sum.init(jnp.float32(1.0), make_batch())
    _, state, _ = private_sum(jnp.float32(1.0), make_batch(), state)
    state.raise_if_failed()


def test_bad_functions_to_sum():
    with pytest.raises(ValueError, match=r"PrivateSum\(fn=\.\.\.\)"):
        dpx.PrivateSum(3, CLIP, QUIET)
    counting = dpx.PrivateSum(lambda model, x, y: {"n": jnp.int32(1)}, CLIP, QUIET)
    with pytest.raises(ValueError, match=r"output\['n'\] is int32"):
        counting.init(None, make_batch())
    with pytest.raises(ValueError, match="l1"):
        dpx.PrivateSum(summary, dpx.FlatClipping(1.0, order=1), QUIET)
    with pytest.raises(ValueError, match=r"dpx\.model_update\(steps=\.\.\.\)"):
        dpx.model_update(loss, optax.sgd(0.1), steps=0)
