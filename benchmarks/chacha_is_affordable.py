"""A million normal numbers from a ChaCha20 key take at most 6 times as long as from JAX's threefry.

    python benchmarks/chacha_is_affordable.py

One process, taking turns. The last shape is one that whole blocks of 16 words do not fill, the slowest case.
"""

import time

import jax
import jax.random as jr

from _timing import interleaved, target
from dpx.random import CHACHA20

SHAPES = [(1_000_000,), (1_000, 1_000), (1_000_001,), (4_096,), (10,)]

if __name__ == "__main__":
    keys = {"threefry": jr.key(0), "chacha20": jr.key(0, impl=CHACHA20)}
    print(f"{jax.devices()[0].device_kind}; float32, medians, milliseconds")
    print(f"{'':8} {'shape':>14} {'threefry':>9} {'chacha20':>9} {'ratio':>6}   compiling")
    for name, draw in (("bits", jr.bits), ("normal", jr.normal)):
        for shape in SHAPES:
            functions, compiling = {}, []
            for kind, key in keys.items():
                begin = time.perf_counter()
                compiled = jax.jit(lambda k, draw=draw, shape=shape: draw(k, shape)).lower(key).compile()
                compiling.append(time.perf_counter() - begin)
                functions[kind] = lambda compiled=compiled, key=key: compiled(key)
            first, second = interleaved(functions, repeats=21).values()
            seconds = " / ".join(f"{s:.2f} s" for s in compiling)
            print(f"{name:8} {shape!s:>14} {first * 1e3:9.3f} {second * 1e3:9.3f} {second / first:6.2f}   {seconds}")
            if name == "normal" and max(shape) > 999:
                target(f"ChaCha20 over threefry, normal {shape}", second / first, 6.0)
