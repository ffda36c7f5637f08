"""A run from data to release: the same step by any road, and the same end however often it is interrupted."""

import io
import json
import os
import signal
import sys
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pandas as pd
import pytest

import dpx
from conftest import assert_trees_close, assert_trees_equal, make_model
from dpx.training import Compiled, DamagedRecord, _checkpoints, _compiled, _fingerprint, _microbatch, _progress, _record

ROWS, STEPS, SEED = 60, 12, 3 << 100
DATA = (
    np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32),
    np.random.default_rng(1).normal(size=(ROWS, 3)).astype(np.float32),
)
METHOD = dpx.Vectorized()
# the same objects in all tests, so that most of them compile nothing
ADAM, AVERAGE = optax.adam(0.1), dpx.optimizers.ema(0.9)


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def make_plan(steps=STEPS, **changes):
    parts = {
        "clipping": dpx.AdaptiveClipping(1.0, quantile=0.5, count_noise_multiplier=20.0),
        "noise": dpx.IndependentGaussian(2.0),
    }
    parts["sampler"] = dpx.PoissonSampler(ROWS, 8, steps)
    plan = dpx.PrivacyPlan(**(parts | changes))
    return plan.with_metrics(loss=dpx.metrics.Mean("losses", 0.0, 5.0, noise_multiplier=20.0))


def banded_plan():
    strategy = dpx.BandedToeplitz.square_root(3)
    sampler = dpx.CyclicPoissonSampler(ROWS, 8, STEPS, cycle_length=3)
    return make_plan(noise=dpx.CorrelatedGaussian(strategy, 2.0), clipping=dpx.FlatClipping(1.0), sampler=sampler)


PLAN, BANDED = make_plan(), banded_plan()
MODEL = make_model()
KEY = jr.key(5)


def make_trainer(folder=None, plan=PLAN, *, every=4, keep=3, rebuild_noise=False, optimizer=None, **options):
    checkpoint = (
        None if folder is None else dpx.Checkpoints(folder, every=every, keep=keep, rebuild_noise=rebuild_noise)
    )
    options = {"method": METHOD, "average": AVERAGE} | options
    return dpx.Trainer(plan, loss, optimizer or ADAM, checkpoint=checkpoint, **options)


def fit(trainer, **options):
    return trainer.fit(MODEL, DATA, **({"seed": SEED, "key": KEY, "progress": False} | options))


class Interrupted(Exception):
    pass


def interrupt_at(step):
    def callback(info):
        if info.step == step:
            raise Interrupted

    return callback


def interrupted(trainer, step, **options):
    with pytest.raises(Interrupted):
        fit(trainer, callbacks=[interrupt_at(step)], **options)


def arrays_of_last_record(folder):
    step = dpx.Checkpoints(folder).steps[-1]
    return _record.read(_checkpoints.file_of(folder, step))


def steps_of(trainer):
    return list(trainer.checkpoint.steps)


def assert_same_run(a, b):
    assert_trees_equal(
        eqx.filter((a.model, a.averaged_model), eqx.is_array), eqx.filter((b.model, b.averaged_model), eqx.is_array)
    )
    assert a.history == b.history and a.steps == b.steps


@pytest.fixture(scope="module")
def whole():
    """The run that nobody interrupted, and kept nothing."""
    return fit(make_trainer())


# The step


def test_fit_is_the_loop_of_the_readme(whole):
    private_grad = PLAN.private_gradient(loss, method=METHOD)
    optim, average = optax.adam(0.1), dpx.optimizers.ema(0.9)
    model, state = MODEL, private_grad.init(MODEL, key=KEY)
    params = eqx.filter(model, eqx.is_inexact_array)
    opt_state, averaged = optim.init(params), average.init(params)
    for row, (batch, mask) in zip(whole.history, PLAN.batches(DATA, seed=SEED), strict=True):
        grads, state, _ = private_grad(model, batch, state, mask=mask)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optim.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        model = eqx.apply_updates(model, updates)
        averaged = average.step(averaged, eqx.filter(model, eqx.is_inexact_array))
        np.testing.assert_allclose(row["loss"], private_grad.metric_values(state)["loss"], rtol=1e-5)
    assert_trees_close(eqx.filter(whole.model, eqx.is_inexact_array), eqx.filter(model, eqx.is_inexact_array))
    assert_trees_close(
        eqx.filter(whole.averaged_model, eqx.is_inexact_array),
        eqx.filter(averaged.apply_to(model), eqx.is_inexact_array),
    )
    assert whole.steps == STEPS and jax.tree.structure(whole.model) == jax.tree.structure(MODEL)


