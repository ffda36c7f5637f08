"""What tests share: quick compilation, strict types, a small model, and sums by their definition."""

import os
import subprocess
import sys
from pathlib import Path

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
from registry import ClippingRecord, Linear  # noqa: E402

_SLOW_CASES = Path(__file__).with_name("slow_cases.txt")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked
def pytest_collection_modifyitems(config, items):
    lines = (line.strip() for line in _SLOW_CASES.read_text().splitlines())
    slow = {line for line in lines if line and not line.startswith("#")}
    found = set()
    for item in items:
        case = item.nodeid.removeprefix("tests/")
        if case in slow:
            item.add_marker(pytest.mark.slow)
            found.add(case)
    # all tests were collected where nobody named any
    if config.args == config.getini("testpaths") and slow - found:
        raise pytest.UsageError(f"{_SLOW_CASES.name} names tests that do not exist: {', '.join(sorted(slow - found))}")


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(dpx.__file__).parents[1]), "XLA_FLAGS": ""}
"""For tests that start a Python of their own."""


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
    """What one example contributes to the sum before noise, by the definition of a record of the registry, or of flat clipping, in float64."""
    if not isinstance(clipping, ClippingRecord):
        clipping = flat(clipping)
    order = clipping.value.order
    groups = [[x for x, g in zip(leaves, labels, strict=True) if g == k] for k in range(max(labels) + 1)]
    factors = clipping.factors(np.array([norm64(group, order) for group in groups]))
    return [factors[k] * x for x, k in zip(leaves, labels, strict=True)]


def flat(clipping):
    """Flat clipping, or a number that stands for it, with its definition."""
    clipping = clipping if isinstance(clipping, dpx.FlatClipping) else dpx.FlatClipping(clipping)
    norm, by = float(clipping.norm), float(clipping.norm) if clipping.unit_norm else 1.0
    return ClippingRecord(
        "flat", lambda: clipping, lambda norms: np.minimum(1.0, norm / np.maximum(norms, 1e-300)) / by
    )


def naive_clipped_sum(loss, model, batch, mask, clipping):
    """The definition, one example at a time, clipped (by a record, or flatly) and added up in float64."""
    clipping = clipping if isinstance(clipping, ClippingRecord) else flat(clipping)
    params = eqx.filter(model, eqx.is_inexact_array)
    sums = [np.zeros(x.shape) for x in jax.tree.leaves(params)]
    for i in np.flatnonzero(mask):
        grad = eqx.filter_grad(loss)(model, *jax.tree.map(lambda leaf, i=i: leaf[i], batch))
        leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(grad)]
        terms = contribution64(clipping, leaves, clipping.value.labels(params))
        sums = [s + x for s, x in zip(sums, terms, strict=True)]
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
