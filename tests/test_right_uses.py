"""Right uses that look unusual are accepted: each with the result that a naive loop gives."""

import pickle
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import dpx
from conftest import assert_trees_close, assert_trees_equal, loss, make_batch, make_model, naive_clipped_sum, norm64

FLAT = dpx.FlatClipping(0.5)
QUIET = dpx.IndependentGaussian(1e-9)
METHODS = [dpx.Vectorized(), dpx.Ghost()]
IDS = ["vectorized", "ghost"]


# --- saving --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", dpx.random.CHACHA20], ids=str)
def test_a_state_is_saved_and_restored_by_equinox_and_goes_on_as_if_nothing_had_happened(impl, tmp_path, model, batch):
    clipping = dpx.AdaptiveClipping(1.0, count_noise_multiplier=50.0)
    noise = dpx.CorrelatedGaussian(dpx.BandedToeplitz([1.0, 0.5]), 1.0)
    private_grad = dpx.PrivateGradient(loss, clipping, noise, steps=4, normalizer=8.0, method=dpx.Vectorized())
    state = private_grad.init(model, key=jr.key(3, impl=impl))
    np.testing.assert_array_equal(jr.key_data(state.key), jr.key_data(jr.key(3, impl=impl)))
    _, state, _ = private_grad(model, batch, state)
    eqx.tree_serialise_leaves(tmp_path / "run.eqx", (model, state))
    like = private_grad.init(model, key=jr.key(9, impl=impl))
    _, restored = eqx.tree_deserialise_leaves(tmp_path / "run.eqx", (model, like))
    assert bool(eqx.tree_equal(state, restored)) and jr.key_impl(restored.key) == jr.key_impl(state.key)
    pickled = pickle.loads(pickle.dumps(jax.device_get(state)))
    grads = [private_grad(model, batch, s)[0] for s in (state, restored, pickled)]
    assert_trees_equal(grads[0], grads[1])
    assert_trees_equal(grads[0], grads[2])


# --- shapes at the edge --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_an_empty_batch_and_parameters_without_axes(method):
    model = {"scale": jnp.array(2.0), "shift": jnp.ones(3)}
    square = lambda m, x: jnp.sum((m["scale"] * x + m["shift"]) ** 2)
    private_grad = dpx.PrivateGradient(square, FLAT, dpx.IndependentGaussian(1.0), method=method)
    state = private_grad.init(model, key=jr.key(0))
    grads, _, diagnostics = private_grad(model, (np.zeros((0, 3), np.float32),), state)
    masked, _, _ = private_grad(model, (np.zeros((1, 3), np.float32),), state, mask=np.zeros(1, bool))
    assert_trees_equal(grads, masked)
    assert grads["scale"].shape == () and diagnostics.reveal().losses.shape == (0,)


def test_parameters_without_entries():
    model = {"w": jnp.ones(3), "none": jnp.zeros((0, 3))}
    square = lambda m, x: jnp.sum((m["w"] * x) ** 2) + jnp.sum(m["none"] @ x)
    private_grad = dpx.PrivateGradient(square, FLAT, dpx.IndependentGaussian(1.0), method=dpx.Vectorized())
    x = np.ones((4, 3), np.float32)
    grads, state, _ = private_grad(model, (x,), private_grad.init(model, key=jr.key(0)))
    assert grads["none"].shape == (0, 3) and np.isfinite(grads["w"]).all() and state.result == dpx.Result.successful
    total = private_grad.clipped_sum(model, (x,)).reveal()
    assert_trees_close(total, naive_clipped_sum(square, model, (x,), np.ones(4, bool), FLAT)[::1])


# --- a loss whose `key` is an example's part -------------------------------------------------------------------------------


def keyed_by_the_batch(model, x, key):
    """`key` is a part of the example here, as in retrieval."""
    return loss(model, x, key)