def test_the_state_is_arrays_and_the_step_is_pure(whole):
    trainer = make_trainer()
    state = trainer.init(MODEL, key=KEY)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    again = trainer.init(MODEL, key=KEY)
    assert jax.tree.structure(state) == jax.tree.structure(again) and hash(jax.tree.structure(state)) is not None
    batches = list(PLAN.batches(DATA, seed=SEED))
    stacked = jax.tree.map(lambda *xs: jnp.stack([jnp.asarray(x) for x in xs]), *batches)
    scanned, _ = jax.lax.scan(lambda s, b: (trainer.step(s, *b), None), state, stacked)
    assert int(scanned.private.step) == STEPS
    jitted = jax.jit(trainer.step, donate_argnums=0)(again, *batches[0])
    assert int(jitted.private.step) == 1 and all(x.is_deleted() for x in jax.tree.leaves(again.private))
    assert_trees_close(eqx.filter(scanned.model, eqx.is_inexact_array), eqx.filter(whole.model, eqx.is_inexact_array))


def test_compile_donates_and_reports():
    trainer = make_trainer()
    state = trainer.init(MODEL, key=KEY)
    batch, mask = next(PLAN.batches(DATA, seed=SEED))
    expected = jax.tree.map(np.asarray, trainer.step(state, batch, mask).model)
    compiled = trainer.compile(state, batch)
    assert compiled.memory["total"] > 0 and compiled.microbatch_size is None and compiled.count == 1
    new = compiled(state, batch, mask)
    assert_trees_close(new.model, expected)
    assert all(x.is_deleted() for x in jax.tree.leaves(eqx.filter(state.model, eqx.is_inexact_array)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(eqx.filter(MODEL, eqx.is_array)))


def test_steps_per_call_changes_nothing_but_speed(whole):
    result = fit(make_trainer(steps_per_call=5))
    assert_trees_close(eqx.filter(result.model, eqx.is_inexact_array), eqx.filter(whole.model, eqx.is_inexact_array))
    np.testing.assert_allclose(result.history["loss"], whole.history["loss"], rtol=1e-4)


def test_half_precision_keeps_its_dtypes():
    model = make_model(jnp.bfloat16)
    cast = lambda x: x.astype(jnp.bfloat16)
    half = lambda model, x, y: loss(model, cast(x), cast(y)).astype(jnp.float32)
    trainer = dpx.Trainer(make_plan(2), half, optax.adam(0.1), method=METHOD)
    result = trainer.fit(model, DATA, seed=SEED, key=KEY, progress=False)
    dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]
    assert dtypes(result.model) == dtypes(model)


@pytest.mark.slow
def test_optimisers_are_told_the_noise():
    for optimizer in (dpx.optimizers.adam_bc(0.1), dpx.optimizers.scale_then_privatize(optax.adam(0.1))):
        plan = dpx.dp_sgd(ROWS, 8, 2, noise_multiplier=2.0)
        result = dpx.Trainer(plan, loss, optimizer, method=METHOD).fit(MODEL, DATA, seed=SEED, key=KEY, progress=False)
        assert result.steps == 2


def test_arrays_of_a_loss_are_no_constants():
    class Loss(eqx.Module):
        by: jax.Array

        def __call__(self, model, x, y):
            return loss(model, x, y) * self.by[0]

    big = Loss(jnp.ones(100_000))
    plan = dpx.dp_sgd(ROWS, 8, 2, noise_multiplier=2.0)
    trainer = dpx.Trainer(plan, big, optax.sgd(0.1), method=METHOD)
    state = trainer.init(MODEL, key=KEY)
    compiled = trainer.compile(state, next(plan.batches(DATA, seed=SEED))[0])
    assert compiled.memory["arguments"] > 400_000


