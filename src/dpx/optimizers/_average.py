"""Averages of parameters over steps, which take out noise."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from .._checks import flag, integer, positive_int
from .._tree import wide
from .._types import Params
from ._decay import check_decay


class AverageState(eqx.Module):
    """An average of parameters.

    **Arguments:**

    - `count`: number of steps taken.
    - `average`: like the parameters; at least float32, since changes of a thousandth are lost in half precision.
    """

    count: Int[Array, ""]
    average: Params

    def apply_to(self, model: PyTree) -> PyTree:
        """`model` with the averaged parameters in place of its own, in its own dtypes."""

        def one(average, x):
            return x if average is None else average.astype(x.dtype)

        return jax.tree.map(one, self.average, model, is_leaf=lambda x: x is None)


class AbstractParameterAverage(eqx.Module):
    r"""A running average of the parameters, $\bar\theta \leftarrow \bar\theta + w_t (\theta_t - \bar\theta)$: takes out noise, at no cost of privacy.

    ```python
    average = dpx.optimizers.ema(0.999)
    averaged = average.init(params)
    averaged = average.step(averaged, params)  # after every update
    model = averaged.apply_to(model)
    ```
    """

    @abc.abstractmethod
    def weight(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """$w_t$ of the parameters after step number `step` (from 0)."""

    def init(self, params: Params) -> AverageState:
        """The state before the first step; `params` are arrays and None, as from `eqx.filter(model, eqx.is_inexact_array)`."""
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(wide, params))

    def step(self, state: AverageState, params: Params) -> AverageState:
        """The state after a step that led to `params`."""
        weight = self.weight(state.count)
        average = jax.tree.map(lambda a, x: a + weight.astype(a.dtype) * (wide(x) - a), state.average, params)
        return AverageState(state.count + 1, average)


class ExponentialAverage(AbstractParameterAverage):
    r"""$\bar\theta \leftarrow \mu_t \bar\theta + (1 - \mu_t) \theta_t$ with $\mu_t = \min(\mu, (1 + t) / (10 + t))$, so that the start is forgotten.

    **Arguments:**

    - `decay`: $\mu$ in [0, 1).
    - `warm_up`: False for $\mu_t = \mu$ from the first step on.

    ??? cite "Reference"

        De et al., *Unlocking high-accuracy differentially private image classification through scale*, 2022.
    """

    decay: float = eqx.field(static=True)
    warm_up: bool = eqx.field(static=True)

    def __init__(self, decay: float = 0.999, warm_up: bool = True):
        self.decay = check_decay("ema(decay=...)", decay)
        self.warm_up = flag("ema(warm_up=...)", warm_up)

    def weight(self, step: Int[Array, ""]) -> Float[Array, ""]:
        settled = jnp.asarray(1 - self.decay, jnp.float32)
        return jnp.maximum(settled, 9 / (10 + step.astype(jnp.float32))) if self.warm_up else settled


class TailAverage(AbstractParameterAverage):
    r"""The mean of the parameters after step `start` and all later ones; before that, the parameters themselves.

    **Arguments:**

    - `start`: number of the first step that counts (from 0), such as half of all steps.
    """

    start: int = eqx.field(static=True)

    def __init__(self, start: int):
        start = integer("tail_average(start=...)", start)
        self.start = 0 if start == 0 else positive_int("tail_average(start=...)", start)

    def weight(self, step: Int[Array, ""]) -> Float[Array, ""]:
        return 1 / jnp.maximum(step - self.start + 1, 1).astype(jnp.float32)


def ema(decay: float = 0.999, warm_up: bool = True) -> ExponentialAverage:
    """An exponential moving average of the parameters: `ExponentialAverage(decay, warm_up)`."""
    return ExponentialAverage(decay, warm_up)


def tail_average(start: int) -> TailAverage:
    """The mean of the parameters from step `start` on: `TailAverage(start)`."""
    return TailAverage(start)
