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

import concurrent.futures
import functools
import math
import os
import secrets
import threading
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..events import parts
from ._distributions import LossDistribution, LossPmf

_FAILURE = 1e-8
_LEAST_SAMPLES, _MOST_SAMPLES = 2**20, 2**23
_CHUNK = 2**10  # small enough for the caches
_MULTIPLIERS, _LOSSES = 128, 96  # grid points an octave
_STRUCTURES = 2**10  # that have equal shares of one half of the probability of failure
_POWERS = 2.0 ** (np.arange(-12 * _LOSSES, 10 * _LOSSES + 1) / _LOSSES)
_THRESHOLDS = np.concatenate([-_POWERS[::-1], [0.0], _POWERS])
# two directions; multipliers from 2^-7 to 2^10
_QUESTIONS = 2 * len(_THRESHOLDS) * (17 * _MULTIPLIERS) * (2 * _STRUCTURES)

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


def is_monte_carlo(event: Any) -> bool:
    """Whether `event`, or a part of it, is accounted for by simulation."""
    from ..events import CoupledDpEvent, MinSepSampledDpEvent

    return any(
        isinstance(part, MinSepSampledDpEvent) or (isinstance(part, CoupledDpEvent) and is_monte_carlo(part.event))
        for part, _ in parts(event)
    )


def samples_for(delta: float) -> int:
    """How many samples questions about `delta` need."""
    samples = _LEAST_SAMPLES
    while samples < _MOST_SAMPLES and samples * delta < 80:
        samples *= 2
    return samples


def min_sep_distribution(event: Any, adjacency: str, interval: float, samples: int) -> LossDistribution:
    """The pessimistic privacy loss of a `MinSepSampledDpEvent`; the same one whenever the same is asked."""
    if adjacency == "replace_one":
        raise ValueError(
            "b-min-sep sampling can be accounted for with `adjacency='add_or_remove_one'` or `'replace_special'` only, for which the pair of "
            "distributions that dominates it is known; got 'replace_one'."
        )
    multiplier = 2.0 ** (math.floor(math.log2(event.noise_multiplier) * _MULTIPLIERS) / _MULTIPLIERS)
    if not 2.0**-7 <= multiplier < 2.0**10:
        raise ValueError(
            f"b-min-sep sampling is accounted for with noise multipliers between 1/128 and 1024; got {event.noise_multiplier:g}."
        )
    structure = (
        event.coefficients,
        event.steps,
        event.min_separation,
        event.sampling_probability,
        event.is_warm,
        event.side_precision,
    )
    remove, add = _histograms(multiplier, structure, samples, _seed((*structure, samples)))
    room = math.log(_QUESTIONS * _dearer((*structure, samples)) / _FAILURE) / samples
    return LossDistribution(_pessimistic(remove, samples, room, interval), _pessimistic(add, samples, room, interval))


@functools.cache
def _seed(structure: Any) -> int:
    """One secret for all noise multipliers, so that epsilon depends on them smoothly."""
    return secrets.randbits(128)


_asked: dict[Any, int] = {}
_lock = threading.Lock()


