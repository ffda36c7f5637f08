"""Calibrating a plan takes at most half the time of `dp_accounting.calibrate_dp_mechanism` with a good bracket.

    python benchmarks/calibration_is_quick.py

60,000 examples, batch 256, 5,000 steps, epsilon 1, delta 1e-5, privacy loss distributions; both end at 1.33678.
"""

import time

import dp_accounting as da
import dp_accounting.rdp  # imported before the clock starts
import numpy as np
from dp_accounting.pld import PLDAccountant

import dpx
from _timing import target
from dpx.accounting import _questions


def theirs():
    def event(sigma):
        return da.SelfComposedDpEvent(da.PoissonSampledDpEvent(256 / 60_000, da.GaussianDpEvent(float(sigma))), 5_000)

    bracket = da.LowerEndpointAndGuess(1.0, 1.5)
    return da.calibrate_dp_mechanism(PLDAccountant, event, 1.0, 1e-5, bracket_interval=bracket, tol=1e-5)


def ours():
    _questions._composed.cache_clear()
    plan = dpx.dp_sgd(60_000, 256, 5_000, epsilon=1.0, delta=1e-5)
    assert plan.epsilon(1e-5) <= 1.0
    return plan.noise_multiplier


if __name__ == "__main__":
    seconds = {"dp_accounting": [], "dpx": []}
    found = {}
    for _ in range(5):
        for name, run in (("dp_accounting", theirs), ("dpx", ours)):
            begin = time.perf_counter()
            found[name] = run()
            seconds[name].append(time.perf_counter() - begin)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    for name in median:
        print(
            f"{name:14} noise multiplier {found[name]:.6f}  {median[name]:.2f} s  ratio {median[name] / median['dp_accounting']:.2f}"
        )
    target("calibration over dp_accounting's time", median["dpx"] / median["dp_accounting"], 0.5)
