"""A record of a run as one file: JSON and arrays, checksummed, without code in it that a reader could be made to run.

Layout: 8 bytes of name, 8 bytes that say how long the header is, the header (JSON in UTF-8), the bytes of the arrays one after the other, and
the SHA-256 of all that.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._files import write_atomically
from .._tree import path_str
from ..random import key_of_words, key_words

FORMAT = 1
_NAME = b"dpx-run\n"
_DIGEST = 32
_CHUNK = 1 << 24

_MSG_DAMAGED = (
    "`{path}` is damaged: {what}. It was not written like this; somebody, or the disk, has changed it since.{remedy}"
)


class DamagedRecord(ValueError):
    """A record that is not what was written."""


class Record(NamedTuple):
    """What one file holds.

    **Arguments:**

    - `meta`: what can be said in JSON.
    - `arrays`: arrays by name.
    """

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]


def named_arrays(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree of arrays by their paths; typed keys as their words."""
    plain = lambda x: key_words(x)[0] if _is_key(x) else x
    return {path_str(path): plain(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def restored(arrays: dict[str, Any], like: PyTree) -> PyTree:
    """A tree like `like`, laid out as it is, of arrays by their paths; raises `ValueError` naming the first leaf that differs."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = [path_str(path) for path, _ in leaves]
    for name in [*names, *arrays]:
        if (name in arrays) != (name in names):
            where = "the record has not" if name in names else "the record has, and this run has not"
            raise ValueError(f"{name}, which {where}")
    return jax.tree.unflatten(
        treedef, [_placed(arrays[name], leaf, name) for name, (_, leaf) in zip(names, leaves, strict=True)]
    )


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _placed(array: Any, leaf: Any, name: str) -> Any:
    like, impl = key_words(leaf) if _is_key(leaf) else (leaf, None)
    if (array.shape, array.dtype) != (like.shape, like.dtype):
        raise ValueError(
            f"{name}, in the record {array.dtype}{list(array.shape)}, in this run {like.dtype}{list(like.shape)}"
        )
    if impl is not None:
        return key_of_words(jnp.asarray(array), impl)
    if not isinstance(array, np.ndarray):
        return array
    copy = jnp.array(array)  # JAX owns it, so it may be donated
    # what was on a device because it has to be somewhere would else be another argument of another program
    return jax.device_put(copy, leaf.sharding) if leaf.committed else copy


def write(path: Path, record: Record) -> None:
    """Writes the file so that a crash leaves it whole or not there; nobody but its owner may read it, since it holds secrets."""
    rows, start = [], 0
    for name, array in record.arrays.items():
        rows.append({"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "start": start})
        start += array.nbytes
    header = json.dumps({"format": FORMAT, "meta": record.meta, "arrays": rows, "bytes": start}).encode()

    def save(half: Path) -> None:
        digest = hashlib.sha256()
        with open(half, "r+b") as file:
            for part in (_NAME, len(header).to_bytes(8, "little"), header, *_bytes_of(record.arrays)):
                digest.update(part)
                file.write(part)
            file.write(digest.digest())

    write_atomically(path, save, mode=0o600)


def _bytes_of(arrays: dict[str, np.ndarray]) -> Iterator[Any]:
    for array in arrays.values():
        # as bytes whatever the dtype is: those of small floats have no buffer of their own
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def read_meta(path: Path) -> dict[str, Any]:
    """What a file says of itself, without its arrays, and without a look at its checksum."""
    with open(path, "rb") as file:
        return _header(path, file)["meta"]


def read(path: Path, remedy: str = "") -> Record:
    """The file's record.

    **Raises:** `DamagedRecord`, naming the file, if a single bit of it is not as it was written; `remedy` says what then.
    """
    try:
        _verify(path)
        with open(path, "rb") as file:
            header = _header(path, file)
            arrays = {}
            for row in header["arrays"]:
                dtype, shape = jnp.dtype(row["dtype"]), tuple(row["shape"])
                raw = file.read(dtype.itemsize * math.prod(shape))
                arrays[row["name"]] = np.frombuffer(raw, dtype).reshape(shape)
    except DamagedRecord as error:
        raise DamagedRecord(str(error).format(remedy=f" {remedy}" if remedy else "")) from None
    return Record(header["meta"], arrays)


def _damaged(path: Path, what: str) -> DamagedRecord:
    return DamagedRecord(_MSG_DAMAGED.format(path=str(path).replace("{", "{{"), what=what, remedy="{remedy}"))


def _verify(path: Path) -> None:
    digest, rest = hashlib.sha256(), os.path.getsize(path) - _DIGEST
    if rest < len(_NAME) + 8:
        raise _damaged(path, "it is too short")
    with open(path, "rb") as file:
        while rest:
            part = file.read(min(_CHUNK, rest))
            digest.update(part)
            rest -= len(part)
        if file.read() != digest.digest():
            raise _damaged(path, "its checksum does not fit")


def _header(path: Path, file: BinaryIO) -> dict[str, Any]:
    if file.read(len(_NAME)) != _NAME:
        raise _damaged(path, "it does not begin as a record does")
    try:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        made_by = header["format"]
    except (ValueError, KeyError, TypeError, MemoryError, OverflowError):
        raise _damaged(path, "its header cannot be read") from None
    if made_by != FORMAT:
        raise ValueError(
            f"`{path}` is a record of format {made_by}, and this version of dpx reads format {FORMAT}. Go on with the version that wrote it."
        )
    return header
