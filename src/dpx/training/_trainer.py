"""`Trainer`: a plan, a loss and an optimiser as one compiled step, and the loop around it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import PyTree

from .._checks import described, flag, function, instance, is_traced, positive_int
from .._tree import wide
from .._types import Batch, Integer, Mask, PRNGKey, RealScalarLike, Unchecked
from ..gradients import AbstractGradientMethod, Auto
from ..optimizers import AbstractParameterAverage, ScaleThenPrivatize
from ..plan import PrivacyPlan
from ..private_gradient import PrivateGradient, Result
from ..problem import check_arguments, check_filter_spec, check_model, trainable
from ..random import shared_key
from ._checkpoints import Checkpoints
from ._compiled import Compiled, compiled, lowered, remembered
from ._microbatch import has_microbatch, is_chosen, largest_that_fits, with_microbatch
from ._result import TrainResult
from ._run import run
from ._state import Skeleton, TrainState, mesh_of, placed

_MSG_MICROBATCH = "`Trainer(microbatch_size=...)` must be a positive integer, None, or 'auto', for the largest that fits; got {given}."


class Trainer(eqx.Module):
    r"""A run, from data to release: one compiled step, its repetition, and what survives a crash.

    ```python
    trainer = dpx.Trainer(plan, loss, optax.adam(1e-3), checkpoint=dpx.Checkpoints("run"))
    result = trainer.fit(model, (x, y))
    result.publish("release")
    ```

    `init`, `step` and `compile` are pure parts for a loop of your own; `fit` is a loop over them, and the same as the loop of the README.

    !!! success "Guarantee"

        A run of `fit` takes its batches and its gradients from the plan, each step once and with one noise, also across crashes: what is computed
        again after one has the same bits. Callbacks, progress bar and history show what the plan pays for, or what `evaluate` computes from public
        data.

    **Arguments:**

    - `plan`: what the run's privacy depends on.
    - `loss`, `filter_spec`, `has_aux`: as for `plan.private_gradient`.
    - `optimizer`: an optax transformation, or one of `dpx.optimizers`, which are told the noise's variance. Its state is kept in at least float32.
    - `method`: how clipped sums are computed; changes speed and memory, not the result.
    - `checkpoint`: where the run keeps what it needs to go on, `dpx.Checkpoints(...)`; by default nowhere.
    - `microbatch_size`: how many examples are differentiated at once. `"auto"`: all, or as many as fit into the device's memory, as measured by
        compiling; a microbatch size or memory budget of the method stands. None: what the method does.
    - `steps_per_call`: how many steps are compiled into one program, for models whose step takes less than a millisecond. Evaluations, records and
        callbacks then wait for the end of such a group.
    - `average`: what to average the trained parameters by, such as `dpx.optimizers.ema(0.999)`.

    **Raises:** `ValueError`, naming the argument.
    """

    plan: PrivacyPlan
    loss: Callable[..., Any]
    optimizer: Any
    method: AbstractGradientMethod
    filter_spec: PyTree
    has_aux: bool = eqx.field(static=True)
    checkpoint: Checkpoints | None
    microbatch_size: Any = eqx.field(static=True)
    steps_per_call: int = eqx.field(static=True)
    average: AbstractParameterAverage | None
    private_gradient: PrivateGradient

    def __init__(
        self,
        plan: PrivacyPlan,
        loss: Callable[..., Any],
        optimizer: Any,
        *,
        method: AbstractGradientMethod = Auto(),
        filter_spec: PyTree = eqx.is_inexact_array,
        has_aux: bool = False,
        checkpoint: Checkpoints | None = None,
        microbatch_size: Unchecked[int | str | None] = "auto",
        steps_per_call: Integer = 1,
        average: AbstractParameterAverage | None = None,
    ):
        self.plan = instance(
            "Trainer(plan=...)", plan, PrivacyPlan, "dpx.dp_sgd(60_000, 256, 5_000, epsilon=1.0, delta=1e-5)"
        )
        self.loss = function("Trainer(loss=...)", loss, "loss(model, *example)")
        if not isinstance(optimizer, optax.GradientTransformation | ScaleThenPrivatize):
            raise ValueError(
                f"`Trainer(optimizer=...)` must be an optax transformation such as `optax.adam(1e-3)`; got {described(optimizer)}."
            )
        self.optimizer = optimizer
        self.method = instance("Trainer(method=...)", method, AbstractGradientMethod, "dpx.Ghost()")
        if checkpoint is not None:
            instance("Trainer(checkpoint=...)", checkpoint, Checkpoints, 'dpx.Checkpoints("run")')
        self.checkpoint = checkpoint
        if not (microbatch_size is None or isinstance(microbatch_size, str)):
            microbatch_size = positive_int("Trainer(microbatch_size=...)", microbatch_size)
            with_microbatch(method, microbatch_size)
        elif isinstance(microbatch_size, str) and microbatch_size != "auto":
            raise ValueError(_MSG_MICROBATCH.format(given=repr(microbatch_size)))
        self.microbatch_size = microbatch_size
        self.steps_per_call = positive_int("Trainer(steps_per_call=...)", steps_per_call)
        if average is not None:
            instance("Trainer(average=...)", average, AbstractParameterAverage, "dpx.optimizers.ema(0.999)")
        self.average = average
        self.filter_spec = check_filter_spec("Trainer(filter_spec=...)", filter_spec)
        self.has_aux = flag("Trainer(has_aux=...)", has_aux)
        self.private_gradient = self._gradient(microbatch_size if isinstance(microbatch_size, int) else None)

    # by identity, so that `jax.jit(trainer.step)` works, which looks functions up by their hash: arrays have none
    def __hash__(self) -> int:
        return id(self)

    # Pure parts

    def init(self, model: PyTree, *, key: PRNGKey | None = None) -> TrainState:
        """The state before the first step, on the devices where the model is.

        **Arguments:**

        - `model`: the model. Its arrays are copied: a state may be donated.
        - `key`: the secret of the run's noise, as for `PrivateGradient.init`; by default fresh entropy, which all processes of a run share.

        **Raises:** as `PrivateGradient.init` does.
        """
        if any(is_traced(leaf) for leaf in jax.tree.leaves(model)):
            raise ValueError(
                "`Trainer.init(model)` was called inside a JAX transformation. Call it outside, and pass the state in."
            )
        check_model(model)
        params, _ = trainable(model, self.filter_spec)
        private = self.private_gradient.init(model, key=shared_key() if key is None else key)
        arrays, rest = eqx.partition(model, eqx.is_array)
        opt_state = self.optimizer.init(jax.tree.map(wide, params))
        average = None if self.average is None else self.average.init(params)
        arrays, opt_state, private, average = placed((arrays, opt_state, private, average), mesh_of(model))
        return TrainState(arrays, opt_state, private, average, Skeleton(rest))

    def step(self, state: TrainState, batch: Batch, mask: Mask | None = None) -> TrainState:
        """The state after one private step: pure, to be compiled, scanned and donated as you like. Never take two steps from one state.

        What went wrong on the device is in `state.private`: `state.private.raise_if_failed()`.

        **Arguments:**

        - `state`: from `init`, or the step before.
        - `batch`, `mask`: from `plan.batches` or `dpx.data.feed`.
        """
        instance("Trainer.step(state=...)", state, TrainState, "trainer.init(model)")
        return self._step(self.private_gradient, state, batch, mask)

    def _step(self, private_gradient: PrivateGradient, state: TrainState, batch: Any, mask: Any) -> TrainState:
        model = state.whole_model
        is_scaled = isinstance(self.optimizer, ScaleThenPrivatize)
        extra: Any = {}
        if not is_scaled:
            extra = {"noise_variance": private_gradient.noise_variance(model, state.private)}
        scaling = self.optimizer.scaling(state.opt_state) if is_scaled else None
        grads, private, _ = private_gradient(model, batch, state.private, mask=mask, scaling=scaling)
        params, frozen = eqx.partition(model, self.filter_spec)
        update = optax.with_extra_args_support(self.optimizer).update if not is_scaled else self.optimizer.update
        # optimisers add integers to floats, whatever whoever uses them allows
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, opt_state = update(grads, state.opt_state, jax.tree.map(wide, params), **extra)
        params = jax.tree.map(_moved, params, updates)
        average = state.average
        if self.average is not None and average is not None:
            average = self.average.step(average, params)
        arrays = eqx.filter(eqx.combine(params, frozen), eqx.is_array)
        return TrainState(arrays, opt_state, private, average, state.skeleton)

    def compile(self, state: TrainState, batch: Batch, mask: Mask | None = None) -> Compiled:
        """The step, compiled for batches of this shape before it runs. The state that it is called with is donated: its arrays are gone.

        **Arguments:**

        - `state`: from `init`.
        - `batch`, `mask`: as the steps will get them; only shapes, dtypes and layouts matter. By default a mask of one entry for each example.

        **Returns:**

        A `Compiled`, to be called as `compiled(state, batch, mask)`, which says what memory it takes and which microbatch was chosen.
        """
        instance("Trainer.compile(state=...)", state, TrainState, "trainer.init(model)")
        for name, tree in (("batch", batch), ("mask", mask)):
            for leaf in [] if tree is None else jax.tree.leaves(tree) or [tree]:
                if not (getattr(leaf, "shape", ()) and hasattr(leaf, "dtype")):
                    raise ValueError(
                        f"`Trainer.compile({name}=...)` must be as a step gets it: arrays with a leading batch axis; got {described(leaf)}."
                    )
        check_arguments(state.whole_model, batch, mask, None)
        if mask is None:
            axes = 2 if self.private_gradient.unit == "user" else 1
            mask = np.ones(jax.tree.leaves(batch)[0].shape[:axes], bool)
        return self._compiled_for(state, ((batch, mask),), self.microbatch_size)

    def _compiled_for(self, state: TrainState, pairs: tuple[Any, ...], microbatch_size: Any) -> Compiled:
        """The steps of so many batches and masks in one program, as `fit` runs it."""
        rows = jax.tree.leaves(pairs[0])[0].shape[0]

        parts = (self.plan, self.loss, self.optimizer, self.method, self.average, self.filter_spec)
        options = (self.has_aux, len(pairs))

        def compile_with(size: int | None) -> Compiled:
            return remembered(parts, (*options, size), (state, pairs), lambda: make(size))

        def make(size: int | None) -> Compiled:
            gradient = self._gradient(size)
            # arrays in a loss are arguments, or they would be constants of the program, which are copied into it
            constants, rest = eqx.partition(self.loss, eqx.is_array)

            def step(state, batch, mask, constants):
                with_loss = eqx.tree_at(
                    lambda g: g.loss, gradient, eqx.combine(constants, rest), is_leaf=lambda x: x is None
                )
                return self._step(with_loss, state, batch, mask)

            program = lowered(step, outputs, state, pairs, constants)
            unreached = gradient.unreached(state.whole_model, pairs[0][0])
            return compiled(program, constants, size, len(pairs), unreached)

        def outputs(state):
            # flags, and what the step released
            is_good = state.private.result == Result.successful
            return {"is_good": is_good, "metrics": self.private_gradient.metric_values(state.private)}

        if microbatch_size != "auto" or is_chosen(self.method) or not has_microbatch(self.method):
            return compile_with(None if microbatch_size == "auto" else microbatch_size)
        return largest_that_fits(compile_with, rows, str(len(pairs)))

    def _gradient(self, microbatch_size: int | None) -> PrivateGradient:
        method = with_microbatch(self.method, microbatch_size)
        return self.plan.private_gradient(self.loss, method=method, filter_spec=self.filter_spec, has_aux=self.has_aux)

    # The loop

    def fit(
        self,
        model: PyTree,
        data: Any,
        *,
        seed: Integer | None = None,
        key: PRNGKey | None = None,
        evaluate: Callable[[PyTree], Any] | None = None,
        evaluate_every: Integer | None = None,
        callbacks: Any = (),
        stop_at_epsilon: RealScalarLike | None = None,
        delta: RealScalarLike | None = None,
        sharding: Any = None,
        progress: bool = True,
    ) -> TrainResult:
        r"""Trains, or goes on with a run that was interrupted.

        **Arguments:**

        - `model`: the model to begin with. Where the run goes on from a record, its values are the record's.
        - `data`: a tuple of PyTrees of arrays, as for `plan.batches`; or what `dpx.data.as_source` takes.
        - `seed`, `key`: the secrets of the sampling and of the noise; by default fresh entropy. A record's win: others raise.
        - `evaluate`: `evaluate(model) -> number, or numbers by name`, of PUBLIC data: what it returns is recorded and published without noise. With
            an average it is called for the averaged model, too, whose numbers are named `averaged_...`.
        - `evaluate_every`: how often; by default twenty times in the run. The last one, if nobody stops the run, is evaluated, too.
        - `callbacks`: functions of one `StepInfo`, called after every step; each returns None, or a `dpx.Stop`. After a crash they may see steps
            again, with the same numbers.
        - `stop_at_epsilon`: end before the first step that would spend more, at `delta`. Their number is fixed before the first step, from
            the plan alone.
        - `delta`: for `stop_at_epsilon`, for the epsilon of callbacks and progress bar, and for what is published. By default
            $\min(10^{-5}, n^{-1.5})$ for $n$ units in the data.
        - `sharding`: how batches are laid out on devices; by default their rows over the first axis of the mesh that the model lies on, or of the
            mesh in scope.
        - `progress`: show a bar where there is a terminal, with `rich` or `tqdm` if one is installed.

        **Returns:** a `TrainResult`.

        **Raises:**

        - `ValueError` if arguments do not fit, or the records are of another plan, data, model, seed, key or version: nothing is trained or lost.
        - `RuntimeError` if a step failed, a record could not be written, or another run writes to the same folder. The last record stands.
        """
        return run(
            self,
            model,
            data,
            seed=seed,
            key=key,
            evaluate=evaluate,
            evaluate_every=evaluate_every,
            callbacks=callbacks,
            stop_at_epsilon=stop_at_epsilon,
            delta=delta,
            sharding=sharding,
            progress=progress,
        )


def _moved(x: Any, update: Any) -> Any:
    # added in the wider dtype, and kept in the parameter's
    return x if update is None else (x.astype(update.dtype) + update).astype(x.dtype)
