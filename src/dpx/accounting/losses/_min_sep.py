r"""b-min-sep sampling, whose likelihood ratios are simulated; what samples prove, `_monte_carlo` says."""

import concurrent.futures
import functools
import math
import os
import secrets
from typing import Any

import attr
import jax
import jax.numpy as jnp
import numpy as np
from dp_accounting import DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from jaxtyping import Array, Float

from ...events import MinSepSampledDpEvent
from .._rules import loss_rule
from ._distribution import LossDistribution
from ._gaussian import gaussian_scale
from ._monte_carlo import FAILURE, MULTIPLIERS, THRESHOLDS, confidence_room, kl_lower, pessimistic, samples_for

_CHUNK = 2**10  # small enough for the caches
_OCTAVE = 1024  # epsilons that samples are asked about


def min_sep_distribution(event: Any, interval: float, samples: int) -> LossDistribution:
    """The pessimistic privacy loss of a `MinSepSampledDpEvent`; the same one whenever the same is asked."""
    multiplier = 2.0 ** (math.floor(math.log2(event.noise_multiplier) * MULTIPLIERS) / MULTIPLIERS)
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
    room = confidence_room(structure, samples)
    return LossDistribution(pessimistic(remove, samples, room, interval), pessimistic(add, samples, room, interval))


@functools.cache
def _seed(structure: Any) -> int:
    """One secret for all noise multipliers, so that epsilon depends on them smoothly."""
    return secrets.randbits(128)


@functools.lru_cache(maxsize=256)
def _histograms(multiplier: float, structure: Any, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How many samples of the losses of removing and adding one unit lie at most at each threshold, and above the one before."""
    *given, side_precision = structure
    losses = min_sep_losses(multiplier, *given, samples=samples, seed=seed, side_precision=side_precision)
    places = (np.searchsorted(THRESHOLDS, loss, side="left") for loss in losses)
    remove, add = (np.bincount(place, minlength=len(THRESHOLDS) + 1) for place in places)
    return remove, add


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
    lost = _lost(steps)
    return remove + lost, add + lost


def _lost(steps: int) -> float:
    """What single precision may take from a loss, or add to it."""
    return 1e-4 + steps * 2.0**-21


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


def _sampled_epsilon(event: Any, delta: float) -> float:
    """b-min-sep sampling, whose likelihood ratios are simulated: too large with probability 1e-8 at most, whatever is asked."""
    samples = samples_for(delta)
    structure = (event.coefficients, event.steps, event.min_separation, event.sampling_probability, event.is_warm)
    remove, add = min_sep_losses(
        event.noise_multiplier, *structure, samples=samples, seed=_attackers_seed(event.noise_multiplier, structure)
    )
    raised = 2 * _lost(event.steps)  # by half of that they were rounded up, and by half they may be wrong
    room = math.log(2 * 20 * _OCTAVE / FAILURE) / samples
    found = 0.0
    for losses in (remove, add):
        losses = np.sort(losses[np.isfinite(losses)] - raised)[::-1]
        losses = losses[losses > 0]

        def is_above(place: int, losses: np.ndarray = losses) -> bool:
            epsilon = 2.0 ** (place / _OCTAVE)
            mean = float(-np.expm1(np.minimum(epsilon - losses, 0.0)).sum()) / samples
            return kl_lower(mean, room) > delta

        low, high = -10 * _OCTAVE, 10 * _OCTAVE
        if not is_above(low):
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_above(middle) else (low, middle)
        found = max(found, 2.0 ** (low / _OCTAVE))
    return found


@functools.lru_cache(maxsize=64)
def _attackers_seed(multiplier: float, structure: Any) -> int:
    """A secret of its own: the samples of the upper bound decide nothing here."""
    del multiplier, structure
    return secrets.randbits(128)


def _turns(event: Any) -> tuple[float, int]:
    """In how many turns, and with what probability in each, b-min-sep sampling takes a unit, about."""
    p, separation = event.sampling_probability, event.min_separation
    return separation * p / (1 + (separation - 1) * p), -(-event.steps // separation)


def _scale(event: Any, adjacency: str) -> tuple[float, float]:
    del adjacency
    share, turns = _turns(event)
    spread, extent = gaussian_scale(event.noise_multiplier, share, False)
    return spread * math.sqrt(turns), min(extent * turns, 2048.0)


def _guess(event: Any) -> DpEvent:
    share, turns = _turns(event)
    gaussian = GaussianDpEvent(event.noise_multiplier)
    return SelfComposedDpEvent(PoissonSampledDpEvent(share, gaussian) if share < 1 else gaussian, turns)


def _with_side_queries(event: Any, noise_multiplier: float, side_precision: float) -> DpEvent:
    return attr.evolve(event, noise_multiplier=noise_multiplier, side_precision=side_precision)


def _attained(event: Any, count: int, adjacency: str, delta: float) -> float | None:
    del adjacency
    return _sampled_epsilon(event, delta) if count == 1 else None


@loss_rule(
    MinSepSampledDpEvent,
    scale=_scale,
    guess=_guess,
    attained=_attained,
    only_presence="b-min-sep sampling",
    with_side_queries=_with_side_queries,
    is_simulated=True,
)
def _loss(event: Any, adjacency: str, interval: float, samples: int | None) -> LossDistribution:
    del adjacency
    return min_sep_distribution(event, interval, samples or samples_for(1e-4))
