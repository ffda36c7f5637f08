"""Claim: a ghost-clipped step costs about an ordinary backward pass, in time and in memory, whatever the model.

Prints, for each workload, time and peak temporary memory of every method over those of the non-private step of the same batch. Steps are
interleaved in one process and medians compared, so that what else the machine does hits all of them alike.

    python benchmarks/ghost_costs_a_backward.py [--rounds 15] [--only transformer]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from _timing import interleaved
from dpx.gradients import AbstractGradientMethod, Vectorized
from dpx.gradients._ghost_method import Ghost


class Workload(NamedTuple):
    model: Any
    loss: Callable[..., jax.Array]
    batch: tuple[jax.Array, ...]
    trained: Any = eqx.is_inexact_array


def cross_entropy(logits, label):
    return -jax.nn.log_softmax(logits)[label]


def mlp():
    model = eqx.nn.MLP(784, 10, 1024, 3, key=jr.key(0))
    batch = jr.normal(jr.key(1), (256, 784)), jnp.arange(256) % 10
    return Workload(model, lambda m, x, y: cross_entropy(m(x), y), batch)


def cnn():
    """Two convolutions and two linear layers, as in the DP-SGD tutorials on MNIST."""
    keys = jr.split(jr.key(0), 4)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 16, 8, stride=2, padding="SAME", key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 1),
            eqx.nn.Conv2d(16, 32, 4, stride=2, key=keys[1]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 1),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(512, 32, key=keys[2]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(32, 10, key=keys[3]),
        ]
    )
    batch = jr.normal(jr.key(1), (128, 1, 28, 28)), jnp.arange(128) % 10
    return Workload(model, lambda m, x, y: cross_entropy(m(x), y), batch)


class Adapted(eqx.Module):
    """A linear layer without bias, and a low-rank correction where `rank` is not zero."""

    weight: jax.Array
    a: jax.Array | None
    b: jax.Array | None

    def __init__(self, size, out, rank, *, key):
        keys = jr.split(key, 3)
        self.weight = jr.normal(keys[0], (size, out)) / size**0.5
        self.a = jr.normal(keys[1], (size, rank)) / size**0.5 if rank else None
        self.b = jr.normal(keys[2], (rank, out)) / 8 if rank else None

    def __call__(self, x):
        y = x @ self.weight
        return y if self.a is None else y + (x @ self.a) @ self.b


class Block(eqx.Module):
    qkv: list
    out: Adapted
    up: Adapted
    down: Adapted
    norms: list
    heads: int = eqx.field(static=True)

    def __init__(self, size, heads, rank, *, key):
        keys = jr.split(key, 6)
        self.qkv = [Adapted(size, size, rank, key=k) for k in keys[:3]]
        self.out = Adapted(size, size, rank, key=keys[3])
        self.up = Adapted(size, 4 * size, rank, key=keys[4])
        self.down = Adapted(4 * size, size, rank, key=keys[5])
        self.norms = [eqx.nn.LayerNorm(size) for _ in range(2)]
        self.heads = heads

    def __call__(self, x):
        length, size = x.shape
        h = jax.vmap(self.norms[0])(x)
        q, k, v = (p(h).reshape(length, self.heads, -1) for p in self.qkv)
        scores = jnp.einsum("thd,shd->hts", q, k) / (size / self.heads) ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -1e9)
        x = x + self.out(jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v).reshape(length, size))
        return x + self.down(jax.nn.gelu(self.up(jax.vmap(self.norms[1])(x))))


class Transformer(eqx.Module):
    embedding: jax.Array
    positions: jax.Array
    blocks: Any
    head: jax.Array
    stacked: bool = eqx.field(static=True)

    def __init__(self, size=256, heads=8, layers=4, length=64, vocab=512, rank=0, stacked=False):
        keys = jr.split(jr.key(0), 4)
        make = lambda key: Block(size, heads, rank, key=key)
        self.embedding = jr.normal(keys[0], (vocab, size)) * 0.02
        self.positions = jr.normal(keys[1], (length, size)) * 0.02
        layer_keys = jr.split(keys[2], layers)
        self.blocks = eqx.filter_vmap(make)(layer_keys) if stacked else [make(k) for k in layer_keys]
        self.head = jr.normal(keys[3], (size, vocab)) * 0.02
        self.stacked = stacked

    def __call__(self, ids):
        x = self.embedding[ids] + self.positions
        if self.stacked:
            arrays, static = eqx.partition(self.blocks, eqx.is_array)
            body = jax.checkpoint(lambda x, layer: (eqx.combine(layer, static)(x), None))
            x, _ = lax.scan(body, x, arrays)
        else:
            for block in self.blocks:
                x = block(x)
        return x @ self.head


def _next_token(model, ids, targets):
    return jnp.mean(jax.vmap(cross_entropy)(model(ids), targets))


def _tokens(batch=16, length=64, vocab=512):
    return tuple(jr.randint(jr.key(k), (batch, length), 0, vocab) for k in (1, 2))


def transformer():
    return Workload(Transformer(), _next_token, _tokens())


def transformer_scan_remat():
    return Workload(Transformer(stacked=True), _next_token, _tokens())


def lora():
    model = Transformer(rank=8)
    spec = jax.tree_util.tree_map_with_path(lambda path, _: str(path[-1]) in (".a", ".b"), model)
    return Workload(model, _next_token, _tokens(), spec)


class Bag(eqx.Module):
    embedding: jax.Array
    mlp: eqx.nn.MLP

    def __call__(self, ids):
        return self.mlp(self.embedding[ids].mean(0))


def embedding_heavy():
    model = Bag(jr.normal(jr.key(0), (50_000, 128)), eqx.nn.MLP(128, 10, 128, 1, key=jr.key(1)))
    batch = jr.randint(jr.key(1), (64, 64), 0, 50_000), jnp.arange(64) % 10
    return Workload(model, lambda m, ids, y: cross_entropy(m(ids), y), batch)


WORKLOADS = [mlp, cnn, transformer, transformer_scan_remat, embedding_heavy, lora]


def steps(workload: Workload, methods: dict[str, AbstractGradientMethod]) -> tuple[dict[str, Any], tuple]:
    """The non-private mean gradient and the clipped sum of each method: compiled, seconds to compile, bytes; and the arguments."""
    params, static = eqx.partition(workload.model, workload.trained)
    per_example = lambda p, e: (workload.loss(eqx.combine(p, static), *e), ())
    mask = jnp.ones(len(workload.batch[0]), bool)
    labels = (0,) * len(jax.tree.leaves(params))
    factors = lambda norms: 1 / jnp.maximum(norms, 1.0)

    def plain(params, examples):
        mean = lambda p: jax.vmap(lambda e: per_example(p, e)[0])(examples).mean()
        loss, grads = jax.value_and_grad(mean)(params)
        return grads, loss

    def private(method):
        def step(params, examples):
            out = method.clipped_sum(per_example, params, examples, mask, labels, 2, factors)
            return out.total, out.losses.mean(), out.norms

        return step

    programs = {"non-private": plain} | {name: private(method) for name, method in methods.items()}
    out = {}
    for name, program in programs.items():
        start = time.perf_counter()
        compiled: Any = jax.jit(program).lower(params, workload.batch).compile()
        out[name] = (compiled, time.perf_counter() - start, compiled.memory_analysis().temp_size_in_bytes)
    return out, (params, workload.batch)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ghost clipping beside the non-private step.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="")
    parser.add_argument("--vectorized", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--budget", type=float, default=None)
    options = parser.parse_args()
    print(f"{'workload':24}{'method':14}{'ms':>9}{'time':>8}{'memory':>8}{'compile':>9}")
    for make in WORKLOADS:
        if options.only not in make.__name__:
            continue
        methods: dict[str, AbstractGradientMethod] = {"Ghost": Ghost()}
        if options.budget:
            methods["Ghost, budget"] = Ghost(memory_budget=options.budget)
        if options.vectorized:
            methods["Vectorized"] = Vectorized()
        compiled, arguments = steps(make(), methods)
        times = interleaved({name: partial(c, *arguments) for name, (c, _, _) in compiled.items()}, options.rounds)
        _, compile_base, memory_base = compiled["non-private"]
        for name, (_, seconds, memory) in compiled.items():
            ratios = times[name] / times["non-private"], memory / memory_base, seconds / compile_base
            print(
                f"{make.__name__:24}{name:14}{1e3 * times[name]:9.1f}{ratios[0]:8.2f}{ratios[1]:8.2f}{ratios[2]:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
