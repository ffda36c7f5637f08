"""Clipped sums of per-example gradients, by one forward and one backward pass over the batch."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, PyTree

from ...sharding import batch_axis
from .._base import ClippedSum
from ._jaxpr import Program, trace
from ._passes import Clip, one_pass, two_passes
from ._plan import Plan, make_plan, need_per_example, time_per_pass, time_to_move


def ghost_clipped_sum(
    loss: Callable[[Any, Any], tuple[Array, Any]],
    params: PyTree,
    examples: PyTree,
    mask: Bool[Array, " batch"] | None,
    labels: tuple[int, ...],
    factors: Callable[[Float[Array, "batch groups"]], Float[Array, "batch groups"]],
    *,
    order: int = 2,
    memory_budget: int | None = None,
    passes: int = 1,
) -> tuple[PyTree, Float[Array, "batch groups"], Float[Array, " batch"], PyTree]:
    r"""$\sum_i w_{i,g(\ell)} \nabla_\ell L_i$ for every leaf $\ell$ of group $g(\ell)$, without one gradient per example.

    **Arguments:**

    - `loss`: `(params, example) -> (scalar, aux)`, traced once.
    - `params`: every leaf is differentiated.
    - `examples`: a batch of at least one.
    - `mask`: True for real examples.
    - `labels`: the group of each leaf, in flattening order.
    - `factors`: weights from finite norms.
    - `order`: norms are L1 (1) or L2 (2). Products tell nothing about L1 norms, which need one gradient per example.
    - `memory_budget`: bytes that instantiated gradients may take.
    - `passes`: 2 to compute cotangents twice rather than keep them.

    **Returns:** the sum; per-example, per-group norms of the unclipped gradients, shape `(batch, groups)`; losses; stacked aux.

    !!! success "Guarantee"

        An example that is masked, or has a norm that is not finite in any group, contributes exactly zero.
    """
    program = trace_example(loss, params, examples)
    options: Any = {"order": order, "memory_budget": memory_budget, "passes": passes}
    out = clipped_sum_of(program, params, examples, mask, labels, factors, **options)
    return out.total, out.norms, out.losses, out.aux


def clipped_sum_of(
    program: Program,
    params: PyTree,
    examples: PyTree,
    mask: Bool[Array, " batch"] | None,
    labels: tuple[int, ...],
    factors: Callable[[Float[Array, "batch groups"]], Float[Array, "batch groups"]],
    *,
    order: int = 2,
    memory_budget: int | None = None,
    passes: int = 1,
) -> ClippedSum:
    """`ghost_clipped_sum` of a loss that was traced by `trace_example`."""
    leaves, params_tree = jax.tree.flatten(params)
    example_leaves = jax.tree.leaves(examples)
    plan = plan_for(program, example_leaves[0].shape[0], memory_budget, order, passes)
    compute = one_pass if plan.passes == 1 else two_passes
    clip = Clip(mask, labels, factors, order)
    total, (norms, bounds), losses, aux = compute(program, plan, leaves, example_leaves, clip, batch_axis(examples))
    total, aux = jax.tree.unflatten(params_tree, total), jax.tree.unflatten(program.aux_tree, aux)
    return ClippedSum(total, norms, losses, aux, bounds)


def plan_for(program: Program, batch: int, memory_budget: int | None, order: int, passes: int = 1) -> Plan:
    """`make_plan`; under L1 norms every parameter is direct."""
    direct = {} if order == 2 else dict.fromkeys(range(program.num_params), "has an L1 norm")
    return make_plan(program, batch, memory_budget, direct, passes)


def batch_that_fits(program: Program, batch: int, memory_budget: int | None, order: int) -> tuple[int, int]:
    """How many examples at once keep within the budget, and in how many passes.

    Without one, everything at once in one pass; but what is captured inside `jax.checkpoint`, by which the user said that memory is
    short, is kept to twice the size of the model. With one, two passes are chosen if their examples at once are so many more that they
    save more time on parameters that need not be read than the second pass costs.

    **Raises:** `ValueError` if not even one example fits.
    """
    plan = plan_for(program, 1, 0, order)
    need = max(1, need_per_example(program, plan))
    params = program.jaxpr.invars[: program.num_params]
    model = _bytes([*program.consts, *(v.aval for v in params)])
    if memory_budget is None:
        if not plan.found.is_checkpointed:
            return batch, 1
        return _divisor(batch, max(need, 2 * model) // need), 1
    if need * batch <= memory_budget:
        return batch, 1
    frugal = plan_for(program, 1, 0, order, passes=2)
    needs = {1: need, 2: max(1, need_per_example(program, frugal))}
    least = min(needs.values())
    if memory_budget < least:
        raise ValueError(
            f"`Ghost(memory_budget=...)` must be at least {least} bytes for this loss, which is what clipping one example holds; "
            f"got {memory_budget}."
        )
    sizes = {passes: _divisor(batch, memory_budget // n) for passes, n in needs.items() if n <= memory_budget}
    # each microbatch reads the model twice, writes its gradient and adds it up
    chunks = lambda passes: -(-batch // sizes[passes]) * passes * time_to_move(4 * model)
    time = {passes: chunks(passes) + (passes - 1) * batch * time_per_pass(frugal) for passes in sizes}
    passes = min(time, key=lambda n: time[n])
    return sizes[passes], passes


def _divisor(batch: int, fits: int) -> int:
    """At most so many, and a divisor if that is not much fewer: it costs no padding."""
    if fits >= batch:
        return batch
    divisor = next(n for n in range(fits, 0, -1) if batch % n == 0)
    return divisor if 2 * divisor >= fits else fits


def _bytes(arrays) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)


def trace_example(loss: Callable[[Any, Any], tuple[Array, Any]], params: PyTree, examples: PyTree) -> Program:
    """`trace`, with the shapes of one of `examples`."""
    one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return trace(loss, params, jax.tree.map(one, examples))
