"""`Trainer.fit`: a run begins, or goes on where its last record left it."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import PyTree

from ..random import check_key, check_seed, key_words, shared_seed
from . import _orbax
from ._checkpoints import Checkpoints, RunFolder, file_of
from ._fingerprint import check_identity, described, identity, refuse
from ._history import Recorder
from ._loop import Loop
from ._moved import checksums
from ._options import Options, options_of
from ._processes import check_same, from_first, is_first, raise_together
from ._record import Record, read
from ._result import TrainResult
from ._saved import key_impl, key_of, recorder_of, state_of
from ._signals import Signals
from ._state import TrainState, mesh_of

if TYPE_CHECKING:
    from ._trainer import Trainer


def run(
    trainer: "Trainer", model: PyTree, data: Any, *, seed: Any, key: Any, sharding: Any, **options: Any
) -> TrainResult:
    """Trains, or goes on: see `Trainer.fit`."""
    chosen = options_of(trainer.plan, sharding=sharding, **options)
    seed = None if seed is None else check_seed("Trainer.fit(seed=...)", seed)
    if key is not None:
        check_key("Trainer.fit(key=...)", key)
    mesh = mesh_of(model) if sharding is None else sharding.mesh
    in_scope = contextlib.nullcontext() if mesh is None or not jax.sharding.get_mesh().empty else jax.set_mesh(mesh)
    with in_scope, _opened(trainer.checkpoint) as folder, Signals(trainer.checkpoint is not None) as signals:
        loop = _begun(trainer, model, seed, key, chosen, folder)
        loop.run(data, signals)
        return loop.result()


@contextlib.contextmanager
def _opened(checkpoint: Checkpoints | None) -> Iterator[RunFolder | None]:
    """The run's folder, locked by process 0; None in the others, and without checkpoints."""
    folder = error = None
    if checkpoint is not None and is_first():
        try:
            remove = lambda step: _orbax.remove(_orbax.folder_of(checkpoint.path, step))
            folder = RunFolder(checkpoint, remove)
        except Exception as found:
            error = found
    if checkpoint is not None:
        raise_together(error)
    is_done = False
    try:
        yield folder
        is_done = True
    finally:
        if folder is not None:
            folder.close(quietly=not is_done)


def _begun(
    trainer: "Trainer", model: PyTree, seed: Any, key: Any, options: Options, folder: RunFolder | None
) -> "Loop":
    """The run at its beginning, committed, or where its last record left it."""
    record = _last_record(trainer.checkpoint, folder)
    path = None if trainer.checkpoint is None else trainer.checkpoint.path
    if record is None:
        seed = shared_seed() if seed is None else seed
        state = trainer.init(model, key=key)
        meta = {
            "identity": identity(trainer, state),
            "seed": str(seed),
            "key_impl": key_impl(state),
            "rebuild_noise": trainer.checkpoint is not None and trainer.checkpoint.rebuild_noise,
            "stopped": None,
            "horizon": options.horizon,
            "layout": None,
            "microbatch_size": None,
            "programs": {},
            "checksums": checksums(state.whole_model, trainer.filter_spec),
            "unreached": [],
            "remarks": [],
        }
        _check_agreement(meta, state)
        return Loop(trainer, state, Recorder(), meta, options, folder)
    meta = record.meta
    if seed is not None and str(seed) != meta["seed"]:
        refuse(path, "seed")
    if key is not None:
        words, kind = key_words(key)
        if str(kind) != meta["key_impl"] or not np.array_equal(
            np.asarray(words), np.asarray(key_words(key_of(record))[0])
        ):
            refuse(path, "key")
    like = trainer.init(model, key=key_of(record))
    check_identity(path, meta["identity"], identity(trainer, like))
    assert path is not None
    state = state_of(record, path, like, trainer)
    _check_agreement(meta, state)
    meta["rebuild_noise"] = trainer.checkpoint is not None and trainer.checkpoint.rebuild_noise
    return Loop(trainer, state, recorder_of(record), meta, options, folder)


def _last_record(checkpoint: Checkpoints | None, folder: RunFolder | None) -> Record | None:
    """The record to go on from: process 0 finds it, and all read it."""
    found = error = None
    if folder is not None:
        try:
            found = folder.newest()
        except Exception as damaged:
            error = damaged
    if checkpoint is None:
        return None
    raise_together(error)
    if jax.process_count() == 1:
        return None if found is None else found[1]
    step = int(from_first(np.array(-1 if found is None else found[0], np.int32)))
    if step < 0:
        return None
    return found[1] if found is not None else read(file_of(checkpoint.path, step))


def _check_agreement(meta: dict[str, Any], state: TrainState) -> None:
    check_same("the plan, the model or the versions", str(sorted(meta["identity"].items())))
    check_same("the seed", meta["seed"])
    check_same("the key", str(described(state.private.key)))
