"""The laws of one private gradient: of a loss, a model and a batch."""

import dataclasses
import inspect
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from .._checks import instance
from ..private_gradient import PrivateGradient
from ._clipping import before_rescaling, norms_of_rows
from ._report import check_false_alarm, require

_NAIVE = "the clipped sum is that of one gradient after the other, clipped and added up in float64"
_BOUND = "one example's contribution, in float64, is at most the sensitivity"


def check_loss(
    private_gradient: PrivateGradient,
    model: PyTree,
    batch: Any,
    *,
    most: int = 8,
    tolerance: float = 1e-4,
    seed: int = 0,
    false_alarm: float = 1e-6,
) -> None:
    r"""Checks a private gradient on a model and a batch of your own: engine against definition, and the bound.

    Sums are compared before the noise, which `check_noise` looks at. Frozen leaves, groups, order and state of the clipping are as in training.

    !!! success "Laws"

        - The clipped sum equals that of a naive loop: `eqx.filter_grad` of every example, its norms in float64, the clipping's factors.
        - Each example alone contributes at most the sensitivity, in float64; examples that are masked, or whose gradient is not finite, nothing.
        - What the examples contribute alone adds up to what they contribute together: they do not mix.

    **Arguments:**

    - `private_gradient`: for single examples (`unit="example"`), and without noise on integers.
    - `model`, `batch`: as in training.
    - `most`: how many examples of the batch are looked at.
    - `tolerance`: difference to the naive loop, over the sensitivity: more for models of half precision.
    - `seed`: of the keys, where the loss takes one.
    - `false_alarm`: as elsewhere; nothing here is a matter of chance.

    **Raises:** `AssertionError` that names the law and the example.
    """
    instance("check_loss(private_gradient=...)", private_gradient, PrivateGradient, "plan.private_gradient(loss)")
    check_false_alarm("check_loss", false_alarm)
    if private_gradient.unit != "example":
        raise ValueError("`check_loss(private_gradient=...)` must be for single examples; got `unit='user'`.")
    batch = jax.tree.map(lambda x: jnp.asarray(x)[:most], batch)
    size = len(jax.tree.leaves(batch)[0])
    takes_key = _takes_key(private_gradient.loss, len(batch))
    examined, rows = private_gradient, batch
    if takes_key:
        # a key goes by the rank among real examples: who is looked at alone must keep the key that it has in the batch
        keys = jax.vmap(jr.fold_in, in_axes=(None, 0))(jr.key(seed), jnp.arange(size))
        examined = dataclasses.replace(private_gradient, loss=_with_its_key(private_gradient.loss))
        rows = (*batch, jr.key_data(keys))
    params, frozen = eqx.partition(model, private_gradient.filter_spec)
    clipping, sensitivity = private_gradient.clipping, private_gradient.sensitivity

    def clipped(mask: np.ndarray) -> list[np.ndarray]:
        return before_rescaling(clipping, examined.clipped_sum(model, rows, mask=mask).reveal(), params)

    alone = [clipped(np.arange(size) == i) for i in range(size)]
    for i, leaves in enumerate(alone):
        norm = float(norms_of_rows([x[None] for x in leaves], clipping.order)[0])
        require(
            norm <= sensitivity * (1 + 1e-6),
            private_gradient,
            _BOUND,
            f"{norm:.9g} from example {i}, of a sensitivity of {sensitivity:.9g}",
        )
    nobody = clipped(np.zeros(size, bool))
    require(
        all(not x.any() for x in nobody),
        private_gradient,
        "masked examples contribute nothing",
        "a sum that is not zero where all are masked",
    )
    everyone, some = np.ones(size, bool), np.arange(size) % 3 != 1
    for mask in (everyone, some):
        together = clipped(mask)
        expected = [
            sum((leaves[k] for leaves, m in zip(alone, mask, strict=True) if m), np.zeros(x.shape))
            for k, x in enumerate(together)
        ]
        apart = max(float(np.max(np.abs(a - b), initial=0.0)) for a, b in zip(together, expected, strict=True))
        require(
            apart <= tolerance * sensitivity,
            private_gradient,
            "examples do not mix: their contributions add up",
            f"a difference of {apart:.3g} between the sum at once and of each alone, with the mask {mask.tolist()}",
        )
    if takes_key:
        published = private_gradient.clipped_sum(model, batch, mask=everyone, key=jr.key(seed)).reveal()
        pairs = zip(before_rescaling(clipping, published, params), clipped(everyone), strict=True)
        apart = max(float(np.max(np.abs(a - b), initial=0.0)) for a, b in pairs)
        require(
            apart <= tolerance * sensitivity,
            private_gradient,
            "the key of an example is folded by its rank among real ones",
            f"a difference of {apart:.3g} to the sum with these keys",
        )

    loss = examined.loss

    def scalar(params: Any, example: Any) -> Any:
        out = loss(eqx.combine(params, frozen), *example)
        return out[0] if private_gradient.has_aux else out

    gradient = jax.jit(jax.grad(scalar))
    for i in range(size):
        leaves = jax.tree.leaves(gradient(params, jax.tree.map(lambda x, i=i: x[i], rows)))
        expected = naive_contribution(clipping, [_float64(x) for x in leaves], params)
        apart = max(float(np.max(np.abs(a - b), initial=0.0)) for a, b in zip(alone[i], expected, strict=True))
        require(
            apart <= tolerance * sensitivity,
            private_gradient,
            _NAIVE,
            f"a difference of {apart:.3g} for example {i}, of a sensitivity of {sensitivity:.6g}",
        )


def _float64(x: Any) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32) if x.dtype.itemsize < 4 else x, np.float64)


def naive_contribution(clipping: Any, leaves: list[np.ndarray], params: Any) -> list[np.ndarray]:
    """What one example adds to the sum, from its gradient in float64; nothing if that is not finite."""
    if not all(np.isfinite(x).all() for x in leaves):
        return [np.zeros(x.shape) for x in leaves]
    labels = clipping.labels(params)
    norms = [
        float(
            norms_of_rows(
                [np.concatenate([np.ravel(x) for x, k in zip(leaves, labels, strict=True) if k == group])[None]],
                clipping.order,
            )[0]
        )
        for group in range(max(labels) + 1)
    ]
    factors = np.asarray(clipping.factors(jnp.asarray([norms], jnp.float32), clipping.init(params)), np.float64)[0]
    return [factors[k] * x for x, k in zip(leaves, labels, strict=True)]


def _with_its_key(loss: Any) -> Any:
    """The loss of an example whose key, in words, is its last argument."""
    return lambda model, *example: loss(model, *example[:-1], key=jr.wrap_key_data(example[-1]))


def _takes_key(loss: Any, positional: int) -> bool:
    try:
        parameters = list(inspect.signature(loss).parameters.values())
    except (TypeError, ValueError):
        return False
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return "key" in names and (
        any(p.name == "key" and p.kind == p.KEYWORD_ONLY for p in parameters) or names.index("key") > positional
    )
