"""How many examples are differentiated at once: the most that fit into the device's memory, as measured by compiling."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from .._files import write_text_atomically
from ..gradients import AbstractGradientMethod, Auto, Ghost
from ._compiled import Compiled

_SHARE = 0.9  # of what is there: allocators lose some to gaps

_MSG_NO_SIZE = (
    "`Trainer(microbatch_size={size})` cannot be handed to `{method}`, which has no microbatch size. Leave it out, or use `dpx.Ghost()` or "
    "`dpx.Vectorized()`."
)
_MSG_TOO_LARGE = (
    "A step does not fit into the device's memory even with one example at a time: it takes {bytes:,} bytes, and {limit:,} may be used. Use a "
    "smaller model, shard it over more devices, or give `Trainer(microbatch_size=None)` to try all the same."
)


def with_microbatch(method: AbstractGradientMethod, size: int | None) -> AbstractGradientMethod:
    """The method with that microbatch size; None leaves it as it is."""
    if size is None:
        return method
    if isinstance(method, Auto):
        return Ghost(microbatch_size=size)
    if not has_microbatch(method):
        raise ValueError(_MSG_NO_SIZE.format(size=size, method=type(method).__name__))
    changed: Any = method
    return dataclasses.replace(changed, microbatch_size=size)


def has_microbatch(method: AbstractGradientMethod) -> bool:
    """Whether it can be told how many examples to differentiate at once."""
    return isinstance(method, Auto) or any(field.name == "microbatch_size" for field in dataclasses.fields(method))


def is_chosen(method: AbstractGradientMethod) -> bool:
    """Whether the user has told it already, or has given it a budget of memory to choose by itself."""
    return getattr(method, "microbatch_size", None) is not None or getattr(method, "memory_budget", None) is not None


def memory_limit() -> int:
    """Bytes that a program may take on one device; on a CPU those of the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    found = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(_SHARE * found)


def largest_that_fits(
    compile_with: Callable[[int | None], Compiled], rows: int, key: str, limit: int | None = None
) -> Compiled:
    """The step with the largest microbatch that fits: the whole batch if it does, else the largest of its halves, quarters, and so on.

    Each candidate is compiled, and its memory measured: a line through small ones underestimates large ones by a quarter. What was found is
    kept beside JAX's compilation cache, where there is one, by what it depends on: the program of the whole batch, the kind of device and its memory,
    and JAX's version.
    """
    limit = memory_limit() if limit is None else limit
    whole = compile_with(None)
    if not whole.memory or whole.memory["total"] <= limit:
        return whole
    name = hashlib.sha256(
        json.dumps([key, whole.digest, limit, jax.__version__, jax.local_devices()[0].device_kind]).encode()
    ).hexdigest()
    known = _known(name)
    if known is not None and known < rows:
        found = compile_with(known)
        if found.memory["total"] <= limit:
            return found
    sizes = sorted({-(-rows // 2**k) for k in range(1, rows.bit_length() + 1)})
    # the largest that fits, by halving: more examples never take less memory, up to what a compiler makes of it; what is chosen was measured
    best, low, high = None, 0, len(sizes) - 1
    smallest = None
    while low <= high:
        middle = (low + high) // 2
        candidate = compile_with(sizes[middle])
        smallest = candidate
        if candidate.memory["total"] <= limit:
            best, low = candidate, middle + 1
        else:
            high = middle - 1
    if best is None:
        assert smallest is not None
        raise ValueError(_MSG_TOO_LARGE.format(bytes=smallest.memory["total"], limit=limit))
    _remember(name, best.microbatch_size)
    return best


_FOUND: dict[str, int] = {}


def _folder() -> Path | None:
    config: Any = jax.config
    folder = config.jax_compilation_cache_dir
    return None if not folder or "://" in folder else Path(folder) / "dpx-microbatch"


def _known(name: str) -> int | None:
    folder = _folder()
    if name not in _FOUND and folder is not None:
        try:
            _FOUND[name] = int((folder / name).read_text())
        except (OSError, ValueError):
            return None
    return _FOUND.get(name)


def _remember(name: str, size: int | None) -> None:
    assert size is not None
    _FOUND[name] = size
    folder = _folder()
    if folder is not None:
        write_text_atomically(folder / name, str(size))
