"""Adam without the noise in its second moment."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from .._checks import is_traced, positive_float, real_number
from .._tree import wide, wide_dtype
from .._types import Params, RealScalarLike
from ._decay import check_decay

_MSG_NO_VARIANCE = (
    "`{name}` must know the variance of the noise in the gradients: call `optimizer.update(grads, opt_state, params, "
    "noise_variance=private_grad.noise_variance(model, state))`, with the state before the step. Without noise give 0."
)


class ScaleByAdamBCState(NamedTuple):
    """Moving averages of `scale_by_adam_bc`: of gradients, of their squares, and of the noise variance of each leaf."""

    count: Int[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride]
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
    b1, b2 = check_decay(f"{call}(b1=...)", b1), check_decay(f"{call}(b2=...)", b2)
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
    if not callable(learning_rate) or isinstance(learning_rate, type):
        if not is_traced(learning_rate) and not math.isfinite(real_number("adam_bc(learning_rate=...)", learning_rate)):
            raise ValueError(
                f"`adam_bc(learning_rate=...)` must be a finite number or an optax schedule; got {learning_rate}."
            )
    return optax.chain(scale_by_adam_bc(b1, b2, eps, floor), optax.scale_by_learning_rate(learning_rate))


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
