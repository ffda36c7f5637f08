"""Clipped sums of per-example gradients, by one forward and one backward pass over the batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PyTree

from ..._tree import grouped, per_example_power, root, weighted_sum
from ...sharding import batch_axis
from ._jaxpr import Program, run, trace
from ._norm import gram_norm, outer_norm
from ._plan import Plan, make_plan, need_per_example
from ._term import Term, instantiate, make_term, total
from ._view import View


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

    **Returns:** the sum; per-example, per-group norms of the unclipped gradients, shape `(batch, groups)`; losses; stacked aux.

    !!! success "Guarantee"

        An example that is masked, or has a norm that is not finite in any group, contributes exactly zero.
    """
    program = trace_example(loss, params, examples)
    return clipped_sum_of(program, params, examples, mask, labels, factors, order=order, memory_budget=memory_budget)


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
) -> tuple[PyTree, Float[Array, "batch groups"], Float[Array, " batch"], PyTree]:
    """`ghost_clipped_sum` of a loss that was traced by `trace_example`."""
    leaves, params_tree = jax.tree.flatten(params)
    example_leaves = jax.tree.leaves(examples)
    batch = example_leaves[0].shape[0]
    plan = plan_for(program, batch, memory_budget, order)

    axis = batch_axis(examples)
    specs = [PartitionSpec()] * len(leaves) if axis is None else [jax.typeof(x).sharding.spec for x in leaves]

    at = {k: len(site.scans) for k, site in enumerate(plan.found.sites)}
    at_captured = {site.capture: len(site.scans) for site in plan.found.sites}
    out = _differentiate(program, plan, (0, 0, at_captured, at, 0), leaves, example_leaves)
    losses, aux, captured, cotangents, direct = out

    # Under explicit axes, products over a sharded batch are ambiguous: there the compiler is left to place them.
    squares = _automatic(lambda *args: _squares(plan, len(leaves), order, batch, *args), axis, PartitionSpec(axis))
    powers, errors, kept = squares(captured, cotangents, direct)
    power = grouped(powers, labels)
    norms = root(power, order)
    safe = root(power + grouped(errors, labels), order)
    keep = jnp.all(jnp.isfinite(safe), axis=1)
    if mask is not None:
        keep = keep & mask
    weights = factors(jnp.where(keep[:, None], safe, 0))
    weights = jnp.where(keep[:, None], weights, 0)

    def sums(captured, cotangents, direct, kept, weights, keep, leaves):
        terms = _terms(plan, captured, cotangents)
        columns = [weights[:, label] for label in labels]
        return [_sum(plan, k, leaf, terms, direct, kept, columns[k], keep) for k, leaf in enumerate(leaves)]

    total = _automatic(sums, axis, specs)(captured, cotangents, direct, kept, weights, keep, leaves)
    aux = jax.tree.unflatten(program.aux_tree, aux)
    return jax.tree.unflatten(params_tree, total), norms, losses, aux


def _automatic(function: Callable, axis: Any, out_sharding: Any) -> Callable:
    return function if axis is None else jax.sharding.auto_axes(function, out_sharding=out_sharding)


def _squares(plan: Plan, number: int, order: int, batch: int, captured, cotangents, direct: dict[int, Array]):
    """For each leaf the squared norms and how far rounding may have lowered them; and the instantiated gradients, by group."""
    terms = _terms(plan, captured, cotangents)
    powers: list[list[Array]] = [[] for _ in range(number)]
    errors: list[list[Array]] = [[] for _ in range(number)]
    kept = {}
    for position, group in enumerate(plan.groups):
        parts = [terms[k] for k in group.sites]
        if group.rule == "outer product":
            power = outer_norm(parts[0])
        elif group.rule == "Gram":
            # products that cancel are the one place where rounding errors are not small beside the norm
            power, bound = gram_norm(parts)
            errors[group.leaf].append(2.0**-24 * bound.astype(jnp.float32))
        else:
            kept[position] = functools.reduce(jnp.add, [instantiate(part) for part in parts])
            power = per_example_power(kept[position], 2)
        powers[group.leaf].append(power.astype(jnp.float32))
    for leaf, grads in direct.items():
        powers[leaf].append(per_example_power(grads, order))
    zero = jnp.zeros(batch, jnp.float32)
    add = lambda parts: functools.reduce(jnp.add, parts) if parts else zero
    return [add(parts) for parts in powers], [add(parts) for parts in errors], kept


def _sum(plan: Plan, number: int, leaf: Array, terms, direct, kept, column, keep) -> Array:
    """The clipped sum of one leaf."""
    dtype = np.result_type(leaf.dtype, np.float32)
    if number in direct:
        return weighted_sum(direct[number], column, keep).astype(dtype)
    parts = []
    for position, group in enumerate(plan.groups):
        if group.leaf == number:
            view = plan.found.sites[group.sites[0]].view
            if position in kept:
                base = weighted_sum(kept[position], column, keep)
            else:
                base = functools.reduce(jnp.add, [total(terms[k], column, keep) for k in group.sites])
            parts.append(_pull_back(view, leaf.shape, base.astype(dtype)))
    return functools.reduce(jnp.add, parts) if parts else jnp.zeros(leaf.shape, dtype)


