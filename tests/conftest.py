"""Registries: whoever adds a clipping, a gradient method, a noise or a sampler adds one line here, and every property is tested."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Most of the suite's time is compilation of small programs, which these make three times shorter. `XLA_FLAGS= pytest` tests what users compile.
_QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false"
)
_GIVEN = os.environ.get("XLA_FLAGS")
if _GIVEN is None:  # workers inherit what the first process finds
    quick = {**os.environ, "XLA_FLAGS": _QUICK_COMPILATION}
    # a flag that the compiler does not know ends the process
    knows = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=quick, capture_output=True, check=False
    )
    os.environ["XLA_FLAGS"] = _QUICK_COMPILATION if knows.returncode == 0 else ""

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jax.random as jr  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import dpx  # noqa: E402

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dpx.__file__).parents[1]), "XLA_FLAGS": ""}
"""For tests that start a Python of their own."""


class Linear(eqx.Module):
    """A small model with leaves of two shapes and something that is not trained."""

    weight: Any
    bias: Any
    count: Any
    name: str | None = "linear"

    def __call__(self, x):
        return self.weight @ x + self.bias


CLIPPINGS = {
    "flat": dpx.FlatClipping(0.5),
    "flat-unit": dpx.FlatClipping(0.5, unit_norm=True),
    "flat-l1": dpx.FlatClipping(0.5, order=1),
    "group": dpx.GroupClipping(Linear(0.3, 0.4, None, None)),
    "group-equal": dpx.GroupClipping(Linear(0.3, 0.4, None, None), allocation="equal"),
    "group-optimal": dpx.GroupClipping(Linear(0.3, 0.4, None, None), unit_norm=True, allocation="optimal"),
    "normalized": dpx.NormalizedClipping(0.5),
    "auto-v": dpx.NormalizedClipping(0.5, gamma=0),
    "psac": dpx.PSACClipping(0.5),
    "hard": dpx.HardThresholdClipping(0.5, threshold=7.2),
    "adaptive": dpx.AdaptiveClipping(0.5),
    "adaptive-groups": dpx.AdaptiveClipping(Linear(0.3, 0.4, None, None)),
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
    "balls-in-bins": dpx.sampling.BallsInBinsSampler(50, 10, 400),
    "random-allocation": dpx.sampling.RandomAllocationSampler(50, 10, 400, 80),
    "min-sep": dpx.sampling.MinSepSampler(50, 5, 400, 4),
    "min-sep-cold-truncated": dpx.sampling.MinSepSampler(50, 5, 400, 4, start="cold", max_batch_size=9),
    "fixed-size": dpx.sampling.FixedSizeSampler(50, 10, 400),
    "fixed-size-replace": dpx.sampling.FixedSizeSampler(50, 10, 400, replace=True),
    "users": dpx.sampling.UserSampler(dpx.PoissonSampler(20, 5, 400), np.arange(90) * 7 % 30 % 20, 4),
    "users-min-sep": dpx.sampling.UserSampler(dpx.sampling.MinSepSampler(20, 4, 400, 3), np.arange(60) % 20, 2),
}


def make_model(dtype=jnp.float32):
    weight = jr.normal(jr.key(1), (3, 4), dtype)
    return Linear(weight, jnp.ones(3, dtype), jnp.array(7))


def loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def make_batch(size=8, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 4)).astype(np.float32) * np.logspace(-2, 2, size, dtype=np.float32)[:, None]
    return x, rng.normal(size=(size, 3)).astype(np.float32)


def contribution64(clipping, leaves, labels):
    """What one example contributes to the sum before noise, by the definition in each clipping's paper, in float64."""
    groups = max(labels) + 1
    norms = np.array(
        [norm64([x for x, g in zip(leaves, labels, strict=True) if g == k], clipping.order) for k in range(groups)]
    )
    match clipping:
        case dpx.FlatClipping():
            factors = np.minimum(1.0, float(clipping.norm) / np.maximum(norms, 1e-300))
            factors /= float(clipping.norm) if clipping.unit_norm else 1.0
        case dpx.GroupClipping():
            bounds = np.asarray(clipping.norms, np.float64)
            factors = np.minimum(1.0, bounds / np.maximum(norms, 1e-300))
            factors /= norm64([bounds]) if clipping.unit_norm else 1.0
        case dpx.NormalizedClipping():
            factors = float(clipping.norm) / (norms + float(clipping.gamma))
        case dpx.PSACClipping():
            factors = float(clipping.norm) / (norms + float(clipping.r) / (norms + float(clipping.r)))
        case dpx.HardThresholdClipping():
            factors = np.where(norms <= float(clipping.threshold), float(clipping.norm / clipping.threshold), 0.0)
        case dpx.AdaptiveClipping():
            factors = np.minimum(1.0, np.asarray(clipping.initial_norms, np.float64) / np.maximum(norms, 1e-300))
    return [factors[k] * x for x, k in zip(leaves, labels, strict=True)]


def naive_clipped_sum(loss, model, batch, mask, clipping):
    """The definition, one example at a time, clipped (or flatly, at a given norm) and added up in float64."""
    if not isinstance(clipping, dpx.AbstractClipping):
        clipping = dpx.FlatClipping(clipping)
    params = eqx.filter(model, eqx.is_inexact_array)
    sums = [np.zeros(x.shape) for x in jax.tree.leaves(params)]
    for i in np.flatnonzero(mask):
        grad = eqx.filter_grad(loss)(model, *jax.tree.map(lambda leaf, i=i: leaf[i], batch))
        leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(grad)]
        sums = [s + x for s, x in zip(sums, contribution64(clipping, leaves, clipping.labels(params)), strict=True)]
    return sums


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
