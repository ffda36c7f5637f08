"""A part of a plan with its numbers: as data, and as somebody would type it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import numpy as np

from .._round import exactly


def settings(part: eqx.Module) -> dict[str, Any]:
    """The fields of a part as JSON-serialisable values: numbers as they were typed, not the shapes of their arrays."""
    return {field.name: _plain(getattr(part, field.name)) for field in dataclasses.fields(part)}


def described(part: eqx.Module) -> str:
    """A part as somebody would type it, with its numbers."""
    return f"{type(part).__name__}({', '.join(f'{name}={value!r}' for name, value in settings(part).items())})"


def _plain(value: Any) -> Any:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        value = np.asarray(value)
        if value.dtype.kind != "f":
            return value.tolist()
        return float(exactly(float(value))) if value.ndim == 0 else [_plain(x) for x in value]
    if hasattr(value, "prefixes") and hasattr(value, "groups"):  # which path belongs to which group
        paths = [jax.tree_util.keystr(path) for path in value.prefixes]
        return dict(zip(paths, value.groups, strict=True))
    if isinstance(value, eqx.Module):
        return settings(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", None) or repr(value)


def in_words(value: Any) -> str:
    """A number, or several, of `settings`, as the statement prints them."""
    if isinstance(value, list):
        return ", ".join(map(in_words, value))
    return exactly(value) if isinstance(value, float) else str(value)
