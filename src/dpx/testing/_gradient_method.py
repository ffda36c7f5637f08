"""The laws of gradient methods."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from .._checks import instance
from ..clipping import FlatClipping, GroupClipping
from ..gradients import AbstractGradientMethod
from ..noise import IndependentGaussian, Laplace
from ..private_gradient import PrivateGradient
from ._clipping import norms_of_rows
from ._loss import naive_contribution
from ._report import check_false_alarm, require
from ._zoo import zoo

_SIZES = (1, 5)  # among them none that a microbatch of 2, 3 or 4 divides
_MASK = "a masked example contributes exactly nothing, whatever it contains"
_NAIVE = "the clipped sum is that of a loop over examples"


def check_gradient_method(
    method: AbstractGradientMethod, *, kinds: tuple[str, ...] | None = None, seed: int = 0, false_alarm: float = 1e-6
) -> None:
    r"""Checks that a gradient method computes the clipped sum of its definition.

    It is run on a few small models (linear, a perceptron, an embedding with a number that is not trained, a convolution), with flat, grouped and
    $\ell_1$ clipping, batches of 7, 5, 1 and no examples.

    !!! success "Laws"

        - The sum equals that of a naive loop, gradients clipped and added up in float64; so do the norms and losses of the diagnostics.
        - A masked example contributes exactly nothing, whatever it contains; so does one whose gradient is not finite.
        - One example alone contributes at most the clip norm in float64, at any scale; an empty batch gives the zero sum.

    **Arguments:**

    - `method`: the gradient method.
    - `kinds`: on which models, of `"list"`, `"perceptron"`, `"embedding"` and `"convolution"`; by default on all.
    - `seed`: of models and batches.
    - `false_alarm`: as elsewhere; nothing here is a matter of chance.

    **Raises:** `AssertionError` that names the law, the model, the clipping and the batch.
    """
    instance("check_gradient_method(method=...)", method, AbstractGradientMethod, "dpx.Vectorized()")
    check_false_alarm("check_gradient_method", false_alarm)
    for name, model, loss in zoo(seed):
        if kinds is not None and name not in kinds:
            continue
        params = eqx.filter(model, eqx.is_inexact_array)
        groups = (
            GroupClipping([0.05 * (k + 1) for k in range(len(jax.tree.leaves(params)))]) if name == "list" else None
        )
        clippings = [FlatClipping(0.3)] if name != "list" else [FlatClipping(0.3), FlatClipping(0.3, order=1), groups]
        for clipping in clippings:
            _check(method, name, model, loss, params, clipping, seed, clipping is clippings[0] and name == "list")


def _check(
    method: Any, name: str, model: Any, loss: Any, params: Any, clipping: Any, seed: int, is_first: bool
) -> None:
    noise = IndependentGaussian(1.0) if clipping.order == 2 else Laplace(1.0)
    private_grad = PrivateGradient(loss, clipping, noise, method=method)
    gradient = jax.jit(
        jax.grad(lambda p, e: loss(eqx.combine(p, eqx.filter(model, eqx.is_inexact_array, inverse=True)), *e))
    )
    where = f"on the {name} model with `{type(clipping).__name__}` of order {clipping.order}"
    sensitivity = private_grad.sensitivity

    def clipped(batch: Any, mask: Any = None) -> list[np.ndarray]:
        return [
            np.asarray(x, np.float64)
            for x in jax.tree.leaves(private_grad.clipped_sum(model, batch, mask=mask).reveal())
        ]

    def loop(batch: Any, mask: np.ndarray) -> list[np.ndarray]:
        total = [np.zeros(x.shape) for x in jax.tree.leaves(params)]
        for i in np.flatnonzero(mask):
            leaves = [
                np.asarray(x, np.float64)
                for x in jax.tree.leaves(gradient(params, jax.tree.map(lambda x, i=i: x[i], batch)))
            ]
            total = [t + x for t, x in zip(total, naive_contribution(clipping, leaves, params), strict=True)]
        return total

    def compare(law: str, got: list[np.ndarray], expected: list[np.ndarray], batch: str, allowed: float = 2e-5) -> None:
        apart = max(
            float(np.max(np.abs(a - b), initial=0.0)) if np.isfinite(a).all() else np.inf
            for a, b in zip(got, expected, strict=True)
        )
        require(
            apart <= allowed * sensitivity,
            method,
            law,
            f"a difference of {apart:.3g}, {where}, {batch}; the clip norm is {sensitivity:.4g}",
        )

    size = 7
    batch = loss.batch(size, jr.key(seed))
    everyone, some = np.ones(size, bool), np.arange(size) % 3 != 1
    for mask in (everyone, some, ~everyone):
        shown = f"a batch of {size}, mask {mask.astype(int).tolist()}"
        compare(f"{_NAIVE} that are not masked", clipped(batch, mask), loop(batch, mask), shown)
    inexact = lambda f: jax.tree.map(lambda x: f(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, batch)
    mask = np.arange(size) != 2
    reference = clipped(batch, mask)
    for junk in (0.0, 1e30, np.inf, np.nan):
        dirty = inexact(lambda x, junk=junk: x.at[2].set(junk))
        compare(_MASK, clipped(dirty, mask), reference, f"the masked example is {junk:g}", 0.0)
    poisoned = inexact(lambda x: x.at[2].set(np.nan))
    compare(
        "an example whose gradient is not finite contributes nothing",
        clipped(poisoned, everyone),
        reference,
        "the third example of 7 is NaN",
    )
    for scale in (1e-20, 1.0, 1e8, 1e18):
        leaves = [x[None] for x in clipped(inexact(lambda x, scale=scale: x * np.float32(scale)), ~mask)]
        norm = float(norms_of_rows(leaves, clipping.order)[0])
        require(
            norm <= sensitivity * (1 + 1e-6),
            method,
            "one example contributes at most the clip norm, in float64",
            f"{norm:.9g} of {sensitivity:.9g}, {where}, an example multiplied by {scale:g}",
        )
    if not is_first:
        return
    for fewer in _SIZES:
        part = jax.tree.map(lambda x, fewer=fewer: x[:fewer], batch)
        compare(_NAIVE, clipped(part), loop(part, np.ones(fewer, bool)), f"a batch of {fewer}")
    empty = jax.tree.map(lambda x: x[:0], batch)
    require(
        all(not x.any() for x in clipped(empty)), method, "an empty batch gives the zero sum", f"another one, {where}"
    )
    _, _, diagnostics = private_grad(model, batch, private_grad.init(model, key=jr.key(0)), mask=mask)
    seen = diagnostics.reveal()
    for i in range(size):
        example = jax.tree.map(lambda x, i=i: x[i], batch)
        leaves = [np.asarray(x, np.float64)[None] for x in jax.tree.leaves(gradient(params, example))]
        expected = float(norms_of_rows(leaves, clipping.order)[0]) * mask[i], float(loss(model, *example)) * mask[i]
        got = float(seen.norms[i]), float(seen.losses[i])
        if clipping.order == 1 or max(clipping.labels(params)) == 0:
            require(
                np.allclose(got, expected, rtol=1e-3, atol=1e-6),
                method,
                "the diagnostics are norm and loss of each example, 0 where masked",
                f"{got} for example {i}, and {expected} by the definition, {where}",
            )
