"""Epsilon is known to within a per cent where the worst case is known, and how well elsewhere.

    python benchmarks/brackets_are_narrow.py

Prints, for a table of plans, the lower and the upper end of `plan.epsilon_bracket(1e-7)`, their relative distance, the ratio of that
to the 1 % that is promised (where it is), and the processor time of either end.
"""

import time

import dpx
from _timing import target
from dpx import sampling

N = 10**6
FLAT = dpx.FlatClipping(1.0)
NOISE = dpx.IndependentGaussian


def plan(sampler, noise, **options):
    clipping = dpx.FlatClipping(1.0, order=noise.order)
    return dpx.PrivacyPlan(sampler, clipping, noise, **options)


BANDED = dpx.BandedToeplitz([1.0, 0.5, 0.3, 0.2])
PROMISED = {
    "Gaussian, everybody, 100 steps": plan(dpx.PoissonSampler(N, N, 100), NOISE(20.0)),
    "Poisson, 1 step": plan(dpx.PoissonSampler(N, N // 10, 1), NOISE(1.0)),
    "Poisson, 100 steps": plan(dpx.PoissonSampler(N, N // 100, 100), NOISE(1.0)),
    "Poisson, 5,000 steps": plan(dpx.PoissonSampler(N, N // 250, 5000), NOISE(1.0)),
    "Poisson, little noise": plan(dpx.PoissonSampler(N, N // 1000, 1000), NOISE(0.5)),
    "Poisson, replacement": plan(dpx.PoissonSampler(N, N // 100, 300), NOISE(1.2), adjacency="replace_one"),
    "Poisson, Laplace": plan(dpx.PoissonSampler(N, N // 20, 200), dpx.Laplace(0.5)),
    "cyclic, independent": plan(dpx.CyclicPoissonSampler(N, N // 100, 400, 4), NOISE(1.0)),
    "cyclic, banded": plan(dpx.CyclicPoissonSampler(N, N // 100, 400, 4), dpx.CorrelatedGaussian(BANDED, 1.0)),
    "random allocation, 20 steps": plan(sampling.RandomAllocationSampler(N, N // 20, 20), NOISE(1.0)),
    "random allocation, 10 of 1,000": plan(sampling.RandomAllocationSampler(N, N // 100, 1000, 10), NOISE(1.0)),
    "balls in bins, independent": plan(sampling.BallsInBinsSampler(N, N // 20, 60), NOISE(2.0)),
    "shuffled, independent": plan(dpx.ShuffleSampler(N, N // 100, 300), NOISE(5.0), adjacency="replace_special"),
    "shuffled, square root": plan(
        dpx.ShuffleSampler(N, N // 100, 300), dpx.CorrelatedGaussian(dpx.SquareRootToeplitz(300), 5.0), adjacency="replace_one"
    ),
}  # fmt: skip
OTHERS = {
    "cyclic, banded, a last turn cut": plan(dpx.CyclicPoissonSampler(N, N // 100, 401, 4), dpx.CorrelatedGaussian(BANDED, 1.0)),
    "reshuffled, square root": plan(
        dpx.ShuffleSampler(N, N // 100, 300, reshuffle=True), dpx.CorrelatedGaussian(dpx.SquareRootToeplitz(300), 5.0), adjacency="replace_one"
    ),
    "balls in bins, a cycle cut": plan(sampling.BallsInBinsSampler(N, N // 20, 70), NOISE(2.0)),
    "balls in bins, banded": plan(sampling.BallsInBinsSampler(N, N // 20, 60), dpx.CorrelatedGaussian(BANDED, 1.0)),
    "fixed size, 1 step": plan(sampling.FixedSizeSampler(N, N // 100, 1), NOISE(2.0), adjacency="replace_one"),
    "fixed size, 100 steps": plan(sampling.FixedSizeSampler(N, N // 100, 100), NOISE(2.0), adjacency="replace_one"),
    "truncated, rarely": plan(dpx.PoissonSampler(10_000, 500, 50, max_batch_size=620), NOISE(1.0)),
    "truncated, often": plan(dpx.PoissonSampler(10_000, 500, 50, max_batch_size=510), NOISE(1.0)),
    "discrete, Poisson": plan(dpx.PoissonSampler(N, N // 100, 40), dpx.DiscreteGaussian(2.0), accountant="rdp"),
    "Poisson, Rényi": plan(dpx.PoissonSampler(N, N // 100, 100), NOISE(1.0), accountant="rdp"),
}  # fmt: skip


def show(name, plan, delta, promise):
    begin = time.process_time()
    plan.epsilon(delta)
    between = time.process_time()
    lower, upper = plan.epsilon_bracket(delta)
    end = time.process_time()
    apart = 1 - lower / upper
    ratio = f"{apart / promise:9.4f}" if promise else "        -"
    print(
        f"{name:34} {lower:10.5g} {upper:10.5g} {apart:10.3%} {ratio} {between - begin:7.2f} s {end - between:7.2f} s"
    )
    if promise:
        target(f"bracket of {name}", apart, promise)


if __name__ == "__main__":
    print(f"{'':34} {'lower':>10} {'upper':>10} {'apart':>10} {'of 1 %':>9}     upper     lower")
    for name, one in PROMISED.items():
        show(name, one, 1e-7, 0.01)
    for name, one in OTHERS.items():
        show(name, one, 1e-7, None)
