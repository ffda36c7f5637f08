"""Registries: whoever adds a clipping, a gradient method, a noise or a sampler adds one line here, and every property is tested."""

import os
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jax.random as jr  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import dpx  # noqa: E402

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dpx.__file__).parents[1])}
"""For tests that start a Python of their own."""

CLIPPINGS = {
    "flat": dpx.FlatClipping(0.5),
    "flat-unit": dpx.FlatClipping(0.5, unit_norm=True),
    "flat-l1": dpx.FlatClipping(0.5, order=1),
}
METHODS = {
    "vectorized": dpx.Vectorized(),
    "microbatch-1": dpx.Vectorized(1),
    "microbatch-3": dpx.Vectorized(3),  # does not divide the batch
    "ghost": dpx.Ghost(),
    "ghost-3": dpx.Ghost(3),
    "auto": dpx.Auto(),
}
NOISES = {"gaussian": dpx.IndependentGaussian(1.5), "laplace": dpx.Laplace(1.5)}
SAMPLERS = {
    "poisson": dpx.PoissonSampler(50, 10, 400),
    "poisson-truncated": dpx.PoissonSampler(50, 10, 400, max_batch_size=14),
    "cyclic": dpx.CyclicPoissonSampler(50, 8, 400, 5),
    "cyclic-equal": dpx.CyclicPoissonSampler(50, 8, 400, 5, partition="equal"),
    "shuffle": dpx.ShuffleSampler(50, 8, 400),
    "reshuffle": dpx.ShuffleSampler(50, 8, 400, reshuffle=True),
    "poisson-all": dpx.PoissonSampler(20, 20, 400),
}


class Linear(eqx.Module):
    """A small model with leaves of two shapes and something that is not trained."""

    weight: jax.Array
    bias: jax.Array
    count: jax.Array
    name: str = "linear"

    def __call__(self, x):
        return self.weight @ x + self.bias


def make_model(dtype=jnp.float32):
    weight = jr.normal(jr.key(1), (3, 4), dtype)
    return Linear(weight, jnp.ones(3, dtype), jnp.array(7))


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def make_batch(size=8, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 4)).astype(np.float32) * np.logspace(-2, 2, size, dtype=np.float32)[:, None]
    return x, rng.normal(size=(size, 3)).astype(np.float32)


def naive_clipped_sum(loss, model, batch, mask, norm, order=2, unit_norm=False):
    """The definition, one example at a time, clipped and added up in float64."""
    sums: dict[int, np.ndarray] = {}
    for i in np.flatnonzero(mask):
        grad = eqx.filter_grad(loss)(model, *jax.tree.map(lambda leaf, i=i: leaf[i], batch))
        leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(grad)]
        size = sum(np.sum(np.abs(g) ** order) for g in leaves) ** (1 / order)
        scale = min(1.0, norm / size) if size > 0 else 1.0
        for k, g in enumerate(leaves):
            sums[k] = sums.get(k, 0.0) + scale / (norm if unit_norm else 1.0) * g
    return [sums[k] for k in range(len(sums))]


def norm64(tree, order=2):
    return sum(np.sum(np.abs(np.asarray(x, np.float64)) ** order) for x in jax.tree.leaves(tree)) ** (1 / order)


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=rtol, atol=atol)


def assert_trees_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def batch():
    return make_batch()