# Going on


CASES = {
    "threefry, adaptive, metric": {},
    "chacha": {"key": jr.key(5, impl=dpx.random.CHACHA20)},
    "banded": {"plan": BANDED},
    "banded, rebuilt": {"plan": BANDED, "rebuild_noise": True},
    "groups of steps": {"steps_per_call": 3},
}
SLOW = {"chacha", "banded", "groups of steps"}  # which compile programs that no other test needs


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in CASES.items()]
)
def test_an_interrupted_run_ends_bit_for_bit_like_a_whole_one(tmp_path, case):
    case = dict(case)
    options = {"key": case.pop("key")} if "key" in case else {}
    options |= {"evaluate": lambda m: {"w": m.weight.sum()}, "evaluate_every": 5}
    ends = {}
    for name, at in (("whole", ()), ("interrupted", (3, 6, 7, 11))):
        trainer = make_trainer(tmp_path / name, **case)
        for step in at:
            interrupted(trainer, step, **options)
        ends[name] = fit(trainer, **options), arrays_of_last_record(tmp_path / name)
    (a, one), (b, other) = ends.values()
    assert_same_run(a, b)
    # model, optimiser, average, key, clipping, metrics, noise: all there is
    assert one.arrays.keys() == other.arrays.keys() and one.meta == other.meta
    for name, array in one.arrays.items():
        assert array.dtype == other.arrays[name].dtype
        np.testing.assert_array_equal(array, other.arrays[name], err_msg=name)
    assert any("noise" in name for name in one.arrays) == (
        case.get("plan") is not None and not case.get("rebuild_noise")
    )


def test_a_record_changes_no_bit_of_a_run(tmp_path, whole):
    assert_same_run(fit(make_trainer(tmp_path, every=1)), whole)


def test_fresh_secrets_are_kept(tmp_path):
    trainer = make_trainer(tmp_path / "a")
    secrets = {"seed": None, "key": None}
    interrupted(trainer, 2, **secrets)
    # before the first step, so that no step is taken again with other noise
    assert steps_of(trainer) == [0]
    first = _record.read(_checkpoints.file_of(tmp_path / "a", 0))
    result = fit(trainer, **secrets)
    last = arrays_of_last_record(tmp_path / "a")
    assert first.meta["seed"] == last.meta["seed"] and int(first.meta["seed"]) > 2**64
    np.testing.assert_array_equal(first.arrays["state.private.key_data"], last.arrays["state.private.key_data"])
    assert fit(trainer, **secrets).history == result.history
    other = fit(make_trainer(tmp_path / "b"), **secrets)
    assert other.history != result.history


