"""Which trained arrays a run has not moved, or has moved by noise alone."""

import zlib
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from .._tree import path_str


def checksums(model: PyTree, filter_spec: PyTree) -> dict[str, int]:
    """A checksum of every trained array by its path; of those that this process does not see as a whole, none."""
    trained = jax.tree_util.tree_leaves_with_path(eqx.filter(model, filter_spec))
    return {path_str(path): _checksum(x) for path, x in trained if x.is_fully_addressable}


def _checksum(x: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(np.asarray(x)).reshape(-1).view(np.uint8).data)


def remarks(before: dict[str, int], after: dict[str, int], unreached: tuple[str, ...]) -> tuple[str, ...]:
    """What somebody should know of the arrays, in sentences. It is public: it follows from the model, the loss and what was released."""
    still = [path for path, value in before.items() if after.get(path) == value]
    noise = [path for path in unreached if path not in still]
    found = []
    if still:
        found.append(f"Never moved: {_listed(still)}. Its updates were zero, or too small for its dtype.")
    if noise:
        found.append(
            f"Moved by noise alone: {_listed(noise)}. The loss does not depend on it; leave it out with `filter_spec`, or its noise is published for "
            "nothing."
        )
    return tuple(found)


def _listed(paths: list[str]) -> str:
    shown = ", ".join(f"`{path}`" for path in paths[:8])
    return shown if len(paths) <= 8 else f"{shown} and {len(paths) - 8} more"
