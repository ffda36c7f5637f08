"""Likelihood ratios of a plan's steps: what tells best that a canary was in."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._checks import positive_float, real_array, real_number
from .._types import RealScalarLike
from ..clipping import AbstractClipping
from ..noise import Laplace
from ..plan import PrivacyPlan
from ..sampling import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    RandomAllocationSampler,
    ShuffleSampler,
    UserSampler,
)
from ._noise_laws import NoiseLaw, stated_noise


def log_likelihood_ratio(
    x: Any, noise_multiplier: RealScalarLike, *, sampling_probability: RealScalarLike = 1.0
) -> Any:
    r"""$\log(1 - q + q\, e^{(2 x - 1) / 2 \sigma^2})$: of one step of Poisson-sampled Gaussian noise, for a Dirac canary.

    The most powerful score there is for adding and removing (Neyman and Pearson). It does not overflow where the noise is missing.

    **Arguments:**

    - `x`: what the canary's coordinate of the noisy sum is, in units of the clip norm; the clipped sum of all others subtracted.
    - `noise_multiplier`: $\sigma$.
    - `sampling_probability`: $q$ in (0, 1].
    """
    values = real_array("log_likelihood_ratio(x=...)", x, "numbers")
    sigma = positive_float("log_likelihood_ratio(noise_multiplier=...)", noise_multiplier)
    q = real_number("log_likelihood_ratio(sampling_probability=...)", sampling_probability)
    if not 0 < q <= 1:
        raise ValueError(f"`log_likelihood_ratio(sampling_probability=...)` must lie in (0, 1]; got {q}.")
    found = _mixed((2 * values - 1) / (2 * sigma**2), q)
    return float(found) if found.ndim == 0 else found


def _mixed(ratio: Any, q: float) -> np.ndarray:
    if q >= 1:
        return np.asarray(ratio)
    return np.asarray(np.logaddexp(math.log1p(-q), math.log(q) + ratio))


def best_size(clipping: AbstractClipping, state: PyTree, groups: int) -> tuple[float, np.ndarray]:
    """The size of a gradient, in each group, whose clipped contribution is largest, and those contributions.

    That is 1e4 clip norms for most; a threshold beyond which examples are left out asks for less.
    """
    bound = float(clipping.sensitivity)
    sizes = bound * np.concatenate([np.logspace(4, -2, 25), _thresholds(clipping)])
    norms = jnp.asarray(np.repeat(sizes[:, None], groups, axis=1), jnp.float32)
    factors = np.asarray(clipping.factors(norms, state), np.float64)
    total = np.sum((factors * sizes[:, None]) ** 2, axis=1)
    at = int(np.argmax(total))
    return float(sizes[at]), factors[at] * sizes[at]


def _thresholds(clipping: Any) -> np.ndarray:
    threshold = getattr(clipping, "threshold", None)
    return np.zeros(0) if threshold is None else np.array([0.999 * float(threshold) / float(clipping.sensitivity)])


def one_step_scores(plan: PrivacyPlan, values: np.ndarray, leaf: np.ndarray, grads: PyTree) -> np.ndarray:
    """Of one step, from the canaries' numbers in the sum."""
    if plan.noise.bands != 1:
        raise ValueError(
            "`GradientCanaries.scores` adds up over steps, which noise that is correlated between them does not allow. Use `audit_plan`, which "
            "whitens it."
        )
    state = plan.clipping.init(grads)
    if plan.clipping.side_noise_multipliers:
        raise ValueError(
            "`GradientCanaries.scores` needs clipping without a state; for adaptive clipping use `audit_plan`."
        )
    shifts = shifts_of(plan, grads, leaf)
    rescale = plan.clipping.rescale(state)
    if rescale is not None:
        values = values / np.asarray(rescale, np.float64)[groups_of(plan, grads, leaf)]
    law = stated_noise(plan.mechanism, 1)
    assert law is not None
    ratios = _ratios(values.reshape(1, len(leaf), -1), shifts.reshape(len(leaf), -1), law)
    return _mixed(ratios[0], rate_of(plan))


def groups_of(plan: PrivacyPlan, params: PyTree, leaf: np.ndarray) -> np.ndarray:
    """The clip group of each canary's leaves."""
    return np.asarray(plan.clipping.labels(params))[leaf]


def shifts_of(plan: PrivacyPlan, params: PyTree, leaf: np.ndarray) -> np.ndarray:
    """How far each canary moves the sum in each of its parameters."""
    state = plan.clipping.init(params)
    number = max(plan.clipping.labels(params)) + 1
    _, contributions = best_size(plan.clipping, state, number)
    return contributions[groups_of(plan, params, leaf)]


def rate_of(plan: PrivacyPlan) -> float:
    """The probability with which an example is in one batch."""
    sampler: Any = plan.sampler.base if isinstance(plan.sampler, UserSampler) else plan.sampler
    return min(1.0, sampler.batch_size / sampler.num_examples)


