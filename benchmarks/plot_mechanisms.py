"""Draws docs/images/mechanisms.png: error against memory, and against epsilon, for every mechanism.

python benchmarks/plot_mechanisms.py docs/images/mechanisms.png
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

import dpx

STEPS, EXAMPLES, BATCH, DELTA = 1024, 10_000, 100, 1e-6


def memory_rows():
    """(mechanism, copies of the gradient kept, mean error of prefix sums at one participation and noise multiplier 1)."""
    yield "independent", 0, dpx.Identity().error(STEPS)
    for bands in (2, 4, 8, 16, 32):
        yield "BandedToeplitz", bands - 1, dpx.BandedToeplitz.optimize(STEPS, bands).error(STEPS)
        yield "BandedInverse, optimised", bands - 1, dpx.BandedInverse.optimize(STEPS, bands).error(STEPS)
        yield "BandedInverse, closed form", bands - 1, dpx.BandedInverse.square_root(bands).error(STEPS)
    yield "GeometricStrategy (1, or 0 with replay)", 1, dpx.GeometricStrategy.optimize(STEPS).error(STEPS)
    for buffers in (1, 2, 3, 4):
        yield "BufferedToeplitz", buffers, dpx.BufferedToeplitz.optimize(STEPS, buffers).error(STEPS)
    yield "TreeAggregation, Honaker", 11, dpx.TreeAggregation(STEPS).error(STEPS)
    yield "TreeAggregation, naive", 11, dpx.TreeAggregation(STEPS, honaker=False).error(STEPS)
    yield "SquareRootToeplitz", STEPS - 1, dpx.SquareRootToeplitz().error(STEPS)


def plans(epsilon):
    """(mechanism, plan) for 10,000 examples in batches of 100: ten epochs."""
    budget = {"epsilon": epsilon, "delta": DELTA}
    apart, times = EXAMPLES // BATCH, 11
    yield "DP-SGD, Poisson", dpx.dp_sgd(EXAMPLES, BATCH, STEPS, **budget)
    for bands in (4, 16, 64):
        yield f"{bands} bands, cyclic Poisson", dpx.dp_mf(EXAMPLES, BATCH, STEPS, bands=bands, **budget)
    blt = dpx.BufferedToeplitz.optimize(STEPS, 3, apart, max_participations=times)
    yield "BLT, 3 buffers, no sampling", dpx.dp_mf(EXAMPLES, BATCH, STEPS, strategy=blt, **budget)
    geometric = dpx.GeometricStrategy.optimize(STEPS, min_separation=apart, max_participations=times)
    yield "geometric, no sampling", dpx.dp_mf(EXAMPLES, BATCH, STEPS, strategy=geometric, replay=True, **budget)


if __name__ == "__main__":
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    series = {}
    for name, memory, error in memory_rows():
        series.setdefault(name, []).append((memory, error))
        print(f"{name:42} {memory:5} copies  error {error:.3f}")
    for name, points in series.items():
        left.plot(*zip(*points, strict=True), "o-" if len(points) > 1 else "s", markersize=4, label=name)
    left.set(
        xscale="symlog",
        yscale="log",
        xlabel="copies of the gradient kept",
        ylabel="error of prefix sums, one participation",
    )
    left.legend(fontsize=7)
    epsilons = (0.5, 1.0, 2.0, 4.0, 8.0)
    errors = {}
    for epsilon in epsilons:
        for name, plan in plans(epsilon):
            errors.setdefault(name, []).append(plan.error() * BATCH)
            print(f"epsilon {epsilon}: {name:32} error {errors[name][-1]:.3f}")
    for name, values in errors.items():
        right.plot(epsilons, values, "o-", markersize=4, label=name)
    right.set(xscale="log", yscale="log", xlabel="epsilon", ylabel="error of prefix sums x batch size, ten epochs")
    right.legend(fontsize=7)
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "mechanisms.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=130)
