"""`PrivateGradient`: clip, sum, add noise, divide by a public number."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt32

from .._checks import (
    choice,
    described,
    flag,
    function,
    instance,
    is_traced,
    positive_int,
    positive_scalar,
    usable,
)
from .._norms import combined
from .._sensitive import Sensitive
from .._tree import expand_like, is_finite, leaf_paths, wide_dtype
from .._types import Params, Participation, RealScalarLike
from ..clipping import AbstractClipping, NoClipping, as_clipping
from ..gradients import AbstractGradientMethod, Auto, ClippedSum, LeafPlan, ghost_check, unreached_paths, watched
from ..metrics import AbstractMetric, check_metrics
from ..noise import AbstractIntegerNoise, AbstractNoise, Rounding, check_joint_noise, check_noise, joint_scale
from ..problem import (
    WithinUser,
    check_arguments,
    check_batch,
    check_model,
    prepare,
    trainable,
    warn_of_strange_batch,
)
from ..random import check_key, fresh_key, key_of_words, key_words
from ..sharding import like

# Domains of the state's key: the noise, the loss's own randomness, the clipping's and the metrics' never share a stream.
_NOISE, _LOSS, _CLIPPING, _METRICS = 0, 1, 2, 3


class Result(eqx.Enumeration):
    """What became of a private step."""

    successful = "Every step so far was private and finite."
    budget_spent = "A step was asked for past the last one that the privacy budget covers; its gradients are NaN."
    non_finite = (
        "The private gradient, or something public that it needs (the model's parameters, the state, the noise multiplier, a clip norm, the "
        "normalizer, the scaling), became infinite or NaN, or was not positive where it must be; its gradients are NaN from there on."
    )
    not_the_plan = (
        "The noise, clipping, normalizer or metrics of a plan's gradient were changed after the plan had made it, so that its statement is not about "
        "this run; the gradients are NaN. Make one plan for each choice."
    )


_MSG_NOT_THE_PLAN = (
    "This gradient was made by a plan, whose statement rests on {stated}; it now has {got}. Change the plan, as with "
    "`plan.with_noise_multiplier(...)`, and make a new gradient of it: one plan for each choice, also in a sweep. A `dpx.PrivateGradient` that "
    "no plan made may be changed at will, and states nothing."
)


class Stated(NamedTuple):
    """What a plan's statement says about its gradient; hashable, so that it stays beside the numbers that `eqx.tree_at` can reach.

    **Arguments:**

    - `structure`: the tree of clipping, noise, normalizer and metrics, with all that is static in them.
    - `numbers`: path and value of each of its arrays.
    - `rest`: steps, participation and unit.
    """

    structure: Any
    numbers: tuple[tuple[str, tuple[float, ...]], ...]
    rest: tuple[Any, ...]


def stated_of(clipping: Any, noise: Any, normalizer: Any, metrics: Any, *rest: Any) -> Stated | None:
    """The record of these parts; None if a number among them is traced, about which nothing can be stated."""
    tree = {"clipping": clipping, "noise": noise, "normalizer": normalizer, "metrics": metrics}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if any(is_traced(leaf) for _, leaf in leaves):
        return None
    number = lambda leaf: tuple(np.asarray(leaf).ravel().tolist())
    name = lambda path: path[0].key + jax.tree_util.keystr(path[1:])
    return Stated(jax.tree.structure(tree), tuple((name(p), number(x)) for p, x in leaves), rest)


def check_stated(stated: Stated | None, clipping: Any, noise: Any, normalizer: Any, metrics: Any, *rest: Any) -> Array:
    """Whether these parts are those of the record, on the device; raises where the host can tell that they are not."""
    if stated is None:
        return jnp.array(True)
    tree = {"clipping": clipping, "noise": noise, "normalizer": normalizer, "metrics": metrics}
    if jax.tree.structure(tree) != stated.structure or rest != stated.rest:
        kinds = f"a `{type(clipping).__name__}`, a `{type(noise).__name__}` and {rest}, or other options of them"
        raise ValueError(
            _MSG_NOT_THE_PLAN.format(stated="another clipping, noise, or choice of metrics or steps", got=kinds)
        )
    is_same = [jnp.array(True)]
    for (path, numbers), leaf in zip(stated.numbers, jax.tree.leaves(tree), strict=True):
        if is_traced(leaf):
            expected = jnp.asarray(
                np.reshape(np.asarray(numbers, leaf.dtype), leaf.shape if leaf.size == len(numbers) else -1)
            )
            is_same.append(jnp.all(leaf == expected))
        elif (got := tuple(np.asarray(leaf).ravel().tolist())) != numbers:
            shown = lambda n: ", ".join(f"{x:.9g}" for x in n[:3]) + (", ..." if len(n) > 3 else "")
            raise ValueError(_MSG_NOT_THE_PLAN.format(stated=f"{path} = {shown(numbers)}", got=shown(got)))
    return jnp.all(jnp.stack(is_same))


class PrivateGradientState(eqx.Module):
    """What a `PrivateGradient` carries from one step to the next; a PyTree of plain arrays that can be saved, donated and sharded.

    ```python
    eqx.tree_serialise_leaves("run.eqx", (model, state))
    model, state = eqx.tree_deserialise_leaves("run.eqx", (model, private_grad.init(model)))
    ```

    **Arguments:**

    - `key`: the secret that all noise of the run is folded from. Whoever has it can remove the noise.
    - `step`: number of steps taken.
    - `noise`: the noise's buffers.
    - `clipping`: the clipping's state.
    - `metrics`: the state of each metric by name; its `value` is private.
    - `result`: `Result.successful`, or what went wrong.
    """

    # the key's words, and not the typed key, which neither `eqx.tree_serialise_leaves` nor other checkpoints can store
    key_data: UInt32[Array, "*lanes words"]
    step: Int[Array, ""]
    noise: PyTree
    clipping: PyTree
    metrics: dict[str, Any]
    result: Result  # pyright: ignore[reportInvalidTypeForm]
    key_impl: Any = eqx.field(static=True)

    def __init__(
        self, key: Key[Array, "*lanes"], step: Any, noise: PyTree, clipping: PyTree, metrics: Any, result: Any
    ):
        self.key_data, self.key_impl = key_words(key)
        self.step = step
        self.noise = noise
        self.clipping = clipping
        self.metrics = metrics
        self.result = result

    @property
    def key(self) -> Key[Array, "*lanes"]:
        """The typed key."""
        return key_of_words(self.key_data, self.key_impl)

    def raise_if_failed(self) -> None:
        """Raises `RuntimeError`, on the host, if a step overran the budget or was not finite. Waits for the device."""
        if self.result == Result.successful:
            return
        message = Result[self.result]
        raise RuntimeError(f"{message} (after {int(self.step)} steps)")


class Diagnostics(eqx.Module):
    """What a step saw of single examples; masked examples read 0.

    **Arguments:**

    - `losses`: loss of each example, shape `(batch,)`.
    - `norms`: norm of each example's unclipped gradient, shape `(batch,)`; infinite or NaN exactly where the example was left out of the sum,
        because its gradient was.
    - `group_norms`: the same in each clip group, shape `(batch, groups)`.
    - `aux`: what the loss returned besides, stacked on a leading axis; None without `has_aux`.
    - `mask`: which examples are real, shape `(batch,)`.
    """

    losses: Float[Array, " batch"]
    norms: Float[Array, " batch"]
    group_norms: Float[Array, "batch groups"]
    aux: PyTree
    mask: Array


class Explanation(eqx.Module):
    """How each parameter's clipped gradient is computed; prints as a table.

    **Arguments:**

    - `rows`: one `LeafPlan` for each array of the model.
    """

    rows: tuple[LeafPlan, ...] = eqx.field(static=True)

    def __str__(self) -> str:
        head = ("parameter", "shape", "rule", "MFLOP", "MiB")
        body = [(r.path, str(r.shape), r.rule, f"{r.flops / 1e6:.3g}", f"{r.memory / 2**20:.3g}") for r in self.rows]
        return _aligned([head, *body])


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class Check(eqx.Module):
    """How far the ghost engine is from one gradient per example; prints as a table.

    **Arguments:**

    - `rows`: for each trained leaf its path, the largest relative error of the norms, and that of the sum.
    """

    rows: tuple[tuple[str, float, float], ...] = eqx.field(static=True)

    @property
    def is_close(self) -> bool:
        """Whether all errors are below 1e-4, as float32 rounding is."""
        return all(max(norm, total) < 1e-4 for _, norm, total in self.rows)

    def __str__(self) -> str:
        body = [(path, f"{norm:.1e}", f"{total:.1e}") for path, norm, total in self.rows]
        return _aligned([("parameter", "error of norms", "error of sum"), *body])


class PrivateGradient(eqx.Module):
    r"""The private gradient of a per-example loss: $\big(\sum_i \mathrm{clip}(\nabla L_i) + \text{noise}\big) / \text{normalizer}$.

    ```python
    private_grad = dpx.PrivateGradient(loss, dpx.FlatClipping(1.0), dpx.IndependentGaussian(1.1), normalizer=256)
    state = private_grad.init(model)
    grads, state, diagnostics = private_grad(model, (x, y), state, mask=mask)
    ```

    Usually made by `PrivacyPlan.private_gradient`, which fills in what the privacy statement rests on.

    !!! success "Guarantee"

        Adding or removing one example moves the sum before noise by at most `sensitivity`, for all inputs, finite or not, up to
        relative $10^{-6}$; noise of the stated multiplier is added at every call, to an empty batch also; no two calls share noise.

    **Arguments:**

    - `loss`: `loss(model, *example) -> scalar` for ONE example, without a batch axis; `(scalar, aux)` with `has_aux=True`. If it takes
        a keyword `key` it gets a PRNG key of its own for every example.
    - `clipping`: how much one example may contribute; a number $C$ stands for `FlatClipping(C)`. (A number is no noise: it has to be named.)
    - `noise`: what is added. Its scale is the noise multiplier times the clipping's sensitivity.
    - `normalizer`: what the noisy sum is divided by: a public number such as the EXPECTED batch size, never the realised one.
    - `method`: how the clipped sum is computed; changes speed and memory, not the result.
    - `steps`: the number of steps that the budget covers; a call past it gives NaN and sets `state.result`.
    - `filter_spec`: which leaves are trained, as in `equinox.partition`: a function of a leaf, or a tree prefix of booleans.
    - `has_aux`: whether the loss returns `(scalar, aux)`.
    - `participation`: in which of the steps an example may take part, which scales correlated noise; by default in all of them.
    - `unit`: `"example"`, or `"user"`: every leaf of the batch has two leading axes, (users, examples of a user), the mask too, and it is a user's
        gradient that is clipped.
    - `within_user`: whether a user's gradient is the `"mean"` or the `"sum"` over the user's examples.
    - `metrics`: private statistics to release at every step, by name; see `PrivacyPlan.with_metrics`, which accounts for them.
    - `stated`: what a plan that made this states about it; a gradient whose numbers differ from it is refused (where they are traced, it is NaN and
        `Result.not_the_plan`). Yours to leave alone.
    - `physical_batch_size`: the size to which a plan's batches are padded: one of another size and without a mask is warned about, since it
        comes from somewhere else.
    """

    loss: Callable[..., Any]
    clipping: AbstractClipping
    noise: AbstractNoise
    normalizer: Float[Array, ""]
    filter_spec: PyTree
    method: AbstractGradientMethod
    steps: int | None = eqx.field(static=True)
    has_aux: bool = eqx.field(static=True)
    participation: Participation = eqx.field(static=True)
    unit: str = eqx.field(static=True)
    within_user: WithinUser = eqx.field(static=True)
    metrics: dict[str, AbstractMetric]
    stated: Stated | None = eqx.field(static=True)
    physical_batch_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        loss: Callable[..., Any],
        clipping: AbstractClipping | RealScalarLike,
        noise: AbstractNoise,
        *,
        normalizer: RealScalarLike = 1.0,
        method: AbstractGradientMethod = Auto(),
        steps: Any = None,
        filter_spec: PyTree = eqx.is_inexact_array,
        has_aux: bool = False,
        participation: Participation | None = None,
        unit: str = "example",
        within_user: str = "mean",
        metrics: dict[str, Any] | None = None,
        stated: Stated | None = None,
        physical_batch_size: Any = None,
    ):
        function("PrivateGradient(loss=...)", loss, "loss(model, *example)")
        clipping = as_clipping("PrivateGradient(clipping=...)", clipping)
        check_noise("PrivateGradient(noise=...)", noise)
        instance("PrivateGradient(method=...)", method, AbstractGradientMethod, "dpx.Ghost()")
        if clipping.order != noise.order:
            raise ValueError(
                f"`{type(noise).__name__}` needs clipping in the l{noise.order} norm; `{type(clipping).__name__}` bounds the "
                f"l{clipping.order} norm. Use `FlatClipping(norm, order={noise.order})`."
            )
        self.loss = loss
        self.clipping = clipping
        self.noise = noise
        self.normalizer = positive_scalar("PrivateGradient(normalizer=...)", normalizer)
        self.method = method
        self.steps = None if steps is None else positive_int("PrivateGradient(steps=...)", steps)
        if noise.horizon is not None:
            if self.steps is not None and self.steps > noise.horizon:
                raise ValueError(
                    f"`PrivateGradient(steps=...)` must be at most the horizon of `{type(noise).__name__}`, {noise.horizon}; got {steps}."
                )
            self.steps = self.steps or noise.horizon
        self.filter_spec = _filter_spec(filter_spec)
        self.has_aux = flag("PrivateGradient(has_aux=...)", has_aux)
        self.participation = check_participation("PrivateGradient(participation=...)", participation)
        self.unit = choice("PrivateGradient(unit=...)", unit, ("example", "user"))
        self.within_user = choice("PrivateGradient(within_user=...)", within_user, get_args(WithinUser))
        self.metrics = check_metrics("PrivateGradient(metrics=...)", metrics)
        call = "PrivateGradient(physical_batch_size=...)"
        self.physical_batch_size = None if physical_batch_size is None else positive_int(call, physical_batch_size)
        check_joint_noise(clipping, noise, self.steps, self.participation)
        self.stated = stated
        self._is_the_plans()

    def _is_the_plans(self) -> Array:
        rest = (self.steps, self.participation, self.unit)
        return check_stated(self.stated, self.clipping, self.noise, self.normalizer, self.metrics, *rest)

    @property
    def sensitivity(self) -> float:
        """How far one example, added or removed, can move the clipped sum before noise."""
        return float(self.clipping.sensitivity)

    def init(self, model: PyTree, *, key: Any = None) -> PrivateGradientState:
        """The state before the first step.

        **Arguments:**

        - `model`: the model; only the structure and shapes of its trainable leaves matter.
        - `key`: the secret of the run's noise; by default fresh entropy from the operating system, so that two runs never share
            noise. Give one to reproduce a run, and never the same to two runs whose results are both published.

        **Raises:**

        - `ValueError` if the model cannot be trained privately: layers that mix examples, trainable leaves that are not real numbers.
        - `RuntimeError` if called without a key inside any transformation of JAX's (a sweep with `vmap` needs a key for each lane), or in a run
            of several processes, which must share one: `key=dpx.random.shared_key()`.
        """
        if key is None:
            key = fresh_key()
        check_key("PrivateGradient.init(key=...)", key)
        check_model(model)
        params, _ = trainable(model, self.filter_spec)
        struct = jax.tree.map(_sum_struct, params)
        return PrivateGradientState(
            key,
            jnp.array(0, jnp.int32),
            self.noise.init(struct),
            self.clipping.init(params),
            {name: metric.init() for name, metric in self.metrics.items()},
            Result.successful,
        )

    def noise_variance(self, model: PyTree, state: PrivateGradientState, *, scaling: PyTree = None) -> PyTree:
        """The variance of the noise in every coordinate of the gradient that the next step, from `state`, returns.

        **Arguments:**

        - `model`: the model.
        - `state`: the state BEFORE that step.
        - `scaling`: as the step will get it.

        **Returns:**

        A tree like the gradient, with one number for each leaf (an array like the leaf, with `scaling`). It is public.
        """
        params, _ = trainable(model, self.filter_spec)
        if isinstance(self.clipping, NoClipping):
            variance = jnp.zeros(())
        else:
            variance = self.noise.variance(self._scale(), self.steps, state.step)
        leaves = [jnp.broadcast_to(variance, ()) for _ in jax.tree.leaves(params)]
        tree = self._published(jax.tree.unflatten(jax.tree.structure(params), leaves), state.clipping, power=2)
        return tree if scaling is None else jax.tree.map(lambda v, s: v / s**2, tree, scaling)

    def metric_values(self, state: PrivateGradientState) -> dict[str, Array]:
        """What each metric released last, by name: private numbers, to be published at will. NaN before the first step."""
        return {name: metric.value(state.metrics[name]) for name, metric in self.metrics.items()}

    def _scale(self) -> Float[Array, ""]:
        return joint_scale(self.clipping, self.noise, self.steps, self.participation)

    def __call__(
        self,
        model: PyTree,
        batch: Any,
        state: PrivateGradientState,
        *,
        mask: Any = None,
        key: Any = None,
        scaling: PyTree = None,
    ) -> tuple[PyTree, PrivateGradientState, Sensitive]:
        """One private step. Compiled on its own, and inlined where the caller compiles.

        **Arguments:**

        - `model`: the model.
        - `batch`: a tuple of PyTrees with one leading axis of equal length, splatted into the loss.
        - `state`: from `init` or the step before. Never use one state for two steps: they would share their noise.
        - `mask`: `Bool[Array, "batch"]`, True for real examples, where the batch is padded to a fixed size.
        - `key`: randomness for a loss that takes `key`; by default derived from the state.
        - `scaling`: positive PUBLIC numbers, a tree of arrays like the gradient: it is multiplied by them before it is clipped and divided
            by them after the noise, so that all coordinates get noise in proportion to their size (scale-then-privatize).

        **Returns:**

        The private gradient, with the structure of `eqx.filter(model, filter_spec)` and leaves of at least float32; the next state;
        and `Sensitive` `Diagnostics`, which are not private.

        **Raises:**

        - `ValueError` before anything compiles if loss, model, batch and mask do not fit.

        What is only known on the device, a parameter or a traced number that is not finite or not positive where it must be, gives NaN and
        `Result.non_finite`, which `state.raise_if_failed()` raises on the host.
        """
        check_arguments(model, batch, mask, key, scaling)
        if self.stated is not None and not hasattr(self, "_is_verified"):
            self._is_the_plans()
            # not a field, so that whatever copies the module with other leaves copies it without this
            object.__setattr__(self, "_is_verified", True)
        check_state(batch, state)
        if set(state.metrics) != set(self.metrics):
            raise ValueError(
                f"`private_grad(model, batch, state)`: `state` is of another private gradient, with metrics {sorted(state.metrics)} and not "
                f"{sorted(self.metrics)}. Begin with `private_grad.init(model)`."
            )
        return self._step(model, batch, state, mask, key, scaling)

    @eqx.filter_jit
    def _step(
        self, model: PyTree, batch: Any, state: PrivateGradientState, mask: Any, key: Any, scaling: PyTree
    ) -> tuple[PyTree, PrivateGradientState, Sensitive]:
        is_masked = mask is not None
        if key is None:
            key = jr.fold_in(jr.fold_in(state.key, _LOSS), state.step)
        out, mask = self._clipped(model, batch, state.clipping, mask, key, scaling)
        if not is_masked:
            warn_of_strange_batch(self.physical_batch_size, batch)

        if isinstance(self.clipping, NoClipping):
            noisy, buffers, scale = out.total, state.noise, None
        else:
            scale = self._scale()
            noise_key = jr.fold_in(state.key, _NOISE)
            noisy, buffers = self.noise.step(out.total, scale, noise_key, state.step, state.noise)
        clipping_key = jr.fold_in(jr.fold_in(state.key, _CLIPPING), state.step)
        clipping = self.clipping.update(state.clipping, out.norms, mask, self.normalizer, clipping_key)
        diagnostics = _diagnostics(out, mask, self.clipping.order)
        metrics_key = jr.fold_in(jr.fold_in(state.key, _METRICS), state.step)
        metrics = {
            name: metric.update(
                state.metrics[name], diagnostics, mask, self.normalizer, jr.fold_in(metrics_key, number)
            )
            for number, (name, metric) in enumerate(sorted(self.metrics.items()))
        }
        grads = self._published(noisy, state.clipping)
        if scaling is not None:
            grads = jax.tree.map(jnp.divide, grads, scaling)

        # jnp.where rather than eqx.error_if, which deadlocks on several devices
        steps = np.iinfo(np.int32).max if self.steps is None else self.steps
        # the sum before the noise, which is finite: XLA would draw the noise twice, for the gradients and for a check of them
        rescale = self.clipping.rescale(state.clipping)
        rescale = rescale if rescale is None else usable(rescale)
        # Where noise is kept in buffers, the gradients: what is bad in a buffer ends there, and a check of the buffers themselves would read all of
        # them and keep XLA from writing the one slot that changes in place.
        is_late = scaling is not None or isinstance(self.noise, AbstractIntegerNoise) or bool(jax.tree.leaves(buffers))
        checked = (out.total, scale, clipping, rescale, grads if is_late else None)
        is_good = is_finite(checked) & self._is_usable(model, scaling)
        result = Result.where(is_good, state.result, Result.non_finite)
        result = Result.where(self._is_the_plans(), result, Result.not_the_plan)
        result = Result.where(state.step < steps, result, Result.budget_spent)
        result = Result.where(state.result == Result.successful, result, state.result)
        is_good = result == Result.successful
        grads = jax.tree.map(lambda g: jnp.where(is_good, g, jnp.nan), grads)
        # what clipping and metrics learn is released with the state, so a step without budget must not teach them
        old = (state.clipping, state.metrics)
        clipping, metrics = jax.tree.map(lambda x, y: jnp.where(is_good, x, y), (clipping, metrics), old)
        step = state.step + (state.step < steps).astype(state.step.dtype)
        new = PrivateGradientState(state.key, step, buffers, clipping, metrics, result)
        return grads, new, Sensitive(diagnostics)

    def _is_usable(self, model: PyTree, scaling: PyTree) -> Bool[Array, ""]:
        """Whether the PUBLIC inputs of a step can give a gradient at all.

        Parameters that are not finite make every example's gradient NaN; each is left out, and what remains is finite, pure noise. They are known
        to whoever sees the gradients, so to stop there tells nothing. That the losses of a batch are NaN must NOT be looked at here: it depends on
        the examples, and whether a run stops is published. `dpx.metrics.Dropped` tells how many were left out, with noise.
        """
        params, frozen = eqx.partition(model, self.filter_spec)
        # a frozen infinity may be meant, as in an attention mask
        others = eqx.filter((frozen, self.loss, self.metrics), eqx.is_inexact_array)
        positive = [self.normalizer, *(metric.noise_multiplier for metric in self.metrics.values())]
        leaves = [jnp.all(x > 0) & jnp.all(x < jnp.inf) for x in [*positive, *jax.tree.leaves(scaling)]]
        leaves += [~jnp.any(jnp.isnan(x)) for x in jax.tree.leaves(others)]
        return jnp.all(jnp.stack([is_finite(eqx.filter(params, eqx.is_inexact_array)), *leaves]))

    def clipped_sum(self, model: PyTree, batch: Any, *, mask: Any = None, key: Any = None) -> Sensitive:
        """The sum of clipped gradients, without noise and not divided: for tests and mechanisms of your own.

        **Arguments:** as for a step; a loss that takes `key` needs one here. Stateful clipping is as before its first step.

        **Returns:** `Sensitive` gradients.
        """
        check_arguments(model, batch, mask, key)
        params, _ = trainable(model, self.filter_spec)
        return self._clipped_sum(model, batch, self.clipping.init(params), mask, key)

    @eqx.filter_jit
    def _clipped_sum(self, model: PyTree, batch: Any, clipping_state: PyTree, mask: Any, key: Any) -> Sensitive:
        out, _ = self._clipped(model, batch, clipping_state, mask, key, None)
        rounding = self._rounding(out.total, 1)
        total = out.total if rounding is None else rounding.restore(out.total)
        return Sensitive(self._rescaled(total, clipping_state))

    def explain(self, model: PyTree, batch: Any) -> Explanation:
        """How each parameter is treated: its path, shape, trained or frozen, the gradient rule, its cost and memory.

        **Arguments:** `model` and `batch` as for a step; only their shapes matter.

        **Returns:** an `Explanation`; `print` it.
        """
        params, per_example, examples, _ = self._problem(model, batch, None, jr.key(0))
        rows = {row.path: row for row in self.method.explain(per_example, params, examples)}
        arrays = eqx.filter(model, eqx.is_array)

        def row(path, leaf):
            return rows.get(path, LeafPlan(path, leaf.shape, "frozen", 0, 0))

        pairs = zip(leaf_paths(arrays), jax.tree.leaves(arrays), strict=True)
        return Explanation(tuple(row(path, leaf) for path, leaf in pairs))

    def unreached(self, model: PyTree, batch: Any) -> tuple[str, ...]:
        """The paths of trained leaves that the loss certainly does not depend on: they get noise at every step, and no gradient.

        A step warns of them, once. Leave them out with `filter_spec`.

        **Arguments:** `model` and `batch` as for a step; only their shapes matter.
        """
        params, per_example, examples, _ = self._problem(model, batch, None, jr.key(0))
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), examples)
        return unreached_paths(jax.make_jaxpr(per_example)(params, one), params)

    def check(self, model: PyTree, batch: Any, *, key: Any = None) -> "Check":
        """Compares the ghost engine with one gradient per example, on your model and your data.

        **Arguments:** as for `clipped_sum`. Needs the memory of one gradient per example: a few examples will do.

        **Returns:** a `Check`; `print` it. What differs by more than rounding is a bug to be reported.
        """
        params, per_example, examples, _ = self._problem(model, batch, None, jr.key(0) if key is None else key)
        pairs = ghost_check(per_example, params, examples)
        return Check(tuple((path, *pair) for path, pair in zip(leaf_paths(params), pairs, strict=True)))

    def _problem(self, model, batch, mask, key, scaling=None):
        options: Any = {"filter_spec": self.filter_spec, "has_aux": self.has_aux, "unit": self.unit}
        problem = prepare(self.loss, model, batch, mask, key, within_user=self.within_user, scaling=scaling, **options)
        return problem.params, problem.loss, problem.examples, problem.mask

    def _clipped(self, model, batch, clipping_state, mask, key, scaling) -> tuple[ClippedSum, Array]:
        size = check_batch(batch)[1]
        params, per_example, examples, mask = self._problem(model, batch, mask, key, scaling)
        labels = self.clipping.labels(params)
        rounding = self._rounding(params, mask.shape[0])
        tightened = (lambda norms: norms) if rounding is None else rounding.tightened
        options = {} if rounding is None else {"quantise": rounding.quantise}
        factors = lambda norms: self.clipping.factors(tightened(norms), clipping_state)
        order = self.clipping.order
        per_example = watched(per_example, self.loss)
        out = self.method.clipped_sum(per_example, params, examples, mask, labels, order, factors, **options)
        original, _ = trainable(model, self.filter_spec)
        total = jax.tree.map(like, out.total, original)
        per_example = (out.norms, out.losses, out.aux)
        if size == 0:
            per_example, mask = jax.tree.map(lambda x: x[:0], (per_example, mask))
        return ClippedSum(total, *per_example), mask

    def _rounding(self, params: Params, batch_size: int) -> Rounding | None:
        if not isinstance(self.noise, AbstractIntegerNoise) or isinstance(self.clipping, NoClipping):
            return None
        dimension = sum(x.size for x in jax.tree.leaves(params))
        return self.noise.rounding(self.clipping.sensitivity, dimension, batch_size)

    def _rescaled(self, total: Params, clipping_state: PyTree, power: int = 1) -> Params:
        rescale = self.clipping.rescale(clipping_state)
        if rescale is None:
            return total
        leaves, treedef = jax.tree.flatten(total)
        labels = self.clipping.labels(total)
        return jax.tree.unflatten(
            treedef, [x * rescale[g].astype(x.dtype) ** power for x, g in zip(leaves, labels, strict=True)]
        )

    def _published(self, noisy: Params, clipping_state: PyTree, power: int = 1) -> Params:
        rescaled = self._rescaled(noisy, clipping_state, power)
        return jax.tree.map(lambda x: x / self.normalizer.astype(x.dtype) ** power, rescaled)


def _sum_struct(x: Array) -> jax.ShapeDtypeStruct:
    x = jnp.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, wide_dtype(x.dtype), sharding=jax.typeof(x).sharding)


def _diagnostics(out: ClippedSum, mask: Array, order: int) -> Diagnostics:
    def real(x):
        return jnp.where(expand_like(mask, x), x, jnp.zeros((), x.dtype))

    norms = real(out.norms)
    overall = combined([norms[:, k] for k in range(norms.shape[1])], order)
    # finite wherever the norm of every group is: then the example was not left out
    is_kept = jnp.all(jnp.isfinite(norms), axis=1)
    overall = jnp.where(is_kept, jnp.minimum(overall, jnp.finfo(overall.dtype).max), overall)
    return Diagnostics(real(out.losses), overall, norms, jax.tree.map(real, out.aux), mask)


def _filter_spec(spec: PyTree) -> PyTree:
    leaves = jax.tree.leaves(spec)
    if not leaves or not all(isinstance(leaf, bool | np.bool_) or callable(leaf) for leaf in leaves):
        raise ValueError(
            "`PrivateGradient(filter_spec=...)` must be a function of a leaf, such as `eqx.is_inexact_array`, or a tree of booleans that is a prefix "
            f"of the model's; got {described(spec)}."
        )
    return spec


def check_participation(call: str, participation: Any) -> Participation:
    """In which steps an example may take part; by default in all."""
    if participation is None:
        return Participation(1, None)
    if not isinstance(participation, tuple) or len(participation) != 2:
        raise ValueError(
            f"`{call}` must be a `Participation(min_separation, max_participations)`; got {described(participation)}."
        )
    separation, most = participation
    positive_int(f"{call[:-1]}: min_separation", separation)
    return Participation(separation, None if most is None else positive_int(f"{call[:-1]}: max_participations", most))


def check_state(batch: Any, state: Any) -> None:
    """Raises if the state is none, or stands where the batch should."""
    call = "private_grad(model, batch, state, mask=mask)"
    if isinstance(batch, PrivateGradientState):
        raise ValueError(f"`{call}` takes its arguments in this order; got the state before the batch.")
    if not isinstance(state, PrivateGradientState):
        raise ValueError(
            f"`{call}`: `state` must come from `private_grad.init(model)`, or from the step before; got {described(state)}."
        )
