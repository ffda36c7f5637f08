"""A step of `Vectorized` costs what a hand-written vmap(grad) + clip + sum + noise costs; its memory follows the microbatch.

    python benchmarks/vectorized_costs_vmap.py

Target: at most 1.10 in time on the demo's CNN, batch 128; temporary memory proportional to the microbatch.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import dpx
from _timing import interleaved, table, target
from dpx.cli._digits import DigitsCNN, cross_entropy, digits

BATCH, CLIP, SIGMA = 128, 0.5, 1.66

(images, labels), _ = digits()
model = DigitsCNN(jr.key(0))
batch = jax.tree.map(jnp.asarray, (images[:BATCH], labels[:BATCH]))


def by_hand(model, x, y, key):
    grads = eqx.filter_vmap(eqx.filter_grad(cross_entropy), in_axes=(None, 0, 0))(model, x, y)
    leaves, treedef = jax.tree.flatten(grads)
    norms = jnp.sqrt(sum(jnp.sum(g**2, axis=tuple(range(1, g.ndim))) for g in leaves))
    scale = jnp.minimum(1.0, CLIP / norms)
    keys = jr.split(key, len(leaves))
    out = [
        (jnp.einsum("b,b...->...", scale, g) + SIGMA * CLIP * jr.normal(k, g.shape[1:])) / BATCH
        for k, g in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, out)


def step(method):
    private_grad = dpx.PrivateGradient(
        cross_entropy, dpx.FlatClipping(CLIP), dpx.IndependentGaussian(SIGMA), normalizer=BATCH, method=method
    )
    state = private_grad.init(model, key=jr.key(1))
    compiled = eqx.filter_jit(lambda model, batch, state: private_grad(model, batch, state)[:2])
    memory: Any = compiled.lower(model, batch, state).compile().compiled.memory_analysis()
    return (lambda: compiled(model, batch, state)), memory.temp_size_in_bytes


if __name__ == "__main__":
    hand: Any = eqx.filter_jit(by_hand)
    arguments = (model, *batch, jr.key(1))
    vectorized, memory = step(dpx.Vectorized())
    print(f"demo CNN, batch {BATCH}, {jax.devices()[0].device_kind}")
    seconds = interleaved({"by hand": lambda: hand(*arguments), "Vectorized": vectorized}, repeats=40)
    table(seconds, "by hand")
    target("Vectorized over a hand-written step", seconds["Vectorized"] / seconds["by hand"], 1.1)
    analysis: Any = hand.lower(*arguments).compile().compiled.memory_analysis()
    print("\ntemporary memory, MiB")
    rows = {"by hand": analysis.temp_size_in_bytes, "Vectorized()": memory}
    rows |= {f"Vectorized({size})": step(dpx.Vectorized(size))[1] for size in (64, 32, 16, 8)}
    table({k: float(v) for k, v in rows.items()}, "Vectorized()", 2**-20, "MiB")
