"""The step: equal to its definition however it is computed, compiled or batched; noise as stated; clear errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import dpx
import registry
from conftest import (
    assert_trees_close,
    assert_trees_equal,
    loss,
    make_batch,
    make_model,
    naive_clipped_sum,
)

FLAT = dpx.FlatClipping(0.5)
METHODS = registry.by_name(registry.METHODS)
MASK = np.array([1, 0, 1, 1, 1, 1, 0, 1], bool)


def make(loss=loss, **options):
    options = {"normalizer": 8.0, **options}
    return dpx.PrivateGradient(
        loss, options.pop("clipping", FLAT), options.pop("noise", dpx.IndependentGaussian(1.5)), **options
    )


@pytest.mark.parametrize("method", METHODS)
def test_diagnostics_are_those_of_single_examples(method, model, batch):
    private_grad = make(lambda m, x, y: (loss(m, x, y), {"x": x[0]}), method=METHODS[method], has_aux=True)
    _, _, diagnostics = private_grad(model, batch, private_grad.init(model), mask=MASK)
    seen = diagnostics.reveal()
    for i in range(8):
        grad = eqx.filter_grad(loss)(model, batch[0][i], batch[1][i])
        norm = float(optax.tree.norm(grad))
        value = float(loss(model, batch[0][i], batch[1][i]))
        np.testing.assert_allclose([seen.losses[i], seen.norms[i]], np.array([value, norm]) * MASK[i], rtol=1e-5)
        np.testing.assert_allclose(seen.aux["x"][i], batch[0][i, 0] * MASK[i])


def test_grads_are_sum_plus_noise_over_normalizer(model, batch):
    for normalizer in (1.0, 32.0):
        private_grad = make(normalizer=normalizer)
        state = private_grad.init(model, key=jr.key(3))
        grads, _, _ = private_grad(model, batch, state)
        nothing, _, _ = private_grad(model, batch, state, mask=np.zeros(8, bool))  # the same noise, alone
        total = private_grad.clipped_sum(model, batch).reveal()
        expected = jax.tree.map(lambda t, n, c=normalizer: t / c + n, total, nothing)
        assert_trees_close(grads, expected)
        assert jax.tree.structure(grads) == jax.tree.structure(eqx.filter(model, eqx.is_inexact_array))


@pytest.mark.slow
def test_jit_is_eager(model, batch):
    private_grad = make(method=dpx.Vectorized(3))
    state = private_grad.init(model, key=jr.key(0))
    compiled = private_grad(model, batch, state, mask=MASK)
    with jax.disable_jit():
        eager = private_grad(model, batch, state, mask=MASK)
    assert_trees_close(compiled[0], eager[0])
    assert_trees_close(compiled[2].reveal(), eager[2].reveal())
    assert jr.key_data(compiled[1].key).tolist() == jr.key_data(eager[1].key).tolist()


def test_vmap_over_seeds_and_noise_multipliers_is_a_stack(model, batch):
    keys = jr.split(jr.key(0), 3)
    sigmas = jnp.array([0.5, 1.0, 2.0])

    def one(key, sigma):
        private_grad = make(noise=dpx.IndependentGaussian(sigma), method=dpx.Vectorized(3))
        return private_grad(model, batch, private_grad.init(model, key=key), mask=MASK)[0]

    swept = eqx.filter_vmap(one)(keys, sigmas)
    for i in range(3):
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], swept), one(keys[i], sigmas[i]))


def test_one_trace_for_fifty_steps_of_varying_batch_size_and_noise(model):
    traces = []

    def counted(model, x, y):
        traces.append(None)
        return loss(model, x, y)

    plan = dpx.PrivacyPlan(dpx.PoissonSampler(60, 20, 50), FLAT, dpx.IndependentGaussian(1.0))
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(60, 4)).astype(np.float32), rng.normal(size=(60, 3)).astype(np.float32))
    # not the plan's own gradient, whose noise the plan states
    private_grad = make(counted, method=dpx.Vectorized(8), normalizer=20.0, steps=50)
    state = private_grad.init(model)
    sizes = set()
    for step, (batch, mask) in enumerate(plan.batches(data, seed=0)):
        sizes.add(int(mask.sum()))
        sweep = eqx.tree_at(lambda p: p.noise.noise_multiplier, private_grad, jnp.asarray(1.0 + step, jnp.float32))
        _, state, _ = sweep(model, batch, state, mask=mask)
    state.raise_if_failed()
    assert len(traces) == 1 and len(sizes) > 5 and int(state.step) == 50


def test_microbatches_of_padding_are_not_computed(model):
    evaluated = []

    def watched(model, x, y):
        jax.debug.callback(lambda v: evaluated.append(float(v)), x[0])
        return loss(model, x, y)

    x, y = make_batch(12)
    private_grad = make(watched, method=dpx.Vectorized(4))
    private_grad.clipped_sum(model, (x, y), mask=np.arange(12) < 3).reveal()
    jax.effects_barrier()
    assert sorted(evaluated) == sorted(x[:4, 0].tolist())


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_gives_pure_noise(method, model):
    private_grad = make(method=METHODS[method])
    x, y = make_batch()
    state = private_grad.init(model, key=jr.key(1))
    empty, _, diagnostics = private_grad(model, (x[:0], y[:0]), state)
    masked, _, _ = private_grad(model, (x, y), state, mask=np.zeros(8, bool))
    assert_trees_equal(empty, masked)
    assert float(jnp.abs(empty.weight).min()) > 0
    assert diagnostics.reveal().losses.shape == (0,)


@pytest.mark.parametrize("record", [r for r in registry.NOISES if r.law is not None], ids=lambda r: r.name)
def test_noise_has_the_stated_scale_and_distribution(record):
    from scipy import stats

    noise = record.value
    model = {"w": jnp.zeros(200_000)}
    clipping = dpx.FlatClipping(0.25, order=noise.order)
    private_grad = make(lambda m, x: jnp.sum(m["w"] * x), clipping=clipping, noise=noise)
    grads, _, _ = private_grad(
        model, (np.ones((1, 200_000), np.float32),), private_grad.init(model, key=jr.key(5)), mask=np.zeros(1, bool)
    )
    scale = 1.5 * 0.25 / 8.0
    z = np.asarray(grads["w"], np.float64) / scale
    # a Kolmogorov-Smirnov test that raises a false alarm once in a million; 2 % of scale would fail it
    assert stats.kstest(z, record.law).pvalue > 1e-6
    assert stats.kstest(z * 1.03, record.law).pvalue < 1e-6


def test_two_runs_have_keys_of_their_own(model, batch):
    private_grad = make()
    one, other = (private_grad(model, batch, private_grad.init(model))[0] for _ in range(2))  # fresh entropy
    assert not np.isin(np.ravel(one.weight), np.ravel(other.weight)).any()


def test_steps_are_uncorrelated():
    model = {"w": jnp.zeros(100_000)}
    private_grad = make(lambda m, x: jnp.sum(m["w"]) * x)
    state = private_grad.init(model, key=jr.key(9))
    draws = []
    for _ in range(3):
        grads, state, _ = private_grad(model, (np.zeros(2, np.float32),), state)
        draws.append(np.asarray(grads["w"]))
    correlation = np.corrcoef(draws)
    # standard deviation 1 / sqrt(100,000); six of them are passed once in 5e8
    assert np.abs(correlation - np.eye(3)).max() < 6 / np.sqrt(100_000)


def test_a_step_past_the_budget_is_refused(model, batch):
    private_grad = make(steps=2)
    state = private_grad.init(model)
    for _ in range(2):
        grads, state, _ = private_grad(model, batch, state)
        state.raise_if_failed()
        assert np.isfinite(np.asarray(grads.weight)).all()
    for _ in range(2):
        grads, state, _ = private_grad(model, batch, state)
        assert all(np.isnan(np.asarray(g)).all() for g in jax.tree.leaves(grads))
        with pytest.raises(RuntimeError, match="past the last one that the privacy budget covers"):
            state.raise_if_failed()
    assert state.result == dpx.Result.budget_spent and int(state.step) == 2


def test_a_state_that_is_not_finite_poisons_every_later_step(model, batch):
    private_grad = make()
    state = private_grad.init(model)
    broken = eqx.tree_at(lambda p: p.noise.noise_multiplier, private_grad, jnp.array(jnp.inf))
    grads, state, _ = broken(model, batch, state)
    assert state.result == dpx.Result.non_finite
    grads, state, _ = private_grad(model, batch, state)
    assert np.isnan(np.asarray(grads.weight)).all()
    with pytest.raises(RuntimeError, match="infinite or NaN"):
        state.raise_if_failed()


def test_init_inside_jit_refuses_to_bake_in_a_key(model):
    with pytest.raises(RuntimeError, match="same randomness every time"):
        eqx.filter_jit(lambda m: make().init(m))(model)


def test_a_dict_of_arrays_and_a_pytree_batch():
    params = {"w": jnp.ones((2, 3)), "steps": jnp.array(3)}

    def pytree_loss(params, example):
        return jnp.sum((params["w"] @ example["x"] - example["y"]) ** 2)

    batch = ({"x": np.ones((4, 3), np.float32), "y": np.zeros((4, 2), np.float32)},)
    private_grad = make(pytree_loss)
    grads, _, _ = private_grad(params, batch, private_grad.init(params))
    assert grads["steps"] is None and grads["w"].shape == (2, 3)
    assert_trees_close(
        private_grad.clipped_sum(params, batch).reveal(),
        naive_clipped_sum(pytree_loss, params, batch, np.ones(4, bool), 0.5),
    )


def test_frozen_leaves_get_no_gradient_and_no_noise(model, batch):
    spec = eqx.tree_at(lambda m: m.bias, jax.tree.map(lambda _: False, model), True)
    private_grad = make(filter_spec=spec)
    grads, _, _ = private_grad(model, batch, private_grad.init(model))
    assert grads.weight is None and grads.bias.shape == (3,)
    only_bias = lambda bias, x, y: loss(eqx.tree_at(lambda m: m.bias, model, bias), x, y)
    assert_trees_close(
        private_grad.clipped_sum(model, batch).reveal().bias,
        naive_clipped_sum(only_bias, model.bias, batch, np.ones(8, bool), 0.5)[0],
    )


def test_shared_leaves_are_clipped_as_one(batch):
    class Tied(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self):
            pair = (
                eqx.nn.Linear(4, 4, use_bias=False, key=jr.key(0)),
                eqx.nn.Linear(4, 4, use_bias=False, key=jr.key(1)),
            )
            self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)

        def __call__(self, x):
            first, second = self.shared()
            return second(jnp.tanh(first(x)))

    def tied_loss(model, x, y):
        return jnp.sum(model(x)[:3] * y)

    model = Tied()
    private_grad = make(tied_loss)
    total = private_grad.clipped_sum(model, batch).reveal()
    assert len(jax.tree.leaves(total)) == 1
    assert_trees_close(total, naive_clipped_sum(tied_loss, model, batch, np.ones(8, bool), 0.5))


def test_half_precision_leaves_come_back_as_float32(batch):
    model = make_model(jnp.bfloat16)

    def half_loss(model, x, y):
        return loss(model, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16))

    private_grad = make(half_loss)
    state = private_grad.init(model)
    grads, state, _ = eqx.filter_jit(private_grad)(model, batch, state)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    expected = naive_clipped_sum(half_loss, model, batch, np.ones(8, bool), 0.5)
    assert_trees_close(private_grad.clipped_sum(model, batch).reveal(), expected, rtol=2e-2, atol=2e-2)
    with jax.numpy_dtype_promotion("standard"):
        updated = optax.apply_updates({"w": model.weight}, {"w": grads.weight})
    assert jax.tree.leaves(updated)[0].dtype == jnp.bfloat16


def test_training_loop_under_filter_jit_with_donation(model):
    plan = dpx.dp_sgd(num_examples=40, batch_size=20, steps=5, noise_multiplier=1.0)
    private_grad = plan.private_gradient(loss)
    optim = optax.sgd(0.1)
    rng = np.random.default_rng(0)
    data = (rng.normal(size=(40, 4)).astype(np.float32), rng.normal(size=(40, 3)).astype(np.float32))

    @eqx.filter_jit(donate="all-except-first")
    def step(batch_and_mask, model, state, opt_state):
        batch, mask = batch_and_mask
        grads, state, _ = private_grad(model, batch, state, mask=mask)
        updates, opt_state = optim.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, opt_state

    state = private_grad.init(model)
    opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    for pair in plan.batches(data, seed=0):
        model, state, opt_state = step(pair, model, state, opt_state)
    state.raise_if_failed()
    assert int(state.step) == 5 and np.isfinite(np.asarray(model.weight)).all() and int(model.count) == 7


def test_per_example_keys_do_not_depend_on_method_or_padding(model, batch):
    def noisy_loss(model, x, y, *, key):
        return loss(model, x + jr.normal(key, x.shape), y)

    key = jr.key(4)
    totals = [make(noisy_loss, method=m).clipped_sum(model, batch, key=key).reveal() for m in METHODS.values()]
    for total in totals[1:]:
        assert_trees_close(total, totals[0])
    padded = tuple(np.concatenate([leaf, leaf]) for leaf in batch)
    assert_trees_close(make(noisy_loss).clipped_sum(model, padded, mask=np.arange(16) < 8, key=key).reveal(), totals[0])
    with pytest.raises(ValueError, match="takes `key`"):
        make(noisy_loss).clipped_sum(model, batch)
    same = make(lambda m, x, y, key: jr.uniform(key) + 0 * loss(m, x, y))
    losses = same(model, batch, same.init(model))[2].reveal().losses
    assert len(np.unique(losses)) == 8


def test_explain_lists_every_array(model, batch):
    text = str(
        make(filter_spec=eqx.tree_at(lambda m: m.bias, jax.tree.map(lambda _: False, model), True)).explain(
            model, batch
        )
    )
    assert ".weight" in text and "frozen" in text and ".bias" in text


# --- Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad_loss", "match"),
    [
        (lambda m, x, y: m(x) - y, r"must be a scalar; got shape \(3,\)"),
        (lambda m, x, y: loss(m, x, y)[None], r"got shape \(1,\)"),
        (lambda m, x, y: jnp.argmax(m(x)), "real floating-point scalar; got int32"),
        (lambda m, x, y: (loss(m, x, y), x), "has_aux=True"),
        (lambda m, x: loss(m, x, x[:3]), "must take 3 arguments"),
        (lambda m, x, y, z: loss(m, x, y), "must take 3 arguments"),
        (lambda m, x, y: jnp.mean(jax.vmap(loss, (None, 0, 0))(m, x, y)), "without a batch axis"),
        (lambda m, x, y: jax.lax.pmean(loss(m, x, y), "batch"), "named `vmap` axis"),
    ],
)
def test_bad_losses(bad_loss, match, model, batch):
    private_grad = make(bad_loss)
    with pytest.raises(ValueError, match=match):
        private_grad(model, batch, private_grad.init(model))


def test_errors_of_the_loss_itself_pass_through_with_a_note(model, batch):
    def broken(model, x, y):
        raise KeyError("mine")

    with pytest.raises(KeyError) as caught:
        make(broken).clipped_sum(model, batch)
    assert "ONE example" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("bad_batch", "match"),
    [
        (lambda x, y: (x, y[:3]), r"`batch\[0\]`: 8, `batch\[1\]`: 3"),
        (lambda x, y: [x, y], "must be a tuple"),
        (lambda x, y: (x, y, 1.0), r"batch\[2\]"),
        (lambda x, y: (), "no array"),
    ],
)
def test_bad_batches(bad_batch, match, model, batch):
    with pytest.raises(ValueError, match=match):
        make().clipped_sum(model, bad_batch(*batch))


@pytest.mark.parametrize("mask", [np.ones(8), np.ones(3, bool), np.ones((8, 1), bool), [True] * 8])
def test_bad_masks(mask, model, batch):
    with pytest.raises(ValueError, match="`mask` must"):
        make().clipped_sum(model, batch, mask=mask)


def test_layers_that_mix_examples_are_named(batch):
    class Net(eqx.Module):
        layers: list

    net = Net([eqx.nn.Linear(4, 3, key=jr.key(0)), eqx.nn.BatchNorm(3, "batch", mode="ema")])
    with pytest.raises(ValueError, match=r"`\.layers\[1\]` is a `BatchNorm`.*GroupNorm"):
        make().init(net)
    with pytest.raises(ValueError, match=r"`\.layers\[1\]` is a `BatchNorm`"):
        make().clipped_sum(net, batch)
    spectral = Net([eqx.nn.SpectralNorm(eqx.nn.Linear(4, 3, key=jr.key(0)), "weight", key=jr.key(1))])
    with pytest.raises(ValueError, match="SpectralNorm"):
        make().init(spectral)


def test_only_real_floating_point_leaves_can_be_trained(model):
    with pytest.raises(ValueError, match=r"`\.count`, which is of dtype int32"):
        make(filter_spec=eqx.is_array).init(model)
    with pytest.raises(ValueError, match=r"`\.name`, which is a str"):
        make(filter_spec=eqx.tree_at(lambda m: m.name, jax.tree.map(lambda _: False, model), True)).init(model)
    with pytest.raises(ValueError, match="nothing to train"):
        make(filter_spec=False).init(model)
    with pytest.raises(ValueError, match="complex64"):
        make().init({"w": jnp.ones(3, jnp.complex64)})


def test_bad_keys(model, batch):
    with pytest.raises(ValueError, match="typed PRNG key"):
        make().init(model, key=jr.PRNGKey(0))
    with pytest.raises(ValueError, match="one key"):
        make().init(model, key=jr.split(jr.key(0)))


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_bad_numbers(value):
    for name, cls in (("IndependentGaussian", dpx.IndependentGaussian), ("Laplace", dpx.Laplace)):
        with pytest.raises(ValueError, match=rf"`{name}\(noise_multiplier=\.\.\.\)` must be positive and finite"):
            cls(value)
    with pytest.raises(ValueError, match="normalizer"):
        make(normalizer=value)


def test_bad_counts():
    with pytest.raises(ValueError, match="steps"):
        make(steps=0)
    with pytest.raises(ValueError, match="microbatch_size"):
        dpx.Vectorized(0)
    with pytest.raises(ValueError, match="steps.*integer"):
        make(steps=2.5)


def test_uncalibrated_noise_is_refused(model, batch):
    private_grad = make(noise=dpx.IndependentGaussian())
    with pytest.raises(ValueError, match="no noise multiplier yet"):
        private_grad(model, batch, private_grad.init(model))
