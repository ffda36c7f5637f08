"""The ghost engine against the naive loop, on random programs over parameters and one example."""

import functools
from typing import Any

import hypothesis as hyp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

from dpx.gradients._ghost import ghost_clipped_sum

BATCH, SIZE = 3, 3
PARAMETERS = {"w": (3, 3), "v": (3, 3), "b": (3,), "t": (4, 3, 3), "c": (3, 3, 2)}
"""Square matrices, a vector, a stack of matrices and a convolution kernel."""

# Every operation maps two matrices (3, 3) to one, so that programs of any depth are well formed.
MATRIX = [
    "dot", "dot_transposed", "add", "multiply", "tanh", "transpose", "reshape", "scan_over_stack", "scan_over_time", "cond", "jit",
    "checkpoint", "split", "stack_slice", "outer", "gather", "dynamic_row", "convolve", "standardise", "stop", "cast", "custom", "vmap",
    "while", "flip", "concatenate",
]  # fmt: skip


def apply(name, x, y, p, ids):
    """One operation on two matrices; `p` are the parameters, `ids` integers of the example."""
    match name:
        case "dot":
            return x @ y
        case "dot_transposed":
            return jnp.einsum("ij,kj->ki", x, y)
        case "add":
            return x + y
        case "multiply":
            return x * y
        case "tanh":
            return jnp.tanh(x)
        case "transpose":
            return x.T
        case "reshape":
            return x.reshape(9)[None].reshape(3, 1, 3)[:, 0]
        case "scan_over_stack":
            return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["t"])[0]
        case "scan_over_time":
            return lax.scan(lambda h, row: (jnp.tanh(h @ p["w"] + row[None]), h[0]), x, y)[1]
        case "cond":
            return lax.cond(x[0, 0] > 0, lambda x, y: x @ y, lambda x, y: x + p["v"] @ y, x, y)
        case "jit":
            return jax.jit(lambda x, y: (x, y @ x))(x, y)[1]
        case "checkpoint":
            return jax.checkpoint(lambda x, y: jnp.sin(x @ p["v"]) @ y)(x, y)
        case "split":
            a, b = jnp.split(p["t"], 2)
            return a[0] @ x + y @ b[1]
        case "stack_slice":
            return p["t"][2] @ x + p["t"][1:3][0].T @ y
        case "outer":
            return jnp.outer(x[0], p["b"]) + x * p["b"][None]
        case "gather":
            return p["w"][ids] + x.at[:, ids].get(mode="clip")
        case "dynamic_row":
            return x + p["t"][ids[0]] + y[ids[1]][None]
        case "convolve":
            out = lax.conv_general_dilated(x[None], p["c"], (1,), [(1, 0)], rhs_dilation=(1,))
            return out[0] @ jnp.eye(3)
        case "standardise":
            w = p["w"]
            return x @ ((w - w.mean(0, keepdims=True)) / jnp.sqrt(jnp.var(w, 0, keepdims=True) + 1))
        case "stop":
            return lax.stop_gradient(x) @ y + x
        case "cast":
            return x.astype(jnp.bfloat16).astype(jnp.float32) + y
        case "custom":
            return _tripled(x, y)
        case "vmap":
            return jax.vmap(lambda row: p["v"] @ row + p["b"])(x)
        case "while":
            return lax.fori_loop(0, 2, lambda _, h: jnp.tanh(p["w"] @ h), x)
        case "flip":
            return jnp.flip(x, 0)
        case "concatenate":
            return jnp.concatenate([x[:1], y[1:]])
    raise AssertionError(name)


@jax.custom_vjp
def _tripled(x, y):
    return jnp.sin(x) @ y


_tripled.defvjp(lambda x, y: (_tripled(x, y), (x, y)), lambda res, ct: (3 * (ct @ res[1].T), res[0].T @ ct))

step = st.tuples(st.sampled_from(MATRIX), st.integers(0, 30), st.integers(0, 30))


def make_loss(program):
    def loss(p, example):
        x, ids = example
        # parameters are values like any other: they may meet each other, be used twice or not at all
        values = [x, p["w"], p["v"]]
        for name, i, j in program:
            out = apply(name, values[i % len(values)], values[j % len(values)], p, ids)
            values.append(out / (1 + lax.stop_gradient(jnp.max(jnp.abs(out)))))
        return jnp.sum(jnp.cos(values[-1])) + jnp.sum(values[len(values) // 2] * x), ()

    return loss


PROGRAMS = hyp.given(st.lists(step, min_size=1, max_size=7), st.integers(0, 2**31 - 1))


def settings(max_examples):
    return hyp.settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        # a failing program is reported as found: to shrink it costs a compilation a try
        phases=[hyp.Phase.explicit, hyp.Phase.generate],
        suppress_health_check=[hyp.HealthCheck.too_slow],
    )


@settings(9)
@PROGRAMS
def test_equals_naive_loop_on_random_programs(program, seed):
    check(program, seed)


@pytest.mark.slow
@settings(100)
@PROGRAMS
def test_equals_naive_loop_on_many_random_programs(program, seed):
    check(program, seed)


def check(program, seed):
    loss = make_loss(program)
    keys = jr.split(jr.key(seed), len(PARAMETERS) + 2)
    params = {n: jr.normal(k, shape) for (n, shape), k in zip(PARAMETERS.items(), keys, strict=False)}
    examples = jr.normal(keys[-1], (BATCH, SIZE, SIZE)), jr.randint(keys[-2], (BATCH, 3), 0, 3)
    labels = (0, 1, 0, 1, 1)
    clip = lambda norms: 1 / jnp.maximum(norms, 0.5)
    options: Any = {"passes": 1 + seed % 2, "memory_budget": (None, 0)[seed // 2 % 2]}
    # the arithmetic is the same without optimisation, and compiled in half the time
    jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    run = jit(lambda p, e: ghost_clipped_sum(loss, p, e, None, labels, clip, **options)[:3])
    got, norms, losses = run(params, examples)
    naive = jax.vmap(jax.value_and_grad(lambda p, e: loss(p, e)[0]), in_axes=(None, 0))
    value, grads = jit(naive)(params, examples)
    np.testing.assert_allclose(losses, value, rtol=1e-5, atol=1e-6)
    leaves = [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]
    square = lambda k: sum(
        np.sum(g**2, tuple(range(1, g.ndim))) for g, label in zip(leaves, labels, strict=True) if label == k
    )
    wanted_norms = np.sqrt(np.stack([square(0), square(1)], 1))
    np.testing.assert_allclose(norms, wanted_norms, rtol=2e-5, atol=1e-5)
    weights = np.asarray(clip(wanted_norms), np.float64)
    for x, g, label in zip(jax.tree.leaves(got), leaves, labels, strict=True):
        wanted = np.tensordot(weights[:, label], g, 1)
        np.testing.assert_allclose(x, wanted, rtol=1e-4, atol=2e-5)
