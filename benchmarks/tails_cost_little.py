"""A normal or Laplace draw with tails to 2^-64 costs at most 1.3 times JAX's, which end at 2^-25: threefry and ChaCha20 keys, float32.

    python benchmarks/tails_cost_little.py [repeats]

One process, taking turns, compiled; CPU time of the process; the median of the ratios of neighbours, so that other work on the machine counts
less.
"""

import sys
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from _timing import target
from dpx.random import CHACHA20
from dpx.sharding import laplace_like, normal_like

SIZES = (1_000_000, 10_000_000)
TARGET = 1.3
REPEATS = int(sys.argv[1]) if len(sys.argv) > 1 else 15


def cpu_seconds(functions):
    for function in functions.values():
        for _ in range(2):
            jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(REPEATS):
        for name, function in functions.items():
            begin = time.process_time()
            jax.block_until_ready(function())
            seconds[name].append(time.process_time() - begin)
    return {name: np.array(values) for name, values in seconds.items()}


def compiled(draw, key, size):
    function = jax.jit(lambda key, draw=draw: draw(key, size)).lower(key).compile()
    return lambda: function(key)


if __name__ == "__main__":
    print(f"{jax.devices()[0].device_kind}; float32, CPU milliseconds, medians of {REPEATS}")
    print(f"{'key':10} {'law':8} {'numbers':>10} {'jax':>9} {'dpx':>9} {'ratio':>6}")
    draws = {
        "normal": (lambda key, size: jr.normal(key, (size,)), lambda key, size: normal_like(key, jnp.zeros(size))),
        "laplace": (lambda key, size: jr.laplace(key, (size,)), lambda key, size: laplace_like(key, jnp.zeros(size))),
    }
    for kind, key in (("threefry", jr.key(0)), ("chacha20", jr.key(0, impl=CHACHA20)), ("rbg", jr.key(0, impl="rbg"))):
        for size in SIZES:
            for law, (theirs, ours) in draws.items():
                seconds = cpu_seconds({"jax": compiled(theirs, key, size), "dpx": compiled(ours, key, size)})
                ratio = float(np.median(seconds["dpx"] / seconds["jax"]))
                print(
                    f"{kind:10} {law:8} {size:10} {np.median(seconds['jax']) * 1e3:9.2f} {np.median(seconds['dpx']) * 1e3:9.2f} {ratio:6.2f}"
                )
                if kind != "rbg":
                    target(f"{size:,} {law} numbers by {kind} over JAX's", ratio, TARGET)
