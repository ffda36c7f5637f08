"""`PrivateSum`: the private sum of anything that is computed for each example, or for each user."""

from collections.abc import Callable
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from .._checks import check_tuple, choice, function, instance, positive_int, positive_scalar
from .._sensitive import Sensitive
from .._tree import is_finite, path_str, wide_dtype
from .._types import Batch, Integer, Mask, Participation, PRNGKey, RealScalarLike, Unchecked, Unit
from ..clipping import AbstractClipping, as_clipping
from ..gradients import Vectorized
from ..mechanism import Mechanism, check_participation
from ..noise import AbstractNoise, check_noise
from ..problem import (
    check_arguments,
    check_batch,
    check_user_batch,
    has_parameter,
    keywords,
    takes_key,
    warn_of_strange_batch,
)
from ._private_gradient import PrivateGradient
from ._state import PrivateGradientState, check_state
from ._stated import Stated

_MSG_RAGGED = (
    "`PrivateSum(fn=...)`: users have different numbers of rows, and those missing are filled up with zeros, so that `fn` must know which are "
    "real: let it take a keyword `mask`, as `fn(model, *examples, mask)`, of one boolean for each row (`dpx.model_update` does). If rows of zeros "
    "change nothing, give `mask=mask.any(1)` instead."
)


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

    - `fn`: `fn(model, *example) -> PyTree` of floating-point arrays, for ONE example or user. If it takes a keyword `key` it gets its own. With
        `unit="user"` its arguments are one user's rows, stacked, and it takes a keyword `mask`: which of them are real, the others being padding.
    - `clipping`, `noise`, `normalizer`, `steps`, `participation`, `physical_batch_size`: as for `PrivateGradient`.
    - `microbatch_size`: how many examples are computed, and outputs held, at once; by default all.
    - `stated`: as for `PrivateGradient`: what a plan that made this states about it.
    - `unit`: `"example"`, or `"user"`: every leaf of the batch has two leading axes, (users, rows of a user), and so has the mask.

    ??? cite "Reference"

        McMahan et al., *Learning differentially private recurrent language models*, ICLR 2018 (DP-FedAvg).
    """

    fn: Callable[..., Any]
    clipping: AbstractClipping
    noise: AbstractNoise
    normalizer: Float[Array, ""]
    microbatch_size: int | None = eqx.field(static=True)
    steps: int | None = eqx.field(static=True)
    participation: Participation = eqx.field(static=True)
    unit: str = eqx.field(static=True)
    stated: Stated | None = eqx.field(static=True)
    physical_batch_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        fn: Any,
        clipping: AbstractClipping | RealScalarLike,
        noise: AbstractNoise,
        *,
        normalizer: RealScalarLike = 1.0,
        microbatch_size: Integer | None = None,
        steps: Integer | None = None,
        participation: Participation | None = None,
        unit: Unchecked[Unit] = "example",
        stated: Stated | None = None,
        physical_batch_size: Integer | None = None,
    ):
        self.fn = function("PrivateSum(fn=...)", fn, "fn(model, *example)")
        self.clipping = as_clipping("PrivateSum(clipping=...)", clipping)
        check_noise("PrivateSum(noise=...)", noise)
        self.noise = noise
        self.normalizer = positive_scalar("PrivateSum(normalizer=...)", normalizer)
        name = "PrivateSum(microbatch_size=...)"
        self.microbatch_size = None if microbatch_size is None else positive_int(name, microbatch_size)
        self.steps = None if steps is None else positive_int("PrivateSum(steps=...)", steps)
        self.participation = check_participation("PrivateSum(participation=...)", participation)
        self.unit = choice("PrivateSum(unit=...)", unit, get_args(Unit))
        self.stated = stated
        call = "PrivateSum(physical_batch_size=...)"
        self.physical_batch_size = None if physical_batch_size is None else positive_int(call, physical_batch_size)
        self._aggregate(None)  # what is wrong with clipping, noise or steps shall be said now

    @property
    def mechanism(self) -> Mechanism:
        """What is made private, and by what noise: the arithmetic of this sum's parts."""
        return Mechanism(self.clipping, self.noise, {}, self.steps, self.participation)

    @property
    def sensitivity(self) -> float:
        """How far one example, added or removed, can move the sum before noise."""
        return float(self.mechanism.sensitivity)

    def init(self, model: PyTree, batch: Batch, *, key: PRNGKey | None = None) -> PrivateGradientState:
        """The state before the first step.

        **Arguments:**

        - `model`: what `fn` takes first.
        - `batch`: a batch, or `jax.ShapeDtypeStruct`s of one; only shapes matter, which the shape of the output follows from.
        - `key`: the secret of the noise; by default fresh from the operating system.
        """
        check_tuple("batch", batch)
        is_struct = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(batch))
        batch = batch if is_struct else check_batch(batch)[0]
        return self._aggregate(model).init(self._zeros(model, batch), key=key)

    def __call__(
        self,
        model: PyTree,
        batch: Batch,
        state: PrivateGradientState,
        *,
        mask: Mask | None = None,
        key: PRNGKey | None = None,
    ) -> tuple[PyTree, PrivateGradientState, Sensitive]:
        """One private sum.

        **Arguments:** as for `PrivateGradient`; `mask` has one entry for each example, or, with `unit="user"`, for each row of each user.

        **Returns:** the private sum, with the structure of `fn`'s output; the next state; and `Sensitive` diagnostics, whose `norms` are those
        of the outputs.
        """
        check_arguments(model, batch, mask, key)
        check_state(batch, state)
        if self.stated is not None and not hasattr(self, "_is_verified"):
            self._aggregate(None)
            object.__setattr__(self, "_is_verified", True)  # as `PrivateGradient` does
        return self._step(model, batch, state, mask, key)

    @eqx.filter_jit
    def _step(
        self, model: PyTree, batch: Batch, state: PrivateGradientState, mask: Any, key: Any
    ) -> tuple[PyTree, PrivateGradientState, Sensitive]:
        checked, size = check_batch(batch)
        # zeros, but NaN where every output would be: that a model is not finite is public, and must not pass for an empty batch
        is_good = is_finite(eqx.filter(model, eqx.is_inexact_array))
        weights = jax.tree.map(lambda x: jnp.where(is_good, x, jnp.full_like(x, jnp.nan)), self._zeros(model, checked))
        units, which = self._units(checked, size, mask)
        out = self._aggregate(model)(weights, units, state, mask=which, key=key)
        if mask is None:
            warn_of_strange_batch(self.physical_batch_size, batch)
        return out

    def clipped_sum(
        self, model: PyTree, batch: Batch, *, mask: Mask | None = None, key: PRNGKey | None = None
    ) -> Sensitive:
        """The sum of clipped outputs, without noise and not divided."""
        check_arguments(model, batch, mask, key)
        batch, size = check_batch(batch)
        if key is None and "key" not in wanted_by(self.fn, self.unit, batch):
            key = jax.random.key(0)
        units, mask = self._units(batch, size, mask)
        return self._aggregate(model).clipped_sum(self._zeros(model, batch), units, mask=mask, key=key)

    def _units(self, batch: tuple[Any, ...], size: int, mask: Any) -> tuple[tuple[Any, Any], Any]:
        """The batch with, beside it, which rows of each user are real, where `fn` wants to know; and which users, or examples, are."""
        if self.unit != "user":
            return (batch, None), mask
        is_ragged = mask is not None and jnp.ndim(mask) == 2
        (batch, rows), users = check_user_batch(batch, size, mask)
        if "mask" in wanted_by(self.fn, self.unit, batch):
            return (batch, rows), users
        if is_ragged:
            raise ValueError(_MSG_RAGGED)
        return (batch, None), users

    def _aggregate(self, model: PyTree) -> PrivateGradient:
        # the gradient of <p, fn(example)> with respect to p is fn(example): clipping, noise and checks are PrivateGradient's
        return PrivateGradient(
            _InnerProduct(self.fn, model, self.unit),
            self.clipping,
            self.noise,
            normalizer=self.normalizer,
            method=Vectorized(self.microbatch_size),
            steps=self.steps,
            participation=self.participation,
            stated=self.stated,
        )

    def _zeros(self, model: PyTree, batch: tuple[Any, ...]) -> PyTree:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        rows = None
        if "mask" in wanted_by(self.fn, self.unit, batch):
            rows = jax.ShapeDtypeStruct(jax.tree.leaves(one)[0].shape[:1], jnp.bool_)
        struct = eqx.filter_eval_shape(_InnerProduct(self.fn, model, self.unit).output, one, rows, jax.random.key(0))
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
    - `unit`: as for `PrivateSum`.
    """

    fn: Callable[..., Any]
    model: PyTree
    unit: str = eqx.field(static=True)

    def output(self, example: tuple[Any, ...], rows: Any, key: Any) -> PyTree:
        given = {"key": key, "mask": rows}
        return self.fn(self.model, *example, **{name: given[name] for name in wanted_by(self.fn, self.unit, example)})

    def __call__(self, weights: PyTree, example: tuple[Any, ...], rows: Any, key: Any) -> Array:
        out = jax.tree.map(jax.lax.stop_gradient, self.output(example, rows, key))
        terms = jax.tree.map(lambda w, x: jnp.sum(w * x.astype(w.dtype)), weights, out)
        return jax.tree.reduce(lambda a, b: a + b.astype(a.dtype), terms, jnp.zeros(()))


def wanted_by(fn: Callable[..., Any], unit: str, batch: tuple[Any, ...]) -> tuple[str, ...]:
    """Which keywords `fn` takes beside the model and an example: its key, and the mask of a user's rows."""
    return keywords(fn, len(batch), ("key", "mask") if unit == "user" else ("key",), "fn")


