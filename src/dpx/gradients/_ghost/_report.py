"""What the engine says of itself: its plan, and how far it is from one gradient per example."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ._engine import batch_that_fits, clipped_sum_of, plan_for, trace_example
from ._plan import Group, Plan


def ghost_plan(
    loss: Callable[[Any, Any], tuple[Array, Any]],
    params: PyTree,
    examples: PyTree,
    *,
    memory_budget: int | None = None,
) -> list[tuple[tuple[int, ...], str, int, int]]:
    """One row for each leaf of `params`: shape, rule, and the FLOPs and bytes of norms and clipped sum beyond ordinary backpropagation."""
    leaves = jax.tree.leaves(params)
    program = trace_example(loss, params, examples)
    batch = jax.tree.leaves(examples)[0].shape[0]
    # where the batch is cut, rules are chosen for a part of it
    batch, passes = batch_that_fits(program, batch, memory_budget, 2)
    plan = plan_for(program, batch, memory_budget, 2, passes)
    again = "; in two passes" if passes == 2 else ""
    rows = []
    for number, leaf in enumerate(leaves):
        groups = [group for group in plan.groups if group.leaf == number]
        if number in plan.found.direct:
            size = batch * leaf.size
            rule = f"per example: {plan.found.direct[number]}"
            rows.append((leaf.shape, rule + again, 4 * size, size * leaf.dtype.itemsize))
        elif not groups:
            rows.append((leaf.shape, "has no effect on the loss", 0, 0))
        else:
            rules = ", ".join(dict.fromkeys(_describe(plan, group) for group in groups))
            rows.append((leaf.shape, rules + again, sum(g.flops for g in groups), sum(g.memory for g in groups)))
    return rows


def ghost_check(
    loss: Callable[[Any, Any], tuple[Array, Any]], params: PyTree, examples: PyTree
) -> list[tuple[float, float]]:
    """For each leaf of `params` how far the engine is from one gradient per example: the largest relative error of the norms, and of the
    sum. Evaluates both, so that it needs the memory of one gradient per example.
    """
    number = len(jax.tree.leaves(params))
    if number == 0:
        return []

    @jax.jit
    def both(params, examples):
        program = trace_example(loss, params, examples)
        out = clipped_sum_of(program, params, examples, None, tuple(range(number)), jnp.ones_like)
        grads = jax.vmap(jax.grad(lambda p, e: loss(p, e)[0]), in_axes=(None, 0))(params, examples)
        return out.total, out.norms, grads

    total, norms, grads = jax.device_get(both(params, examples))
    rows = []
    for k, (ours, theirs) in enumerate(zip(jax.tree.leaves(total), jax.tree.leaves(grads), strict=True)):
        theirs = np.asarray(theirs, np.float64)
        wanted = np.sqrt(np.sum(theirs**2, axis=tuple(range(1, theirs.ndim))))
        # a sum may cancel: what it is measured by is the size of what was added
        scale = np.sum(wanted) + np.finfo(np.float32).tiny
        error = np.linalg.norm(np.ravel(np.asarray(ours, np.float64) - theirs.sum(0)))
        norm_error = np.max(np.abs(norms[:, k] - wanted)) / (np.max(wanted) + np.finfo(np.float32).tiny)
        rows.append((float(norm_error), float(error / scale)))
    return rows


def _describe(plan: Plan, group: Group) -> str:
    primitives = ", ".join(dict.fromkeys(plan.found.sites[k].primitive for k in group.sites))
    times = "" if len(group.sites) == 1 else f" x{len(group.sites)}"
    pieces = f" in {group.cut[1]} pieces" if group.cut is not None and group.cut[1] > 1 else ""
    return f"{group.rule}{pieces} ({primitives}{times})"
