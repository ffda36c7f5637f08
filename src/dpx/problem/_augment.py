"""Augmentation multiplicity: one example's gradient is averaged over several views before it is clipped."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Key

from .._checks import flag, function, positive_int
from ._per_example import takes_key


def augment(loss: Any, augmentation: Any, multiplicity: Any, *, has_aux: bool = False) -> "Augmented":
    r"""The loss of one example, averaged over `multiplicity` random views of it: costs time, and no privacy.

    ```python
    def flip(x, y, *, key):
        return jnp.where(jr.bernoulli(key), x[..., ::-1], x), y

    private_grad = plan.private_gradient(dpx.augment(loss, flip, multiplicity=8))
    ```

    The average's gradient is clipped, not each view's, so the sensitivity is that of one example. `Ghost` treats the views like a sequence axis and
    never holds one gradient for each of them.

    **Arguments:**

    - `loss`: `loss(model, *example)`, with `key=` if it wants randomness of its own.
    - `augmentation`: `augmentation(*example, key=key)` gives a tuple, the arguments of the loss after the model.
    - `multiplicity`: number $K \ge 1$ of views.
    - `has_aux`: whether the loss returns `(scalar, aux)`; the aux outputs are stacked along a leading axis of length $K$.

    **Returns:**

    A loss that takes a `key`, for `PrivateGradient` or `PrivacyPlan.private_gradient`.

    ??? cite "Reference"

        De et al., *Unlocking high-accuracy differentially private image classification through scale*, 2022; Fort et al., *Drawing multiple
        augmentation samples per image during training*, 2021.
    """
    function("dpx.augment(loss=...)", loss, "loss(model, *example)")
    function("dpx.augment(augmentation=...)", augmentation, "augmentation(*example, key=key)")
    multiplicity = positive_int("dpx.augment(multiplicity=...)", multiplicity)
    return Augmented(loss, augmentation, multiplicity, flag("dpx.augment(has_aux=...)", has_aux))


class Augmented(eqx.Module):
    """What `augment` returns: the mean of a loss over random views of one example.

    **Arguments:** those of `augment`.
    """

    loss: Callable[..., Any]
    augmentation: Callable[..., Any]
    multiplicity: int = eqx.field(static=True)
    has_aux: bool = eqx.field(static=True)

    def __call__(self, model: Any, *example: Any, key: Key[Array, ""]) -> Any:
        """The mean loss of one example."""

        def view(number: Array) -> Any:
            view_key = jr.fold_in(key, number)
            seen = self.augmentation(*example, key=jr.fold_in(view_key, 0))
            if not isinstance(seen, tuple):
                raise ValueError(
                    f"`augmentation(*example, key=key)` must return a tuple, the arguments of the loss after the model; got {type(seen).__name__}."
                )
            own = {"key": jr.fold_in(view_key, 1)} if takes_key(self.loss, len(seen)) else {}
            return self.loss(model, *seen, **own)

        out = jax.vmap(view)(jnp.arange(self.multiplicity))
        if self.has_aux:
            return jnp.mean(out[0]), out[1]
        return jnp.mean(out)