def test_records_win_over_seed_and_key(tmp_path):
    trainer = make_trainer(tmp_path)
    interrupted(trainer, 6)
    with pytest.raises(ValueError, match="not the seed"):
        fit(trainer, seed=SEED + 1)
    with pytest.raises(ValueError, match="not the key"):
        fit(trainer, key=jr.key(6))
    with pytest.raises(ValueError, match="not the key"):
        fit(trainer, key=jr.key(5, impl="rbg"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(trainer)


def other_rows():
    return make_plan(sampler=dpx.PoissonSampler(ROWS + 1, 8, STEPS))


def test_records_of_another_run_are_refused(tmp_path, monkeypatch):
    interrupted(make_trainer(tmp_path), 6)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    wider = eqx.tree_at(lambda m: m.bias, MODEL, jnp.ones((1, 3)))
    refused = [
        ("another plan", make_trainer(tmp_path, make_plan(noise=dpx.IndependentGaussian(2.1))), {}),
        ("another plan", make_trainer(tmp_path, make_plan(STEPS + 1)), {}),
        ("another plan", make_trainer(tmp_path, other_rows()), {}),
        ("another model", make_trainer(tmp_path), {"model": wider}),
        (
            "another model",
            make_trainer(
                tmp_path, filter_spec=eqx.tree_at(lambda m: m.bias, jax.tree.map(eqx.is_inexact_array, MODEL), False)
            ),
            {},
        ),
        ("another optimiser", make_trainer(tmp_path, optimizer=optax.sgd(0.1)), {}),
        ("another optimiser", make_trainer(tmp_path, average=None), {}),
        ("The loss, the optimiser", make_trainer(tmp_path, optimizer=optax.adam(0.2)), {}),
        ("must have `num_examples` = 60 rows", make_trainer(tmp_path), {"data": tuple(x[:-1] for x in DATA)}),
    ]
    for message, trainer, options in refused:
        with pytest.raises(ValueError, match=message):
            trainer.fit(options.get("model", MODEL), options.get("data", DATA), progress=False)
    versions = _fingerprint.versions()
    for name in ("dpx", "jax"):
        monkeypatch.setattr(_fingerprint, "versions", lambda name=name: {**versions, name: "0.0.1"})
        with pytest.raises(ValueError, match="0.0.1"):
            fit(make_trainer(tmp_path))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_single_wrong_bit_is_refused_by_name(tmp_path):
    trainer = make_trainer(tmp_path)
    interrupted(trainer, 9)
    last = _checkpoints.file_of(tmp_path, 8)
    good = last.read_bytes()
    rng = np.random.default_rng(0)
    for at in [0, 8, 15, 20, len(good) - 1, *rng.integers(len(good), size=200)]:
        last.write_bytes(good[:at] + bytes([good[at] ^ 1 << int(rng.integers(8))]) + good[at + 1 :])
        with pytest.raises(DamagedRecord, match=last.name):
            _record.read(last)
    for size in (0, 10, 50, len(good) - 1):
        last.write_bytes(good[:size])
        with pytest.raises(DamagedRecord, match=last.name):
            _record.read(last)
    with pytest.raises(DamagedRecord, match=r"step 4 is intact.*move `step-000000000008.dpx`"):
        fit(trainer)
    last.rename(tmp_path / "looked-at")
    assert fit(trainer).steps == STEPS


def test_what_was_half_written_is_not_looked_at(tmp_path, whole):
    trainer = make_trainer(tmp_path)
    interrupted(trainer, 6)
    half = tmp_path / f".{'0' * 16}-step-000000000008.dpx"
    half.write_bytes(b"half")
    mine = tmp_path / "notes.txt"
    mine.write_text("not dpx's")
    assert_same_run(fit(trainer), whole)
    assert not half.exists() and mine.exists()


def test_records_are_for_their_owner_and_few(tmp_path):
    trainer = make_trainer(tmp_path / "run", every=2, keep=2)
    fit(trainer)
    assert trainer.checkpoint is not None and trainer.checkpoint.steps == (10, 12)
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    for path in (tmp_path / "run").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_two_runs_in_one_folder(tmp_path, whole):
    def second(info):
        if info.step == 5:
            with pytest.raises(RuntimeError, match="another run is writing there"):
                fit(make_trainer(tmp_path))

    assert_same_run(fit(make_trainer(tmp_path), callbacks=[second]), whole)


def test_a_full_disk_stops_the_run_and_the_last_record_stands(tmp_path, whole, monkeypatch):
    trainer = make_trainer(tmp_path, every=2)
    real = os.fsync
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) > 9:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RuntimeError, match="No space left on device.* stands") as error:
        fit(trainer)
    assert any("stands" in note for note in error.value.__notes__)
    monkeypatch.undo()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert 0 < steps_of(trainer)[-1] < STEPS
    assert_same_run(fit(trainer), whole)


def test_asked_to_end_a_run_writes_a_record_first(tmp_path, whole):
    told = []
    before = signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    try:
        trainer = make_trainer(tmp_path)
        ask = lambda info: os.kill(os.getpid(), signal.SIGTERM) if info.step == 5 else None
        with pytest.raises(SystemExit):
            fit(trainer, callbacks=[ask])
        assert told and trainer.checkpoint is not None
        assert trainer.checkpoint.steps[-1] in (5, 6)
        assert_same_run(fit(trainer), whole)
    finally:
        signal.signal(signal.SIGTERM, before)


# Ends


