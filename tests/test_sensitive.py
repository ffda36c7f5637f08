"""`Sensitive` and fresh randomness."""

import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import dpx
from conftest import ENVIRONMENT, loss

SECRET = dpx.Sensitive({"norms": jnp.array([123.456, 7.0]), "note": "secret-string", "n": 98765})


def test_repr_shows_shapes_only_also_when_nested():
    long = eqx.tree_pformat({"nested": SECRET}, short_arrays=False)
    for shown in (repr(SECRET), str(SECRET), f"{SECRET}", repr([SECRET]), repr(dpx.Sensitive((SECRET, 98765))), long):
        assert "Sensitive" in shown and "f32[2]" in shown
        for secret in ("123", "7.0", "secret-string", "98765"):
            assert secret not in shown


@pytest.mark.parametrize(
    "operation",
    [
        lambda s: s + 1,
        lambda s: 1 + s,
        lambda s: s - s,
        lambda s: 2 * s,
        lambda s: s / 2,
        lambda s: s**2,
        lambda s: -s,
        lambda s: abs(s),
        lambda s: s @ s,
        lambda s: s == s,
        lambda s: s != 1,
        lambda s: s < 1,
        lambda s: bool(s),
        lambda s: float(s),
        lambda s: int(s),
        lambda s: len(s),
        lambda s: s[0],
        lambda s: list(s),
        lambda s: hash(s),
        lambda s: np.asarray(s),
        lambda s: jnp.sum(s),
        lambda s: jnp.asarray(s),
        lambda s: 1 in s,
    ],
)
def test_nothing_can_be_computed_with_it(operation):
    with pytest.raises(TypeError):
        operation(SECRET)


def test_reveal_and_passing_through_jit_and_vmap():
    value = dpx.Sensitive(jnp.arange(3.0))
    np.testing.assert_array_equal(value.reveal(), [0, 1, 2])
    out = jax.jit(lambda s: dpx.Sensitive(s.reveal() * 2))(value)
    np.testing.assert_array_equal(out.reveal(), [0, 2, 4])
    np.testing.assert_array_equal(jax.vmap(lambda s: s.reveal() + 1)(value), [1, 2, 3])


def test_fresh_keys_and_seeds_differ_within_and_between_processes():
    keys = {tuple(jr.key_data(dpx.random.fresh_key()).tolist()) for _ in range(20)}
    assert len(keys) == 20
    assert dpx.random.fresh_key("rbg").dtype == jr.key(0, impl="rbg").dtype
    code = "import dpx, jax; print(jax.random.key_data(dpx.random.fresh_key()).tolist(), dpx.random.fresh_seed())"
    runs = {
        subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(runs) == 2
    assert dpx.random.fresh_seed().bit_length() > 80  # shorter once in 2**47


def test_fresh_randomness_is_refused_while_tracing():
    for draw in (dpx.random.fresh_key, dpx.random.fresh_seed):
        with pytest.raises(RuntimeError, match="tracing"):
            jax.jit(lambda draw=draw: (draw(), 0)[1])()


VALUES = {
    "float32": jnp.array([1.5, -2.0, jnp.nan, jnp.inf, 0.0, 1e-40]),
    "bfloat16": jnp.array([1.5, -2.0], jnp.bfloat16),
    "float16": jnp.array([1.5, -2.0], jnp.float16),
    "int32": jnp.array([3, -7]),
    "int8": jnp.array([3, -7], jnp.int8),
    "int4": jnp.array([3, -7], jnp.int4),
    "bool": jnp.array([True, False]),
    "complex64": jnp.array([1 + 2j, -3j]),
    "empty": jnp.zeros((0, 3)),
    "scalar": jnp.float32(3.0),
    "numpy float64": np.array([1 / 3, -2.0]),
    "numpy int64": np.array([2**40, -1]),
    "numpy float32": np.array([[1.5], [2.5]], np.float32),
}


@pytest.mark.parametrize("name", VALUES)
def test_reveal_gives_back_every_bit_also_through_jit(name):
    value = VALUES[name]
    back = dpx.Sensitive(value).reveal()
    assert back.dtype == value.dtype and type(back) is type(value)
    np.testing.assert_array_equal(np.asarray(back), np.asarray(value))
    passed = jax.jit(lambda s: s)(dpx.Sensitive(value)).reveal()
    expected = jax.jit(lambda x: x)(value)  # what JAX makes of 64 bits
    assert passed.dtype == expected.dtype
    if name != "numpy int64":  # cut to 32 bits either way
        np.testing.assert_array_equal(np.asarray(passed), np.asarray(expected))


def test_other_leaves_come_back_too():
    key = jr.key(3)
    value = {"key": key, "n": 98765, "x": 0.1, "flag": True, "text": "secret", "nested": dpx.Sensitive(1)}
    back = dpx.Sensitive(value).reveal()
    assert (back["n"], back["x"], back["flag"], back["text"]) == (98765, 0.1, True, "secret")
    assert isinstance(back["nested"], dpx.Sensitive) and back["nested"].reveal() == 1
    assert (jr.key_data(back["key"]) == jr.key_data(key)).all()
    assert jax.eval_shape(lambda: dpx.Sensitive(jnp.ones(3))).reveal() == jax.ShapeDtypeStruct((3,), jnp.float32)


def test_leaves_and_tree_maps_show_no_number(model, batch):
    private_grad = dpx.PrivateGradient(
        lambda m, x, y: (loss(m, x, y), {"guess": m(x)}),
        dpx.FlatClipping(0.5),
        dpx.IndependentGaussian(1.0),
        has_aux=True,
    )
    _, _, diagnostics = private_grad(model, batch, private_grad.init(model))
    for sensitive in (diagnostics, private_grad.clipped_sum(model, batch), SECRET):
        true = [
            np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(sensitive.reveal()) if not isinstance(x, str)
        ]
        numbers = {v for x in true for v in x if v not in (0.0, 1.0)}
        assert len(numbers) > 2
        for leaf in [*jax.tree.leaves(sensitive), *jax.tree.leaves(jax.tree.map(lambda x: x, sensitive))]:
            if hasattr(leaf, "dtype"):
                assert np.asarray(leaf).dtype.kind == "u"
                assert not numbers & set(np.asarray(leaf, np.float64).ravel().tolist())
            assert "secret" not in repr(leaf)
    # nor does an average of leaves tell the average of the values
    seen = [float(np.mean(np.asarray(x, np.float64))) for x in jax.tree.leaves(diagnostics)]
    assert min(abs(s - float(diagnostics.reveal().losses.mean())) for s in seen) > 1


def test_sealed_values_are_sliced_stacked_and_sharded():
    value = dpx.Sensitive(jnp.arange(12.0).reshape(4, 3))
    rows = jax.lax.scan(lambda c, s: (c, s), None, value)[1]
    np.testing.assert_array_equal(rows.reveal(), value.reveal())
    made = jax.vmap(lambda x: dpx.Sensitive(2 * x))(jnp.arange(4.0))
    np.testing.assert_array_equal(made.reveal(), [0, 2, 4, 6])
    with jax.set_mesh(jax.make_mesh((4,), ("data",))):
        spread = jax.device_put(value, jax.P("data"))
        assert jax.typeof(spread.reveal()).sharding.spec[0] == "data"
        np.testing.assert_array_equal(spread.reveal(), value.reveal())


def test_a_gradient_through_a_sealed_value_is_refused_not_zero():
    with pytest.raises(TypeError, match="cannot be differentiated"):
        jax.grad(lambda x: jnp.sum(dpx.Sensitive(x).reveal()))(jnp.ones(2))
