"""Fresh keys and seeds: never inside a transformation, where lanes or calls would share them; never one for each process."""

import subprocess
import sys
import threading
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import dpx
from conftest import ENVIRONMENT, loss, make_batch, make_model
from dpx import _checks

MODEL = make_model()
PRIVATE_GRAD = dpx.PrivateGradient(loss, dpx.FlatClipping(0.5), dpx.IndependentGaussian(1.0))
PLAN = dpx.dp_sgd(num_examples=8, batch_size=4, steps=2, noise_multiplier=1.0)
PRIVATE_SUM = dpx.PrivateSum(lambda model, x, y: x, dpx.FlatClipping(0.5), dpx.IndependentGaussian(1.0))

# every door through which randomness comes in; a new one adds a line
DRAWS: dict[str, Any] = {
    "fresh_key": dpx.random.fresh_key,
    "chacha_key": dpx.random.chacha_key,
    "fresh_seed": dpx.random.fresh_seed,
    "shared_key": dpx.random.shared_key,
    "shared_seed": dpx.random.shared_seed,
    "PrivateGradient.init": lambda: PRIVATE_GRAD.init(MODEL),
    "PrivateSum.init": lambda: PRIVATE_SUM.init(None, make_batch()),
    "PrivacyPlan.batches": lambda: PLAN.batches(make_batch(), seed=None),
    "Mean.release": lambda: dpx.metrics.Mean(None, 0.0, 1.0, 1.0).release(np.ones(2), expected_size=2),
    "Count.release": lambda: dpx.metrics.Count(None, 1.0).release(np.ones(2)),
    "Quantile.release": lambda: dpx.metrics.Quantile(None, 0.5, 0.0, 1.0, 1.0).release(np.ones(2), expected_size=2),
    "Histogram.release": lambda: dpx.metrics.Histogram(None, [0, 1, 2], 1.0).release(np.ones(2)),
}


def custom(with_gradient):
    def transform(f):
        @jax.custom_vjp
        def g(x):
            return f(x)

        g.defvjp(lambda x: (f(x), None), lambda _, ct: (ct,))
        return jax.grad(g)(1.0) if with_gradient else g(1.0)

    return transform


def under(context, transform):
    def inner(f):
        def g(x):
            with context():
                return f(x)

        return transform(g)

    return inner


