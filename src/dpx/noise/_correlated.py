"""Gaussian noise that is correlated between steps, so that it cancels in sums of gradients."""

import functools
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from .._checks import flag, instance
from .._rounding_up import PRODUCT_UP
from .._types import Params, Participation, RealScalarLike, Struct
from ..strategies import AbstractStrategy
from ._base import AbstractNoise, Buffers, as_multiplier, known_multiplier
from ._gaussian import standard_normal

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_MSG_NO_STEPS = (
    "`CorrelatedGaussian` must know for how many steps it is used, since its sensitivity grows with them. Give "
    "`PrivateGradient(..., steps=...)`, or use a plan, which does."
)


@functools.lru_cache(maxsize=16)
def _row_powers(strategy: AbstractStrategy, steps: int) -> np.ndarray:
    """`inverse_row_power` as float32, without the constant end that those of most Toeplitz matrices have."""
    powers = strategy.inverse_row_power(steps).astype(np.float32)
    changes = np.flatnonzero(powers != powers[-1])
    return powers[: changes[-1] + 2 if changes.size else 1]


class CorrelatedGaussian(AbstractNoise[PyTree]):
    r"""Adds $\sigma\, C\, \text{sens}\, (S^{-1} z)_t$ at step $t$, for a strategy matrix $S$ and independent $z_t \sim N(0, I)$.

    $C$ is the clip norm and sens the strategy's sensitivity in the run, so that all steps together are one Gaussian mechanism of noise
    multiplier $\sigma$, whichever way the gradients depend on earlier steps (Denisov et al. 2022). Noise of neighbouring steps cancels in
    their sums, which is what training sees.

    !!! success "Guarantee"

        Its scale is never smaller than noise multiplier times both sensitivities, rounding included. Past the strategy's horizon it is
        NaN: noise never repeats. It is a pure function of key and step, and the same on any number of devices.

    **Arguments:**

    - `strategy`: the matrix, from `dpx.strategies`.
    - `noise_multiplier`: $\sigma > 0$, rounded up to float32; None to let a plan calibrate it.
    - `replay`: draw the noise of earlier steps again instead of keeping it in buffers: no memory, and as many more draws a step as the
        inverse of the matrix has bands. Only where that inverse is banded.

    ??? cite "Reference"

        Denisov et al., *Improved differential privacy for SGD via optimal private linear operators on adaptive streams*, NeurIPS 2022;
        Choquette-Choo et al., *(Amplified) banded matrix factorization*, NeurIPS 2023.
    """

    strategy: AbstractStrategy
    noise_multiplier: Float[Array, ""] | None
    replay: bool = eqx.field(static=True)
    order: ClassVar[int] = 2

    def __init__(
        self, strategy: AbstractStrategy, noise_multiplier: RealScalarLike | None = None, replay: bool = False
    ):
        instance("CorrelatedGaussian(strategy=...)", strategy, AbstractStrategy, "BandedToeplitz.square_root(4)")
        replay = flag("CorrelatedGaussian(replay=...)", replay)
        if replay and strategy.replay_depth is None:
            raise ValueError(
                f"`CorrelatedGaussian({type(strategy).__name__}(...), replay=True)`: the inverse of this matrix is not banded, so earlier noise "
                "cannot be drawn again. Leave `replay` out, or use `BandedInverse` or `GeometricStrategy`."
            )
        self.strategy = strategy
        self.noise_multiplier = as_multiplier("CorrelatedGaussian", noise_multiplier)
        self.replay = replay

    @property
    def bands(self) -> int | None:
        return self.strategy.bands

    @property
    def description(self) -> str:
        return f"Gaussian noise correlated between steps by `{type(self.strategy).__name__}` (matrix factorization, DP-FTRL)"

    @property
    def horizon(self) -> int | None:
        return self.strategy.steps

    def event(self, noise_multiplier: float) -> "DpEvent":
        from dp_accounting import GaussianDpEvent

        return GaussianDpEvent(float(noise_multiplier))

    def scale(self, sensitivity: Float[Array, ""], steps: int | None, participation: Participation) -> Float[Array, ""]:
        multiplier = known_multiplier(self)
        if steps is None:
            raise ValueError(_MSG_NO_STEPS)
        # float64 on the host, rounded up where the product is
        factor = self.strategy.sensitivity(steps, participation.min_separation, participation.max_participations)
        return multiplier * sensitivity * np.float32(factor * PRODUCT_UP) * PRODUCT_UP

    def variance(self, scale: Float[Array, ""], steps: int | None, step: Int[Array, ""]) -> Float[Array, ""]:
        if steps is None:
            raise ValueError(_MSG_NO_STEPS)
        power = jnp.asarray(_row_powers(self.strategy, steps))
        return scale**2 * power[jnp.clip(step, 0, len(power) - 1)]

    def error(self, steps: int, participation: Participation, workload: Any, kind: str) -> float:
        separation, participations = participation
        return self.strategy.error(steps, workload, kind, min_separation=separation, max_participations=participations)

    def init(self, struct: Struct) -> PyTree:
        return () if self.replay else self.strategy.init(struct)

    def step(
        self, total: Params, scale: Float[Array, ""], key: Key[Array, ""], step: Int[Array, ""], buffers: Buffers
    ) -> tuple[Params, Buffers]:
        def draw(age: Any) -> Params:
            return standard_normal(jr.fold_in(key, jnp.maximum(step - age, 0)), total)

        if self.replay:
            x = self.strategy.replay(draw, step)
        else:
            x, buffers = self.strategy.step(draw(0), buffers)
        return jax.tree.map(lambda t, x: t + scale.astype(x.dtype) * x, total, x), buffers