def test_the_budget_ends_a_run_before_it_is_overspent():
    epsilon = PLAN.epsilon(1e-5, steps=7)
    result = fit(make_trainer(), stop_at_epsilon=epsilon, delta=1e-5)
    assert result.steps == 7 and result.accounted_steps == 7 and result.stopped is None
    assert "first 7 of the 12" in result.statement() and result.epsilon() == epsilon
    with pytest.raises(ValueError, match="one step of this plan has epsilon"):
        fit(make_trainer(), stop_at_epsilon=1e-6)


def test_a_budget_that_grows_goes_on(tmp_path, whole):
    trainer = make_trainer(tmp_path)
    assert fit(trainer, stop_at_epsilon=PLAN.epsilon(1e-5, steps=7), delta=1e-5).steps == 7
    assert_same_run(fit(trainer), whole)


def test_who_stops_by_looking_pays_for_all_steps(tmp_path):
    stop = lambda info: dpx.Stop("the loss is low.") if info.metrics["loss"] > -1e9 and info.step == 5 else None
    trainer = make_trainer(tmp_path)
    result = fit(trainer, callbacks=[stop], delta=1e-5)
    assert (result.steps, result.accounted_steps) == (5, STEPS)
    assert result.epsilon() == PLAN.epsilon(1e-5)
    text = result.statement()
    assert text.startswith(PLAN.statement(1e-5)) and "Stopped after 5 steps: the loss is low. Whether" in text
    # it has ended, whoever asks
    again = fit(trainer, delta=1e-5)
    assert_same_run(again, result)
    assert again.statement() == text
    # what could not have been exceeded was fixed beforehand
    budget = PLAN.epsilon(1e-5, steps=8)
    bounded = fit(make_trainer(), callbacks=[stop], delta=1e-5, stop_at_epsilon=budget)
    assert (bounded.steps, bounded.epsilon()) == (5, budget)


def test_a_stop_is_not_lost_between_a_record_and_its_callbacks(tmp_path, monkeypatch):
    stop = lambda info: dpx.Stop("enough") if info.step == 8 else None
    whole = fit(make_trainer(), callbacks=[stop])
    trainer = make_trainer(tmp_path)
    # killed after the record of step 8 and before its callbacks
    interrupted(trainer, 8)
    assert trainer.checkpoint is not None and trainer.checkpoint.steps[-1] == 8
    seen = []
    again = fit(trainer, callbacks=[seen.append, stop])
    assert_same_run(again, whole)
    assert [(info.step, info.metrics["loss"]) for info in seen] == [(8, whole.history[7]["loss"])]
    assert again.stopped is not None
    # at its end a run is not stopped
    late = fit(make_trainer(), callbacks=[lambda info: dpx.Stop("late") if info.step == STEPS else None])
    assert late.stopped is None and late.statement(1e-5) == PLAN.statement(1e-5)


def test_another_loss_is_refused_also_before_the_first_record_of_a_step(tmp_path):
    """What callbacks saw of the first steps would else be seen again with the same noise and other gradients."""
    interrupted(make_trainer(tmp_path), 2)
    with pytest.raises(ValueError, match="The loss, the optimiser"):
        fit(make_trainer(tmp_path, optimizer=optax.adam(0.2)))


def test_who_stops_for_the_time_pays_for_the_steps_taken():
    stop = lambda info: dpx.Stop("an hour has passed", is_public=True) if info.step == 5 else None
    result = fit(make_trainer(), callbacks=[stop], delta=1e-5)
    assert result.epsilon() == PLAN.epsilon(1e-5, steps=5)
    assert (
        "first 5 of the 12" in result.statement() and "Assumed: this was decided without looking" in result.statement()
    )


def test_callbacks_see_what_was_released(whole):
    seen = []
    fit(make_trainer(), callbacks=[seen.append], delta=1e-5, evaluate=lambda m: m.weight.sum(), evaluate_every=4)
    assert [info.step for info in seen] == list(range(1, STEPS + 1))
    assert [info.metrics["loss"] for info in seen] == whole.history["loss"].tolist()
    assert {name for info in seen for name in info.metrics} == {"loss", "evaluation", "averaged_evaluation"}
    assert [info.step for info in seen if "evaluation" in info.metrics] == [4, 8, 12]
    assert seen[4].epsilon == PLAN.epsilon(1e-5, steps=5) and seen[4].seconds > 0


