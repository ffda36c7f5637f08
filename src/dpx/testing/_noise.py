"""The laws of noise."""

import itertools
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from .. import accounting
from .._checks import instance
from .._types import Participation
from ..noise import AbstractIntegerNoise, AbstractNoise
from ._report import check_false_alarm, require
from ._statistics import at_least, at_most, quantile

_SENSITIVITY = 0.5
_EVENT = "`event` costs no less than what `step` does"
_FRESH = (
    "no noise is used twice: steps, leaves, coordinates and keys are independent but for the strategy's correlation"
)
# Where the noise is large, an attack on its variance alone loses next to nothing; where it is as small as the second, an error of the scale moves
# delta most.
_LARGE, _SMALL = 16.0, 0.5


def check_noise(
    noise: AbstractNoise, *, steps: int = 6, samples: int = 2**17, seed: int = 0, false_alarm: float = 1e-6
) -> None:
    r"""Checks that noise is what its `event` claims it is, by drawing it.

    The noise is drawn at its own multiplier, and at a large and a small one, where errors show best.

    !!! success "Laws"

        - The event costs no less than what is drawn. One attacker takes the best linear statistic $T$ of all noisy sums, for every pattern of
          participations that the scale was made for: by the inequality of Hammersley, Chapman and Robbins,
          $(\mathbb{E}_P T - \mathbb{E}_Q T)^2 \le \chi^2 \operatorname{Var} T$ for whatever noise has the event's $\chi^2$ divergence. Another looks
          whether one noisy number exceeds a threshold, and must stay below the event's $\delta$ at several $\varepsilon$.
        - Noise is fresh in every step, leaf, coordinate and run; the same key gives the same noise; it does not depend on the sum.
        - Its mean is zero and its variance what `variance` says; past `horizon` it is NaN.

    Noise that is 2 % too small is refuted by 2^17 samples.

    **Arguments:**

    - `noise`: the noise; its multiplier may be missing.
    - `steps`: how many steps are looked at together, up to 8.
    - `samples`: coordinates drawn at every step.
    - `seed`: of the draws.
    - `false_alarm`: the probability with which sound noise is refuted.

    **Raises:** `AssertionError` that names the law, with numbers.
    """
    instance("check_noise(noise=...)", noise, AbstractNoise, "dpx.IndependentGaussian(1.0)")
    failure = check_false_alarm("check_noise", false_alarm) / 64
    key = jr.key(seed)
    own = noise.noise_multiplier
    noise = noise if own is not None else _with_multiplier(noise, 1.0)
    steps = min(steps, 8, noise.horizon or steps)
    _check_fresh(noise, steps, min(2**14, samples), key, failure)
    for number, multiplier in enumerate((None, _LARGE, _SMALL)):
        loud = noise if multiplier is None else _with_multiplier(noise, multiplier)
        _check_law(loud, steps, samples, jr.fold_in(key, number), failure)
    if noise.horizon is not None:
        late = _draw(noise, noise.horizon + 1, key, {"a": jnp.zeros(2)}, noise.horizon, Participation(1, 1))["a"]
        require(
            np.isnan(late[-1]).all(),
            noise,
            "past `horizon` the noise is NaN, so that none is used twice",
            f"{late[-1]} at step {noise.horizon} (from 0)",
        )


def _with_multiplier(noise: AbstractNoise, multiplier: float) -> AbstractNoise:
    old = noise.noise_multiplier
    new = jnp.float32(multiplier) if old is None else jnp.full_like(old, multiplier)
    return eqx.tree_at(lambda n: n.noise_multiplier, noise, new, is_leaf=lambda x: x is None)


def _draw(noise: Any, steps: int, key: Any, zeros: Any, horizon: int, participation: Participation) -> Any:
    """The noise of the first steps, float64, with a leading axis of steps."""
    if isinstance(noise, AbstractIntegerNoise):
        zeros = jax.tree.map(lambda x: x.astype(jnp.int32), zeros)
    scale = noise.scale(jnp.float32(_SENSITIVITY), horizon, participation)

    return jax.tree.map(
        lambda x: np.asarray(x, np.float64), _run(noise, key, zeros, scale, jnp.arange(steps, dtype=jnp.int32))
    )


@eqx.filter_jit
def _run(noise: Any, key: Any, zeros: Any, scale: Array, steps: Array) -> Any:
    def body(buffers: Any, step: Array) -> Any:
        noisy, buffers = noise.step(zeros, scale, key, step, buffers)
        return buffers, noisy

    return jax.lax.scan(body, noise.init(zeros), steps)[1]