def _ratios(x: np.ndarray, shifts: np.ndarray, law: NoiseLaw) -> np.ndarray:
    """Log likelihood ratios of having been in each single step, `(steps, canaries)`, from sums `(steps, canaries, coordinates)`."""
    if law.kind == "laplace":
        return np.sum((np.abs(x) - np.abs(x - shifts)) / law.scale, axis=2)
    y, d = x / law.scale, shifts / law.scale
    if law.matrix is not None:
        steps = len(law.matrix)
        y = (law.matrix.T @ law.matrix @ y.reshape(steps, -1)).reshape(y.shape)
        lengths = np.sum(law.matrix**2, axis=0)
        return np.sum(y * d, axis=2) - 0.5 * lengths[:, None] * np.sum(d**2, axis=1)
    return np.sum(y * d, axis=2) - 0.5 * np.sum(d**2, axis=1)


def run_scores(plan: PrivacyPlan, x: np.ndarray, shifts: np.ndarray, taken: np.ndarray, law: NoiseLaw) -> np.ndarray:
    """The score of every canary after a run.

    **Arguments:**

    - `x`: the canaries' numbers in the noisy sums, `(steps, canaries, coordinates)`.
    - `shifts`: how far a canary moves them, `(canaries, coordinates)`.
    - `taken`: `(steps, canaries)`, whose row was in which batch, whether the canary was in or not. It is used where the plan counts it as known.
    - `law`: of the noise.
    """
    sampler: Any = plan.sampler.base if isinstance(plan.sampler, UserSampler) else plan.sampler
    ratios = _ratios(x, shifts, law)
    steps = len(ratios)
    if isinstance(sampler, ShuffleSampler) or rate_of(plan) >= 1:
        return linear_scores(x, shifts, taken, law)[0] if law.kind != "laplace" else np.sum(ratios * taken, axis=0)
    if isinstance(sampler, CyclicPoissonSampler):
        cycle, p = sampler.cycle_length, min(1.0, sampler.sampling_probability)
        first = np.argmax(taken, axis=0) % cycle  # the group, which is no secret
        mine = (np.arange(steps)[:, None] % cycle == first) & taken.any(0)
        return np.sum(np.where(mine, _mixed(ratios, p), 0.0), axis=0)
    if isinstance(sampler, BallsInBinsSampler | RandomAllocationSampler):
        return _allocated_scores(sampler, x, shifts, ratios, law)
    return np.sum(_mixed(ratios, rate_of(plan)), axis=0)


def _allocated_scores(sampler: Any, x: np.ndarray, shifts: np.ndarray, ratios: np.ndarray, law: NoiseLaw) -> np.ndarray:
    """The place of an example is its secret: a mean of likelihoods over places."""
    from scipy import special

    steps = len(ratios)
    if isinstance(sampler, BallsInBinsSampler):
        places = []
        for place in range(min(sampler.bins, steps)):
            taken = np.zeros((steps, x.shape[1]), bool)
            taken[place :: sampler.bins] = True
            places.append(np.sum(ratios * taken, axis=0) if law.matrix is None else _pattern(x, shifts, taken, law))
        missing = max(0, sampler.bins - steps)  # places of batches that are not looked at
        places += [np.zeros(x.shape[1])] * missing
        return np.asarray(special.logsumexp(np.stack(places), axis=0)) - math.log(len(places))
    total = np.zeros(x.shape[1])
    for begin in range(0, steps, sampler.block):
        part = ratios[begin : begin + sampler.block]
        missing = sampler.block - len(part)
        part = np.concatenate([part, np.zeros((missing, part.shape[1]))])
        total += np.asarray(special.logsumexp(part, axis=0)) - math.log(sampler.block)
    return total


def _pattern(x: np.ndarray, shifts: np.ndarray, taken: np.ndarray, law: NoiseLaw) -> np.ndarray:
    normal, mu = linear_scores(x, shifts, taken, law)
    return normal * mu - 0.5 * mu**2


def linear_scores(x: np.ndarray, shifts: np.ndarray, taken: np.ndarray, law: NoiseLaw) -> tuple[np.ndarray, np.ndarray]:
    r"""Scores that are $N(\mu_j, 1)$ for a canary that is in and $N(0, 1)$ for one that is out, for known participations; and the $\mu_j$."""
    y, d = x / law.scale, shifts / law.scale
    pattern = taken.astype(np.float64)
    if law.matrix is not None:
        steps = len(law.matrix)
        y = (law.matrix @ y.reshape(steps, -1)).reshape(y.shape)
        pattern = law.matrix @ pattern
    signal = pattern[:, :, None] * d
    mu = np.sqrt(np.sum(signal**2, axis=(0, 2)))
    return np.sum(signal * y, axis=(0, 2)) / np.where(mu > 0, mu, 1.0), mu


def is_laplace(plan: PrivacyPlan) -> bool:
    """Whether the noise is Laplace's."""
    return isinstance(plan.noise, Laplace)


def trained(model: PyTree, filter_spec: PyTree) -> list[jax.Array]:
    """The trained leaves."""
    return jax.tree.leaves(eqx.filter(model, filter_spec))
