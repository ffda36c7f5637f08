"""Words for messages: shapes, and what an error says."""

from typing import Any

import equinox as eqx
import jax

from .._checks import described


def describe(tree: Any) -> str:
    """Dtypes and shapes, one for each leaf."""
    return ", ".join(f"{x.dtype}{list(x.shape)}" if eqx.is_array(x) else described(x) for x in jax.tree.leaves(tree))


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().split("\n")[0]
