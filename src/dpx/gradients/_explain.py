"""How gradients are computed, and how well, as tables to print."""

from collections.abc import Sequence

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._tree import leaf_paths
from .._types import Examples, Params, PerExampleLoss
from ._base import AbstractGradientMethod, LeafPlan
from ._ghost import ghost_check


class Explanation(eqx.Module):
    """How each parameter's clipped gradient is computed; prints as a table.

    **Arguments:**

    - `rows`: one `LeafPlan` for each array of the model.
    """

    rows: tuple[LeafPlan, ...] = eqx.field(static=True)

    def __str__(self) -> str:
        head = ("parameter", "shape", "rule", "MFLOP", "MiB")
        body = [(r.path, str(r.shape), r.rule, f"{r.flops / 1e6:.3g}", f"{r.memory / 2**20:.3g}") for r in self.rows]
        return _aligned([head, *body])


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


class Check(eqx.Module):
    """How far the ghost engine is from one gradient per example; prints as a table.

    **Arguments:**

    - `rows`: for each trained leaf its path, the largest relative error of the norms, and that of the sum.
    """

    rows: tuple[tuple[str, float, float], ...] = eqx.field(static=True)

    @property
    def is_close(self) -> bool:
        """Whether all errors are below 1e-4, as float32 rounding is."""
        return all(max(norm, total) < 1e-4 for _, norm, total in self.rows)

    def __str__(self) -> str:
        body = [(path, f"{norm:.1e}", f"{total:.1e}") for path, norm, total in self.rows]
        return _aligned([("parameter", "error of norms", "error of sum"), *body])


def explanation(
    method: AbstractGradientMethod, loss: PerExampleLoss, params: Params, examples: Examples, model: PyTree
) -> Explanation:
    """How `method` computes the gradients of a loss, for every array of the model that has these trained leaves."""
    rows = {row.path: row for row in method.explain(loss, params, examples)}
    arrays = eqx.filter(model, eqx.is_array)
    pairs = zip(leaf_paths(arrays), jax.tree.leaves(arrays), strict=True)
    return Explanation(tuple(rows.get(path, LeafPlan(path, x.shape, "frozen", 0, 0)) for path, x in pairs))


def comparison(loss: PerExampleLoss, params: Params, examples: Examples) -> Check:
    """The ghost engine against one gradient per example."""
    pairs = ghost_check(loss, params, examples)
    return Check(tuple((path, *pair) for path, pair in zip(leaf_paths(params), pairs, strict=True)))
