"""What a run is, as hashes: a record of another plan, model or data is refused, and what differs is named."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._tree import path_str
from ..plan import versions
from ..random import key_words
from ._processes import digest
from ._state import TrainState

if TYPE_CHECKING:
    from ._trainer import Trainer

_REMEDY = "Go on with what the record was made with, or begin a new run in another folder, whose privacy is paid for on its own."
_MSG_OTHER = {
    "plan": "The record in `{path}` is of another plan. ",
    "data": "The record in `{path}` is of data with {old} rows; this plan is for {new}. ",
    "model": "The record in `{path}` is of another model: its arrays have other names, shapes or dtypes, or others are trained. ",
    "optimizer": "The record in `{path}` is of another optimiser or average: its state has other arrays. ",
    "dpx": "The record in `{path}` was written by dpx {old}; this is {new}, which may draw other noise. ",
    "jax": (
        "The record in `{path}` was written with JAX {old}; this is {new}, which may draw other noise, so that what was released after the record "
        "would be released again with other noise. "
    ),
    "seed": "`Trainer.fit(seed=...)` is not the seed of the run in `{path}`, which goes on with its own. Leave it out. ",
    "key": "`Trainer.fit(key=...)` is not the key of the run in `{path}`, which goes on with its own. Leave it out. ",
    "program": (
        "The loss, the optimiser or what else makes a step is not what it was when the record in `{path}` was written, on the same devices. Steps "
        "after the record may have been released; taken again with the same noise for other gradients, they would tell the difference without noise. "
    ),
}


def identity(trainer: "Trainer", state: TrainState) -> dict[str, str]:
    """What a run is, by what can differ."""
    plan = trainer.plan
    found = versions()
    trained = eqx.filter(state.whole_model, trainer.filter_spec)
    return {
        "plan": digest(described(plan)),
        "data": str(plan.sampler.num_rows),
        "model": digest([struct(state.model), struct(trained)]),
        "optimizer": digest([struct(state.opt_state), struct(state.average), described(trainer.average)]),
        "dpx": found["dpx"],
        "jax": found["jax"],
    }


def check_identity(path: Any, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Raises, with the remedy, if something is not as it was."""
    for name, value in new.items():
        if old.get(name) != value:
            refuse(path, name, old.get(name), value)


def refuse(path: Any, what: str, old: Any = None, new: Any = None) -> None:
    """Raises: the record is of another run."""
    raise ValueError(_MSG_OTHER[what].format(path=path, old=old, new=new) + _REMEDY)


def struct(tree: Any) -> list[str]:
    """Path, dtype and shape of every array; of keys, their type."""
    kind = lambda x: str(x.dtype)
    return [f"{path_str(path)} {kind(x)} {list(x.shape)}" for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def described(value: Any) -> Any:
    """A part with all its numbers, to the last bit, as nested lists of texts that are the same in every process."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        words, impl = key_words(value)
        return ["key", str(impl), np.asarray(words).tobytes().hex()]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.asarray(value)
        return ["array", array.dtype.name, list(array.shape), digest(array.tobytes())]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [[f.name, described(getattr(value, f.name))] for f in dataclasses.fields(value)]
        return [_name(type(value)), fields]
    if isinstance(value, Mapping):
        return ["dict", [[str(key), described(value[key])] for key in sorted(value, key=str)]]
    if isinstance(value, list | tuple):
        return [_name(type(value)), [described(v) for v in value]]
    if isinstance(value, functools.partial):
        return ["partial", described([value.func, value.args, value.keywords])]
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    # code is compared as part of the program
    return _name(value) if hasattr(value, "__qualname__") else _name(type(value))


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
