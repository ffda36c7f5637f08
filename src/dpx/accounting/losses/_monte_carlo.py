r"""Privacy losses by simulation, for what has no distribution in closed form: b-min-sep sampling.

*The distribution.* Let $L$ be the loss in one direction, $S(x) = P(L > x)$, and $\hat S(x)$ the share of $n$ samples above $x$. With probability
$1 - t$, $S(x)$ is at most the largest $s$ with $\text{KL}(\hat S(x), s) \le \log(1 / t) / n$ (Chernoff and Hoeffding). Take that bound at all of a
fixed list of thresholds, and let $\bar L$ be the variable that has those bounds as its tail: its mass is moved up to the next threshold, and what no
sample reaches counts as infinite. On the event $G$ that all bounds hold, $P(\bar L > x) \ge S(x)$ for every $x$. So for every real $\varepsilon$
$$E[(1 - e^{\varepsilon - \bar L})_+] \ge E[(1 - e^{\varepsilon - L})_+],$$
the means of a function that increases with the loss; and $E[e^{-\bar L}] \le E[e^{-L}] \le 1$, so that $\bar L$ is the loss of a pair of
distributions. That pair dominates the mechanism, and dominating pairs compose, adaptively, with any others (Zhu, Dong and Wang 2022). Little is
lost to looking at the whole curve: by concavity of the square root its bound on $\delta$ is about as tight as one for that mean alone.

*The failure.* All bounds that one process can ask for fail with probability at most $\tau$ = 1e-8 together. It is divided among: both
directions; all thresholds; all noise multipliers, which are rounded down to a grid half a per cent wide, since those of one structure share their
random numbers (so that epsilon depends on them smoothly, and calibration may choose among them); and structures (strategy, steps, sampling,
number of samples), each of which draws its own secret: the first 1024 have equal shares of one half of $\tau$, the next 2048 of a quarter, and so
on without an end. Which structure is asked about next may depend on answers about others. The distribution has $\tau$ more at infinity: if $G$
fails with probability at most $\tau$ and the release is $(\varepsilon, \delta)$-DP on $G$, then all that is done, the simulation included, is
$(\varepsilon, \delta + \tau)$-DP. In a composition each simulated mechanism adds its $\tau$ once, however many questions are asked.

No delta below about $43 / n$ can be certified: 4e-5 with a million samples, 5e-6 with the most that are drawn.

??? cite "Reference"

    Wang et al., *A randomized approach to tight privacy accounting*, NeurIPS 2023 (estimate, verify, release); Choquette-Choo et al.,
    2026 (arXiv:2602.09338), for b-min-sep sampling.
"""

import math
import threading
from typing import Any

import equinox as eqx
import numpy as np

from ._distribution import LossDistribution
from ._pmf import LossPmf

FAILURE = 1e-8
_LEAST_SAMPLES, _MOST_SAMPLES = 2**20, 2**23
MULTIPLIERS, _LOSSES = 128, 96  # grid points an octave
_STRUCTURES = 2**10  # that have equal shares of one half of the probability of failure
_POWERS = 2.0 ** (np.arange(-12 * _LOSSES, 10 * _LOSSES + 1) / _LOSSES)
THRESHOLDS = np.concatenate([-_POWERS[::-1], [0.0], _POWERS])
# two directions; multipliers from 2^-7 to 2^10
_QUESTIONS = 2 * len(THRESHOLDS) * (17 * MULTIPLIERS) * (2 * _STRUCTURES)


_MSG_DELTA = (
    "`delta` = {delta:g} cannot be certified from {samples:,} samples of the privacy loss of b-min-sep sampling, which show no delta below "
    "{floor:.2g}. Use a larger delta, or `CyclicPoissonSampler` or `BallsInBinsSampler`, whose bounds need no samples."
)


class SampledLosses(eqx.Module):
    r"""A distribution of losses of which some are simulated, their probability of failure among what is infinite.

    **Arguments:**

    - `distribution`: the losses.
    - `samples`: how many there were.
    """

    distribution: LossDistribution
    samples: int

    @property
    def floor(self) -> float:
        """The delta that is certified if no sample exceeds epsilon."""
        return max(self.distribution.remove.infinity, self.distribution.add.infinity)

    def get_delta(self, epsilon: float) -> float:
        r"""An upper bound on $\delta$ at `epsilon`."""
        return self.distribution.get_delta(epsilon)

    def get_epsilon(self, delta: float) -> float:
        r"""An upper bound on the least $\varepsilon$ at `delta`; raises `ValueError` where so small a delta cannot be certified."""
        if delta <= self.floor:
            raise ValueError(_MSG_DELTA.format(delta=delta, samples=self.samples, floor=self.floor))
        return self.distribution.get_epsilon(delta)


def samples_for(delta: float) -> int:
    """How many samples questions about `delta` need."""
    samples = _LEAST_SAMPLES
    while samples < _MOST_SAMPLES and samples * delta < 80:
        samples *= 2
    return samples


_asked: dict[Any, int] = {}
_lock = threading.Lock()


def _dearer(structure: Any) -> int:
    """By how much the share of the probability of failure is smaller than that of the first structures: a power of 4."""
    with _lock:
        number = _asked.setdefault(structure, len(_asked))
    # 1024 * 2^b structures have 4^-b times the share of the first: 1/2 + 1/4 + ... of it all
    return 4 ** ((number // _STRUCTURES + 1).bit_length() - 1)


def confidence_room(structure: Any, samples: int) -> float:
    """How far, in Kullback-Leibler divergence, the tail may be from that of so many samples of a structure."""
    return math.log(_QUESTIONS * _dearer((*structure, samples)) / FAILURE) / samples


def pessimistic(counts: np.ndarray, samples: int, room: float, interval: float) -> LossPmf:
    """The distribution whose tail is the upper confidence bound at every threshold, on multiples of `interval`, rounded up."""
    above = samples - np.cumsum(counts)[:-1]
    known, where = np.unique(above, return_inverse=True)
    tail = _kl_uppers(known / samples, room)[where]
    mass = -np.diff(np.concatenate([[1.0], tail]))
    mass[np.flatnonzero(mass)[0]] -= FAILURE  # what a failure costs is infinite, and taken from the least loss
    kept = np.flatnonzero(mass)
    index = np.ceil(THRESHOLDS[kept] / interval).astype(np.int64)
    lowest = int(index[0])
    return LossPmf(
        interval, lowest, np.bincount(index - lowest, np.maximum(mass[kept], 0.0)), float(tail[-1]) + FAILURE
    )


def _kl_uppers(means: np.ndarray, room: float) -> np.ndarray:
    """The largest means from which samples of these means diverge by at most `room`, rounded up."""
    low, high = means.copy(), np.ones(len(means))
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(100):
            middle = 0.5 * (low + high)
            divergence = np.where(means < 1, (1 - means) * np.log1p((middle - means) / (1 - middle)), 0.0)
            divergence += np.where(means > 0, means * np.log(means / middle), 0.0)
            fits = divergence <= room
            low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return high


def kl_lower(mean: float, room: float) -> float:
    """The least mean of which samples of this mean are not yet a surprise (Chernoff and Hoeffding)."""
    low, high = 0.0, mean
    for _ in range(100):
        middle = 0.5 * (low + high)
        if not 0 < middle < mean:
            break
        divergence = mean * math.log(mean / middle)
        divergence += (1 - mean) * math.log((1 - mean) / (1 - middle)) if mean < 1 else 0.0
        low, high = (low, middle) if divergence <= room else (middle, high)
    return low
