"""Several devices: the numbers of one, the noise bit for bit, and no communication for it."""

import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import AxisType

import dpx
from conftest import assert_trees_close, assert_trees_equal, loss, make_batch, make_model

P = jax.P
COLLECTIVES = re.compile(r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\(")
MASK = np.array([1, 0, 1, 1, 1, 1, 0, 1], bool)


def private_gradient(method=dpx.Vectorized(), loss=loss, **options):
    return dpx.PrivateGradient(
        loss, dpx.FlatClipping(0.5), dpx.IndependentGaussian(1.5), normalizer=8.0, method=method, **options
    )


def explicit(shape, names):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Explicit,) * len(names))


def put(model, batch, parameters, examples):
    place = lambda x, spec: jax.device_put(x, spec) if eqx.is_array(x) else x
    model = eqx.tree_at(
        lambda m: m.weight, jax.tree.map(lambda x: place(x, P()), model), place(model.weight, parameters)
    )
    return model, jax.tree.map(lambda x: jax.device_put(x, P(examples)), batch)


@pytest.mark.parametrize(
    ("shape", "names", "weight"),
    [
        ((4,), ("data",), P()),
        ((2, 2), ("data", "model"), P(None, "model")),
        ((4,), ("data",), P(None, "data")),  # parameters on the batch's own axis (FSDP)
    ],
)
@pytest.mark.parametrize("method", [dpx.Vectorized(), dpx.Vectorized(3), dpx.Auto()], ids=repr)
def test_explicit_mesh_gives_the_result_of_one_device(shape, names, weight, method):
    model, batch = make_model(), make_batch()
    private_grad = private_gradient(method)
    key = jr.key(2)
    nobody = np.zeros(8, bool)
    reference = private_grad(model, batch, private_grad.init(model, key=key), mask=MASK)
    noise = private_grad(model, batch, private_grad.init(model, key=key), mask=nobody)[0]
    with jax.set_mesh(explicit(shape, names)):
        sharded_model, sharded_batch = put(model, batch, weight, "data")
        state = private_grad.init(sharded_model, key=key)
        grads, state, diagnostics = private_grad(sharded_model, sharded_batch, state, mask=MASK)
        sharded_noise = private_grad(
            sharded_model, sharded_batch, private_grad.init(sharded_model, key=key), mask=nobody
        )[0]
        assert jax.typeof(grads.weight).sharding.spec == jax.typeof(sharded_model.weight).sharding.spec
        state.raise_if_failed()
    assert_trees_close(grads, reference[0])
    assert_trees_close(diagnostics.reveal(), reference[2].reveal())
    assert_trees_equal(sharded_noise, noise)


def test_auto_mesh_gives_the_result_of_one_device():
    model, batch = make_model(), make_batch()
    private_grad = private_gradient()
    reference = private_grad(model, batch, private_grad.init(model, key=jr.key(2)), mask=MASK)[0]
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        sharded = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, P("data"))), batch)
        grads = private_grad(model, sharded, private_grad.init(model, key=jr.key(2)), mask=MASK)[0]
    assert_trees_close(grads, reference)


def test_noise_needs_no_collective():
    model, batch = make_model(), make_batch()
    private_grad = private_gradient()
    with jax.set_mesh(explicit((2, 2), ("data", "model"))):
        sharded_model, sharded_batch = put(model, batch, P(None, "model"), "data")
        state = private_grad.init(sharded_model, key=jr.key(0))
        noise = private_grad.noise
        total = jax.tree.map(jnp.zeros_like, eqx.filter(sharded_model, eqx.is_inexact_array))

        def only_noise(total, key):
            return noise.step(total, jnp.float32(1.0), key, jnp.int32(0), ())[0]

        def step(model, batch, state):
            return private_grad(model, batch, state)[0]

        def without_noise(model, batch):
            return private_grad.clipped_sum(model, batch).reveal()

        text = jax.jit(only_noise).lower(total, state.key).compile().as_text()
        assert text is not None and not COLLECTIVES.search(text)
        assert "[3,2]" in text and "[3,4]" not in text  # a device draws its own shard and nothing else

        def collectives(function, *arguments):
            compiled: Any = eqx.filter_jit(function).lower(*arguments).compile().compiled
            return len(COLLECTIVES.findall(compiled.as_text()))

        with_noise = collectives(step, sharded_model, sharded_batch, state)
        without = collectives(without_noise, sharded_model, sharded_batch)
        assert without > 0  # the sum over examples does communicate, so the pattern finds collectives
        assert with_noise <= without + 1  # the flag that says whether all is finite


def test_per_example_keys_follow_the_batch():
    def noisy_loss(model, x, y, *, key):
        return loss(model, x + jr.normal(key, x.shape), y)

    model, batch = make_model(), make_batch()
    private_grad = private_gradient(loss=noisy_loss)
    reference = private_grad.clipped_sum(model, batch, key=jr.key(1)).reveal()
    with jax.set_mesh(explicit((4,), ("data",))):
        sharded_model, sharded_batch = put(model, batch, P(), "data")
        sharded = private_grad.clipped_sum(sharded_model, sharded_batch, key=jr.key(1)).reveal()
    assert_trees_close(sharded, reference)


def test_shard_is_portable():
    x = jnp.arange(8.0)
    np.testing.assert_array_equal(dpx.sharding.shard(x, P("data")), x)
    with jax.set_mesh(explicit((4,), ("data",))):
        assert jax.typeof(dpx.sharding.shard(x, P("data"))).sharding.spec == P("data")
    with jax.set_mesh(jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))):
        out = jax.jit(lambda x: dpx.sharding.shard(x, P("data")))(x)
        assert len({s.device for s in out.addressable_shards}) == 4
