"""Leaves that a loss does not reach are named, once, with the remedy; others never are."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import dpx

METHODS = {"microbatch": dpx.Vectorized(3), "ghost": dpx.Ghost()}
BATCH = (np.ones((4, 3), np.float32),)


def model():
    return {"used": jnp.ones((2, 3)), "unused": jnp.ones(5), "count": jnp.array(3), "half": jnp.ones(2, jnp.bfloat16)}


def make(loss, method=dpx.Auto(), **options):
    return dpx.PrivateGradient(loss, dpx.FlatClipping(1.0), dpx.IndependentGaussian(1.0), method=method, **options)


def fresh():
    return lambda m, x: jnp.sum(m["used"] @ x) + jnp.sum(m["half"].astype(jnp.float32))


@pytest.mark.parametrize("name", ["ghost", pytest.param("microbatch", marks=pytest.mark.slow)])
def test_an_unused_leaf_is_named_once(name):
    private_grad = make(fresh(), METHODS[name])
    state = private_grad.init(model())
    with pytest.warns(UserWarning) as caught:
        _, state, _ = private_grad(model(), BATCH, state)
    (text,) = [str(w.message) for w in caught]
    assert "`['unused']`" in text and "count" not in text and "half" not in text
    assert "filter_spec=eqx.tree_at(lambda m: m['unused']" in text
    # neither per step, nor where it is traced again: another batch size, another state, inside another program
    private_grad(model(), BATCH, state)
    private_grad(model(), (np.ones((5, 3), np.float32),), state)
    private_grad.clipped_sum(model(), BATCH)
    eqx.filter_jit(lambda s: private_grad(model(), BATCH, s))(state)
    # the remedy is right
    spec = eqx.tree_at(lambda m: m["unused"], jax.tree.map(eqx.is_inexact_array, model()), False)
    mended = make(fresh(), METHODS[name], filter_spec=spec)
    mended(model(), BATCH, mended.init(model()))


CUT: dict[str, Any] = {
    "stop_gradient": lambda a, b: a + jax.lax.stop_gradient(b),
    "inside jit": lambda a, b: jax.jit(lambda a, b: a + jax.lax.stop_gradient(b))(a, b),
    "an argument of jit": lambda a, b: jax.jit(lambda a, b: 2 * a)(a, b),
    "inside checkpoint": lambda a, b: jax.checkpoint(lambda a, b: a + jax.lax.stop_gradient(b))(a, b),
    "an integer": lambda a, b: a + (b > 0).astype(jnp.float32),
    "both branches": lambda a, b: jax.lax.cond(a > 0, lambda a, b: a, lambda a, b: 2 * a, a, b),
    "a scan's carry": lambda a, b: jax.lax.scan(lambda c, _: ((c[0] + a, c[1] + b), None), (a, b), None, length=3)[0][
        0
    ],
    "a scan's constant": lambda a, b: jax.lax.scan(lambda c, _: (c + a, c + b), a, None, length=3)[0],
    "an output of the model": lambda a, b: (a, b * 2)[0],
}
REACHED: dict[str, Any] = {
    "sum": lambda a, b: a + b,
    "one branch": lambda a, b: jax.lax.cond(a > 0, lambda a, b: a, lambda a, b: b, a, b),
    "a scan, two steps later": lambda a, b: jax.lax.scan(
        lambda c, _: ((c[0] + c[1], c[1] + c[2], c[2]), None), (a, a, b), None, length=3
    )[0][0],
    "a scan's output": lambda a, b: jnp.sum(jax.lax.scan(lambda c, _: (c, b * c), a, None, length=3)[1]),
    "while": lambda a, b: jax.lax.fori_loop(0, 3, lambda i, c: c + b, a),
    "relu": lambda a, b: a + jax.nn.relu(b),
    "zero": lambda a, b: a + 0 * b,
    "vmap": lambda a, b: jnp.sum(jax.vmap(lambda i: a + i * b)(jnp.arange(3.0))),
    "checkpoint": lambda a, b: jax.checkpoint(lambda a, b: a * b)(a, b),
}


@pytest.mark.parametrize("name", CUT)
def test_what_is_cut_off_is_found(name):
    private_grad = make(lambda m, x: CUT[name](jnp.sum(m["a"] * x), jnp.sum(m["b"])))
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    assert private_grad.unreached(params, BATCH) == ("['b']",)
    gradient = jax.grad(lambda m: private_grad.loss(m, BATCH[0][0]))(params)
    assert (gradient["b"] == 0).all()


@pytest.mark.parametrize("name", REACHED)
def test_what_is_reached_is_never_named(name):
    private_grad = make(lambda m, x: REACHED[name](jnp.sum(m["a"] * x), jnp.sum(m["b"])))
    assert private_grad.unreached({"a": jnp.ones(3), "b": jnp.ones(2)}, BATCH) == ()


def test_a_custom_rule_counts_as_reaching_all_of_its_arguments():
    @jax.custom_vjp
    def f(a, b):
        return a

    f.defvjp(lambda a, b: (a, None), lambda _, g: (g, g))  # straight through to b
    private_grad = make(lambda m, x: f(jnp.sum(m["a"] * x), jnp.sum(m["b"])))
    assert private_grad.unreached({"a": jnp.ones(3), "b": jnp.ones(2)}, BATCH) == ()


def test_several_leaves_users_and_aux():
    class Net(eqx.Module):
        layers: list
        head: eqx.nn.Linear

    keys = jr.split(jr.key(0), 3)
    net = Net([eqx.nn.Linear(3, 3, key=keys[0]), eqx.nn.Linear(3, 3, key=keys[1])], eqx.nn.Linear(3, 1, key=keys[2]))

    def loss(net, x):
        hidden = net.layers[0](x)
        return jnp.sum(net.head(hidden)), net.layers[1](hidden)  # aux is no loss

    private_grad = make(loss, has_aux=True, unit="user")
    with pytest.warns(UserWarning, match=r"`\.layers\[1\]\.weight`, `\.layers\[1\]\.bias`.*Do not train them"):
        private_grad(net, (np.ones((2, 4, 3), np.float32),), private_grad.init(net))
    assert private_grad.unreached(net, (np.ones((2, 4, 3), np.float32),)) == (".layers[1].weight", ".layers[1].bias")


def test_sums_of_outputs_have_no_such_leaves():
    private_sum = dpx.PrivateSum(
        lambda model, x: {"x": x, "zero": jnp.zeros(2)}, dpx.FlatClipping(1.0), dpx.IndependentGaussian(1.0)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        private_sum(None, BATCH, private_sum.init(None, BATCH))
