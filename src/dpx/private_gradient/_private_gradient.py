"""`PrivateGradient`: clip, sum, add noise, divide by a public number."""

from collections.abc import Callable
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PyTree

from .._checks import choice, flag, function, instance, positive_int, positive_scalar, usable
from .._sensitive import Sensitive
from .._tree import is_finite
from .._types import Batch, Integer, Mask, Participation, PRNGKey, RealScalarLike, Unchecked, Unit
from ..clipping import AbstractClipping, as_clipping
from ..gradients import AbstractGradientMethod, Auto, Check, Explanation, comparison, explanation, unreached_leaves
from ..mechanism import Mechanism, check_participation
from ..metrics import AbstractMetric, check_metrics
from ..noise import AbstractNoise, check_noise
from ..problem import (
    Problem,
    WithinUser,
    check_arguments,
    check_filter_spec,
    check_model,
    prepare,
    trainable,
    warn_of_strange_batch,
)
from ..random import check_key, fresh_key
from ._diagnostics import Diagnostics, diagnostics_of, measured
from ._learning import learnt, query_of, struct_of_query
from ._outcome import are_usable, has_budget, outcome
from ._state import PrivateGradientState, Result, check_state
from ._stated import Stated, check_stated
from ._sums import clipped, published, rescaled

# Domains of the state's key: the noise, the loss's own randomness, the clipping's and the metrics' never share a stream.
_NOISE, _LOSS, _CLIPPING, _METRICS = 0, 1, 2, 3


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
    - `physical_batch_size`: the size to which a plan's batches are padded: one of another size and without a mask is warned about.
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
        steps: Integer | None = None,
        filter_spec: PyTree = eqx.is_inexact_array,
        has_aux: bool = False,
        participation: Participation | None = None,
        unit: Unchecked[Unit] = "example",
        within_user: Unchecked[WithinUser] = "mean",
        metrics: dict[str, Any] | None = None,
        stated: Stated | None = None,
        physical_batch_size: Integer | None = None,
    ):
        self.loss = function("PrivateGradient(loss=...)", loss, "loss(model, *example)")
        clipping = as_clipping("PrivateGradient(clipping=...)", clipping)
        check_noise("PrivateGradient(noise=...)", noise)
        self.method = instance("PrivateGradient(method=...)", method, AbstractGradientMethod, "dpx.Ghost()")
        self.clipping = clipping
        self.noise = noise
        self.normalizer = positive_scalar("PrivateGradient(normalizer=...)", normalizer)
        self.filter_spec = check_filter_spec("PrivateGradient(filter_spec=...)", filter_spec)
        self.has_aux = flag("PrivateGradient(has_aux=...)", has_aux)
        self.unit = choice("PrivateGradient(unit=...)", unit, get_args(Unit))
        self.within_user = choice("PrivateGradient(within_user=...)", within_user, get_args(WithinUser))
        metrics = check_metrics("PrivateGradient(metrics=...)", metrics)
        steps = None if steps is None else positive_int("PrivateGradient(steps=...)", steps)
        participation = check_participation("PrivateGradient(participation=...)", participation)
        mechanism = Mechanism(clipping, noise, metrics, steps, participation)
        mechanism.check_budget()
        self.metrics, self.steps, self.participation = metrics, mechanism.steps, participation
        call = "PrivateGradient(physical_batch_size=...)"
        self.physical_batch_size = None if physical_batch_size is None else positive_int(call, physical_batch_size)
        self.stated = stated
        self._is_the_plans()

    # Questions

    @property
    def mechanism(self) -> Mechanism:
        """What is made private, and by what noise: the arithmetic of this gradient's parts."""
        return Mechanism(self.clipping, self.noise, self.metrics, self.steps, self.participation)

    @property
    def sensitivity(self) -> float:
        """How far one example, added or removed, can move the clipped sum before noise."""
        return float(self.mechanism.sensitivity)

    def init(self, model: PyTree, *, key: PRNGKey | None = None) -> PrivateGradientState:
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
        return PrivateGradientState(
            key,
            jnp.array(0, jnp.int32),
            self.noise.init(struct_of_query(self.clipping, params)),
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
        variance = self.mechanism.variance(state.step)
        variances = jax.tree.map(lambda _: variance, params)
        tree = published(self.clipping, variances, state.clipping, self.normalizer, power=2)
        return tree if scaling is None else jax.tree.map(lambda v, s: v / s**2, tree, scaling)

    def metric_values(self, state: PrivateGradientState) -> dict[str, Array]:
        """What each metric released last, by name: private numbers, to be published at will. NaN before the first step."""
        return {name: metric.value(state.metrics[name]) for name, metric in self.metrics.items()}

    # A step

    def __call__(
        self,
        model: PyTree,
        batch: Batch,
        state: PrivateGradientState,
        *,
        mask: Mask | None = None,
        key: PRNGKey | None = None,
        scaling: PyTree = None,
    ) -> tuple[PyTree, PrivateGradientState, Sensitive[Diagnostics]]:
        """One private step. Compiled on its own, and inlined where the caller compiles.

        **Arguments:**

        - `model`: the model.
        - `batch`: a tuple of PyTrees with one leading axis of equal length, splatted into the loss.
        - `state`: from `init` or the step before. Never use one state for two steps: they would share their noise.
        - `mask`: `Bool[Array, "batch"]`, True for real examples, where the batch is padded to a fixed size.
        - `key`: randomness for a loss that takes `key`, a SECRET (keys go by the rank among real examples); by default derived from the state.
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
        check_state(batch, state, self.metrics)
        return self._step(model, batch, state, mask, key, scaling)

    @eqx.filter_jit
    def _step(
        self, model: PyTree, batch: Batch, state: PrivateGradientState, mask: Any, key: Any, scaling: PyTree
    ) -> tuple[PyTree, PrivateGradientState, Sensitive[Diagnostics]]:
        # clip and sum
        mechanism = self.mechanism
        step_key = lambda domain: jr.fold_in(jr.fold_in(state.key, domain), state.step)
        problem = self._problem(model, batch, mask, step_key(_LOSS) if key is None else key, scaling)
        out, seen = clipped(problem, self.loss, self.method, mechanism, state.clipping)
        if mask is None:
            warn_of_strange_batch(self.physical_batch_size, batch)

        # add noise
        query = query_of(self.clipping, out, seen, state.clipping)
        noisy, buffers = mechanism.step(query, jr.fold_in(state.key, _NOISE), state.step, state.noise)

        # learn from norms and losses, privately
        noisy, clipping = learnt(self.clipping, noisy, state.clipping, out, seen, self.normalizer, step_key(_CLIPPING))
        diagnostics = diagnostics_of(out, seen, self.clipping.order)
        metrics = measured(self.metrics, state.metrics, diagnostics, seen, self.normalizer, step_key(_METRICS))

        # publish
        grads = published(self.clipping, noisy, state.clipping, self.normalizer)
        if scaling is not None:
            grads = jax.tree.map(jnp.divide, grads, scaling)

        # What the outcome rests on is the sum before the noise, which is finite: XLA would draw the noise twice, for the gradients and for a check of
        # them. It is the gradients where dividing by the scaling can overflow them, where integers become numbers only with the noise, and
        # where noise is kept in buffers: what is bad in a buffer ends there, and a check of the buffers themselves would read all of them and
        # keep XLA from writing the one slot that changes in place.
        is_late = scaling is not None or self.noise.is_integer or bool(jax.tree.leaves(buffers))
        rescale = jax.tree.map(usable, self.clipping.rescale(state.clipping))
        checked = (out.total, mechanism.scale(), clipping, rescale, grads if is_late else None)
        params, frozen = eqx.partition(model, self.filter_spec)
        positive = (self.normalizer, [metric.noise_multiplier for metric in self.metrics.values()], scaling)
        is_good = is_finite(checked) & are_usable(params, (frozen, self.loss, self.metrics), positive)
        result = outcome(state, self.steps, is_good=is_good, is_the_plans=self._is_the_plans())

        # jnp.where rather than eqx.error_if, which deadlocks on several devices
        is_good = result == Result.successful
        grads = jax.tree.map(lambda g: jnp.where(is_good, g, jnp.nan), grads)
        # what clipping and metrics learn is released with the state, so a step without budget must not teach them
        old = (state.clipping, state.metrics)
        clipping, metrics = jax.tree.map(lambda x, y: jnp.where(is_good, x, y), (clipping, metrics), old)
        step = state.step + has_budget(state, self.steps).astype(state.step.dtype)
        new = PrivateGradientState(state.key, step, buffers, clipping, metrics, result)
        return grads, new, Sensitive(diagnostics)

    def _is_the_plans(self) -> Array:
        rest = (self.steps, self.participation, self.unit)
        return check_stated(self.stated, self.clipping, self.noise, self.normalizer, self.metrics, *rest)

    def clipped_sum(
        self, model: PyTree, batch: Batch, *, mask: Mask | None = None, key: PRNGKey | None = None
    ) -> Sensitive[PyTree]:
        """The sum of clipped gradients, without noise and not divided: for tests and mechanisms of your own.

        **Arguments:** as for a step; a loss that takes `key` needs one here. Stateful clipping is as before its first step.

        **Returns:** `Sensitive` gradients.
        """
        check_arguments(model, batch, mask, key)
        return self._clipped_sum(model, batch, mask, key)

    @eqx.filter_jit
    def _clipped_sum(self, model: PyTree, batch: Batch, mask: Any, key: Any) -> Sensitive[PyTree]:
        problem = self._problem(model, batch, mask, key)
        clipping_state = self.clipping.init(problem.trained)
        out, _ = clipped(problem, self.loss, self.method, self.mechanism, clipping_state)
        rounding = self.mechanism.rounding(out.total)
        total = out.total if rounding is None else rounding.restore(out.total)
        return Sensitive(rescaled(self.clipping, total, clipping_state))

    def explain(self, model: PyTree, batch: Batch) -> Explanation:
        """How each parameter is treated: its path, shape, trained or frozen, the gradient rule, its cost and memory.

        **Arguments:** `model` and `batch` as for a step; only their shapes matter.

        **Returns:** an `Explanation`; `print` it.
        """
        problem = self._problem(model, batch, None, jr.key(0))
        return explanation(self.method, problem.loss, problem.params, problem.examples, model)

    def unreached(self, model: PyTree, batch: Batch) -> tuple[str, ...]:
        """The paths of trained leaves that the loss certainly does not depend on: they get noise at every step, and no gradient.

        A step warns of them, once. Leave them out with `filter_spec`.

        **Arguments:** `model` and `batch` as for a step; only their shapes matter.
        """
        problem = self._problem(model, batch, None, jr.key(0))
        return unreached_leaves(problem.loss, problem.params, problem.examples)

    def check(self, model: PyTree, batch: Batch, *, key: PRNGKey | None = None) -> Check:
        """Compares the ghost engine with one gradient per example, on your model and your data.

        **Arguments:** as for `clipped_sum`. Needs the memory of one gradient per example: a few examples will do.

        **Returns:** a `Check`; `print` it. What differs by more than rounding is a bug to be reported.
        """
        problem = self._problem(model, batch, None, jr.key(0) if key is None else key)
        return comparison(problem.loss, problem.params, problem.examples)

    # Its parts

    def _problem(self, model: PyTree, batch: Batch, mask: Any, key: Any, scaling: PyTree = None) -> Problem:
        options: Any = {"filter_spec": self.filter_spec, "has_aux": self.has_aux, "unit": self.unit}
        return prepare(self.loss, model, batch, mask, key, within_user=self.within_user, scaling=scaling, **options)
