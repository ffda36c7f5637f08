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
from conftest import ENVIRONMENT

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
