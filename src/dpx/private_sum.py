"""`PrivateSum`: the private sum of anything that is computed for each example, or for each user."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._checks import positive_int
from ._loss import check_batch
from ._sensitive import Sensitive
from ._tree import is_finite, path_str, wide_dtype
from ._types import Participation, RealScalarLike
from .clipping import AbstractClipping
from .gradients import Vectorized
from .noise import AbstractNoise
from .private_gradient import PrivateGradient, PrivateGradientState, Stated


class PrivateSum(eqx.Module):
    r"""The private sum $\big(\sum_i \mathrm{clip}(f_i) + \text{noise}\big) / \text{normalizer}$ of any function's outputs, one for each example.

    ```python
    update = dpx.model_update(loss, optax.sgd(0.1), steps=5)  # of one user's data, by several local steps
    private_sum = dpx.PrivateSum(update, dpx.FlatClipping(1.0), dpx.IndependentGaussian(1.1), normalizer=64)
    state = private_sum.init(model, batch)
    mean_update, state, diagnostics = private_sum(model, batch, state, mask=mask)
    ```

    The general primitive of private aggregation: of model updates (federated averaging), statistics, embeddings. A plan makes one with
    `PrivacyPlan.private_sum`.

    !!! success "Guarantee"

        That of `PrivateGradient`: adding or removing one example, or user, moves the sum before noise by at most `sensitivity`, for all inputs;
        an output that is not finite contributes zero.

    **Arguments:**

    - `fn`: `fn(model, *example) -> PyTree` of floating-point arrays, for ONE example or user. If it takes a keyword `key` it gets its own.
    - `clipping`, `noise`, `normalizer`, `steps`, `participation`: as for `PrivateGradient`.
    - `microbatch_size`: how many examples are computed, and outputs held, at once; by default all.
    - `stated`: as for `PrivateGradient`: what a plan that made this states about it.

    ??? cite "Reference"

        McMahan et al., *Learning differentially private recurrent language models*, ICLR 2018 (DP-FedAvg).
    """

    fn: Callable[..., Any]
    clipping: AbstractClipping
    noise: AbstractNoise
    normalizer: RealScalarLike
    microbatch_size: int | None = eqx.field(static=True)
    steps: int | None = eqx.field(static=True)
    participation: Participation | None = eqx.field(static=True)
    stated: Stated | None = eqx.field(static=True)

    def __init__(
        self,
        fn: Any,
        clipping: AbstractClipping,
        noise: AbstractNoise,
        *,
        normalizer: RealScalarLike = 1.0,
        microbatch_size: Any = None,
        steps: Any = None,
        participation: Participation | None = None,
        stated: Stated | None = None,
    ):
        if not callable(fn):
            raise ValueError(f"`PrivateSum(fn=...)` must be a function `fn(model, *example)`; got {fn!r}.")
        self.fn, self.clipping, self.noise, self.normalizer = fn, clipping, noise, normalizer
        name = "PrivateSum(microbatch_size=...)"
        self.microbatch_size = None if microbatch_size is None else positive_int(name, microbatch_size)
        self.steps, self.participation, self.stated = steps, participation, stated
        self._aggregate(None)  # what is wrong with clipping, noise or steps shall be said now

    @property
    def sensitivity(self) -> float:
        """How far one example, added or removed, can move the sum before noise."""
        return float(self.clipping.sensitivity)

    def init(self, model: PyTree, batch: Any, *, key: Any = None) -> PrivateGradientState:
        """The state before the first step.

        **Arguments:**

        - `model`: what `fn` takes first.
        - `batch`: a batch, or `jax.ShapeDtypeStruct`s of one; only shapes matter, which the shape of the output follows from.
        - `key`: the secret of the noise; by default fresh from the operating system.
        """
        return self._aggregate(model).init(self._zeros(model, batch), key=key)

    def __call__(
        self, model: PyTree, batch: Any, state: PrivateGradientState, *, mask: Any = None, key: Any = None
    ) -> tuple[PyTree, PrivateGradientState, Sensitive]:
        """One private sum.

        **Arguments:** as for `PrivateGradient`; `mask` has one entry for each example, or user.

        **Returns:** the private sum, with the structure of `fn`'s output; the next state; and `Sensitive` diagnostics, whose `norms` are those
        of the outputs.
        """
        if self.stated is not None and not hasattr(self, "_is_verified"):
            self._aggregate(None)
            object.__setattr__(self, "_is_verified", True)  # as `PrivateGradient` does
        return self._step(model, batch, state, mask, key)

    @eqx.filter_jit
    def _step(self, model: PyTree, batch: Any, state: PrivateGradientState, mask: Any, key: Any):
        # zeros, but NaN where every output would be: that a model is not finite is public, and must not pass for an empty batch
        is_good = is_finite(eqx.filter(model, eqx.is_inexact_array))
        weights = jax.tree.map(lambda x: jnp.where(is_good, x, jnp.full_like(x, jnp.nan)), self._zeros(model, batch))
        return self._aggregate(model)(weights, batch, state, mask=mask, key=key)

    def clipped_sum(self, model: PyTree, batch: Any, *, mask: Any = None, key: Any = None) -> Sensitive:
        """The sum of clipped outputs, without noise and not divided."""
        if key is None and not _takes_key(self.fn):
            key = jax.random.key(0)
        return self._aggregate(model).clipped_sum(self._zeros(model, batch), batch, mask=mask, key=key)

    def _aggregate(self, model: PyTree) -> PrivateGradient:
        # the gradient of <p, fn(example)> with respect to p is fn(example): clipping, noise and checks are PrivateGradient's
        return PrivateGradient(
            _InnerProduct(self.fn, model),
            self.clipping,
            self.noise,
            normalizer=self.normalizer,
            method=Vectorized(self.microbatch_size),
            steps=self.steps,
            participation=self.participation,
            stated=self.stated,
        )

    def _zeros(self, model: PyTree, batch: Any) -> PyTree:
        is_struct = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(batch))
        batch = batch if is_struct else check_batch(batch)[0]
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        struct = eqx.filter_eval_shape(_InnerProduct(self.fn, model).output, one, jax.random.key(0))
        for path, leaf in jax.tree_util.tree_leaves_with_path(struct):
            if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
                got = leaf.dtype if hasattr(leaf, "dtype") else repr(leaf)
                raise ValueError(
                    f"`PrivateSum(fn=...)` must return a PyTree of real floating-point arrays; its output{path_str(path)} is {got}. "
                    "Convert it with `.astype(jnp.float32)`, or leave it out."
                )
        return jax.tree.map(lambda x: jnp.zeros(x.shape, wide_dtype(x.dtype)), struct)


class _InnerProduct(eqx.Module):
    """The loss whose gradient is the output of `fn`.

    **Arguments:**

    - `fn`, `model`: the function and its first argument.
    """

    fn: Callable[..., Any]
    model: PyTree

    def output(self, example: tuple[Any, ...], key: Any) -> PyTree:
        return self.fn(self.model, *example, **({"key": key} if _takes_key(self.fn) else {}))

    def __call__(self, weights: PyTree, *example: Any, key: Any) -> Array:
        out = jax.tree.map(jax.lax.stop_gradient, self.output(example, key))
        terms = jax.tree.map(lambda w, x: jnp.sum(w * x.astype(w.dtype)), weights, out)
        return jax.tree.reduce(lambda a, b: a + b.astype(a.dtype), terms, jnp.zeros(()))


def _takes_key(fn: Callable[..., Any]) -> bool:
    import inspect

    try:
        return "key" in inspect.signature(fn).parameters
    except (TypeError, ValueError):  # some callables of C have none
        return False


def model_update(loss: Callable[..., Any], optimizer: Any, steps: Any = 1) -> Callable[..., PyTree]:
    r"""What several local steps on one user's data change in the model: the update that DP-FedAvg clips.

    **Arguments:**

    - `loss`: `loss(model, *example)` of one example.
    - `optimizer`: an `optax.GradientTransformation`, which starts afresh for every user.
    - `steps`: number of full-batch steps on the user's examples.

    **Returns:**

    `fn(model, *examples) -> update` for `PrivateSum`, where `examples` are one user's, stacked on a leading axis; the update has the structure of
    `eqx.filter(model, eqx.is_inexact_array)`, and is what to ADD to the model.
    """
    steps = positive_int("dpx.model_update(steps=...)", steps)

    def fn(model: PyTree, *examples: Any) -> PyTree:
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def mean_loss(params):
            losses = jax.vmap(lambda *example: loss(eqx.combine(params, static), *example))(*examples)
            return jnp.mean(losses)

        def step(carry, _):
            now, state = carry
            updates, state = optimizer.update(jax.grad(mean_loss)(now), state, now)
            return (eqx.apply_updates(now, updates), state), None

        (after, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return jax.tree.map(lambda a, b: a.astype(wide_dtype(a.dtype)) - b.astype(wide_dtype(b.dtype)), after, params)

    return fn