def test_key_as_an_argument_of_the_batch():
    model, (x, y) = make_model(), make_batch(4)
    expected = naive_clipped_sum(loss, model, (x, y), np.ones(4, bool), FLAT)
    private_grad = dpx.PrivateGradient(keyed_by_the_batch, FLAT, QUIET, method=dpx.Vectorized())
    assert_trees_close(private_grad.clipped_sum(model, (x, y)).reveal(), expected)
    augmented = dpx.augment(keyed_by_the_batch, lambda x, y, *, key: (x, y), 2)
    private_grad = dpx.PrivateGradient(augmented, FLAT, QUIET, method=dpx.Vectorized())
    assert_trees_close(private_grad.clipped_sum(model, (x, y), key=jr.key(0)).reveal(), expected)
    gradient = lambda model, x, key: eqx.filter_grad(keyed_by_the_batch)(model, x, key)
    total = dpx.PrivateSum(gradient, FLAT, QUIET).clipped_sum(model, (x, y)).reveal()
    assert_trees_close(total, expected)
    update = dpx.model_update(keyed_by_the_batch, optax.sgd(1.0))
    users = (x[:, None], y[:, None])  # one row each: the update is minus the gradient
    total = dpx.PrivateSum(update, FLAT, QUIET).clipped_sum(model, users, key=jr.key(0)).reveal()
    assert_trees_close(total, [-e for e in expected])


def test_local_steps_have_randomness_of_their_own():
    noisy = lambda model, x, key: jnp.sum(model * jr.normal(key, x.shape))
    update = dpx.model_update(noisy, optax.sgd(1.0), steps=2)
    private_sum = dpx.PrivateSum(update, dpx.FlatClipping(100.0), QUIET, unit="user")
    sums = [
        private_sum.clipped_sum(jnp.ones(2), (np.ones((n, 2, 2), np.float32),), key=jr.key(5)).reveal() for n in (1, 2)
    ]
    key = jr.fold_in(jr.key(5), 0)
    draws = [jr.normal(jr.fold_in(jr.fold_in(key, step), row), (2,)) for step in range(2) for row in range(2)]
    np.testing.assert_allclose(sums[0], -np.sum(draws, axis=0) / 2, rtol=1e-5)
    assert not np.allclose(sums[1], 2 * sums[0])


# --- federated averaging over a flat table -------------------------------------------------------------------------------


NAMES = ["ada"] * 5 + ["bob"] + ["cyd"] * 2 + ["dan"] * 3 + ["eve"] * 9
SHUFFLED = np.random.default_rng(3).permutation(len(NAMES))
USER_IDS = [NAMES[i] for i in SHUFFLED]


def fed_avg(data, user_ids, model, *, noise, seed):
    """The six lines."""
    sampler = dpx.UserSampler(dpx.PoissonSampler(5, 3, 4), user_ids, examples_per_user=4)
    plan = dpx.PrivacyPlan(sampler, 0.5, noise, adjacency="replace_special")
    private_sum = plan.private_sum(dpx.model_update(loss, optax.sgd(0.1), steps=3))
    state = private_sum.init(model, next(plan.batches(data, seed=seed))[0], key=jr.key(0))
    for batch, mask in plan.batches(data, seed=seed):
        update, state, _ = private_sum(model, batch, state, mask=mask)
        model = eqx.apply_updates(model, update)
    return model


