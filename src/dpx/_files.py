"""Writing files so that a crash leaves the old one or the new one, never half of one."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Any, save: Callable[[Path], Any]) -> Path:
    """Lets `save` write a file of another name next to `path`, and renames it. Missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        save(half)
        os.replace(half, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            half.unlink()
    return path