def plan_for(program: Program, batch: int, memory_budget: int | None, order: int) -> Plan:
    """`make_plan`; under L1 norms every parameter is direct."""
    direct = {} if order == 2 else dict.fromkeys(range(program.num_params), "has an L1 norm")
    return make_plan(program, batch, memory_budget, direct)


def batch_that_fits(program: Program, batch: int, memory_budget: int | None, order: int) -> int:
    """How many examples at once keep within the budget.

    Without one, everything at once; but what is captured inside `jax.checkpoint`, by which the user said that memory is short, is kept
    to twice the size of the model.

    **Raises:** `ValueError` if not even one example fits.
    """
    plan = plan_for(program, 1, 0, order)
    need = max(1, need_per_example(program, plan))
    if memory_budget is None:
        if not plan.found.is_checkpointed:
            return batch
        model = [*program.consts, *(v.aval for v in program.jaxpr.invars[: program.num_params])]
        memory_budget = max(need, 2 * sum(x.size * x.dtype.itemsize for x in model))
    fits = memory_budget // need
    if fits < 1:
        raise ValueError(
            f"`Ghost(memory_budget=...)` must be at least {need} bytes for this loss, which is what clipping one example holds; "
            f"got {memory_budget}."
        )
    if fits >= batch:
        return batch
    # a divisor costs no padding
    divisor = next(n for n in range(fits, 0, -1) if batch % n == 0)
    return divisor if 2 * divisor >= fits else fits


def trace_example(loss: Callable[[Any, Any], tuple[Array, Any]], params: PyTree, examples: PyTree) -> Program:
    """`trace`, with the shapes of one of `examples`."""
    one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    return trace(loss, params, jax.tree.map(one, examples))


def _differentiate(program: Program, plan: Plan, out_axes, leaves, example_leaves):
    """Losses, aux, what sites captured, the cotangents of their results, and gradients of direct leaves: all per example."""
    found = plan.found
    taps = {k: jnp.zeros(site.tap_shape, site.output.dtype) for k, site in enumerate(found.sites)}
    differentiated = {k: leaves[k] for k in found.direct}

    def one(example):
        def value(taps, differentiated):
            args = [differentiated.get(k, leaf) for k, leaf in enumerate(leaves)]
            loss, aux, captured = run(program, found, args, example, taps)
            return loss, (loss, aux, captured)

        loss, pull_back, (loss, aux, captured) = jax.vjp(value, taps, differentiated, has_aux=True)
        cotangents, direct = pull_back(jnp.ones_like(loss))
        return loss, aux, captured, cotangents, direct

    # the batch goes behind the axes of scans, where it is already: in front it would cost a transposition
    return jax.vmap(one, out_axes=out_axes)(example_leaves)


def _terms(plan: Plan, captured, cotangents) -> list[Term]:
    return [make_term(site, captured[site.capture], cotangents[k]) for k, site in enumerate(plan.found.sites)]


def _pull_back(view: View, shape: tuple[int, ...], base: Array) -> Array:
    if not view.steps:
        return base
    (pulled,) = jax.linear_transpose(view.apply, jax.ShapeDtypeStruct(shape, base.dtype))(base)
    return pulled


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
    batch = min(batch, batch_that_fits(program, batch, memory_budget, 2))
    plan = plan_for(program, batch, memory_budget, 2)
    rows = []
    for number, leaf in enumerate(leaves):
        groups = [group for group in plan.groups if group.leaf == number]
        if number in plan.found.direct:
            size = batch * leaf.size
            rows.append((leaf.shape, f"per example: {plan.found.direct[number]}", 4 * size, size * leaf.dtype.itemsize))
        elif not groups:
            rows.append((leaf.shape, "has no effect on the loss", 0, 0))
        else:
            rules = ", ".join(dict.fromkeys(_describe(plan, group) for group in groups))
            rows.append((leaf.shape, rules, sum(g.flops for g in groups), sum(g.memory for g in groups)))
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
        run = lambda order: clipped_sum_of(
            program, params, examples, None, tuple(range(number)), jnp.ones_like, order=order
        )
        total, norms, _, _ = run(2)
        grads = jax.vmap(jax.grad(lambda p, e: loss(p, e)[0]), in_axes=(None, 0))(params, examples)
        return total, norms, grads

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


def _describe(plan: Plan, group) -> str:
    primitives = ", ".join(dict.fromkeys(plan.found.sites[k].primitive for k in group.sites))
    times = "" if len(group.sites) == 1 else f" x{len(group.sites)}"
    return f"{group.rule} ({primitives}{times})"