def test_fed_avg_over_ragged_users_is_the_naive_loop():
    """Users with 1 to 9 rows, padded to 4 a batch; padding is not trained on."""
    data, model = make_batch(20), make_model()
    got = fed_avg(data, USER_IDS, model, noise=QUIET, seed=7)
    sampler = dpx.UserSampler(dpx.PoissonSampler(5, 3, 4), USER_IDS, examples_per_user=4)
    expected, taken = model, []
    for step in range(4):
        total = jax.tree.map(lambda p: np.zeros(p.shape), eqx.filter(expected, eqx.is_inexact_array))
        for rows in sampler.indices(7, step):
            rows = rows[rows >= 0]
            taken.append(len(rows))
            assert len({USER_IDS[i] for i in rows}) == 1  # a user's own rows, by name
            local = expected
            for _ in range(3):
                mean = lambda m, rows=rows: jnp.mean(jnp.stack([loss(m, data[0][i], data[1][i]) for i in rows]))
                local = eqx.apply_updates(local, jax.tree.map(lambda g: -0.1 * g, eqx.filter_grad(mean)(local)))
            before, after = (eqx.filter(m, eqx.is_inexact_array) for m in (expected, local))
            change = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), after, before)
            factor = min(1.0, 0.5 / norm64(change))
            total = jax.tree.map(lambda t, c, f=factor: t + f * c, total, change)
        expected = eqx.apply_updates(expected, jax.tree.map(lambda t: jnp.asarray(t / 3, jnp.float32), total))
    assert 1 in taken and 4 in taken and len(taken) > 6
    assert_trees_close(
        eqx.filter(got, eqx.is_inexact_array), eqx.filter(expected, eqx.is_inexact_array), rtol=1e-4, atol=1e-5
    )


def test_padding_of_a_user_cannot_poison_the_local_steps():
    root = lambda model, x: jnp.sum(jnp.sqrt(x) * model)  # an infinite slope at the zeros of padding
    update = dpx.model_update(lambda model, x: root(x, model), optax.sgd(1.0))
    x = np.array([[[4.0, 4.0], [0.0, 0.0]]], np.float32)
    private_sum = dpx.PrivateSum(update, dpx.FlatClipping(100.0), QUIET, unit="user")
    total = private_sum.clipped_sum(jnp.ones(2), (x,), mask=np.array([[True, False]])).reveal()
    np.testing.assert_allclose(total, -0.5 * x[0, 0], rtol=1e-6)


def test_a_function_that_does_not_know_the_mask_is_refused_ragged_users():
    plan = dpx.PrivacyPlan(
        dpx.UserSampler(dpx.PoissonSampler(5, 3, 4), USER_IDS, examples_per_user=4),
        0.5,
        QUIET,
        adjacency="replace_special",
    )
    private_sum = plan.private_sum(lambda model, x, y: jnp.sum(x, axis=0))
    model, data = make_model(), make_batch(20)
    batch, mask = next(plan.batches(data, seed=1))
    state = private_sum.init(model, batch, key=jr.key(0))
    with pytest.raises(ValueError, match="keyword `mask`"):
        private_sum(model, batch, state, mask=mask)
    total = private_sum(model, batch, state, mask=mask.any(1))[0]  # zeros change no sum
    assert total.shape == (4,)


@pytest.mark.parametrize(
    "ids",
    [
        USER_IDS,
        np.array(USER_IDS),
        np.array(USER_IDS, object),
        [("user", name) for name in USER_IDS],
        [(name,) * (1 + (name == "bob")) for name in USER_IDS],
    ],
    ids=["texts", "array", "objects", "tuples", "tuples of two lengths"],
)
def test_users_have_names(ids):
    sampler = dpx.UserSampler(dpx.PoissonSampler(5, 3, 4), ids, 4)
    numbers = dict(zip(USER_IDS, sampler.user_ids.tolist(), strict=True))
    assert sorted(numbers.values()) == [0, 1, 2, 3, 4]
    assert [numbers[name] for name in USER_IDS] == sampler.user_ids.tolist()


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (USER_IDS + ["fay"], "names 6 users, and `base` samples 5"),
        ([None, *USER_IDS], "no user to 1 of 21 rows, the first of them 0"),
        ([[name] for name in USER_IDS], "whatever can be hashed"),
        ("adabob", "one name"),
    ],
    ids=["too many", "missing", "lists", "a text"],
)
def test_users_without_or_with_strange_names(ids, match):
    with pytest.raises(ValueError, match=match):
        dpx.UserSampler(dpx.PoissonSampler(5, 3, 4), ids, 4)


# --- layers with a state ------------------------------------------------------------------------------------------------