def test_a_callback_that_fails_loses_nothing(tmp_path, whole):
    trainer = make_trainer(tmp_path)
    with pytest.raises(Interrupted) as error:
        fit(trainer, callbacks=[interrupt_at(9)])
    assert error.value.__notes__ == ["The record of step 8 stands."]
    with pytest.raises(ValueError, match="returned True. To end the run return `dpx.Stop"):
        fit(trainer, callbacks=[lambda info: True])
    assert_same_run(fit(trainer), whole)


def test_an_optimiser_that_gives_nan_is_named_and_not_recorded(tmp_path):
    def update(updates, state, params=None):
        bad = jnp.where(state == 6, jnp.nan, 1.0)
        return jax.tree.map(lambda g: -0.1 * g * bad, updates), state + 1

    optimizer = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)
    for every, last in ((4, 4), (1, 6)):
        trainer = make_trainer(tmp_path / str(every), optimizer=optimizer, every=every, average=None)
        with pytest.raises(RuntimeError, match=r"`.weight` is not finite after step .: the optimiser"):
            fit(trainer)
        assert trainer.checkpoint is not None and trainer.checkpoint.steps[-1] == last
    with pytest.raises(RuntimeError, match=r"`.weight` is not finite after step 7"):
        fit(make_trainer(optimizer=optimizer, plan=make_plan(7), average=None))


def test_an_optimiser_that_changes_its_state_is_named():
    def update(updates, state, params=None):
        return updates, jnp.zeros(2)

    optimizer = optax.GradientTransformation(lambda params: jnp.zeros(()), update)
    with pytest.raises(ValueError, match=r"`state.opt_state` as float32\[\] and gives it as float32\[2\]"):
        fit(make_trainer(optimizer=optimizer))


def test_arrays_that_nothing_moved_are_named(caplog):
    class Two(eqx.Module):
        inner: eqx.Module
        still: Any
        noisy: Any

    model = Two(MODEL, jnp.ones(2), jnp.ones(3))
    label = lambda params: Two(jax.tree.map(lambda _: "move", params.inner), "stay", "move")
    optimizer = optax.multi_transform({"move": optax.sgd(0.1), "stay": optax.set_to_zero()}, label)
    two = lambda m, x, y: loss(m.inner, x, y) + m.still.sum()
    trainer = dpx.Trainer(dpx.dp_sgd(ROWS, 8, 2, noise_multiplier=2.0), two, optimizer, method=METHOD)
    with pytest.warns(UserWarning, match="does not depend on"):
        result = trainer.fit(model, DATA, seed=SEED, key=KEY, progress=False)
    still, noisy = result.remarks
    assert "Never moved: `.still`" in still and "by noise alone: `.noisy`" in noisy
    assert [record.message for record in caplog.records] == list(result.remarks)


def test_history_is_a_table(whole):
    table = pd.DataFrame(whole.history)
    assert list(table.columns) == ["step", "loss"] and len(table) == STEPS
    assert whole.history["step"].tolist() == list(range(1, STEPS + 1)) and whole.history[-1]["step"] == STEPS
    with pytest.raises(KeyError, match="accuracy"):
        whole.history["accuracy"]


# Memory


def fake(size):
    """A step, of which only what it would take of the memory is known."""
    return Compiled(size, {"total": 10 + (100 if size is None else size)}, 1, "program", (), None)


@pytest.mark.parametrize(("limit", "size"), [(110, None), (109, 50), (60, 50), (59, 25), (23, 13), (11, 1)])
def test_of_all_microbatches_the_largest_that_fits_is_taken(limit, size):
    tried = []
    found = _microbatch.largest_that_fits(lambda s: tried.append(s) or fake(s), 100, f"fake {limit}", limit)
    assert found.microbatch_size == size and len(tried) <= 5
    again = _microbatch.largest_that_fits(lambda s: tried.append(s) or fake(s), 100, f"fake {limit}", limit)
    assert again.microbatch_size == size and tried[-1] == size


