"""Optimised strategies, their errors and the time that finding them takes; next to jax-privacy's where it is installed.

    python benchmarks/optimised_strategies.py

Targets: 1,024 steps x 32 bands in at most 20 s, BLT for 10^5 steps with 3 buffers in at most 60 s, errors at least as good as jax-privacy's.
"""

import time

import numpy as np

import dpx
from _timing import target


def timed(function):
    begin = time.perf_counter()
    result = function()
    return result, time.perf_counter() - begin


def row(name, error, seconds):
    print(f"{name:44} {error:10.5f}  {seconds:8.2f} s", flush=True)


if __name__ == "__main__":
    banded, seconds = timed(lambda: dpx.BandedToeplitz.optimize(1024, 32))
    row("32 bands, 1,024 steps, mean error", banded.error(1024), seconds)
    target("1,024 steps x 32 bands, s", seconds, 20.0)
    buffered, buffered_seconds = timed(lambda: dpx.BufferedToeplitz.optimize(100_000, 3, kind="max"))
    row("BLT, 3 buffers, 10^5 steps, max error", buffered.error(100_000, kind="max"), buffered_seconds)
    target("BLT of 10^5 steps with 3 buffers, s", buffered_seconds, 60.0)
    try:
        import jax
        import jax.numpy as jnp
        from jax_privacy.matrix_factorization import buffered_toeplitz, toeplitz  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit("jax-privacy is not installed: `pip install 'dpx[bench]'` for its rows") from None
    with jax.enable_x64(True):
        found, seconds = timed(lambda: np.asarray(toeplitz.optimize_banded_toeplitz(1024, 32), np.float64))
        row("jax-privacy: 32 bands", dpx.BandedToeplitz(found).error(1024), seconds)
        optimise = lambda: buffered_toeplitz.optimize(n=100_000, min_buffers=3, max_buffers=3, error="max")
        found, seconds = timed(optimise)
        theirs = dpx.BufferedToeplitz(np.asarray(found.buf_decay), np.asarray(found.output_scale))
        row("jax-privacy: BLT, 3 buffers", theirs.error(100_000, kind="max"), seconds)
        assert jnp.isfinite(found.buf_decay).all()
