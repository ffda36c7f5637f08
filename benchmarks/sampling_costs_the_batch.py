"""A Poisson batch costs time and memory in proportion to the batch, not to the data set.

python benchmarks/sampling_costs_the_batch.py
"""

import time
import tracemalloc

import numpy as np

import dpx

if __name__ == "__main__":
    print("examples      batch      ms   KiB peak")
    for num_examples in (10**5, 10**7, 10**9):
        for batch_size in (100, 1_000):
            sampler = dpx.PoissonSampler(num_examples, batch_size, 1_000)
            times = []
            for step in range(50):
                begin = time.perf_counter()
                sampler.indices(0, step)
                times.append(time.perf_counter() - begin)
            tracemalloc.start()
            sampler.indices(0, 51)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            print(f"{num_examples:<12}  {batch_size:<6}  {1e3 * np.median(times):6.3f}  {peak / 1024:8.1f}")