# each applies a transformation to a function of one number
TRANSFORMATIONS: dict[str, Any] = {
    "jit": lambda f: jax.jit(f)(1.0),
    "filter_jit": lambda f: eqx.filter_jit(f)(1.0),
    "vmap": lambda f: jax.vmap(f)(jnp.ones(2)),
    "filter_vmap": lambda f: eqx.filter_vmap(f)(jnp.ones(2)),
    "filter_vmap over nothing": lambda f: eqx.filter_vmap(f, in_axes=None, axis_size=2)(jnp.ones(())),
    "grad": lambda f: jax.grad(f)(1.0),
    "value_and_grad": lambda f: jax.value_and_grad(f)(1.0),
    "jacrev": lambda f: jax.jacrev(f)(1.0),
    "jvp": lambda f: jax.jvp(f, (1.0,), (1.0,)),
    "vjp": lambda f: jax.vjp(f, 1.0),
    "linearize": lambda f: jax.linearize(f, 1.0),
    "checkpoint": lambda f: jax.checkpoint(f)(1.0),
    "eval_shape": lambda f: jax.eval_shape(f, 1.0),
    "filter_eval_shape": lambda f: eqx.filter_eval_shape(f, 1.0),
    "make_jaxpr": lambda f: jax.make_jaxpr(f)(1.0),
    "scan": lambda f: jax.lax.scan(lambda c, x: (c, f(x)), 0.0, jnp.ones(2)),
    "map": lambda f: jax.lax.map(f, jnp.ones(2)),
    "while_loop": lambda f: jax.lax.while_loop(lambda c: c < 0, f, 1.0),
    "cond": lambda f: jax.lax.cond(True, f, lambda x: x, 1.0),
    "shard_map": lambda f: jax.shard_map(f, mesh=jax.make_mesh((1,), ("d",)), in_specs=jax.P(), out_specs=jax.P())(1.0),
    "jit of vmap of grad": lambda f: jax.jit(jax.vmap(jax.grad(f)))(jnp.ones(2)),
    "custom_vjp": custom(False),
    "grad of custom_vjp": custom(True),
    "constants in jit": under(jax.ensure_compile_time_eval, lambda f: jax.jit(f)(1.0)),
    "constants in vmap": under(jax.ensure_compile_time_eval, lambda f: jax.vmap(f)(jnp.ones(2))),
    "eval_context in scan": under(
        jax.core.eval_context, lambda f: jax.lax.scan(lambda c, x: (c, f(x)), 0.0, jnp.ones(2))
    ),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_nothing_is_drawn_inside_a_transformation(name):
    refused = []

    def f(x):
        for draw, call in DRAWS.items():
            try:
                call()
            except RuntimeError as error:
                assert "tracing" in str(error) and "key" in str(error)
                refused.append(draw)
        return x

    TRANSFORMATIONS[name](f)
    assert set(refused) == set(DRAWS)


@pytest.mark.parametrize("name", ["jit", "vmap", "filter_vmap over nothing", "grad", "scan", "shard_map"])
def test_the_trace_state_alone_tells_transformations_from_none(name, monkeypatch):
    monkeypatch.setattr(_checks, "_TRACERS", ())
    seen = []
    TRANSFORMATIONS[name](lambda x: (seen.append(_checks.is_tracing()), x)[1])
    assert seen and all(seen) and not _checks.is_tracing()


def test_the_sweep_whose_noise_cancelled_is_refused_and_right_with_a_key_for_each_lane():
    batch = make_batch()

    def one(sigma, key):
        private_grad = dpx.PrivateGradient(
            loss, dpx.FlatClipping(0.5), dpx.IndependentGaussian(sigma), normalizer=4.0, steps=5
        )
        return private_grad(MODEL, batch, private_grad.init(MODEL, key=key))[0]

    sigmas = jnp.array([1.0, 2.0])
    with pytest.raises(RuntimeError, match="each lane"):
        eqx.filter_vmap(lambda sigma: one(sigma, None))(sigmas)
    grads = eqx.filter_vmap(one)(sigmas, jr.split(jr.key(0), 2)).weight
    total = PRIVATE_GRAD.clipped_sum(MODEL, batch).reveal().weight / 4
    # had the lanes the same noise, this combination would have none
    assert float(jnp.abs(2 * grads[0] - grads[1] - total).max()) > 0.05


CONTEXTS: dict[str, Any] = {
    "nothing": lambda: jax.named_scope("here"),
    "explicit mesh": lambda: jax.set_mesh(jax.make_mesh((4,), ("data",))),
    "debug_nans": lambda: jax.debug_nans(True),
    "disable_jit": lambda: jax.disable_jit(),
    "default_device": lambda: jax.default_device(jax.devices()[1]),
    "enable_x64": lambda: jax.enable_x64(True),
    "checking_leaks": lambda: jax.checking_leaks(),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_outside_all_is_drawn_whatever_the_configuration(name):
    with CONTEXTS[name]():
        for draw in ("fresh_key", "chacha_key", "fresh_seed", "PrivateGradient.init", "PrivacyPlan.batches"):
            DRAWS[draw]()
        assert len(jax.tree.map(lambda _: dpx.random.fresh_seed(), [0, 0])) == 2


def test_other_threads_draw_while_one_is_tracing():
    keys = []

    def f(x):
        thread = threading.Thread(target=lambda: keys.append(dpx.random.fresh_key()))
        thread.start()
        thread.join()
        return x

    jax.jit(f)(1.0)
    thread = threading.Thread(target=lambda: keys.append(dpx.random.fresh_key()))
    thread.start()
    thread.join()
    assert len(keys) == 2


def test_dpx_may_be_imported_inside_a_trace():
    code = """
import jax
def f(x):
    import dpx
    try:
        dpx.random.fresh_key()
    except RuntimeError:
        return x
    raise AssertionError("drawn")
jax.jit(f)(1.0)
import dpx
dpx.random.fresh_key(), dpx.random.fresh_seed()
"""
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True)


def test_a_jax_that_cannot_be_asked_draws_nothing(monkeypatch):
    monkeypatch.delattr(jex, "get_opaque_trace_state")
    assert _checks.is_tracing()
    with pytest.raises(RuntimeError, match="`key=`"):
        PRIVATE_GRAD.init(MODEL)
    PRIVATE_GRAD.init(MODEL, key=jr.key(0))


# --- Several processes ---------------------------------------------------------------------------------------------------


def test_several_processes_must_share_what_is_drawn(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda *_: 2)
    for name, call in DRAWS.items():
        if not name.startswith("shared"):
            with pytest.raises(RuntimeError, match=r"2 processes.*dpx\.random\.shared_(key|seed)\("):
                call()
    PRIVATE_GRAD.init(MODEL, key=jr.key(0))
    next(iter(PLAN.batches(make_batch(), seed=3)))


def test_shared_secrets_are_fresh_ones_where_there_is_one_process():
    assert len({dpx.random.shared_seed() for _ in range(5)}) == 5
    assert dpx.random.shared_seed().bit_length() > 80  # shorter once in 2**47
    pair = [jr.key_data(dpx.random.shared_key(dpx.random.CHACHA20)) for _ in range(2)]
    assert pair[0].shape == (8,) and (pair[0] != pair[1]).any()


_PROCESS = """
import sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))
import dpx
import jax.numpy as jnp
plan = dpx.dp_sgd(num_examples=8, batch_size=4, steps=2, noise_multiplier=1.0)
private_grad = plan.private_gradient(lambda w, x: jnp.sum(w * x))
for draw in (dpx.random.fresh_key, dpx.random.fresh_seed, lambda: private_grad.init(jnp.zeros(2)),
             lambda: plan.batches((np.ones((8, 2), np.float32),), seed=None)):
    try:
        draw()
    except RuntimeError as error:
        assert "shared_" in str(error), error
    else:
        raise AssertionError("drawn in each process")
key, seed = dpx.random.shared_key(dpx.random.CHACHA20), dpx.random.shared_seed()
print(jax.random.key_data(key).tolist(), seed)
"""


@pytest.mark.slow  # two processes import and connect
def test_two_processes_share_key_and_seed():
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(number), port],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outs = [run.communicate(timeout=120) for run in runs]
    assert all(run.returncode == 0 for run in runs), outs
    drawn = [out.strip().splitlines()[-1] for out, _ in outs]
    assert drawn[0] == drawn[1]
