"""A run between its steps: the same steps whether it was interrupted or not."""

import collections
import functools
import itertools
import logging
import signal
import time
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..data import Batches
from . import _orbax
from ._callbacks import StepInfo, Stop, called
from ._checkpoints import RunFolder
from ._compiled import Compiled
from ._feed import batches_of, sharding_of_batches
from ._fingerprint import described, refuse
from ._history import Recorder, check_evaluation
from ._moved import checksums, remarks
from ._options import Options
from ._processes import digest, from_first, is_first, raise_together, text_from_first
from ._progress import Progress
from ._result import TrainResult, ended
from ._saved import Snapshot, record_of
from ._signals import Signals
from ._state import TrainState, mesh_of

if TYPE_CHECKING:
    from ._trainer import Trainer

_IN_FLIGHT = 2  # programs that may wait for the device
_AGREE_EVERY = 16  # programs between two looks, in several processes, at whether to stop

_LOG = logging.getLogger("dpx")


class Loop:
    """A run between its steps: state, history, and what is said of it in records.

    **Arguments:**

    - `trainer`, `options`: what was asked for.
    - `state`: after the steps so far.
    - `recorder`: what they released.
    - `meta`: what a record says besides.
    - `folder`: where records go; None for nowhere, and in all processes but the first.
    """

    def __init__(
        self,
        trainer: "Trainer",
        state: TrainState,
        recorder: Recorder,
        meta: dict[str, Any],
        options: Options,
        folder: RunFolder | None,
    ):
        self.trainer, self.options, self.folder, self.meta, self.recorder = trainer, options, folder, meta, recorder
        # looked up at every step, which a module makes slow
        self.size, self.checkpoint = trainer.steps_per_call, trainer.checkpoint
        self.every = None if trainer.checkpoint is None else trainer.checkpoint.every
        self.is_stopped = meta["stopped"] is not None
        self.leaves, self.treedef = jax.tree.flatten(state)
        self.step = int(state.private.step)
        self.spread_at = self.step if self.step else None
        self.begin = time.monotonic()
        self.pending: collections.deque[Any] = collections.deque()
        self.programs: dict[Any, Compiled] = {}
        self.last_shape: Any = None
        self.is_program_new = False
        self.call: Any = None
        self.last: dict[str, Any] = {}
        self.epsilon = functools.cache(lambda step: trainer.plan.epsilon(options.delta, step))

    @property
    def state(self) -> TrainState:
        return jax.tree.unflatten(self.treedef, self.leaves)

    @property
    def stopped(self) -> Stop | None:
        found = self.meta["stopped"]
        return None if found is None else Stop(found["reason"], is_public=found["is_public"])

    # The steps

    def run(self, data: Any, signals: Signals) -> None:
        """Takes the steps that are left."""
        if self.stopped is not None or self.step >= self.options.horizon:
            return
        trainer, options = self.trainer, self.options
        self.meta["horizon"] = options.horizon
        batches = self._batches(data)
        shown = options.progress and is_first()
        progress = Progress(
            shown, self.step, options.horizon, self.epsilon if trainer.plan.mechanism.is_private else None
        )
        try:
            self._call_again()
            while self.step < options.horizon and not self.is_stopped:
                before = self.step
                self._take(batches)
                is_due = lambda every, a=before: self.step // every > a // every or self.step == options.horizon
                must_save = self.every is not None and is_due(self.every)
                evaluates = options.evaluate is not None and is_due(options.evaluate_every)
                ends = self._agree(signals.has_come)
                is_quiet = not (must_save or evaluates or ends or options.callbacks)
                released = self._wait(_IN_FLIGHT if is_quiet else 0)
                if evaluates:
                    released[self.step] = {**released.get(self.step, {}), **self._evaluated()}
                if must_save or ends:
                    # callbacks see what is on the disk, if they see anything
                    self.save(wait=bool(options.callbacks) or ends or self.step == options.horizon)
                for step, numbers in released.items():
                    self.last.update(numbers)
                    if options.callbacks:
                        self._call(step, numbers)
                self._keep_stop()
                if ends and not self.is_stopped:
                    raise SystemExit(128 + signal.SIGTERM)
                progress.show(self.step, self.last)
        except Exception as error:
            if self.checkpoint is not None and self.checkpoint.steps:
                error.add_note(f"The record of step {max(self.checkpoint.steps)} stands.")
            raise
        finally:
            batches.close()
            progress.close()

    def _call_again(self) -> None:
        """Calls the callbacks of the last steps of a record: the run may have been killed after it was written, and before they were called."""
        if self.step == 0 or not self.options.callbacks:
            return
        columns = self.recorder.columns
        for step in range((self.step - 1) // self.size * self.size + 1, self.step + 1):
            numbers = {name: column[step - 1].tolist() for name, column in columns.items()}
            rows = [row for row in self.recorder.rows if row["step"] == step]
            self._call(
                step, {**numbers, **{name: value for row in rows for name, value in row.items() if name != "step"}}
            )
        self._keep_stop()

    def _keep_stop(self) -> None:
        """Records that somebody has ended the run."""
        if self.is_stopped:
            self.save(wait=True)

    def _batches(self, data: Any) -> Batches[Any]:
        """The batches that are left, laid out for the microbatch that the first of them was found to need."""
        plan, seed = self.trainer.plan, int(self.meta["seed"])
        sharding = sharding_of_batches(self.options.sharding, mesh_of(self.state))
        prefetch = max(2, self.trainer.steps_per_call)
        size = self.trainer.microbatch_size
        known = size if isinstance(size, int) else None
        batches = batches_of(plan, data, seed, self.step, sharding, known, prefetch)
        if sharding is None or size != "auto":
            return batches
        found = self._program(self._next(batches)).microbatch_size
        batches.close()
        return batches_of(plan, data, seed, self.step, sharding, found, prefetch)

    def _next(self, batches: Batches[Any]) -> tuple[Any, ...]:
        """The batches of the next program: how many, and which, depends on the step alone."""
        size = self.size
        count = min(size - self.step % size, self.options.horizon - self.step)
        pairs = tuple(itertools.islice(batches, count))
        return _of_one_size(pairs) if count > 1 else pairs

    def _take(self, batches: Batches[Any]) -> None:
        """Hands the next steps to the device."""
        pairs = self._next(batches)
        shape = (len(pairs), *(x.shape for x in jax.tree.leaves(pairs[0])))
        if shape != self.last_shape:
            self.last_shape, self.call = shape, self._program(pairs).run
            if self.is_program_new:
                # Before a step of it: a run that begins again has the same secrets, and its steps the same program.
                self._wait(0)
                self.save(wait=True)
                self.is_program_new = False
        self.leaves, out = self.call(self.leaves, pairs)
        self.pending.append((self.step, len(pairs), out))
        self.step += len(pairs)

    def _program(self, pairs: tuple[Any, ...]) -> Compiled:
        shape = (len(pairs), *(x.shape for x in jax.tree.leaves(pairs[0])))
        if shape not in self.programs:
            meta, trainer = self.meta, self.trainer
            where = self._layout()
            size = trainer.microbatch_size
            if size == "auto" and meta["layout"] == where and meta["microbatch_size"] is not None:
                size = meta["microbatch_size"]
            elif self.programs:
                size = next(iter(self.programs.values())).microbatch_size
            program = trainer._compiled_for(self.state, pairs, size)
            if meta["layout"] not in (None, where):
                meta["programs"] = {}
                meta["remarks"] = [
                    *meta["remarks"],
                    f"Went on after step {self.step} on other devices, or with steps computed in another way: with the same noise and batches, and "
                    "other rounding.",
                ]
            meta |= {"layout": where, "microbatch_size": program.microbatch_size}
            name = str(shape)
            if meta["programs"].get(name, program.digest) != program.digest:
                refuse(None if trainer.checkpoint is None else trainer.checkpoint.path, "program")
            self.is_program_new |= name not in meta["programs"]
            meta["programs"] = {**meta["programs"], name: program.digest}
            meta["unreached"] = list(program.unreached)
            self.programs[shape] = program
        return self.programs[shape]

    def _layout(self) -> str:
        """On what steps are computed, and how: what their rounding depends on, beside the program."""
        devices = sorted({(d.platform, d.device_kind) for x in self.leaves for d in x.sharding.device_set})
        places = sorted({str(len(x.sharding.device_set)) + str(getattr(x.sharding, "spec", "")) for x in self.leaves})
        trainer = self.trainer
        return digest(
            [
                devices,
                places,
                jax.process_count(),
                described(trainer.method),
                trainer.microbatch_size,
                trainer.steps_per_call,
            ]
        )

    def _wait(self, most: int) -> dict[int, dict[str, Any]]:
        """Waits until at most so many programs are under way; what those released that have ended, by step."""
        released: dict[int, dict[str, Any]] = {}
        while len(self.pending) > most:
            start, count, out = self.pending.popleft()
            metrics = {name: np.asarray(value) for name, value in out["metrics"].items()}
            is_good = np.asarray(out["is_good"])
            if not is_good.all():
                self._fail(start + int(np.argmin(is_good)) + 1)
            self.recorder.add(metrics)
            for i in range(count):
                released[start + i + 1] = {name: values[i].tolist() for name, values in metrics.items()}
        return released

    def _fail(self, step: int) -> None:
        state = self.state
        Snapshot(state, self.recorder, True, self.trainer.filter_spec).check(step - 1)
        state.private.raise_if_failed()
        raise RuntimeError(f"Step {step} failed.")

    def _evaluated(self) -> dict[str, Any]:
        """What `evaluate` says of the model, which the next step would otherwise take away from whoever keeps it."""
        state, metrics = self.state, self.trainer.plan.metrics
        evaluate: Any = self.options.evaluate
        copied = lambda tree: jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tree)
        found = check_evaluation(evaluate(copied(state.whole_model)), metrics)
        if state.average is not None:
            averaged = check_evaluation(evaluate(state.averaged_model), metrics)
            found |= {f"averaged_{name}": value for name, value in averaged.items()}
        self.recorder.rows.append({"step": self.step, **found})
        return found

    def _call(self, step: int, numbers: dict[str, Any]) -> None:
        callbacks = self.options.callbacks
        stop, error = None, None
        if is_first():
            try:
                epsilon = functools.partial(self.epsilon, step)
                info = StepInfo(step, epsilon, time.monotonic() - self.begin, numbers, self.options.delta)
                stop = called(callbacks, info)
            except Exception as found:
                error = found
        raise_together(error)
        if jax.process_count() > 1:
            stop = _agreed_stop(stop)
        # at its end a run is not stopped
        if stop is not None and not self.is_stopped and self.step < self.options.horizon:
            self.is_stopped = True
            self.meta["stopped"] = {"reason": stop.reason, "is_public": stop.is_public}

    def _agree(self, has_come: bool) -> bool:
        """Whether process 0 was asked to end; the others are told now and then, all at the same step."""
        if jax.process_count() == 1:
            return has_come
        if (self.step // self.size) % _AGREE_EVERY:
            return False
        return bool(from_first(np.array(has_come)))

    # What is kept

    def save(self, *, wait: bool) -> None:
        """Commits a record of the run as it is."""
        checkpoint = self.trainer.checkpoint
        if checkpoint is None:
            return
        step, meta = self.step, dict(self.meta)
        snapshot = Snapshot(self.state, self.recorder, not meta["rebuild_noise"], self.trainer.filter_spec)
        if snapshot.spread:
            if self.spread_at != step:  # never over what a record refers to
                _orbax.save(_orbax.folder_of(checkpoint.path, step), snapshot.spread)
            self.spread_at, wait = step, True
        error = None
        if self.folder is not None:
            try:
                self.folder.save(step, lambda: record_of(snapshot, step, meta), wait=wait)
            except Exception as found:
                error = found
        raise_together(error)

    def result(self) -> TrainResult:
        """What the run ends with."""
        self._wait(0)
        state, trainer = self.state, self.trainer
        Snapshot(state, self.recorder, False, trainer.filter_spec).check(self.step)
        state.private.raise_if_failed()
        after = checksums(state.whole_model, trainer.filter_spec)
        said = (*self.meta["remarks"], *remarks(self.meta["checksums"], after, tuple(self.meta["unreached"])))
        for remark in said if is_first() else ():
            _LOG.warning(remark)
        trained = jax.tree.leaves(eqx.filter(state.whole_model, trainer.filter_spec))
        return TrainResult(
            state.whole_model,
            state.averaged_model,
            self.recorder.history(),
            self.step,
            trainer.plan,
            ended(self.step, self.meta["horizon"], self.stopped),
            self.stopped,
            self.options.delta,
            said,
            sum(x.size for x in trained),
        )


def _of_one_size(pairs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Batches that are computed together, padded to the largest: one in 10^9 is."""
    most = max(jax.tree.leaves(pair)[0].shape[0] for pair in pairs)
    rows = lambda x: [(0, most - x.shape[0]), *[(0, 0)] * (x.ndim - 1)]
    grown = lambda x: x if x.shape[0] == most else jnp.pad(x, rows(x))
    return tuple(jax.tree.map(grown, pair) for pair in pairs)


def _agreed_stop(stop: Stop | None) -> Stop | None:
    text = text_from_first("" if stop is None else f"{int(stop.is_public)}{stop.reason}")
    return Stop(text[1:], is_public=text[0] == "1") if text else None
