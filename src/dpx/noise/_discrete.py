"""Gaussian noise on integers, drawn exactly."""

import math
from typing import TYPE_CHECKING, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key, UInt32

from .._checks import is_traced, positive_float
from .._types import Params, Participation, RealScalarLike
from ..random import multiply
from ..sharding import bits_like
from ._base import Buffers, as_multiplier, known_multiplier
from ._independent import AbstractIntegerNoise
from ._rounding import Rounding

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_LARGEST_SIGMA = 2**26  # on the grid: then 16 standard deviations fit into 2**30


class DiscreteGaussian(AbstractIntegerNoise):
    r"""Rounds every contribution to a grid, adds up integers, and adds integer noise $P(z) \propto \exp(-z^2 / 2 s^2)$ to every coordinate.

    What is published is a function of an integer vector whose distribution is known exactly, so the privacy does not rest on how
    floating-point numbers behave (see the docs on floating point).

    Let $C$ be the clip norm, $R$ = 1 / `granularity`, and $d$ the number of trained parameters. The grid has steps of $C / R$.
    Gradients are clipped to $C' = C - \frac{\sqrt d}{2} \frac{C}{R}$, less a relative $2^{-18}$ for errors of float32, and rounded to
    integers $v$, in units of a step; the noise on the sum has $s = \lceil \sigma R \rceil$.

    !!! success "Guarantee"

        One example's integer vector has $\ell_2$ norm at most $R$, exactly, for every input, and sums of integers do not overflow. Hence each
        step satisfies $\rho$-zCDP with $\rho = R^2 / 2 s^2 \le 1 / 2 \sigma^2$ under adding or removing an example.

    *Proof.* The vector $u$ before rounding, in steps, has $\|u\| \le R - \sqrt d / 2$ up to the errors of float32 for which $C'$
    makes room. Every coordinate moves by at most 1/2 in rounding, so $\|v - u\| \le \sqrt d / 2$ and $\|v\| \le R$. Should the errors of
    float32 ever be larger, the example is left out: $\|v\|^2 \le R^2$ is verified in integer arithmetic. Either way an example
    contributes a vector of norm at most $R$ that depends on no other example. Sums are at most $2^{30}$ in every coordinate, which is
    checked from the batch size; so they are exact, and do not depend on the order. To add the noise modulo $2^{32}$ is a function of
    adding it exactly. Discrete Gaussian noise of scale $s$ in every coordinate, on a sum of integers of $\ell_2$ sensitivity $R$, is
    $R^2 / 2 s^2$-zCDP (Canonne et al. 2020, Theorem 14); scaling back is post-processing. $\square$

    Sampling is exact too: rejection sampling with random integers, of which every branch has precisely the stated probability, given
    independent random bits (`dpx.random.chacha_key` has the best). How often it loops depends on the noise alone, but an observer of its
    running time learns something about the largest noise.

    Accounting is by zero-concentrated DP: plans need `accountant="rdp"`. Poisson sampling (cyclic, too) amplifies it by the general bound of Zhu
    and Wang (2019), which knows nothing of the noise but its Rényi divergences: looser than what sampled Gaussian noise of this scale has.

    **Arguments:**

    - `noise_multiplier`: $\sigma > 0$, rounded up to a multiple of the granularity; None to let a plan calibrate it.
    - `granularity`: step of the grid as a fraction of the clip norm: a power of two, $2^{-16}$ or more, and less than $2 / \sqrt d$. Gradient
        coordinates below half a step round to zero.

    ??? cite "Reference"

        Canonne, Kamath and Steinke, *The discrete Gaussian for differential privacy*, NeurIPS 2020; Kairouz, Liu and Steinke, *The
        distributed discrete Gaussian mechanism*, ICML 2021; Zhu and Wang, *Poisson subsampled Rényi differential privacy*, ICML 2019;
        Karney, *Sampling exactly from the normal distribution*, 2016.
    """

    noise_multiplier: Float[Array, ""] | None
    granularity: float = eqx.field(static=True)
    order: ClassVar[int] = 2
    # that of the integers is below their parameter squared by a relative 2.2e-7 at parameter 1, and by less above
    unit_variance: ClassVar[float] = 1.0

    def __init__(self, noise_multiplier: RealScalarLike | None = None, granularity: RealScalarLike = 2.0**-16):
        step = positive_float("DiscreteGaussian(granularity=...)", granularity)
        mantissa, exponent = math.frexp(step)
        if mantissa != 0.5 or not 1 / Rounding.finest <= step <= 1:
            raise ValueError(
                f"`DiscreteGaussian(granularity=...)` must be a power of two between 2**-16 and 1; got {step:g}. Try "
                f"2**{min(0, max(-16, exponent - 1))}."
            )
        self.granularity = step
        self.noise_multiplier = None
        number = as_multiplier("DiscreteGaussian", noise_multiplier)
        if number is not None:
            if not is_traced(noise_multiplier) and float(np.asarray(noise_multiplier)) * self.radius > _LARGEST_SIGMA:
                raise ValueError(
                    f"`DiscreteGaussian(noise_multiplier=...)` must be at most {_LARGEST_SIGMA // self.radius} at granularity {step:g}, for noise "
                    f"to fit into 32-bit integers; got {float(np.asarray(noise_multiplier)):g}. Use a coarser granularity."
                )
            # exact in float32, where multiplying by a power of two is
            self.noise_multiplier = jnp.ceil(number * self.radius) / self.radius

    @property
    def radius(self) -> int:
        """The clip norm, in steps of the grid."""
        return round(1 / self.granularity)

    @property
    def description(self) -> str:
        return (
            f"discrete Gaussian noise at every step, on integer multiples of {self.granularity:g} times the clip norm"
        )

    def event(self, noise_multiplier: float) -> "DpEvent":
        from dp_accounting.dp_event import ZCDpEvent

        return ZCDpEvent(0.5 / float(noise_multiplier) ** 2)

    def scale(self, sensitivity: Float[Array, ""], steps: int | None, participation: Participation) -> Float[Array, ""]:
        del steps, participation
        return known_multiplier(self) * sensitivity  # in units of the sum; the privacy is that of the integers

    def rounding(self, sensitivity: Float[Array, ""], dimension: int, batch_size: int) -> Rounding:
        return Rounding(sensitivity, self.radius, dimension, batch_size)

    def step(
        self, total: Params, scale: Float[Array, ""], key: Key[Array, ""], step: Int[Array, ""], buffers: Buffers
    ) -> tuple[Params, Buffers]:
        leaves, treedef = jax.tree.flatten(total)
        if any(x.dtype != jnp.int32 for x in leaves):
            raise ValueError(
                "`DiscreteGaussian` adds noise to sums of integers, as `DiscreteGaussian.rounding` makes them; got "
                f"{', '.join(str(x.dtype) for x in leaves)}."
            )
        steps = jnp.ceil(jnp.asarray(self.noise_multiplier) * self.radius)
        # a multiplier that came in traced, or was changed, is checked here; with a parameter of 0 the sampler would never end
        is_good = (steps >= 1) & (steps <= _LARGEST_SIGMA)
        spacing = jnp.where(is_good, scale / steps, jnp.nan)
        sigma = jnp.where(is_good, steps, 1).astype(jnp.uint32)
        keys = jr.split(jr.fold_in(key, step), len(leaves))
        noisy = [x + discrete_gaussian(keys[i], x, sigma) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(treedef, [x.astype(jnp.float32) * spacing for x in noisy]), buffers


# What a coordinate is waiting for.
_DRAW, _COUNT, _HALF, _LINEAR, _SQUARE, _DONE = map(np.uint32, range(6))
_STEPS_BETWEEN_LOOKS = 8


def discrete_gaussian(key: Key[Array, ""], x: Int[Array, "*shape"], sigma: UInt32[Array, ""]) -> Int[Array, "*shape"]:
    r"""Exact samples $P(y) \propto \exp(-y^2 / 2 \sigma^2)$, in the shape and sharding of `x`; $1 \le \sigma \le 2^{26}$ is an integer.

    As Canonne et al. (2020, Algorithm 3) with $t = \sigma$: write $|y| = u + \sigma v$ with $u$ uniform in $[0, \sigma)$ and $v$
    geometric, $P(v) \propto e^{-v}$, and accept with probability
    $e^{-(v - 1)^2 / 2}\, e^{-u v / \sigma}\, e^{-(u / \sigma)^2 / 2}$. Altogether this is proportional to
    $e^{-v - (v - 1)^2 / 2 - u v / \sigma - u^2 / 2 \sigma^2} = e^{-1/2 - y^2 / 2 \sigma^2}$. Every factor is a power of some $e^{-a}$ with
    rational $a \le 1$, whose coin is tossed as: toss coins of probability $a / 1, a / 2, \dots$ until one fails; accept if an odd number
    were tossed. And those are products of coins $n / m$, for which a uniform integer below $m$ is compared with $n$. Nothing is rounded.

    Every coordinate is at a place of its own in that program and advances by one coin at a time, for which it gets one random word.
    """
    like = jnp.zeros_like(x, jnp.uint32)

    def coin(i, state):
        phase, tosses, factor, left, v, u = state
        word = bits_like(jr.fold_in(key, i), x)
        is_half, is_linear, is_square = phase == _HALF, phase == _LINEAR, phase == _SQUARE
        multiple = jnp.where(is_half | is_square, tosses * np.uint32(2), tosses)
        bound = jnp.where(factor > 0, sigma, jnp.where(phase == _DRAW, np.uint32(2) * sigma, multiple))
        # the upper word of word * bound is uniform below bound, if the lower one is not among the first 2**32 mod bound (Lemire 2019)
        low, number = multiply(word, bound)
        is_valid = (low >= (np.uint32(0) - bound) % bound) & (phase != _DONE)
        magnitude = u >> np.uint32(1)  # the lowest bit of u is the sign

        # a coin within a toss: u / sigma (`factor` times), then one over the multiple
        has_passed = number < jnp.where(factor > 0, magnitude, np.uint32(1))
        factors = is_linear.astype(jnp.uint32) + np.uint32(2) * is_square.astype(jnp.uint32)
        has_tossed = has_passed & (factor == 0)
        next_factor = jnp.where(factor > 0, factor - np.uint32(1), factors)
        next_tosses = tosses + has_tossed.astype(jnp.uint32)

        # the end of a trial: tosses were made until one failed
        is_success = tosses & np.uint32(1) == 1
        is_count = phase == _COUNT
        excess = v - np.uint32(1)
        remaining = jnp.where(is_count, excess * excess, left - np.uint32(1))
        after_half = jnp.where(v > 0, _LINEAR, _SQUARE)
        is_minus_zero = (v == 0) & (u == 1)
        following = jnp.where(
            is_half, after_half, jnp.where(is_linear, _SQUARE, jnp.where(is_minus_zero, _DRAW, _DONE))
        )
        following = jnp.where(is_count, jnp.where(remaining > 0, _HALF, _LINEAR), following)
        following = jnp.where(~is_count & (remaining > 0), phase, following)
        ended = jnp.where(is_count & is_success, _COUNT, jnp.where(is_count | is_success, following, _DRAW))

        is_draw = phase == _DRAW
        is_end = ~has_passed & ~is_draw
        new_phase = jnp.where(is_draw, _COUNT, jnp.where(is_end, ended, phase))
        is_start = is_draw | is_end
        is_new = is_start & (new_phase != phase)
        trials = jnp.where(new_phase == _LINEAR, v, np.uint32(1))
        trials = jnp.where(new_phase == _HALF, excess * excess, trials)
        first_factor = jnp.where(
            new_phase == _LINEAR, np.uint32(1), jnp.where(new_phase == _SQUARE, np.uint32(2), np.uint32(0))
        )
        new = (
            new_phase,
            # the first toss for exp(-1) succeeds always
            jnp.where(is_start, jnp.where(new_phase == _COUNT, np.uint32(2), np.uint32(1)), next_tosses),
            jnp.where(is_start, first_factor, jnp.where(has_passed, next_factor, factor)),
            jnp.where(is_new, trials, jnp.where(is_end, remaining, left)),
            jnp.where(is_draw, np.uint32(0), v + (is_end & is_count & is_success).astype(jnp.uint32)),
            jnp.where(is_draw, number, u),
        )
        return tuple(jnp.where(is_valid, after, before) for after, before in zip(new, state, strict=True))

    def advance(carry):
        i, state = carry
        state = lax.fori_loop(0, _STEPS_BETWEEN_LOOKS, lambda j, s: coin(i + j.astype(jnp.uint32), s), state)
        return i + np.uint32(_STEPS_BETWEEN_LOOKS), state

    start = (jnp.zeros((), jnp.uint32), (like,) * 6)
    _, (_, _, _, _, v, u) = lax.while_loop(lambda c: jnp.any(c[1][0] != _DONE), advance, start)
    size = ((u >> np.uint32(1)) + sigma * v).astype(jnp.int32)
    return jnp.where(u & np.uint32(1) == 1, -size, size)
