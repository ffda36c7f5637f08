"""What differential privacy changes about the update: all of it is a function of private gradients, and costs nothing."""

import abc
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ._checks import positive_float, positive_int
from ._tree import pairwise_sum, wide, wide_dtype
from ._types import Params, RealScalarLike

_MSG_NO_VARIANCE = (
    "`{name}` must know the variance of the noise in the gradients: call `optimizer.update(grads, opt_state, params, "
    "noise_variance=private_grad.noise_variance(model, state))`, with the state before the step. Without noise give 0."
)


class ScaleByAdamBCState(NamedTuple):
    """Moving averages of `scale_by_adam_bc`: of gradients, of their squares, and of the noise variance of each leaf."""

    count: Int[Array, ""]
    mu: PyTree
    nu: PyTree
    phi: PyTree


def scale_by_adam_bc(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, floor: RealScalarLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Adam without the noise in its second moment (DP-AdamBC): $\hat m_t / (\sqrt{\max(\hat v_t - \hat\phi_t, \text{floor})} + \epsilon)$.

    Private gradients $g_t + \xi_t$ have second moment $E[g_t^2] + \phi_t$. Where the noise variance $\phi_t$ dominates, Adam divides every
    coordinate by the same $\sqrt{\phi}$ and is SGD with momentum. The variance is public, so it is taken off: $\hat\phi_t$ is its
    moving average with the weights of $\hat v_t$, as noise that is correlated between steps does not have the same variance at all of them.

    For correlated noise the variance of single steps is all that is corrected. The noise in $\hat m_t$ is correlated too (it cancels in
    sums over steps, which is what $\hat m_t$ is), and gradients depend on earlier noise through the parameters, so that
    $E[g_t \xi_t]$ need not be zero as it is for independent noise.

    Its `update(grads, state, params, noise_variance=...)` takes the variance of the noise in every coordinate of the gradients, a
    scalar or a tree prefix of scalars, as `PrivateGradient.noise_variance` gives it.

    **Arguments:**

    - `b1`, `b2`: decay of the averages, in [0, 1).
    - `eps`: added to the denominator. With `noise_variance=0` the result is `optax.scale_by_adam`'s.
    - `floor`: least second moment, in units of a squared gradient. By default $\hat\phi_t \sqrt{2 \sum_s w_s^2}$ with the weights $w_s$ of
        $\hat v_t$: one standard deviation of what independent Gaussian noise alone makes of $\hat v_t$. What lies below cannot be told from
        zero, and the first steps, when little is known, are short.

    ??? cite "Reference"

        Tang, Shpilevskiy and Lécuyer, *DP-AdamBC: your DP-Adam is actually DP-SGD (unless you apply bias correction)*, AAAI 2024.
    """
    call = "scale_by_adam_bc"
    b1, b2 = _decay(f"{call}(b1=...)", b1), _decay(f"{call}(b2=...)", b2)
    eps = positive_float(f"{call}(eps=...)", eps)
    least = None if floor is None else positive_float(f"{call}(floor=...)", floor)

    def init(params: Params) -> ScaleByAdamBCState:
        def zeros():
            return jax.tree.map(lambda x: jnp.zeros_like(x, wide_dtype(x.dtype)), params)

        phi = jax.tree.map(lambda x: jnp.zeros((), wide_dtype(x.dtype)), params)
        return ScaleByAdamBCState(jnp.zeros((), jnp.int32), zeros(), zeros(), phi)

    def update(
        updates: Params,
        state: ScaleByAdamBCState,
        params: Params = None,
        *,
        noise_variance: PyTree = None,
        **extra_args: Any,
    ) -> tuple[Params, ScaleByAdamBCState]:
        del params, extra_args
        if noise_variance is None:
            raise ValueError(_MSG_NO_VARIANCE.format(name=call))
        count = state.count + 1
        lost = [1 - _gone(b, count) for b in (b1, b2)]
        # sum of the squared weights of the second moment's average
        effective = (1 - b2) / (1 + b2) * (1 + lost[1]) / (1 - lost[1])

        def average(decay, old, new):
            return jax.tree.map(lambda a, x: decay * a + (1 - decay) * wide(x).astype(a.dtype), old, new)

        mu = average(b1, state.mu, updates)
        nu = average(b2, state.nu, jax.tree.map(lambda g: jnp.square(wide(g)), updates))
        phi = average(b2, state.phi, _expand_scalars(call, noise_variance, updates))

        def direction(g, m, v, noise):
            m = m / _gone(b1, count).astype(m.dtype)
            v, noise = (x / _gone(b2, count).astype(x.dtype) for x in (v, noise))
            bottom = noise * jnp.sqrt(2 * effective).astype(noise.dtype) if least is None else least
            return (m / (jnp.sqrt(jnp.maximum(v - noise, bottom)) + eps)).astype(g.dtype)

        return jax.tree.map(direction, updates, mu, nu, phi), ScaleByAdamBCState(count, mu, nu, phi)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def adam_bc(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    floor: RealScalarLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with the correction of `scale_by_adam_bc`, whose arguments it has, and a learning rate or schedule.

    ```python
    optim = dpx.optimizers.adam_bc(1e-2)
    variance = private_grad.noise_variance(model, state)
    grads, state, _ = private_grad(model, batch, state, mask=mask)
    updates, opt_state = optim.update(grads, opt_state, noise_variance=variance)
    ```
    """
    return optax.chain(scale_by_adam_bc(b1, b2, eps, floor), optax.scale_by_learning_rate(learning_rate))


class ScaleThenPrivatize(eqx.Module):
    r"""An adaptive optimiser whose preconditioner is applied before clipping, and undone after the noise.

    `scaling` gives, before each step, a multiplier $s = k / (\sqrt{\nu} + \epsilon)$ for every coordinate, from the second moment $\nu$ that the
    optimiser keeps of earlier PRIVATE gradients, so it is public. What is clipped and gets noise is $s g$, and the result is divided
    by $s$: the noise is small where gradients are, and no coordinate drowns because another is large. `init` and `update` are the
    optimiser's own.

    ```python
    optim = dpx.optimizers.scale_then_privatize(optax.adam(1e-2))
    opt_state = optim.init(params)
    grads, state, _ = private_grad(model, batch, state, mask=mask, scaling=optim.scaling(opt_state))
    updates, opt_state = optim.update(grads, opt_state, params)
    ```

    **Arguments:**

    - `optimizer`: an optax transformation whose state has one second moment `nu`: `optax.adam`, `optax.adamw`, `optax.rmsprop`, or a chain
        with one of them.
    - `eps`: $\epsilon > 0$, in units of a gradient. The larger, the more alike the scales: raise it where coordinates of tiny gradients
        take too much of the clip norm.
    - `normalize`: choose $k$ so that the mean of $1 / s^2$ over coordinates is 1. Then the noise has the total variance that it
        has without scaling, and the clip norm keeps its unit; the first step, when $\nu = 0$, has $s = 1$. Otherwise $k = 1$, as published.

    ??? cite "Reference"

        Ganesh, McMahan and Thakurta, *On design principles for private adaptive optimizers*, 2025.
    """

    optimizer: optax.GradientTransformation
    eps: float = eqx.field(static=True)
    normalize: bool = eqx.field(static=True)

    def __init__(self, optimizer: Any, eps: RealScalarLike = 1e-8, normalize: bool = True):
        if not isinstance(optimizer, optax.GradientTransformation):
            raise ValueError(
                f"`scale_then_privatize(optimizer=...)` must be an optax transformation such as `optax.adam(1e-3)`; got {optimizer!r}."
            )
        self.optimizer = optimizer
        self.eps = positive_float("scale_then_privatize(eps=...)", eps)
        self.normalize = bool(normalize)

    def init(self, params: Params) -> Any:
        """The optimiser's state. Raises `ValueError` if it has not exactly one second moment."""
        opt_state = self.optimizer.init(params)
        self._second_moment(opt_state)
        return opt_state

    def scaling(self, opt_state: Any) -> PyTree:
        """Positive multipliers in the shapes of the parameters, as float32, for the next private gradient."""
        sizes = jax.tree.map(lambda v: jnp.sqrt(wide(v).astype(jnp.float32)) + self.eps, self._second_moment(opt_state))
        leaves = jax.tree.leaves(sizes)
        typical = jnp.ones(())
        if self.normalize:
            number = sum(x.size for x in leaves)
            typical = jnp.sqrt(pairwise_sum([jnp.sum(jnp.square(x)) for x in leaves]) / number)
        return jax.tree.map(lambda x: typical / x, sizes)

    def update(self, grads: Params, opt_state: Any, params: Params = None, **extra_args: Any) -> tuple[Params, Any]:
        """The optimiser's update, from gradients that are scaled back already."""
        return optax.with_extra_args_support(self.optimizer).update(grads, opt_state, params, **extra_args)

    def _second_moment(self, opt_state: Any) -> PyTree:
        found = list(_fields(opt_state, "nu"))
        if len(found) != 1:
            raise ValueError(
                f"`scale_then_privatize(optimizer=...)` needs an optimiser whose state has one second moment `nu`, such as `optax.adam`; this "
                f"one has {len(found)}."
            )
        return found[0]


def scale_then_privatize(optimizer: Any, eps: RealScalarLike = 1e-8, normalize: bool = True) -> ScaleThenPrivatize:
    """`ScaleThenPrivatize(optimizer, eps, normalize)`, by the name that it has in the literature."""
    return ScaleThenPrivatize(optimizer, eps, normalize)


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
        self.decay = _decay("ema(decay=...)", decay)
        self.warm_up = bool(warm_up)

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
        self.start = 0 if start == 0 else positive_int("tail_average(start=...)", start)

    def weight(self, step: Int[Array, ""]) -> Float[Array, ""]:
        return 1 / jnp.maximum(step - self.start + 1, 1).astype(jnp.float32)


def ema(decay: float = 0.999, warm_up: bool = True) -> ExponentialAverage:
    """An exponential moving average of the parameters: `ExponentialAverage(decay, warm_up)`."""
    return ExponentialAverage(decay, warm_up)


def tail_average(start: int) -> TailAverage:
    """The mean of the parameters from step `start` on: `TailAverage(start)`."""
    return TailAverage(start)


def _decay(call: str, value: Any) -> float:
    number = float(np.asarray(value))
    if not 0 <= number < 1:
        raise ValueError(f"`{call}` must lie in [0, 1); got {number}.")
    return number


def _gone(decay: float, count: Int[Array, ""]) -> Float[Array, ""]:
    """$1 - decay^count$, without the cancellation that costs three digits in float32 at 0.9999."""
    if decay == 0:
        return jnp.ones(())
    return -jnp.expm1(count.astype(jnp.float32) * math.log(decay))


def _expand_scalars(call: str, prefix: PyTree, tree: PyTree) -> PyTree:
    """One scalar for each leaf of `tree`."""
    try:
        full = jax.tree.map(lambda v, part: jax.tree.map(lambda _: jnp.asarray(v, jnp.float32), part), prefix, tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`{call}`: `noise_variance` must be a scalar or a tree prefix of scalars of the gradients. {error}"
        ) from None
    if any(x.shape != () for x in jax.tree.leaves(full)):
        raise ValueError(
            f"`{call}`: `noise_variance` must hold scalars, since the noise is the same in every coordinate of a leaf. Gradients that were "
            "scaled before clipping need no correction: the scale is one for their noise too."
        )
    return full


def _fields(state: Any, name: str) -> Iterator[Any]:
    """Fields of that name in the named tuples of an optax state; parameters, which may use the name too, are not looked into."""
    if hasattr(state, "_fields"):
        if name in state._fields:
            yield getattr(state, name)
            return
        state = tuple(state)
    if isinstance(state, (tuple, list)):
        for part in state:
            yield from _fields(part, name)
    elif isinstance(state, dict):
        for part in state.values():
            yield from _fields(part, name)
