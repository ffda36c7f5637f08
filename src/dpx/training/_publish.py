"""A folder of what may be published of a run, and nothing else."""

import json
import math
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._checks import described, flag
from .._files import fsync
from .._round import round_epsilon, round_up
from .._tree import path_str
from .._types import FilePath
from ._processes import digest, is_first

if TYPE_CHECKING:
    from ._result import TrainResult

# the names that the safetensors format has for dtypes
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
_MODEL, _AVERAGE = "model.safetensors", "average.safetensors"

_MSG_EXISTS = "`TrainResult.publish({path!r})`: there is something else already{what}. Publish to a path that does not exist, or remove it."
_CARD = """# Model card

{guarantee}

| | |
|---|---|
| Data | {examples:,} {unit}s |
| Steps taken | {steps:,} of {planned:,} planned |
| Expected batch size | {batch_size:,} |
| Parameters | {trained:,} trained, {frozen:,} frozen |
| Written by | dpx {dpx}, JAX {jax} |

## Privacy

{statement}

## Files

| | |
|---|---|
{files}

The privacy statement is about the data that the model was trained on, not about what frozen parameters were trained on before, and not about
what `evaluate` saw, which was declared public.
{remarks}"""


def publish(result: "TrainResult", path: Any, delta: float) -> Path:
    """Writes the folder, or finds it written: see `TrainResult.publish`."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"`TrainResult.publish(path=...)` must be the path of a folder; got {described(path)}.")
    path = Path(os.path.abspath(os.fspath(path)))
    if not result.plan.mechanism.is_private:
        raise ValueError(
            "`TrainResult.publish(...)`: this run is not differentially private (`NoClipping`), so nothing of it may be published as such. Save "
            "`result.model` yourself."
        )
    contents = contents_of(result, delta)  # in every process: arrays may be gathered
    if not is_first():
        return path
    if os.path.lexists(path):
        _check_same(path, contents)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # what a killed process left
    for name in os.listdir(path.parent):
        if name.startswith(f".{path.name}.half-"):
            shutil.rmtree(path.parent / name, ignore_errors=True)
    half = path.with_name(f".{path.name}.half-{secrets.token_hex(8)}")
    half.mkdir()
    try:
        for name, data in contents.items():
            with open(half / name, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        fsync(half)
        try:
            os.rename(half, path)
        except OSError:
            _check_same(path, contents)  # somebody was quicker
    finally:
        shutil.rmtree(half, ignore_errors=True)
    fsync(path.parent)
    return path


def _check_same(path: Path, contents: dict[str, bytes]) -> None:
    if not path.is_dir():
        raise ValueError(_MSG_EXISTS.format(path=str(path), what=", which is no folder"))
    names = set(os.listdir(path))
    if names != set(contents):
        raise ValueError(_MSG_EXISTS.format(path=str(path), what=""))
    for name, data in contents.items():
        if (path / name).read_bytes() != data:
            raise ValueError(_MSG_EXISTS.format(path=str(path), what=f": `{name}` differs"))


def contents_of(result: "TrainResult", delta: float) -> dict[str, bytes]:
    """The files of a publication, by name. The same result gives the same bytes."""
    sampler = result.plan.sampler
    weights = {_MODEL: safetensors("TrainResult.publish(...): model", result.model)}
    if result.averaged_model is not None:
        weights[_AVERAGE] = safetensors("TrainResult.publish(...): averaged_model", result.averaged_model)
    report = result.plan.report(delta, steps=result.accounted_steps)
    statement = report["statement"] if result.note is None else f"{report['statement']}\n{result.note}"
    report |= {
        "statement": statement,
        "steps_taken": result.steps,
        "steps_accounted_for": result.accounted_steps,
        "stopped": None if result.stopped is None else result.stopped.reason,
        "data": {"num_examples": sampler.num_examples, "num_rows": sampler.num_rows},
        "remarks": list(result.remarks),
        "sha256": {name: digest(data) for name, data in weights.items()},
    }
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(eqx.filter(result.model, eqx.is_array))]
    files = {
        _MODEL: "the weights, in the safetensors format",
        **({_AVERAGE: "their average over steps"} if result.averaged_model is not None else {}),
        "history.json": "private metrics and evaluations, step by step",
        "statement.txt": "the privacy statement",
        "report.json": "the same as data, with the DP event, curves and versions",
    }
    card = _CARD.format(
        guarantee=f"Trained with ({round_epsilon(report['epsilon'])}, {round_up(delta)})-differential privacy for one {result.plan.unit}.",
        examples=sampler.num_examples,
        unit=sampler.unit,
        steps=result.steps,
        planned=sampler.steps,
        batch_size=sampler.batch_size,
        trained=result.trained,
        frozen=sum(sizes) - result.trained,
        dpx=report["versions"]["dpx"],
        jax=report["versions"]["jax"],
        statement=statement,
        files="\n".join(f"| `{name}` | {what} |" for name, what in files.items()),
        remarks="".join(f"\n{remark}\n" for remark in result.remarks),
    )
    return {
        **weights,
        "history.json": _json(_finite(list(result.history))),
        "statement.txt": f"{statement}\n".encode(),
        "report.json": _json(_finite(report)),
        "MODEL_CARD.md": card.encode(),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """With null for what JSON has no number for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def safetensors(call: str, model: PyTree) -> bytes:
    """The arrays of a model by their paths, in the safetensors format, which other programs read too."""
    header, parts, start = {}, [], 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_array)):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.dtype.name not in _DTYPES:
            kind = "PRNG keys" if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.name
            raise ValueError(
                f"`{call}{path_str(path)}` holds {kind}, which cannot be published. Take it out of the model, or convert it."
            )
        array = np.ascontiguousarray(on_host(leaf)).reshape(-1).view(np.uint8)
        name = path_str(path)
        header[name] = {
            "dtype": _DTYPES[leaf.dtype.name],
            "shape": list(leaf.shape),
            "data_offsets": [start, start + array.nbytes],
        }
        parts.append(array.data)
        start += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def on_host(leaf: Any) -> np.ndarray:
    """The whole of an array, also of one that lies on several processes, all of which must then call this."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def load_published(path: FilePath, like: PyTree, *, average: bool = False) -> PyTree:
    """The model of a publication.

    ```python
    model = dpx.load_published("release", eqx.nn.MLP(8, 1, 32, 2, key=jax.random.key(0)))
    ```

    **Arguments:**

    - `path`: the folder that `TrainResult.publish` wrote.
    - `like`: a model of the same structure, shapes and dtypes, whose values do not matter (`eqx.filter_eval_shape` of its constructor will do).
    - `average`: whether to load the average of its weights.

    **Returns:** `like` with the weights that were published, laid out as its arrays are.

    **Raises:** `ValueError` if there is no such publication, a file is not as it was written, or the model is another one.
    """
    call = "load_published(path=...)"
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"`{call}` must be the path of a folder; got {described(path)}.")
    path, name = Path(path), _AVERAGE if flag("load_published(average=...)", average) else _MODEL
    try:
        sums = json.loads((path / "report.json").read_bytes())["sha256"]
        data = (path / name).read_bytes() if name in sums else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{call}`: `{path}` is no folder that `TrainResult.publish` wrote: {error}.") from None
    if data is None:
        raise ValueError(f"`{call}`: no average was published in `{path}`. Leave `average` out.")
    if digest(data) != sums[name]:
        raise ValueError(
            f"`{call}`: `{path / name}` is not as it was published: its checksum does not fit. Get it again from where it came from."
        )
    arrays = _read_safetensors(data)
    is_leaf = lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
    old, rest = eqx.partition(like, is_leaf)
    found = jax.tree_util.tree_leaves_with_path(old)
    names = [path_str(where) for where, _ in found]
    odd = [n for n in [*names, *arrays] if (n in arrays) != (n in names)]
    if odd:
        raise ValueError(
            f"`load_published(like=...)` is another model: `{odd[0]}` is not in {'it' if odd[0] in arrays else 'what was published'}."
        )
    loaded = []
    for n, (_, leaf) in zip(names, found, strict=True):
        array = arrays[n]
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(
                f"`load_published(like=...)` is another model: `{n}` is {leaf.dtype}{list(leaf.shape)}, and was published as "
                f"{array.dtype}{list(array.shape)}."
            )
        sharding = getattr(leaf, "sharding", None)
        loaded.append(jnp.array(array) if sharding is None else jax.device_put(jnp.array(array), sharding))
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(old), loaded), rest)


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    dtypes = {short: name for name, short in _DTYPES.items()}
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    arrays = {}
    for name, row in header.items():
        begin, end = row["data_offsets"]
        arrays[name] = np.frombuffer(body[begin:end], jnp.dtype(dtypes[row["dtype"]])).reshape(row["shape"])
    return arrays
