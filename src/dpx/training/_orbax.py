"""Arrays that lie on several processes, written and read by Orbax: each process handles its own shards."""

import shutil
from pathlib import Path
from typing import Any

import jax

from ._processes import is_first

_MSG_MISSING = "Records of arrays that lie on several processes are written with Orbax, which is not installed: `pip install 'dpx[scale]'`."


def folder_of(folder: Path, step: int) -> Path:
    """Where the arrays of a record are that are not in its own file."""
    return folder / f"step-{step:012d}.orbax"


def save(path: Path, arrays: dict[str, Any]) -> None:
    """Writes arrays by name; every process must call this. The record's own file, written afterwards, is what commits them."""
    ocp = _orbax()
    if is_first():
        shutil.rmtree(path, ignore_errors=True)  # of a run that was killed before it committed
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, enumerate_names(arrays), force=True)


def load(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """The arrays by name, laid out as those of `like`, on whatever mesh that is."""
    ocp = _orbax()
    target = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in enumerate_names(like).items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(path, target)
    return {name: found[short] for short, name in zip(enumerate_names(like), sorted(like), strict=True)}


def enumerate_names(arrays: dict[str, Any]) -> dict[str, Any]:
    """With names that file systems take, in the order of the paths, which the record's own file lists."""
    return {f"{number:06d}": arrays[name] for number, name in enumerate(sorted(arrays))}


def remove(path: Path) -> None:
    """Removes what Orbax wrote; called by one process."""
    shutil.rmtree(path, ignore_errors=True)


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(_MSG_MISSING) from None
    return ocp
