r"""Privacy losses by simulation, for what has no distribution in closed form: b-min-sep sampling.

$\delta(\varepsilon) = E[(1 - e^{\varepsilon - L})_+]$ is the mean of a variable in [0, 1]; from $n$ samples of mean $\hat\delta$, with probability
$1 - \tau$, it is at most the largest $d$ with $\text{KL}(\hat\delta, d) \le \log(1 / \tau) / n$ (Chernoff and Hoeffding).

What is reported is that bound plus $\tau$ = 1e-8. It is divided among all questions that can be asked: noise multipliers are rounded down and
epsilons up to grids, two per cent and one per cent wide together, and the bound is made to hold for all of them, in both directions, at once. So
calibration, which looks at many, may choose among them, and samples may be shared, without the guarantee suffering. Whoever sees the release
only if this check passed holds a guarantee of $(\varepsilon, \delta)$ that counts the check's failure.

No delta below about $40 / n$ can be certified: 4e-5 with a million samples, 5e-6 with the most that are drawn.

??? cite "Reference"

    Wang et al., *A randomized approach to tight privacy accounting*, NeurIPS 2023 (estimate, verify, release); Choquette-Choo et al.,
    2026 (arXiv:2602.09338), for b-min-sep sampling.
"""

import concurrent.futures
import functools
import math
import os
import secrets
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._distributions import with_coupling
from ._event_tree import parts

_FAILURE = 1e-8
_LEAST_SAMPLES, _MOST_SAMPLES = 2**20, 2**23
_CHUNK = 2**10  # small enough for the caches
_MULTIPLIERS, _EPSILONS = 128, 64  # grid points an octave
_QUESTIONS = 2 * (17 * _MULTIPLIERS) * (20 * _EPSILONS)  # two directions; 2^-7 to 2^10, and 2^-10 to 2^10

_MSG_DELTA = (
    "`delta` = {delta:g} cannot be certified from {samples:,} samples of the privacy loss of b-min-sep sampling, which show no delta below "
    "{floor:.2g}. Use a larger delta, or `CyclicPoissonSampler` or `BallsInBinsSampler`, whose bounds need no samples."
)


class SampledLosses(eqx.Module):
    r"""Upper bounds on delta and epsilon from samples of the privacy loss, their probability of failure counted in delta.

    **Arguments:**

    - `remove`, `add`: samples of the loss in the two directions, those above 0, as their indicator is all that matters of the rest.
    - `samples`: how many there were.
    - `coupling`: as for `LossDistribution`.
    """

    remove: np.ndarray
    add: np.ndarray
    samples: int
    coupling: float = 0.0

    @property
    def floor(self) -> float:
        """The delta that is certified if no sample exceeds epsilon."""
        return _kl_upper(0.0, self.samples) + _FAILURE

    def get_delta(self, epsilon: float) -> float:
        r"""An upper bound on $\delta$ at `epsilon`."""
        # an answer at a smaller epsilon is one at this
        return min(1.0, self._delta(_on_grid(epsilon, up=False)) + self.coupling * (1 + math.exp(min(epsilon, 700.0))))

    def get_epsilon(self, delta: float) -> float:
        r"""An upper bound on the least $\varepsilon$ at `delta`; raises `ValueError` where so small a delta cannot be certified."""
        if delta <= self.floor:
            raise ValueError(_MSG_DELTA.format(delta=delta, samples=self.samples, floor=self.floor))
        return with_coupling(self._epsilon, delta, self.coupling)

    def _epsilon(self, delta: float) -> float:
        if delta <= self.floor:
            return math.inf
        if self._delta(0.0) <= delta:
            return 0.0
        low, high = -10 * _EPSILONS - 1, 10 * _EPSILONS
        if self._delta(2.0 ** (high / _EPSILONS)) > delta:
            return math.inf
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._delta(2.0 ** (middle / _EPSILONS)) <= delta else (middle, high)
        return 2.0 ** (high / _EPSILONS)

    def _delta(self, epsilon: float) -> float:
        means = [
            float(-np.expm1(np.minimum(epsilon - losses, 0.0)).sum()) / self.samples
            for losses in (self.remove, self.add)
        ]
        return _kl_upper(max(means), self.samples) + _FAILURE