def test_what_never_fits_is_refused():
    with pytest.raises(ValueError, match="does not fit into the device's memory even with one example"):
        _microbatch.largest_that_fits(fake, 100, "never", 10)


@pytest.mark.slow
def test_the_largest_microbatch_that_fits_is_found_by_measuring(monkeypatch):
    plan = dpx.dp_sgd(ROWS, 32, 2, noise_multiplier=2.0)
    model = eqx.nn.Linear(64, 64, key=jr.key(0))
    data = (np.ones((ROWS, 64), np.float32),)
    trainer = dpx.Trainer(plan, lambda m, x: jnp.sum(m(x) ** 2), optax.sgd(0.1), method=METHOD)
    state, (batch, _) = trainer.init(model, key=KEY), next(plan.batches(data, seed=0))
    rows = batch[0].shape[0]
    whole = trainer.compile(state, batch)
    assert whole.microbatch_size is None
    limit = whole.memory["total"] // 3
    monkeypatch.setattr(_microbatch, "memory_limit", lambda: limit)
    small = trainer.compile(state, batch)
    assert small.microbatch_size is not None and small.memory["total"] <= limit < whole.memory["total"]
    twice = dpx.Trainer(
        plan, trainer.loss, optax.sgd(0.1), method=METHOD, microbatch_size=min(rows, 2 * small.microbatch_size)
    )
    assert twice.compile(state, batch).memory["total"] > limit
    # found once, it is not looked for again
    _compiled._PROGRAMS.clear()
    tried = []
    real = _microbatch.with_microbatch
    monkeypatch.setattr(
        "dpx.training._trainer.with_microbatch", lambda method, size: tried.append(size) or real(method, size)
    )
    assert trainer.compile(state, batch).microbatch_size == small.microbatch_size
    assert tried == [None, small.microbatch_size]
    monkeypatch.setattr(_microbatch, "memory_limit", lambda: 1000)
    with pytest.raises(ValueError, match="does not fit into the device's memory even with one example"):
        trainer.compile(state, batch)


# Release


def secrets_and_unreleased(folder):
    """What no publication may contain, as bytes: key, seed, and numbers that were not released."""
    record = arrays_of_last_record(folder)
    words = record.arrays["state.private.key_data"]
    seed = int(record.meta["seed"])
    yield from (words.tobytes(), words.tobytes().hex().encode(), str(int(words[-1])).encode())
    yield from (str(seed).encode(), f"{seed:x}".encode(), seed.to_bytes(16, "little"), seed.to_bytes(16, "big"))
    for name, array in record.arrays.items():
        if "opt_state" in name or ("clipping" in name and array.size):
            if array.nbytes >= 8:
                yield array.tobytes()
            # numbers that could not be there by chance
            yield from (repr(float(x)).encode() for x in array.ravel() if array.dtype == np.float32 and x not in (0, 1))


