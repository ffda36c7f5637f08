"""Accounting costs seconds at most, and a million steps cost about what a hundred do.

    python benchmarks/accounting_is_quick.py

Poisson plans, calibrated, against `dp_accounting.calibrate_dp_mechanism`'s own accountant answering one question; random allocation; truncated
batches; and a million samples of the privacy loss of b-min-sep sampling with a banded matrix.
"""

import time

import dp_accounting as da
import dp_accounting.rdp  # imported before the clock starts
import numpy as np
from dp_accounting.pld import PLDAccountant

import dpx
from _timing import target
from dpx import accounting
from dpx.accounting import _composition, _questions
from dpx.accounting.losses import _allocation, _min_sep
from dpx.events import RandomAllocationDpEvent


def poisson(sigma, q, count):
    return da.SelfComposedDpEvent(da.PoissonSampledDpEvent(q, da.GaussianDpEvent(sigma)), count)


def cold(question, repeats=5):
    """Median seconds with empty caches, and the answer."""
    seconds, answer = [], None
    for _ in range(repeats):
        for cached in (
            _questions._composed,
            _composition.single_loss,
            _composition.interval_of,
            _allocation._mean_of,
            _allocation._even_mean,
        ):
            cached.cache_clear()
        begin = time.perf_counter()
        answer = question()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds)), answer


def ratio(name, ours, theirs):
    (fast, answer), (slow, reference) = cold(ours), cold(theirs)
    print(f"{name:46} {fast:7.3f} s  {slow:7.3f} s  ratio {fast / slow:5.2f}   {answer:.6g} and {reference:.6g}")
    return fast, slow


if __name__ == "__main__":
    accounting.epsilon(poisson(1.0, 0.1, 10), 1e-5)
    print("one question, dpx and dp_accounting")
    for sigma, q, count in ((1.0, 0.01, 1000), (3.0, 0.1, 512), (0.5, 0.01, 1000), (2.0, 0.004, 10**6)):
        event = poisson(sigma, q, count)
        fast, slow = ratio(
            f"epsilon of ({sigma}, {q}, {count:,})",
            lambda event=event: accounting.epsilon(event, 1e-6),
            lambda event=event: PLDAccountant().compose(event).get_epsilon(1e-6),
        )
        target(f"one question of {count:,} steps, over dp_accounting's time", fast / slow, 1.0)
    truncated = da.SelfComposedDpEvent(da.TruncatedSubsampledGaussianDpEvent(10_000, 0.01, 150, 1.0), 1000)
    ratio(
        "epsilon of truncated batches",
        lambda: accounting.epsilon(truncated, 1e-5),
        lambda: PLDAccountant().compose(truncated).get_epsilon(1e-5),
    )

    print("a million steps and a hundred")
    fast, slow = ratio(
        "epsilon of (2.0, 0.004)",
        lambda: accounting.epsilon(poisson(2.0, 0.004, 10**6), 1e-5),
        lambda: accounting.epsilon(poisson(2.0, 0.004, 100), 1e-5),
    )
    target("a million steps over a hundred", fast / slow, 3.0)

    print("calibration, and random allocation")
    for epsilon in (0.1, 1.0, 8.0):
        seconds, plan = cold(lambda epsilon=epsilon: dpx.dp_sgd(60_000, 256, 5_000, epsilon=epsilon, delta=1e-5), 3)
        print(f"noise multiplier for epsilon {epsilon:4} {seconds:24.3f} s   {plan.noise_multiplier:.6g}")  # pyright: ignore[reportOptionalMemberAccess]
    for bins in (100, 10_000):
        seconds, delta = cold(lambda bins=bins: accounting.delta(RandomAllocationDpEvent(1.0, bins), 0.5), 3)
        print(f"delta at 0.5 of random allocation to {bins:6,} {seconds:14.3f} s   {delta:.3g}")

    print("a million samples of b-min-sep losses, by one compiled function")
    for steps, bands in ((128, 8), (512, 16), (1024, 16)):
        weights = 1 / np.sqrt(1 + np.arange(bands))
        mechanism = (1.0, tuple((weights / np.linalg.norm(weights)).tolist()), steps, 2 * bands, 0.1, True)
        _min_sep.min_sep_losses(*mechanism, samples=2**11, seed=0)  # pyright: ignore[reportCallIssue]
        begin = time.perf_counter()
        _min_sep.min_sep_losses(*mechanism, samples=2**20, seed=0)  # pyright: ignore[reportCallIssue]
        print(f"{steps:6} steps, {bands:3} bands {time.perf_counter() - begin:30.1f} s")