def is_monte_carlo(event: Any) -> bool:
    """Whether `event` is one that is accounted for by simulation, alone."""
    from .._events import CoupledDpEvent, MinSepSampledDpEvent

    pairs = parts(event)
    if len(pairs) != 1 or pairs[0][1] != 1:
        return False
    only = pairs[0][0]
    return isinstance(only, MinSepSampledDpEvent) or (isinstance(only, CoupledDpEvent) and is_monte_carlo(only.event))


def sampled_losses(event: Any, adjacency: str, delta: float = 1e-4) -> SampledLosses:
    """Samples of the privacy loss, as many as questions about `delta` need; the same ones whenever the same is asked."""
    from .._events import CoupledDpEvent

    if adjacency == "replace_one":
        raise ValueError(
            "b-min-sep sampling can be accounted for with `adjacency='add_or_remove_one'` or `'replace_special'` only, for which the pair of "
            "distributions that dominates it is known; got 'replace_one'."
        )
    ((only, _),) = parts(event)
    if isinstance(only, CoupledDpEvent):
        inner = sampled_losses(only.event, adjacency, delta)
        return SampledLosses(inner.remove, inner.add, inner.samples, inner.coupling + only.failure_probability)
    samples = _LEAST_SAMPLES
    while samples < _MOST_SAMPLES and samples * delta < 80:
        samples *= 2
    multiplier = 2.0 ** (math.floor(math.log2(only.noise_multiplier) * _MULTIPLIERS) / _MULTIPLIERS)
    if not 2.0**-7 <= multiplier < 2.0**10:
        raise ValueError(
            f"b-min-sep sampling is accounted for with noise multipliers between 1/128 and 1024; got {only.noise_multiplier:g}."
        )
    structure = (only.coefficients, only.steps, only.min_separation, only.sampling_probability, only.is_warm)
    remove, add = min_sep_losses(multiplier, *structure, samples=samples, seed=_seed(structure))
    return SampledLosses(remove[remove > 0], add[add > 0], samples)


@functools.lru_cache(maxsize=64)
def _seed(structure: Any) -> int:
    """One secret for all noise multipliers, so that epsilon depends on them smoothly."""
    return secrets.randbits(128)


def _on_grid(epsilon: float, up: bool) -> float:
    if epsilon < 2.0**-10:
        return 0.0
    place = math.log2(epsilon) * _EPSILONS
    return 2.0 ** (min(math.ceil(place - 1e-9) if up else math.floor(place + 1e-9), 10 * _EPSILONS) / _EPSILONS)


def _kl_upper(mean: float, samples: int) -> float:
    """The largest mean of which samples of this mean are not yet a surprise, all questions considered."""
    room = math.log(_QUESTIONS / _FAILURE) / samples
    low, high = mean, 1.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        divergence = (1 - mean) * math.log1p((middle - mean) / (1 - middle)) if mean < 1 else 0.0
        divergence += mean * math.log(mean / middle) if mean > 0 else 0.0
        low, high = (middle, high) if divergence <= room else (low, middle)
        if high - low <= 1e-12 * high:
            break
    return high


@functools.lru_cache(maxsize=4)
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
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the losses of removing and adding one unit, rounded up by what single precision may have lost."""
    coefficients = coefficients[:steps]
    run = functools.partial(
        _chunk, noise_multiplier, coefficients, steps, min_separation, sampling_probability, is_warm, seed
    )
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        chunks = list(pool.map(run, range(-(-samples // _CHUNK))))
    remove, add = (np.concatenate(losses)[:samples] for losses in zip(*chunks, strict=True))
    lost = 1e-4 + steps * 2.0**-21
    return remove + lost, add + lost


def _chunk(sigma, coefficients, steps, separation, p, is_warm, seed, number):
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
    ratio = _ratios(noise, participates, *weights, *scalars, separation, is_warm)
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
) -> Float[Array, "2 samples"]:
    r"""Likelihood ratios of samples under P (where the unit takes part) and under Q (where it does not).

    Backwards in time, with $R_i$ the ratio of what follows if the unit is not resting at step $i$,
    $R_i = (1 - p) R_{i+1} + p \frac{N(c_i)}{N(0)}(y) R_{i+b}$: columns $b$ steps apart do not overlap.
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
