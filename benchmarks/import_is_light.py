"""`import dpx` costs at most 1.15 times `import equinox, optax`.

    python benchmarks/import_is_light.py

Fresh processes, taking turns; medians.
"""

import subprocess
import sys

import numpy as np

from _timing import target

PROGRAM = "import time; begin = time.perf_counter(); import {}; print(time.perf_counter() - begin)"


def seconds(modules):
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(modules)], check=True, capture_output=True, text=True)
    return float(run.stdout)


if __name__ == "__main__":
    names = ("equinox, optax", "dpx")
    times = {name: [] for name in names}
    for _ in range(12):
        for name in names:
            times[name].append(seconds(name))
    median = {name: float(np.median(values[1:])) for name, values in times.items()}
    for name in names:
        print(f"import {name:16} {median[name]:.3f} s  ratio {median[name] / median[names[0]]:.3f}")
    target("import dpx over import equinox, optax", median["dpx"] / median[names[0]], 1.15)