class Normed(eqx.Module):
    """A model with a layer that keeps a state."""

    first: eqx.nn.Linear
    norm: Any
    last: eqx.nn.Linear

    def __call__(self, x, state):
        return self.last(self.norm(self.first(x), state)[0])


def batch_normed(mode):
    keys = jr.split(jr.key(0), 2)
    first, last = (eqx.nn.Linear(4, 4, key=k) for k in keys)
    return eqx.nn.make_with_state(lambda: Normed(first, eqx.nn.BatchNorm(4, "batch", mode=mode), last))()


def spectral_normed():
    keys = jr.split(jr.key(0), 4)
    inner = eqx.nn.SpectralNorm(eqx.nn.Linear(4, 4, key=keys[2]), "weight", key=keys[3])
    first, last = (eqx.nn.Linear(4, 4, key=k) for k in keys[:2])
    return eqx.nn.make_with_state(lambda: Normed(first, inner, last))()


@pytest.mark.parametrize("make", [lambda: batch_normed("ema"), lambda: batch_normed("batch"), spectral_normed])
def test_frozen_layers_with_a_state_are_trained_and_others_refused(make):
    model, state = make()
    if isinstance(model.norm, eqx.nn.BatchNorm) and model.norm.mode == "ema":
        state = state.set(model.norm.ema_state_index, (0.3 * jnp.ones(4), 2.0 * jnp.ones(4)))
    of_example = lambda m, x: jnp.sum(m(x, state) ** 2)
    private_grad = dpx.PrivateGradient(of_example, FLAT, QUIET, method=dpx.Vectorized())
    remedy = "inference_mode"
    with pytest.raises(ValueError, match=rf"`\.norm` is a `{type(model.norm).__name__}`.*{remedy}"):
        private_grad.init(model, key=jr.key(0))
    frozen = eqx.nn.inference_mode(model)
    x = make_batch(4)[0]
    private_grad.init(frozen, key=jr.key(0))
    total = private_grad.clipped_sum(frozen, (x,)).reveal()
    assert_trees_close(total, naive_clipped_sum(of_example, frozen, (x,), np.ones(4, bool), FLAT), rtol=1e-4)


def test_the_remedy_for_complex_parameters_works():
    model = {"w": jnp.ones(3), "spectrum": jnp.ones(3, jnp.complex64)}
    magnitude = lambda m, x: jnp.sum(jnp.abs(m["spectrum"] * x.astype(jnp.complex64)) ** 2 * m["w"])
    with pytest.raises(ValueError, match=r"\['spectrum'\].*iscomplexobj") as info:
        dpx.PrivateGradient(magnitude, FLAT, QUIET).init(model, key=jr.key(0))
    spec = eval(str(info.value).split("`filter_spec=")[1].split("`")[0], {"eqx": eqx, "jnp": jnp})
    private_grad = dpx.PrivateGradient(magnitude, FLAT, QUIET, filter_spec=spec, method=dpx.Vectorized())
    x = np.ones((2, 3), np.float32)
    grads, _, _ = private_grad(model, (x,), private_grad.init(model, key=jr.key(0)))
    assert grads["spectrum"] is None and grads["w"].shape == (3,)


# --- pandas -------------------------------------------------------------------------------------------------------------


def test_tables_are_read_by_position_whatever_their_labels_are():
    pd = pytest.importorskip("pandas")
    x, y = np.arange(60, dtype=np.float32).reshape(20, 3), np.arange(20)
    plan = dpx.dp_sgd(20, 5, 3, noise_multiplier=1.0)
    labels = np.random.default_rng(0).permutation(20)
    for data in [
        (pd.DataFrame(x), pd.Series(y, index=labels)),
        (pd.DataFrame(x, index=labels, columns=list("abc")), y),
        (pd.DataFrame(x, index=list("abcdefghijklmnopqrst")), pd.Series(y, index=labels[::-1])),
    ]:
        for (batch, mask), (expected, real) in zip(
            plan.batches(data, seed=1), plan.batches((x, y), seed=1), strict=True
        ):
            np.testing.assert_array_equal(mask, real)
            assert_trees_equal(batch, expected)
            np.testing.assert_array_equal(batch[0][mask][:, 0], 3 * batch[1][mask])


