"""A donated step with 32 bands of noise holds at most 1.5 P more than one with independent noise, and costs at most twice its time.

    python benchmarks/ring_costs_no_copy.py [parameters]

P is the size of the parameters in float32. The step is all of it: clipped gradients, noise, checks, the update of the parameters, everything
donated; a benchmark of the noise alone cannot see what the step does to its buffers. One process, taking turns; medians of CPU time, which other
processes do not lengthen.
"""

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import dpx
from _timing import target

SIZE = int(float(sys.argv[1])) if len(sys.argv) > 1 else 1_000_000
WIDTH = round(SIZE**0.5)
STEPS = 1024
NOISES = {
    "independent": dpx.IndependentGaussian(1.0),
    "BandedToeplitz, 32 bands": dpx.CorrelatedGaussian(dpx.BandedToeplitz.optimize(STEPS, 32), 1.0),
    "BufferedToeplitz, 4 buffers": dpx.CorrelatedGaussian(dpx.BufferedToeplitz.optimize(STEPS, 4), 1.0),
}
MOST_TIME, MOST_TEMPORARY = 2.0, 1.5


def loss(model, x, y):
    return jnp.sum((model @ x - y) ** 2)


class Run:
    """A compiled step and its donated carry."""

    def __init__(self, noise):
        private_grad = dpx.PrivateGradient(loss, dpx.FlatClipping(1.0), noise, normalizer=8.0, steps=STEPS)

        def step(model, state, batch):
            grads, state, _ = private_grad(model, batch, state)
            return model - 0.1 * grads, state

        self.batch = (np.ones((8, WIDTH), np.float32), np.ones((8, WIDTH), np.float32))
        model = jnp.zeros((WIDTH, WIDTH))
        self.carry = (model, private_grad.init(model, key=jr.key(0)))
        self.compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*self.carry, self.batch).compile()
        memory: Any = self.compiled.memory_analysis()
        self.temporary = memory.temp_size_in_bytes / model.nbytes
        self.held = memory.argument_size_in_bytes / model.nbytes

    def __call__(self) -> float:
        begin = time.process_time()
        self.carry = jax.block_until_ready(self.compiled(*self.carry, self.batch))
        return time.process_time() - begin


if __name__ == "__main__":
    print(f"{WIDTH**2:.3g} float32 parameters, {jax.devices()[0].device_kind}; CPU time of the process")
    runs = {name: Run(noise) for name, noise in NOISES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(24):
        for name, run in runs.items():
            spent = run()
            if turn >= 4:
                seconds[name].append(spent)
    reference = runs["independent"]
    print(f"{'':28} {'ms':>8} {'ratio':>6} {'carry / P':>10} {'temporary / P':>14} {'more':>6}")
    for name, run in runs.items():
        median = float(np.median(seconds[name]))
        ratio = median / float(np.median(seconds["independent"]))
        more = run.temporary - reference.temporary
        print(f"{name:28} {median * 1e3:8.2f} {ratio:6.2f} {run.held:10.2f} {run.temporary:14.2f} {more:6.2f}")
        if run is not reference:
            target(f"step with {name} over one with independent noise", ratio, MOST_TIME)
            target(f"step with {name}, copies of the parameters more", more, MOST_TEMPORARY)
