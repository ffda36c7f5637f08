"""What the noise of a plan should be, worked out apart from the code that draws it, and residuals brought to standard normal numbers."""

import math
from typing import Any, NamedTuple

import numpy as np

from ..mechanism import Mechanism
from ..noise import AbstractIntegerNoise, Laplace

_MOST_STEPS = 4096  # of a bounded strategy whose whole matrix is needed


class NoiseLaw(NamedTuple):
    """The stated law of the noise on the sum, in units of which residuals are read.

    **Arguments:**

    - `scale`: of one step's noise, before it is correlated; one number.
    - `kind`: `"gaussian"`, `"laplace"` or `"integer"`.
    - `matrix`: `(steps, steps)`, by which residuals of the steps are multiplied to be independent; None where they are.
    - `grid`: of integer noise, the scale in steps of its grid.
    """

    scale: float
    kind: str
    matrix: np.ndarray | None
    grid: float | None = None


def stated_noise(mechanism: Mechanism, steps: int) -> NoiseLaw | None:
    """The law, for the first `steps` steps; None where the strategy's matrix is too large to be written down.

    In float64, from the stated parts: noise multiplier times clip norm times the strategy's sensitivity, raised for the clipping's own questions.
    """
    noise: Any = mechanism.noise
    multiplier = float(noise.noise_multiplier)
    sides = sum(float(s) ** -2 for s in mechanism.clipping.side_noise_multipliers)
    factor, matrix = 1.0, None
    if noise.strategy is not None:
        separation, most = mechanism.participation
        whole = mechanism.steps
        assert whole is not None  # correlated noise knows its horizon
        factor = float(noise.strategy.sensitivity(whole, separation, most))
        horizon = noise.strategy.steps
        if (horizon or steps) > _MOST_STEPS:
            return None
        matrix = np.asarray(noise.strategy.materialize(horizon or steps), np.float64)[:steps, :steps]
    load = multiplier**2 * sides * mechanism.queries_per_event
    scale = multiplier * float(mechanism.clipping.sensitivity) * factor / math.sqrt(1 - load)
    if isinstance(noise, AbstractIntegerNoise):
        radius = float(getattr(noise, "radius", 1 << 16))
        return NoiseLaw(scale, "integer", matrix, multiplier * radius)
    return NoiseLaw(scale, "laplace" if isinstance(noise, Laplace) else "gaussian", matrix)


def standardised(residuals: np.ndarray, law: NoiseLaw, rng: np.random.Generator) -> np.ndarray:
    """Residuals `(steps, coordinates)`, of one run or several, as what are independent standard normal numbers if the law holds.

    Laplace and integer noise are brought to normal numbers by their distribution function, those between two integers at random.
    """
    x = residuals / law.scale
    if law.matrix is not None:
        runs = x.reshape(-1, len(law.matrix), x.shape[1])
        x = (law.matrix @ runs).reshape(x.shape)
    if law.kind == "gaussian":
        return x
    from scipy import special

    if law.kind == "laplace":
        # log of the tail, so that nothing is rounded to 0 or 1
        size = np.minimum(np.abs(x), 700.0)
        z = -special.ndtri_exp(-size - math.log(2))
        return np.sign(x) * np.abs(z)
    assert law.grid is not None
    steps = np.rint(x * law.grid)
    if law.grid > 2000:
        # the grid is fine: a number of it, blurred to its cell, is normal to the ninth digit
        return (steps + rng.random(x.shape) - 0.5) / law.grid
    reach = int(12 * law.grid + 8)
    grid = np.arange(-reach, reach + 1)
    mass = np.exp(-(grid**2) / (2 * law.grid**2))
    mass /= mass.sum()
    below = np.concatenate([[0.0], np.cumsum(mass)[:-1]])
    at = np.clip(steps + reach, 0, 2 * reach).astype(int)
    uniform = below[at] + rng.random(x.shape) * mass[at]
    upper = np.concatenate([np.cumsum(mass[::-1])[::-1][1:], [0.0]])
    tail = upper[at] + rng.random(x.shape) * mass[at]
    return np.where(uniform < 0.5, special.ndtri(np.maximum(uniform, 1e-300)), -special.ndtri(np.maximum(tail, 1e-300)))