def _dearer(structure: Any) -> int:
    """By how much the share of the probability of failure is smaller than that of the first structures: a power of 4."""
    with _lock:
        number = _asked.setdefault(structure, len(_asked))
    # 1024 * 2^b structures have 4^-b times the share of the first: 1/2 + 1/4 + ... of it all
    return 4 ** ((number // _STRUCTURES + 1).bit_length() - 1)


@functools.lru_cache(maxsize=256)
def _histograms(multiplier: float, structure: Any, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How many samples of the losses of removing and adding one unit lie at most at each threshold, and above the one before."""
    *given, side_precision = structure
    losses = min_sep_losses(multiplier, *given, samples=samples, seed=seed, side_precision=side_precision)
    places = (np.searchsorted(_THRESHOLDS, loss, side="left") for loss in losses)
    remove, add = (np.bincount(place, minlength=len(_THRESHOLDS) + 1) for place in places)
    return remove, add


def _pessimistic(counts: np.ndarray, samples: int, room: float, interval: float) -> LossPmf:
    """The distribution whose tail is the upper confidence bound at every threshold, on multiples of `interval`, rounded up."""
    above = samples - np.cumsum(counts)[:-1]
    known, where = np.unique(above, return_inverse=True)
    tail = _kl_uppers(known / samples, room)[where]
    mass = -np.diff(np.concatenate([[1.0], tail]))
    mass[np.flatnonzero(mass)[0]] -= _FAILURE  # what a failure costs is infinite, and taken from the least loss
    kept = np.flatnonzero(mass)
    index = np.ceil(_THRESHOLDS[kept] / interval).astype(np.int64)
    lowest = int(index[0])
    return LossPmf(
        interval, lowest, np.bincount(index - lowest, np.maximum(mass[kept], 0.0)), float(tail[-1]) + _FAILURE
    )


def _kl_upper(mean: float, samples: int) -> float:
    """The largest mean of which samples of this mean are not yet a surprise, all questions considered."""
    return float(_kl_uppers(np.array([mean]), math.log(_QUESTIONS / _FAILURE) / samples)[0])


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


def min_sep_losses(
    noise_multiplier: float,
    coefficients: tuple[float, ...],
    steps: int,
    min_separation: int,
    sampling_probability: float,
    is_warm: bool,
    *,
    samples: int,
    seed: int,
    side_precision: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the losses of removing and adding one unit, rounded up by what single precision may have lost."""
    coefficients = coefficients[:steps]
    run = functools.partial(
        _chunk,
        noise_multiplier,
        coefficients,
        steps,
        min_separation,
        sampling_probability,
        is_warm,
        seed,
        side_precision,
    )
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        chunks = list(pool.map(run, range(-(-samples // _CHUNK))))
    remove, add = (np.concatenate(losses)[:samples] for losses in zip(*chunks, strict=True))
    lost = 1e-4 + steps * 2.0**-21
    return remove + lost, add + lost


def _chunk(sigma, coefficients, steps, separation, p, is_warm, seed, side_precision, number):
    rng = np.random.Generator(np.random.SFC64([seed >> 64, seed & (2**64 - 1), number]))
    noise = rng.standard_normal((steps, _CHUNK), np.float32)
    participates = np.zeros((steps, _CHUNK), np.float32)
    position = rng.geometric(p, _CHUNK) - 1
    if is_warm:
        # of a cycle of mean length b - 1 + 1 / p, b - 1 steps are rest
        resting = rng.random(_CHUNK) < (separation - 1) / (separation - 1 + 1 / p)
        position += np.where(resting, rng.integers(1, max(2, separation), _CHUNK), 0)
    while (inside := position < steps).any():
        participates[position[inside], np.flatnonzero(inside)] = 1.0
        position = np.minimum(position + separation - 1 + rng.geometric(p, _CHUNK), steps)
    weights = tuple(np.asarray(w, np.float32) for w in (coefficients, _norms(coefficients, steps)))
    scalars = tuple(np.float32(x) for x in (sigma, p))
    side = None
    if side_precision:
        side = rng.standard_normal((steps, _CHUNK), np.float32), np.float32(math.sqrt(side_precision))
    ratio = _ratios(noise, participates, *weights, *scalars, separation, is_warm, side)
    with np.errstate(divide="ignore", invalid="ignore"):
        remove, add = np.log(np.asarray(ratio, np.float64)) * np.array([[1.0], [-1.0]])
    # overflow and underflow happen on the losing side, and count there
    return tuple(np.nan_to_num(losses, nan=np.inf, posinf=np.inf) for losses in (remove, add))


def _norms(coefficients: tuple[float, ...], steps: int) -> np.ndarray:
    """Squared norms of the strategy's columns, the last of which are cut."""
    total = np.cumsum(np.square(coefficients))
    return total[np.minimum(np.arange(steps)[::-1], len(total) - 1)]


@functools.partial(jax.jit, static_argnums=(6, 7))
def _ratios(
    noise: Float[Array, "steps samples"],
    participates: Float[Array, "steps samples"],
    coefficients: Float[Array, " bands"],
    norms: Float[Array, " steps"],
    sigma: Float[Array, ""],
    p: Float[Array, ""],
    separation: int,
    is_warm: bool,
    side: tuple[Float[Array, "steps samples"], Float[Array, ""]] | None = None,
) -> Float[Array, "2 samples"]:
    r"""Likelihood ratios of samples under P (where the unit takes part) and under Q (where it does not).

    Backwards in time, with $R_i$ the ratio of what follows if the unit is not resting at step $i$,
    $R_i = (1 - p) R_{i+1} + p \frac{N(c_i)}{N(0)}(y) R_{i+b}$: columns $b$ steps apart do not overlap.

    `side` is the noise of further Gaussian queries of every step, of which a participation moves the sum by `side[1]` standard deviations: one more
    coordinate of the column, which no other column has.
    """
    steps, bands = noise.shape[0], coefficients.shape[0]

    def correlate(x, sign):
        """C x, or its transpose: shifts, weighted."""
        padded = jnp.pad(x, ((bands - 1, 0), (0, 0)) if sign > 0 else ((0, bands - 1), (0, 0)))
        starts = (bands - 1 - j if sign > 0 else j for j in range(bands))
        return sum(coefficients[j] * jax.lax.slice_in_dim(padded, s, s + steps) for j, s in enumerate(starts))

    plain = correlate(noise, -1) / sigma
    moved = plain + correlate(correlate(participates, 1), -1) / jnp.square(sigma)
    half = (0.5 * norms / jnp.square(sigma))[:, None, None]
    if side is not None:
        plain = plain + side[1] * side[0]
        moved = moved + side[1] * (side[0] + side[1] * participates)
        half = half + 0.5 * jnp.square(side[1])
    factors = p * jnp.exp(jnp.stack([moved, plain], axis=1) - half)

    def step(rest, inputs):
        i, factor = inputs
        here, following = i % separation, (i + 1) % separation
        value = (1 - p) * rest[following] + factor * rest[here]
        return rest.at[here].set(value), None

    rest = jnp.ones((separation, 2, noise.shape[1]), noise.dtype)
    rest, _ = jax.lax.scan(step, rest, (jnp.arange(steps), factors), reverse=True)
    if not is_warm:
        return rest[0]
    cycle = separation - 1 + 1 / p
    return (rest[0] / p + rest[1:].sum(0)) / cycle