def test_tables_of_other_things_are_refused_by_column():
    pd = pytest.importorskip("pandas")
    plan = dpx.dp_sgd(20, 5, 3, noise_multiplier=1.0)
    numbers = pd.Series(np.arange(20.0))
    for column in (
        pd.Series(["a"] * 20),
        pd.Series(["a"] * 20, dtype="category"),
        pd.Series([None, 1] * 10, dtype="Int64"),
        pd.Series([[1]] * 20),
        pd.Series(np.zeros(20, "M8[s]")),
    ):
        with pytest.raises(ValueError, match=r"`data\[1\]`, column 'odd', must hold numbers"):
            plan.batches((numbers, pd.DataFrame({"even": numbers, "odd": column})), seed=1)
        with pytest.raises(ValueError, match=r"`data\[0\]` must hold numbers"):
            plan.batches((column,), seed=1)


# --- short ways ---------------------------------------------------------------------------------------------------------


def test_a_number_is_a_flat_clip_norm(model, batch):
    plans = [
        dpx.dp_sgd(100, 10, 5, clipping=0.5, noise_multiplier=1.0),
        dpx.dp_mf(100, 10, 5, bands=2, clipping=0.5, noise_multiplier=1.0),
        dpx.PrivacyPlan(dpx.PoissonSampler(100, 10, 5), 0.5, dpx.IndependentGaussian(1.0)),
    ]
    parts = [
        *plans,
        dpx.PrivateGradient(loss, 0.5, dpx.IndependentGaussian(1.0)),
        dpx.PrivateSum(lambda m, x, y: x, np.float32(0.5), dpx.IndependentGaussian(1.0)),
        dpx.PrivateGradient(loss, jnp.array(0.5), dpx.IndependentGaussian(1.0)),
    ]
    for part in parts:
        assert isinstance(part.clipping, dpx.FlatClipping)
        assert float(part.clipping.norm) == 0.5 and part.clipping.order == 2


@pytest.mark.parametrize(
    ("epochs", "examples", "batch", "steps"),
    [
        (1, 1000, 10, 100),
        (0.1, 1000, 10, 10),
        (1.1, 1000, 10, 110),
        (2, 1000, 300, 7),
        (1e-3, 1000, 10, 1),
        (3, 60_000, 256, 704),
    ],
)
def test_epochs_are_steps_rounded_up(epochs, examples, batch, steps):
    assert dpx.dp_sgd(examples, batch, epochs=epochs, noise_multiplier=1.0).steps == steps
    if steps > 1:
        assert dpx.dp_mf(examples, batch, epochs=epochs, bands=2, noise_multiplier=1.0).steps == steps


def test_epochs_or_steps():
    each: Any = ({}, {"steps": 3, "epochs": 1})
    for options in each:
        with pytest.raises(ValueError, match="`dp_sgd` needs the number of `steps`, or of `epochs=`"):
            dpx.dp_sgd(100, 10, noise_multiplier=1.0, **options)


def test_no_privacy_points_to_no_clipping():
    for make in (
        lambda: dpx.dp_sgd(100, 10, 5, epsilon=np.inf, delta=1e-5),
        lambda: dpx.dp_mf(100, 10, 5, bands=2, epsilon=np.inf, delta=1e-5),
        lambda: dpx.PrivacyPlan(dpx.PoissonSampler(100, 10, 5), 1.0, dpx.IndependentGaussian()).calibrate(np.inf, 1e-5),
        lambda: dpx.dp_sgd(100, 10, 5, noise_multiplier=0.0),
        lambda: dpx.CorrelatedGaussian(dpx.Identity(), 0.0),
        lambda: dpx.dp_sgd(100, 10, 5, clipping=np.inf, noise_multiplier=1.0),
    ):
        with pytest.raises(ValueError, match=r"NoClipping\(\)"):
            make()


