"""Claim: a ghost-clipped step costs about an ordinary backward pass, in time and in memory, whatever the model.

Prints, for each workload, time and peak temporary memory of every method over those of the non-private step of the same batch. Steps are
interleaved in one process and medians compared, so that what else the machine does hits all of them alike. jax-privacy's `clipped_grad` is in
the table where it is installed (`pip install 'dpx[bench]'`), with the best of the microbatches none, 8 and 32.

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

from _timing import interleaved, target
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


TARGETS = {  # of time and of temporary memory
    "mlp": (1.05, 2.5),
    "cnn": (1.25, 2.5),
    "transformer": (1.15, 2.5),
    "transformer_scan_remat": (1.35, 1.5),
    "embedding_heavy": (1.3, 2.0),
    "lora": (1.15, 2.0),
}
WORKLOADS = [mlp, cnn, transformer, transformer_scan_remat, embedding_heavy, lora]


Program = Callable[[Any, Any], Any]


class Compiled(NamedTuple):
    run: Callable[[], Any]
    seconds: float
    memory: int


def split(workload: Workload) -> tuple[Any, Callable]:
    """The trained parameters, and the loss of one example as a function of them."""
    params, static = eqx.partition(workload.model, workload.trained)
    return params, lambda p, e: workload.loss(eqx.combine(p, static), *e)


def non_private(workload: Workload) -> Program:
    _, loss = split(workload)
    return jax.value_and_grad(lambda p, examples: jax.vmap(lambda e: loss(p, e))(examples).mean())


def private(workload: Workload, method: AbstractGradientMethod, groups: int = 1) -> Program:
    """The clipped sum; with several groups, leaves take turns."""
    params, loss = split(workload)
    mask = jnp.ones(len(workload.batch[0]), bool)
    labels = tuple(k % groups for k in range(len(jax.tree.leaves(params))))
    factors = lambda norms: 1 / jnp.maximum(norms, 1.0)

    def step(params, examples):
        out = method.clipped_sum(lambda p, e: (loss(p, e), ()), params, examples, mask, labels, 2, factors)
        return out.total, out.losses.mean(), out.norms

    return step


def jax_privacy(workload: Workload, microbatch_size: int | None) -> Program:
    from jax_privacy import clipping  # pyright: ignore[reportMissingImports]

    _, loss = split(workload)
    options: Any = {"keep_batch_dim": False, "return_values": True, "microbatch_size": microbatch_size}
    return clipping.clipped_grad(loss, l2_clip_norm=1.0, **options)


def compile_step(workload: Workload, program: Program) -> Compiled:
    params, _ = split(workload)
    start = time.perf_counter()
    compiled: Any = jax.jit(program).lower(params, workload.batch).compile()
    seconds = time.perf_counter() - start
    return Compiled(partial(compiled, params, workload.batch), seconds, compiled.memory_analysis().temp_size_in_bytes)


def peers(workload: Workload) -> dict[str, Compiled]:
    """The fastest of jax-privacy's microbatches, if it is installed."""
    sizes = [None, *(n for n in (8, 32) if n < len(workload.batch[0]))]
    try:
        compiled = {f"jax-privacy, {n}": compile_step(workload, jax_privacy(workload, n)) for n in sizes}
    except ImportError:
        return {}
    seconds = interleaved({name: c.run for name, c in compiled.items()}, repeats=3, warmup=1)
    best = min(seconds, key=lambda name: seconds[name])
    return {best: compiled[best]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Ghost clipping beside the non-private step.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="")
    parser.add_argument("--others", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--groups", type=int, default=None)
    parser.add_argument("--budget", type=float, default=None)
    options = parser.parse_args()
    print(f"{'workload':24}{'method':20}{'ms':>9}{'time':>8}{'memory':>8}{'compile':>9}")
    for make in WORKLOADS:
        if options.only not in make.__name__:
            continue
        workload = make()
        programs = {"non-private": non_private(workload), "Ghost": private(workload, Ghost())}
        if options.groups:
            programs[f"Ghost, {options.groups} groups"] = private(workload, Ghost(), options.groups)
        if options.budget:
            programs["Ghost, budget"] = private(workload, Ghost(memory_budget=options.budget))
        if options.others:
            programs["Vectorized"] = private(workload, Vectorized())
        compiled = {name: compile_step(workload, program) for name, program in programs.items()}
        if options.others:
            compiled |= peers(workload)
        times = interleaved({name: c.run for name, c in compiled.items()}, options.rounds)
        base = compiled["non-private"]
        for name, c in compiled.items():
            ratios = times[name] / times["non-private"], c.memory / base.memory, c.seconds / base.seconds
            print(
                f"{make.__name__:24}{name:20}{1e3 * times[name]:9.1f}{ratios[0]:8.2f}{ratios[1]:8.2f}{ratios[2]:9.2f}",
                flush=True,
            )
        ghost = compiled["Ghost"]
        most_time, most_memory = TARGETS[make.__name__]
        target(f"{make.__name__}: time of a step over non-private", times["Ghost"] / times["non-private"], most_time)
        target(f"{make.__name__}: memory over non-private", ghost.memory / base.memory, most_memory)
        target(f"{make.__name__}: compilation over non-private", ghost.seconds / base.seconds, 3.0)


if __name__ == "__main__":
    main()
