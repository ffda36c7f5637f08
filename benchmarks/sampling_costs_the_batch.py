"""A batch costs time and memory in proportion to the batch, not to the data set, whatever the scheme.

python benchmarks/sampling_costs_the_batch.py
"""

import time
import tracemalloc

import numpy as np

import dpx
from _timing import target
from dpx.sampling import BallsInBinsSampler, FixedSizeSampler, MinSepSampler, RandomAllocationSampler

SCHEMES = {
    "Poisson": lambda n, b: dpx.PoissonSampler(n, b, 1_000),
    "cyclic Poisson, 16 groups": lambda n, b: dpx.CyclicPoissonSampler(n, b, 1_000, 16),
    "balls in bins": lambda n, b: BallsInBinsSampler(n, b, 1_000),
    "random allocation": lambda n, b: RandomAllocationSampler(n, b, n // b),
    "fixed size": lambda n, b: FixedSizeSampler(n, b, 1_000),
    "shuffle": lambda n, b: dpx.ShuffleSampler(n, b, 1_000),
    "b-min-sep, b = 16": lambda n, b: MinSepSampler(n, b, 1_000, 16),
}


def measure(sampler):
    """Median milliseconds and peak KiB of a batch, the first left out."""
    sampler.indices(0, 0)
    times = []
    for step in range(1, 51):
        begin = time.perf_counter()
        sampler.indices(0, step)
        times.append(time.perf_counter() - begin)
    tracemalloc.start()
    sampler.indices(0, 51)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return 1e3 * float(np.median(times)), peak / 1024


if __name__ == "__main__":
    print("batches of 1,000             1e7 examples        1e9 examples      time ratio")
    for name, make in SCHEMES.items():
        small, large = (measure(make(num_examples, 1_000)) for num_examples in (10**7, 10**9))
        print(
            f"{name:<26}  {small[0]:6.3f} ms {small[1]:5.0f} KiB  {large[0]:6.3f} ms {large[1]:5.0f} KiB  {large[0] / small[0]:6.2f}"
        )
        target(f"a batch of 1,000 from 1e9 examples, {name}, ms", large[0], 5.0)