# --- what newcomers typed -----------------------------------------------------------------------------------------------


def test_a_batch_that_is_none_of_the_plans_is_warned_about_once(model):
    plan = dpx.dp_sgd(100, 20, 5, noise_multiplier=1.0)
    private_grad = plan.private_gradient(loss, method=dpx.Vectorized())
    x, y = make_batch(20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        state = private_grad.init(model, key=jr.key(0))
        for _ in range(3):
            _, state, _ = private_grad(model, (x, y), state)
    assert len(caught) == 1, [(c.filename, c.lineno) for c in caught]
    assert "plan.batches" in str(caught[0].message) and caught[0].filename == __file__
    data = (np.zeros((100, 4), np.float32), np.zeros((100, 3), np.float32))
    for batch, mask in plan.batches(data, seed=0):  # its own are not, warnings being errors here
        _, state, _ = private_grad(model, batch, state, mask=mask)
        break
    full = dpx.dp_sgd(20, 20, 5, noise_multiplier=1.0).private_gradient(loss, method=dpx.Vectorized())
    full(model, (x, y), full.init(model, key=jr.key(0)))  # everybody is in every batch: nothing is padded


def test_what_plan_batches_yields_as_the_batch(model, batch):
    private_grad = dpx.dp_sgd(100, 20, 5, noise_multiplier=1.0).private_gradient(loss)
    state = private_grad.init(model, key=jr.key(0))
    mask = np.ones(8, bool)
    with pytest.raises(ValueError, match="for batch, mask in plan.batches"):
        private_grad(model, (batch, mask), state, mask=mask)
    with pytest.raises(ValueError, match="for batch, mask in plan.batches"):
        dpx.PrivateGradient(lambda model, x: jnp.sum(model(x)), FLAT, QUIET)(model, ((batch[0],), mask), state)


@pytest.mark.parametrize("bad", [np.array([None] * 8), np.array(["a"] * 8), np.zeros(8, "M8[s]")], ids=str)
def test_data_that_are_no_numbers(bad, model, batch):
    plan = dpx.dp_sgd(8, 2, 5, noise_multiplier=1.0)
    private_grad = plan.private_gradient(loss)
    state = private_grad.init(model, key=jr.key(0))
    with pytest.raises(ValueError, match=r"`batch\[1\]` must hold numbers"):
        private_grad(model, (batch[0], bad), state, mask=np.ones(8, bool))
    with pytest.raises(ValueError, match=r"`data\[1\]` must hold numbers"):
        plan.batches((np.zeros(8), bad), seed=0)


# --- the noise of one step ----------------------------------------------------------------------------------------------


def test_the_noise_of_one_step_is_that_of_the_inverse_matrix():
    strategy = dpx.BandedToeplitz.square_root(4)
    plan = dpx.dp_mf(400, 10, 12, strategy=strategy, clipping=0.5, noise_multiplier=1.5)
    rows = np.square(np.linalg.inv(strategy.materialize(12))).sum(1)
    sensitivity = np.linalg.norm(strategy.materialize(12), axis=0).max()
    expected = 1.5 * 0.5 * sensitivity * np.sqrt(rows.mean()) / 10
    assert plan.step_error() == pytest.approx(expected, rel=1e-5)
    assert plan.step_error() > plan.noise_multiplier * 0.5 / 10  # more than independent noise has
    independent = dpx.dp_sgd(400, 10, 12, clipping=0.5, noise_multiplier=1.5)
    assert independent.step_error() == pytest.approx(1.5 * 0.5 / 10, rel=1e-5)
    assert dpx.dp_sgd(400, 10, 12, clipping=dpx.NoClipping()).step_error() == 0.0
    with pytest.raises(ValueError, match="no noise multiplier yet"):
        dpx.PrivacyPlan(dpx.PoissonSampler(400, 10, 12), 0.5, dpx.IndependentGaussian()).step_error()
