"""How the noise multiplier is shared between the gradient and the private questions that its clipping asks."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._checks import is_traced, usable
from .._rounding_up import JOINT_UP
from .._types import Participation
from ..clipping import AbstractClipping
from ..noise import AbstractNoise


def joint_scale(
    clipping: AbstractClipping, noise: AbstractNoise, steps: int | None, participation: Participation
) -> Float[Array, ""]:
    r"""The scale of the noise that a clipped sum gets, so that it and the clipping's own queries are one Gaussian mechanism of its multiplier.

    With multiplier $z$ and queries of multipliers $s_j$, made $k$ times in one event of the accountant, the gradient alone gets
    $(z^{-2} - k \sum_j s_j^{-2})^{-1/2}$, in units of the clipping's (and the strategy's) sensitivity (Andrew et al. 2021, theorem 1).
    NaN unless it is a positive finite number.
    """
    scale = noise.scale(clipping.sensitivity, steps, participation)
    load = _load(clipping, noise, steps, participation)
    # every number that privacy depends on ends here: one that was zero or negative must not become too little noise
    return usable(scale if load is None else scale * (JOINT_UP / jnp.sqrt(1 - load)))


def check_joint_noise(
    clipping: AbstractClipping, noise: AbstractNoise, steps: int | None, participation: Participation
) -> None:
    """Raises if the clipping's own queries cost more than the noise multiplier allows in total."""
    load = _load(clipping, noise, steps, participation)
    if load is None or is_traced(load) or float(load) < 1:
        return
    times = queries_per_event(noise, steps, participation)
    sides = clipping.side_noise_multipliers
    least = float(noise.noise_multiplier) * np.sqrt(times * len(sides))  # pyright: ignore[reportArgumentType]
    raise ValueError(
        f"The private counts of `{type(clipping).__name__}` cost more than the noise multiplier {float(noise.noise_multiplier):.4g} allows in "  # pyright: ignore[reportArgumentType]
        f"total, so that nothing is left for the gradient. Raise its `count_noise_multiplier`: the counts' own noise multipliers, now "
        f"{', '.join(f'{float(s):.4g}' for s in sides)}, must exceed {least:.4g}, by far if most of the budget is for the gradient."
    )


def _load(
    clipping: AbstractClipping, noise: AbstractNoise, steps: int | None, participation: Participation
) -> Float[Array, ""] | None:
    """The part of the privacy budget, as an inverse variance, that the queries take; None if there are none."""
    sides = clipping.side_noise_multipliers
    if not sides or noise.noise_multiplier is None:
        return None
    cost = sum((1 / s**2 for s in sides), jnp.zeros(()))
    return noise.noise_multiplier**2 * cost * jnp.float32(queries_per_event(noise, steps, participation))


def queries_per_event(noise: AbstractNoise, steps: int | None, participation: Participation) -> int:
    """How often an example takes part in one event of the accountant, at most: once, where the accountant composes steps."""
    if noise.bands == 1:
        return 1
    separation, most = participation
    if steps is None:
        if most is None:
            raise ValueError(
                "Adaptive clipping with correlated noise must know for how many steps it is used. Give `PrivateGradient(..., steps=...)`, or use a "
                "plan, which does."
            )
        return most
    fitting = -(-steps // separation)
    return fitting if most is None else min(most, fitting)