def model_update(loss: Callable[..., Any], optimizer: Any, steps: Integer = 1) -> Callable[..., PyTree]:
    r"""What several local steps on one user's data change in the model: the update that DP-FedAvg clips.

    ```python
    sampler = dpx.UserSampler(dpx.PoissonSampler(num_users, 100, 1_000), user_ids, examples_per_user=64)
    plan = dpx.PrivacyPlan(sampler, 1.0, dpx.IndependentGaussian()).calibrate(3.0, 1e-6)
    private_sum = plan.private_sum(dpx.model_update(loss, optax.sgd(0.1), steps=5))
    state = private_sum.init(model, next(plan.batches((x, y), seed=seed))[0])
    for batch, mask in plan.batches((x, y), seed=seed):
        update, state, _ = private_sum(model, batch, state, mask=mask)
        model = eqx.apply_updates(model, update)
    ```

    **Arguments:**

    - `loss`: `loss(model, *example)` of one example. If it takes a keyword `key` it gets one of its own for every row and step.
    - `optimizer`: an `optax.GradientTransformation`, which starts afresh for every user.
    - `steps`: number of full-batch steps on the user's examples.

    **Returns:**

    `fn(model, *examples, mask=None) -> update` for `PrivateSum`, where `examples` are one user's, stacked on a leading axis, and `mask` says which of
    them are real: the steps follow the mean loss of those. The update has the structure of `eqx.filter(model, eqx.is_inexact_array)`, and is
    what to ADD to the model.
    """
    function("dpx.model_update(loss=...)", loss, "loss(model, *example)")
    instance("dpx.model_update(optimizer=...)", optimizer, optax.GradientTransformation, "optax.sgd(0.1)")
    steps = positive_int("dpx.model_update(steps=...)", steps)

    def local_steps(model: PyTree, examples: tuple[Any, ...], mask: Any, key: Any) -> PyTree:
        params, static = eqx.partition(model, eqx.is_inexact_array)
        rows = jnp.arange(jax.tree.leaves(examples)[0].shape[0])
        wanted = takes_key(loss, len(examples))
        if mask is not None:
            # padding repeats a real row: whatever it contains, 0 * inf in the backward pass cannot poison the user
            source = jnp.where(mask, rows, jnp.argmax(mask))
            examples = jax.tree.map(lambda x: jnp.take(x, source, axis=0), examples)

        def mean_loss(params, number):
            def one(row, *example):
                keys = {"key": jax.random.fold_in(jax.random.fold_in(key, number), row)} if wanted else {}
                return loss(eqx.combine(params, static), *example, **keys)

            losses = jax.vmap(one)(rows, *examples)
            if mask is None:
                return jnp.mean(losses)
            total = jnp.sum(jnp.where(mask, losses, jnp.zeros((), losses.dtype)))
            return total / jnp.maximum(jnp.sum(mask), 1).astype(losses.dtype)

        def step(carry, number):
            now, state = carry
            updates, state = optimizer.update(jax.grad(mean_loss)(now, number), state, now)
            return (eqx.apply_updates(now, updates), state), None

        (after, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
        return jax.tree.map(lambda a, b: a.astype(wide_dtype(a.dtype)) - b.astype(wide_dtype(b.dtype)), after, params)

    def fn(model: PyTree, *examples: Any, mask: Mask | None = None) -> PyTree:
        return local_steps(model, examples, mask, None)

    def fn_of_key(model: PyTree, *examples: Any, mask: Mask | None = None, key: Any) -> PyTree:
        return local_steps(model, examples, mask, key)

    return fn_of_key if has_parameter(loss, "key") else fn
