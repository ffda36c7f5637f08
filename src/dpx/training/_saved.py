"""A run as a record, and back: arrays of the state, history, secrets, and what the run is."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from .._tree import path_str
from ..private_gradient import rebuilt_noise
from ..random import key_of_words, key_words
from . import _orbax
from ._history import Recorder
from ._record import Record, named_arrays, restored
from ._state import TrainState

if TYPE_CHECKING:
    from ._trainer import Trainer

_STATE, _HISTORY = "state", "history/"
_KEY = f"{_STATE}.private.key_data"

_MSG_NOT_FINITE = (
    "`{path}` is not finite after step {step}: the optimiser gave an update that is not, of gradients that are. Nothing of it was recorded or will "
    "be published; use a smaller learning rate, or an optimiser that does not divide by zero."
)


class Snapshot:
    """A state and a history as they were after a step, copied to the host, where the next step cannot change them.

    **Arguments:**

    - `state`: the state.
    - `with_noise`: whether the buffers of the noise are among it.
    - `filter_spec`: what is trained, and must be finite.
    """

    def __init__(self, state: TrainState, recorder: Recorder, with_noise: bool, filter_spec: PyTree):
        kept = state if with_noise else eqx.tree_at(lambda s: s.private.noise, state, None, is_leaf=lambda x: x is None)
        arrays = named_arrays(kept)
        self.spread = {f"{_STATE}{name}": x for name, x in arrays.items() if not _is_on_host(x)}
        here = {f"{_STATE}{name}": x for name, x in arrays.items() if _is_on_host(x)}
        for x in here.values():
            x.copy_to_host_async()
        # a copy, since on CPUs NumPy sees the device's own memory, which is given to the next step
        self.arrays = {name: np.array(_whole(x), copy=True) for name, x in here.items()}
        self.arrays |= {f"{_HISTORY}{name}": column for name, column in recorder.columns.items()}
        self.rows = list(recorder.rows)
        trained = eqx.filter(state.whole_model, filter_spec)
        self._trained = [path for path, _ in jax.tree_util.tree_leaves_with_path(trained)]

    def check(self, step: int) -> None:
        """Raises if a trained array is not finite."""
        for path in self._trained:
            array = self.arrays.get(f"{_STATE}.model{jax.tree_util.keystr(path)}")
            if array is None:
                continue  # on several processes: their next step sees it
            # NumPy does not know what of a small float is finite
            if not np.isfinite(array if array.dtype.kind == "f" else array.astype(np.float32)).all():
                raise RuntimeError(_MSG_NOT_FINITE.format(path=path_str(path), step=step))


def _is_on_host(x: Array) -> bool:
    return x.is_fully_addressable or x.is_fully_replicated


def _whole(x: Array) -> Any:
    return x if x.is_fully_addressable else x.addressable_data(0)


def record_of(snapshot: Snapshot, step: int, meta: Mapping[str, Any]) -> Record:
    """The record of a snapshot."""
    snapshot.check(step)
    return Record({**meta, "step": step, "rows": snapshot.rows, "spread": sorted(snapshot.spread)}, snapshot.arrays)


def key_of(record: Record) -> Key[Array, ""]:
    """The key of the run's noise."""
    return key_of_words(jnp.asarray(record.arrays[_KEY]), record.meta["key_impl"])


def key_impl(state: TrainState) -> str:
    """The name of its type, as a record has it."""
    return str(key_words(state.private.key)[1])


def recorder_of(record: Record) -> Recorder:
    """What the run had released."""
    names = [name for name in record.arrays if name.startswith(_HISTORY)]
    return Recorder({name.removeprefix(_HISTORY): record.arrays[name] for name in names}, record.meta["rows"])


def state_of(record: Record, folder: Path, like: TrainState, trainer: "Trainer") -> TrainState:
    """The state of a record, laid out as `like`, on whatever devices that is.

    **Raises:** `ValueError` if the record is of other arrays.
    """
    rebuild = record.meta["rebuild_noise"]
    target = eqx.tree_at(lambda s: s.private.noise, like, None, is_leaf=lambda x: x is None) if rebuild else like
    arrays: dict[str, Any] = {
        name.removeprefix(_STATE): x for name, x in record.arrays.items() if name.startswith(_STATE)
    }
    spread = [name.removeprefix(_STATE) for name in record.meta["spread"]]
    if spread:
        wanted = named_arrays(target)
        path = _orbax.folder_of(folder, record.meta["step"])
        arrays |= _orbax.load(path, {name: wanted[name] for name in spread if name in wanted})
    try:
        state = restored(arrays, target)
    except ValueError as error:
        raise ValueError(f"The record in `{folder}` is of another run: it differs in `state{error}`.") from None
    if not rebuild:
        return state
    state = eqx.tree_at(lambda s: s.private.noise, state, like.private.noise, is_leaf=lambda x: x is None)
    buffers = rebuilt_noise(trainer.private_gradient, state.whole_model, state.private)
    return eqx.tree_at(lambda s: s.private.noise, state, buffers)