def _check_fresh(noise: AbstractNoise, steps: int, width: int, key: Any, failure: float) -> None:
    zeros = {"a": jnp.zeros(width), "b": jnp.zeros(width)}
    few = min(steps, 3)
    draw = lambda key: _draw(noise, few, key, zeros, steps, Participation(1, None))
    first, again, other = draw(key), draw(key), draw(jr.fold_in(key, 1))
    for leaf in zeros:
        require(
            np.array_equal(first[leaf], again[leaf]),
            noise,
            "the same key gives the same noise",
            "two draws from one key that differ",
        )
    total = {name: jnp.full((width,), 3.0) for name in zeros}
    if isinstance(noise, AbstractIntegerNoise):
        total = jax.tree.map(lambda x: x.astype(jnp.int32), total)
    scale = noise.scale(jnp.float32(_SENSITIVITY), steps, Participation(1, None))
    noisy, _ = noise.step(total, scale, key, jnp.int32(0), noise.init(total))
    nothing, _ = noise.step(jax.tree.map(jnp.zeros_like, total), scale, key, jnp.int32(0), noise.init(total))
    moved = np.asarray(noisy["a"] - nothing["a"], np.float64)
    require(
        np.allclose(moved, moved[0], rtol=1e-3, atol=1e-5 * float(np.max(np.abs(first["a"])))) and moved[0] > 0,
        noise,
        "the noise does not depend on what it is added to",
        f"a sum of 3 moves the noisy one by {moved.min():.6g} to {moved.max():.6g}",
    )
    blocks = {f"step {t}, leaf {leaf!r}": first[leaf][t] for t in range(few) for leaf in zeros}
    blocks |= {f"step 0, leaf {leaf!r}, of another key": other[leaf][0] for leaf in zeros}
    pairs = [(a, b, blocks[a], blocks[b]) for a, b in itertools.combinations(blocks, 2)]
    pairs += [(f"{a}, its first half", "its second", x[: width // 2], x[width // 2 :]) for a, x in blocks.items()]
    pairs += [(a, "its neighbours in the same leaf", x[1:], x[:-1]) for a, x in blocks.items()]
    for a, x in blocks.items():
        require(
            np.ptp(x) > 0 and np.var(x) > 0.5 * np.mean(x**2),
            noise,
            _FRESH,
            f"coordinates of {a} that are all about {np.mean(x):.6g}",
        )
    bound = quantile(failure / (4 * len(pairs)))
    for a, b, x, y in pairs:
        across_steps = noise.bands != 1 and a[:6] != b[:6] and a[-3:] == b[-3:]
        if across_steps:
            continue  # that correlation is the strategy's, and is looked at below
        same = float(np.mean((x == y) & (x != 0)))
        if not isinstance(noise, AbstractIntegerNoise):
            require(same < 0.01, noise, _FRESH, f"{a} and {b} have the same noise in {same:.0%} of the coordinates")
        for power in (1, 2):
            correlation = float(np.corrcoef(x**power, y**power)[0, 1])
            require(
                abs(correlation) * math.sqrt(len(x)) <= 1.5 * bound,
                noise,
                _FRESH,
                f"{a} and {b} have{' squares of' if power == 2 else ''} noise with correlation {correlation:.4f}",
            )


def _check_law(noise: AbstractNoise, steps: int, samples: int, key: Any, failure: float) -> None:
    independent = noise.bands == 1
    participations = [Participation(1, 1)]
    if not independent:
        participations += [Participation(max(1, steps // 2), 2), Participation(1, None)]
    multipliers = np.broadcast_to(np.asarray(noise.noise_multiplier, np.float64), steps)
    for number, participation in enumerate(participations):
        draws = _draw(noise, steps, jr.fold_in(key, number), {"a": jnp.zeros(samples)}, steps, participation)["a"]
        _check_moments(noise, draws, steps, participation, failure)
        if not independent:
            _check_linear(noise, noise.event(float(multipliers[0])), draws, participation, independent, failure)
            continue
        alone = list(zip(multipliers.tolist(), draws[:, None], strict=True))
        if np.ptp(multipliers) == 0:  # all steps are as many draws of one
            alone.insert(0, (float(multipliers[0]), draws.reshape(1, -1)))
        for each, x in alone:
            _check_linear(noise, noise.event(each), x, participation, independent, failure / len(alone))
        each, x = alone[0]
        _check_thresholds(noise, noise.event(each), x[0], failure)


def _check_moments(
    noise: AbstractNoise, draws: np.ndarray, steps: int, participation: Participation, failure: float
) -> None:
    scale = noise.scale(jnp.float32(_SENSITIVITY), steps, participation)
    bound = 1.2 * quantile(failure)
    for t, x in enumerate(draws):
        stated = float(noise.variance(scale, steps, jnp.int32(t)))
        deviation = math.sqrt(stated / len(x))
        require(
            abs(x.mean()) <= bound * deviation + 1e-6 * math.sqrt(stated),
            noise,
            "the noise has mean zero",
            f"{x.mean():.6g} at step {t}, where {bound * deviation:.3g} would be chance",
        )
        measured = float(np.mean(x**2))
        margin = bound * math.sqrt(max(float(np.mean(x**4)) - measured**2, 0.0) / len(x))
        require(
            abs(measured - stated) <= margin + 1e-5 * stated,
            noise,
            "`variance` is the variance of what `step` adds",
            f"{measured:.6g} at step {t}, where `variance` says {stated:.6g} and {margin:.2g} would be chance",
        )


def _chi_square(event: Any, noise: AbstractNoise) -> float | None:
    """What the chi-square divergence of neighbours is at most if the event is right; None for events that this file does not know."""
    import dp_accounting as da
    from dp_accounting.dp_event import ZCDpEvent

    match event:
        case da.GaussianDpEvent():
            return math.expm1(event.noise_multiplier**-2)
        case da.LaplaceDpEvent():
            b = event.noise_multiplier
            return 2 / 3 * math.exp(1 / b) + 1 / 3 * math.exp(-2 / b) - 1
        case ZCDpEvent():
            return math.expm1(event.xi + 2 * event.rho)
    return None


def _check_linear(
    noise: AbstractNoise, event: Any, draws: np.ndarray, participation: Participation, independent: bool, failure: float
) -> None:
    """A participation moves the sums by the sensitivity; how many standard deviations is that, in the best direction?"""
    from scipy import stats

    claimed = _chi_square(event, noise)
    if claimed is None:
        return
    steps, samples = draws.shape
    patterns = np.eye(steps) if independent else signed_patterns(steps, *participation)
    seen = np.diag(np.mean(draws**2, axis=1)) if independent else draws @ draws.T / samples
    measured = _SENSITIVITY**2 * np.einsum("pi,ij,pj->p", patterns, np.linalg.inv(seen), patterns)
    # exact for Gaussian numbers (Wishart); others are corrected by their kurtosis
    kurtosis = (
        max(3.0, float(np.mean(draws**4, axis=1).max() / np.min(np.mean(draws**2, axis=1)) ** 2))
        if independent
        else 3.0
    )
    effective = samples * 2 / (kurtosis - 1)
    lower = measured * stats.chi2.ppf(failure / len(patterns), effective - steps + 1) / effective
    worst = int(np.argmax(lower))
    require(
        lower[worst] <= claimed * (1 + 1e-5),
        noise,
        _EVENT,
        f"participations {patterns[worst].astype(int).tolist()} move the noisy sums by {math.sqrt(measured[worst]):.6g} standard "
        f"deviations of the noise that is drawn, at least {math.sqrt(lower[worst]):.6g} but for chance; {event} allows "
        f"{math.sqrt(claimed):.6g} (scale made for {participation})",
    )


def signed_patterns(steps: int, min_separation: int, max_participations: int | None) -> np.ndarray:
    """All contributions of -1, 0 and 1 that obey the participation, the first that is not zero positive."""
    rows = np.array(list(itertools.product((0, 1, -1), repeat=steps)), np.int8)
    taking = rows != 0
    first = np.take_along_axis(rows, np.argmax(taking, axis=1)[:, None], 1)[:, 0]
    allowed = first == 1
    if max_participations is not None:
        allowed &= taking.sum(1) <= max_participations
    for gap in range(1, min(min_separation, steps)):
        allowed &= ~(taking[:, gap:] & taking[:, :-gap]).any(1)
    return rows[allowed].astype(np.float64)


def _check_thresholds(noise: AbstractNoise, event: Any, x: np.ndarray, failure: float) -> None:
    """Whether one noisy number exceeds a threshold, which was chosen on other draws."""
    guess, test = x[: len(x) // 4], x[len(x) // 4 :]
    accountant = "rdp" if isinstance(noise, AbstractIntegerNoise) else "pld"
    thresholds = np.quantile(guess, np.linspace(0.02, 0.98, 25)) + _SENSITIVITY / 2
    for epsilon in (0.0, 0.5, 1.0):
        claimed = accounting.delta(event, epsilon, adjacency="add_or_remove_one", accountant=accountant)
        gains = [np.mean(guess + _SENSITIVITY > t) - math.exp(epsilon) * np.mean(guess > t) for t in thresholds]
        t = thresholds[int(np.argmax(gains))]
        each = failure / 6
        if epsilon == 0:
            lower = at_least(int(np.sum((test + _SENSITIVITY > t) & ~(test > t))), len(test), each)
        else:
            hit, false = int(np.sum(test + _SENSITIVITY > t)), int(np.sum(test > t))
            lower = at_least(hit, len(test), each) - math.exp(epsilon) * at_most(false, len(test), each)
        require(
            lower <= claimed + 1e-9,
            noise,
            _EVENT,
            f"an attacker who looks whether one noisy number exceeds {t:.4g} has delta {max(gains):.6g} at epsilon "
            f"{epsilon:g}, at least {lower:.6g} but for chance, when the sum moves by the sensitivity {_SENSITIVITY}; {event} allows {claimed:.6g}",
        )
