"""Clipping: whatever the input, one example contributes at most the sensitivity."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import dpx
import registry
from conftest import loss, make_batch, make_model, naive_clipped_sum, norm64
from dpx._norms import grouped_norms, norms_of

BOUND = 1 + 1e-6


@eqx.filter_jit
def clipped(norm, leaves, microbatch_size=None):
    """Clips given per-example gradients: those of a loss that is linear in the parameters."""
    params = [jnp.zeros(leaf.shape[1:], leaf.dtype) for leaf in leaves]

    def linear(params, *example):
        return sum(
            (jnp.sum((p * g).astype(jnp.float32)) for p, g in zip(params, example, strict=True)),
            jnp.zeros((), jnp.float32),
        )

    private_grad = dpx.PrivateGradient(
        linear, dpx.FlatClipping(norm), dpx.IndependentGaussian(1.0), method=dpx.Vectorized(microbatch_size)
    )
    return private_grad.clipped_sum(params, tuple(leaves)).reveal()


@pytest.mark.parametrize("dtype", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("bfloat16", "float16")])
def test_bound_holds_for_hundreds_of_half_precision_leaves(dtype):
    # the square of one leaf is lost when it is added in half precision to the sum of hundreds
    leaves = [jnp.full((1, 12), 0.0173, dtype) for _ in range(100)]
    out = clipped(jnp.asarray(0.1), leaves)
    assert 0.1 * (1 - 1e-5) <= norm64(out) <= 0.1 * BOUND


@pytest.mark.parametrize("number", [1000, pytest.param(4000, marks=pytest.mark.slow)])
def test_norms_of_thousands_of_leaves_are_exact(number):
    for value in (0.0173, 1.1, 0.7):
        leaf = jnp.full((1, 3), value, jnp.bfloat16)
        size = grouped_norms(norms_of([leaf], 2) * number, (0,) * number, 2)[0, 0]
        assert float(size) == pytest.approx(norm64([leaf] * number), rel=5e-7)


def test_bound_holds_for_long_constant_gradients():
    # float32 sums of millions of equal numbers drift by per cents if they are added one after the other
    for value in (0.7, 1.1, 0.0173):
        out = clipped(jnp.asarray(1.0), [jnp.full((1, 3_000_001), value)])
        assert 1 - 2.0**-14 <= norm64(out) <= BOUND


each_clipping = pytest.mark.parametrize(
    "record", [r for r in registry.CLIPPINGS if r.is_private], ids=lambda record: record.name
)


@each_clipping
def test_clipped_sum_is_the_definition(record, model, batch):
    private_grad = dpx.PrivateGradient(loss, record.value, _noise_for(record.value))
    out = private_grad.clipped_sum(model, batch).reveal()
    expected = naive_clipped_sum(loss, model, batch, np.ones(8, bool), record)
    for a, b in zip(jax.tree.leaves(out), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@each_clipping
def test_sensitivity_by_adding_removing_and_replacing(record, model):
    clipping = record.value
    private_grad = dpx.PrivateGradient(loss, clipping, _noise_for(clipping))
    x, y = make_batch()
    other = np.float32(1e3) * np.ones_like(x)

    def total(mask, x=x):
        return private_grad.clipped_sum(model, (x, y), mask=mask).reveal()

    def distance(a, b):
        return norm64(jax.tree.map(jnp.subtract, a, b), clipping.order)

    everyone = np.ones(8, bool)
    bound = private_grad.sensitivity * (1 + 1e-5)  # the float32 sum over examples rounds
    removed = []
    for i in range(8):
        without = everyone.copy()
        without[i] = False
        replaced = x.copy()
        replaced[i] = other[i]
        removed.append(distance(total(everyone), total(without)))
        assert removed[-1] <= bound
        assert distance(total(everyone), total(everyone, replaced)) <= 2 * bound
    # the bound is about attained, so that it is not slack that passes
    assert max(removed) >= private_grad.sensitivity * min(record.attains, 0.99)


def test_no_clipping_is_the_plain_sum(model, batch):
    private_grad = dpx.PrivateGradient(loss, dpx.NoClipping(), dpx.IndependentGaussian())
    grads, _, _ = private_grad(model, batch, private_grad.init(model))
    plain = eqx.filter_grad(lambda m: jnp.sum(jax.vmap(loss, (None, 0, 0))(m, *batch)))(model)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert private_grad.sensitivity == np.inf


@pytest.mark.parametrize("norm", [0.0, -1.0, np.inf, np.nan, 1e-20, 1e30])
def test_bad_clip_norms(norm):
    with pytest.raises(ValueError, match=r"FlatClipping\(norm=\.\.\.\)"):
        dpx.FlatClipping(norm)


def test_bad_order():
    with pytest.raises(ValueError, match="order"):
        dpx.FlatClipping(1.0, order=3)
    with pytest.raises(ValueError, match="order=2"):
        dpx.PrivateGradient(loss, dpx.FlatClipping(1.0, order=1), dpx.IndependentGaussian(1.0))


def test_sweep_over_clip_norms_is_a_vmap(batch):
    model = make_model()

    def one(norm):
        return (
            dpx.PrivateGradient(loss, dpx.FlatClipping(norm), dpx.IndependentGaussian(1.0))
            .clipped_sum(model, batch)
            .reveal()
        )

    norms = jnp.array([0.1, 1.0])
    swept = eqx.filter_vmap(one)(norms)
    for i in range(2):
        for a, b in zip(jax.tree.leaves(swept), jax.tree.leaves(one(norms[i])), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


def _noise_for(clipping):
    return dpx.IndependentGaussian(1.0) if clipping.order == 2 else dpx.Laplace(1.0)


@pytest.mark.parametrize("norm", [1e-12, 1e15])
def test_the_smallest_and_the_largest_clip_norm_can_be_used(norm):
    """Rounded up to float32, 1e15 is above 1e15."""
    for clipping in (dpx.FlatClipping(norm), dpx.GroupClipping({"w": norm}), dpx.NormalizedClipping(norm)):
        assert norm <= float(clipping.sensitivity) <= norm * (1 + 1e-6)


def test_guarantee_ordinary_gradients_do_not_exceed_the_norm_at_all():
    """Rounding of norm, factor and product is paid for with more than it can be."""
    gradients = jr.normal(jr.key(0), (200, 30)) * 10.0 ** jr.uniform(jr.key(1), (200, 1), minval=0, maxval=6)
    one = jax.jit(jax.vmap(lambda g: clipped(jnp.asarray(0.1), [g[None]])[0]))
    longest = np.linalg.norm(np.asarray(one(gradients), np.float64), axis=1).max()
    assert 0.1 * (1 - 1e-5) <= longest <= float(np.float32(0.1))