def test_a_publication_contains_what_was_released_and_nothing_else(tmp_path):
    secret = {"seed": None, "key": None}
    result = fit(make_trainer(tmp_path / "run"), evaluate=lambda m: {"w": m.weight.sum()}, delta=1e-5, **secret)
    out = result.publish(tmp_path / "release")
    names = {
        "model.safetensors",
        "average.safetensors",
        "history.json",
        "statement.txt",
        "report.json",
        "MODEL_CARD.md",
    }
    assert set(os.listdir(out)) == names
    contents = b"\0".join((out / name).read_bytes() for name in sorted(names))
    forbidden = list(secrets_and_unreleased(tmp_path / "run"))
    assert len(forbidden) > 20
    assert not [text for text in forbidden if text in contents]
    # and the search does find what is there
    assert np.asarray(result.model.weight).tobytes() in contents
    report = json.loads((out / "report.json").read_text())
    assert report["data"] == {"num_examples": ROWS, "num_rows": ROWS} and report["versions"]["dpx"] == dpx.__version__
    assert report["epsilon"] == result.epsilon(1e-5) and report["steps_taken"] == STEPS
    assert (out / "statement.txt").read_text() == result.statement(1e-5) + "\n"
    assert json.loads((out / "history.json").read_text()) == list(result.history)
    blank = make_model(jnp.float32)
    assert_trees_equal(dpx.load_published(out, blank), result.model)
    assert_trees_equal(dpx.load_published(out, blank, average=True), result.averaged_model)
    # again, as after a crash; and never over something else
    stray = tmp_path / ".release.half-123"
    stray.mkdir()
    assert result.publish(out) == out
    with pytest.raises(ValueError, match="there is something else already"):
        result.publish(out, delta=1e-6)
    with pytest.raises(ValueError, match="there is something else already"):
        result.publish(tmp_path / "run")
    assert result.publish(tmp_path / "release2") and stray.exists()
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="model.safetensors` is not as it was published"):
        dpx.load_published(out, blank)
    for like in (
        eqx.tree_at(lambda m: m.bias, blank, jnp.ones(4)),
        make_model(jnp.bfloat16),
        eqx.nn.Linear(4, 3, key=KEY),
    ):
        with pytest.raises(ValueError, match="another model"):
            dpx.load_published(tmp_path / "release2", like)
    with pytest.raises(ValueError, match="is no folder that"):
        dpx.load_published(tmp_path / "run", blank)


def test_nothing_is_published_of_a_run_without_privacy(tmp_path):
    plan = dpx.dp_sgd(ROWS, 8, 2, clipping=dpx.NoClipping())
    result = dpx.Trainer(plan, loss, optax.sgd(0.1), method=METHOD).fit(MODEL, DATA, seed=SEED, key=KEY, progress=False)
    with pytest.raises(ValueError, match="not differentially private"):
        result.publish(tmp_path / "release")
    assert not os.listdir(tmp_path)


# Devices


@pytest.mark.parametrize(
    "kind",
    [pytest.param(jax.sharding.AxisType.Explicit, marks=pytest.mark.slow), jax.sharding.AxisType.Auto],
    ids=["explicit", "auto"],
)
def test_on_a_mesh_a_run_compiles_once_and_goes_on_elsewhere(tmp_path, kind):
    plan = BANDED
    single = fit(make_trainer(plan=plan))
    trainer = make_trainer(tmp_path, plan)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        with pytest.raises(Interrupted):
            trainer.fit(MODEL, DATA, seed=SEED, key=KEY, progress=False, callbacks=[interrupt_at(6)])
        result = fit(trainer)
        assert len(result.model.weight.sharding.device_set) == 4
    assert_trees_close(eqx.filter(result.model, eqx.is_inexact_array), eqx.filter(single.model, eqx.is_inexact_array))
    assert not result.remarks
    record = arrays_of_last_record(tmp_path)
    assert len(record.meta["programs"]) == 1
    # and half of the way on one device
    other = tmp_path / "other"
    with jax.set_mesh(mesh), pytest.raises(Interrupted):
        fit(make_trainer(other, plan), callbacks=[interrupt_at(6)])
    moved = fit(make_trainer(other, plan))
    assert_trees_close(eqx.filter(moved.model, eqx.is_inexact_array), eqx.filter(single.model, eqx.is_inexact_array))
    assert "on other devices" in moved.remarks[0]


# What is shown


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("tool", ["rich", "tqdm"])
def test_a_terminal_shows_released_numbers_and_epsilon(monkeypatch, tool):
    if tool == "tqdm":
        monkeypatch.setitem(sys.modules, "rich", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = _progress.Progress(True, 0, 10, lambda step: 0.5)
    bar.show(3, {"loss": 0.25, "histogram": [1.0, 2.0]})
    bar.show(10, {"loss": 0.125})
    bar.close()
    shown = terminal.getvalue()
    assert "10/10" in shown and "loss 0.125" in shown and "epsilon 0.5" in shown and "histogram" not in shown


def test_without_a_terminal_nothing_is_shown(monkeypatch):
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    bar = _progress.Progress(True, 0, 10, lambda step: 1 / 0)
    bar.show(10, {"loss": 0.25})
    bar.close()
    assert not quiet.getvalue()
