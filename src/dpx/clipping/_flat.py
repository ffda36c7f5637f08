"""One clip norm for the whole gradient."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._checks import choice, described, flag, is_traced, positive_scalar, rounded_up, usable
from .._types import RealScalarLike
from ._base import AbstractClipping, AbstractOneGroupClipping

# Within these a float32 sum of squares neither overflows before nor underflows at the clip norm.
SMALLEST, LARGEST = 1e-12, 1e15


def norm_scalar(call: str, value: RealScalarLike) -> Float[Array, ""]:
    """A clip norm as a float32 scalar, rounded up; raises if float32 sums of squares are not exact around it (a traced one is NaN then)."""
    norm = positive_scalar(call, value)
    if is_traced(value):
        return usable_norm(norm)
    # the number that was typed: inside `jit` the array made of it cannot be looked at
    if not SMALLEST <= (number := float(np.asarray(value))) <= LARGEST:
        raise ValueError(
            f"`{call}` must lie between {SMALLEST} and {LARGEST}, where float32 norms are exact; got {number:.6g}. Scale the loss instead."
        )
    return norm


def usable_norm(norm: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Clip norms that were changed after they were checked: NaN where they would be refused."""
    return usable(norm, (norm >= SMALLEST) & (norm <= rounded_up(LARGEST)))


class FlatClipping(AbstractOneGroupClipping):
    r"""Scales a gradient $g$ down to the clip norm: $g \min(1, C / \|g\|)$.

    !!! success "Guarantee"

        One example's contribution has norm at most `sensitivity` $(1 + 10^{-6})$, for every input and dtype. A gradient whose norm
        is not finite in float32 contributes exactly zero.

    **Arguments:**

    - `norm`: the clip norm $C > 0$. A number, or an array for a sweep with `vmap`.
    - `unit_norm`: divide what is clipped by $C$, so that the sensitivity is 1 and the learning rate need not follow the clip norm
        (De et al. 2022).
    - `order`: norms are $\ell_2$ (2, for Gaussian noise) or $\ell_1$ (1, for Laplace noise).

    ??? cite "Reference"

        Abadi et al., *Deep learning with differential privacy*, CCS 2016. De et al., *Unlocking high-accuracy differentially
        private image classification through scale*, 2022.
    """

    norm: Float[Array, ""]
    unit_norm: bool = eqx.field(static=True)
    order: int = eqx.field(static=True)

    def __init__(self, norm: RealScalarLike, unit_norm: bool = False, order: int = 2):
        self.norm = norm_scalar("FlatClipping(norm=...)", norm)
        self.unit_norm = flag("FlatClipping(unit_norm=...)", unit_norm)
        self.order = choice("FlatClipping(order=...)", order, (1, 2))

    @property
    def sensitivity(self) -> Float[Array, ""]:
        norm = usable_norm(self.norm)
        return usable(jnp.ones_like(norm), norm > 0) if self.unit_norm else norm

    def factors(self, norms: Float[Array, "batch groups"], state: PyTree) -> Float[Array, "batch groups"]:
        del state
        # the maximum keeps 0 / 0 away, and makes the factor exactly 1 up to the clip norm
        return (1.0 if self.unit_norm else self.norm) / jnp.maximum(norms, self.norm)


def as_clipping(call: str, clipping: Any) -> AbstractClipping:
    """What was given as `clipping`: a number $C$ stands for `FlatClipping(C)`. Raises `ValueError` for what is neither."""
    if isinstance(clipping, AbstractClipping):
        return clipping
    if isinstance(clipping, type) and issubclass(clipping, AbstractClipping):
        made = f"{clipping.__name__}{'()' if clipping.__name__ == 'NoClipping' else '(1.0)'}"
        raise ValueError(f"`{call}` must be made, such as `{made}`; got the class itself.")
    number: Any = clipping
    is_array = eqx.is_array(clipping) and clipping.shape == () and jnp.issubdtype(clipping.dtype, jnp.floating)
    if is_array or (isinstance(clipping, int | float | np.number) and not isinstance(clipping, bool)):
        positive_scalar(call, number, "It is the clip norm; without one, and without privacy, use `NoClipping()`.")
        return FlatClipping(number)
    raise ValueError(
        f"`{call}` must be a clip norm, such as 1.0, or a clipping, such as `FlatClipping(1.0)`; got {described(clipping)}."
    )
