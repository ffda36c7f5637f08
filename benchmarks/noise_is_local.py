"""Noise costs little more than drawing it, whatever the mechanism; jax-privacy's mechanisms next to it where it is installed.

    python benchmarks/noise_is_local.py [parameters]

Targets, on 10^7 float32 parameters: independent Gaussian at most 1.1 draws; 32 bands at most 1.5 times a draw plus one read of its 32 buffers;
4 BLT buffers at most 2 draws; replay keeps no buffers; nothing slower than jax-privacy, banded noise at least 1.5 times faster. Temporary
memory is that of the compiled step, with its buffers donated.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr

import dpx
from _timing import interleaved, table, target

SIZE = int(float(sys.argv[1])) if len(sys.argv) > 1 else 10_000_000
STEPS, BANDS = 1024, 32
BANDED = dpx.BandedToeplitz.optimize(STEPS, BANDS)
BUFFERED = dpx.BufferedToeplitz.optimize(STEPS, 4)


class Runner:
    """Steps a compiled function of (total, key, step, state) and keeps its donated state, or only reads a state that stays."""

    def __init__(self, function, state, is_read_only=False):
        total, key = jnp.zeros(SIZE), jr.key(0)
        compiled = (
            jax.jit(function, donate_argnums=() if is_read_only else 3).lower(total, key, jnp.int32(0), state).compile()
        )
        memory: Any = compiled.memory_analysis()
        self.temporary = memory.temp_size_in_bytes / (4 * SIZE)
        self.buffers = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim > 0) / (4 * SIZE)
        self.is_read_only = is_read_only
        self.call = lambda step: compiled(total, key, jnp.int32(step), self.state)
        self.state, self.count = state, 0

    def __call__(self):
        self.count += 1
        if self.is_read_only:
            return self.call(self.count)
        out, self.state = self.call(self.count)
        return out


def ours(noise):
    def step(total, key, step, state):
        return noise.step(total, jnp.float32(1.0), key, step, state)

    return Runner(step, noise.init(jax.ShapeDtypeStruct((SIZE,), jnp.float32)))


def theirs(matrix):
    from jax_privacy import noise_addition  # pyright: ignore[reportMissingImports]

    privatizer = noise_addition.matrix_factorization_privatizer(matrix, stddev=1.0, prng_key=jr.key(0))

    def step(total, key, step, state):
        return privatizer.update(total, state)

    state = jax.tree.map(jnp.asarray, privatizer.init(jnp.zeros(SIZE)))
    return Runner(step, state)


def draw(total, key, step, state):
    return jr.normal(jr.fold_in(key, step), (SIZE,)), state


def draw_and_read(total, key, step, state):
    weights = jnp.asarray(BANDED.coefficients, jnp.float32)
    past = sum(weights[j] * state[j] for j in range(BANDS))
    return jr.normal(jr.fold_in(key, step), (SIZE,)) + past


TARGETS = {"IndependentGaussian": 1.1, "BufferedToeplitz, 4 buffers": 2.0, "BandedToeplitz, 32 bands": 1.5}


def report(title, rows, reference, budget=12):
    print(f"\n{title}")
    seconds = interleaved(rows, repeats=budget, warmup=2)
    table(seconds, reference)
    for name in TARGETS.keys() & seconds.keys():
        target(f"{name} over {reference}", seconds[name] / seconds[reference], TARGETS[name])
    for name, runner in rows.items():
        print(f"    {name}: buffers {runner.buffers:.1f}, temporary {runner.temporary:.1f} copies of the gradient")


if __name__ == "__main__":
    has_peer = True
    try:
        from jax_privacy.matrix_factorization import buffered_toeplitz, streaming_matrix, toeplitz  # pyright: ignore[reportMissingImports]
    except ImportError:
        has_peer = False
        print("jax-privacy is not installed: `pip install 'dpx[bench]'` for its rows")
    print(f"{SIZE:.3g} float32 parameters, {jax.devices()[0].device_kind}")
    rows = {
        "one draw": Runner(draw, ()),
        "IndependentGaussian": ours(dpx.IndependentGaussian(1.0)),
        "BufferedToeplitz, 4 buffers": ours(dpx.CorrelatedGaussian(BUFFERED, 1.0)),
        "GeometricStrategy, replay": ours(dpx.CorrelatedGaussian(dpx.GeometricStrategy(0.95), 1.0, replay=True)),
        "GeometricStrategy, buffered": ours(dpx.CorrelatedGaussian(dpx.GeometricStrategy(0.95), 1.0)),
        "BandedInverse 4, replay": ours(dpx.CorrelatedGaussian(dpx.BandedInverse.square_root(4), 1.0, replay=True)),
        "TreeAggregation": ours(dpx.CorrelatedGaussian(dpx.TreeAggregation(STEPS), 1.0)),
    }
    if has_peer:
        rows["jax-privacy Gaussian"] = theirs(streaming_matrix.identity())
        with jax.enable_x64(True):
            blt = buffered_toeplitz.BufferedToeplitz.build(BUFFERED.decays, BUFFERED.scales)
            matrix = blt.inverse_as_streaming_matrix()
        rows["jax-privacy BLT, 4 buffers"] = theirs(matrix)
    report("few buffers", rows, "one draw")
    del rows
    rows = {"a draw + a read of 32": Runner(draw_and_read, tuple(jnp.ones(SIZE) for _ in range(BANDS)), True)}
    rows["BandedToeplitz, 32 bands"] = ours(dpx.CorrelatedGaussian(BANDED, 1.0))
    rows["ColumnNormalizedBanded, 32"] = ours(
        dpx.CorrelatedGaussian(dpx.ColumnNormalizedBanded.optimize(STEPS, BANDS), 1.0)
    )
    if has_peer:
        rows["jax-privacy banded, 32"] = theirs(
            toeplitz.inverse_as_streaming_matrix(jnp.asarray(BANDED.coefficients, jnp.float32))
        )
    report("32 bands", rows, "a draw + a read of 32", 8)
