"""Writing files so that a crash, of the process or of the machine, leaves the old one or the new one, never half of one."""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Any, save: Callable[[Path], Any], *, mode: int | None = None) -> Path:
    """Lets `save` write a file of another name next to `path`, and renames it once it is on the disk. Missing folders are made.

    **Arguments:**

    - `path`: of the file.
    - `save`: writes to the path that it is given, which has the same suffix and exists, empty.
    - `mode`: the file's permissions, such as 0o600 for what nobody else may read; by default those of new files.

    **Returns:** the path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name that no other process or thread has
    half = path.with_name(f".{secrets.token_hex(8)}-{path.name}")
    os.close(os.open(half, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else mode))
    try:
        save(half)
        _to_disk(half, os.O_RDWR)
        os.replace(half, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            half.unlink()
    fsync(path.parent)
    return path


def write_text_atomically(path: Any, text: str, *, mode: int | None = None) -> Path:
    """The same of a text, in UTF-8."""
    return write_atomically(path, lambda half: half.write_text(text, encoding="utf-8"), mode=mode)


def fsync(folder: Path) -> None:
    """Puts the names in a folder on the disk: files that were renamed survive the machine's crash only then."""
    with contextlib.suppress(OSError):  # not all systems let a folder be opened
        _to_disk(folder, os.O_RDONLY)


def _to_disk(path: Path, how: int) -> None:
    handle = os.open(path, how)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
