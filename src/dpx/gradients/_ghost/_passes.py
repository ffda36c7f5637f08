"""From a plan to the clipped sum: in one backward pass, whose cotangents are kept, or in two."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from ..._norms import at_most, combined, grouped_norms, norms_of, settle
from ..._tree import weighted_sum
from .._base import clip_weights
from ._cores import with_cores
from ._jaxpr import Program, run
from ._norm import Bounded, gram_norm, instantiated_norm, outer_norm, recomputed_norm
from ._plan import GRAM, KEEP, OUTER, RECOMPUTE, Group, Plan
from ._term import Term, instantiate, make_term, total
from ._use import ScatterUse
from ._view import View


class Clip(eqx.Module):
    """What becomes of the norms.

    **Arguments:**

    - `mask`: True for real examples; None if all are.
    - `labels`: the group of each leaf.
    - `factors`: weights from finite norms.
    - `order`: norms are L1 (1) or L2 (2).
    """

    mask: Bool[Array, " batch"] | None
    labels: tuple[int, ...] = eqx.field(static=True)
    factors: Callable = eqx.field(static=True)
    order: int = eqx.field(static=True)

    def weigh(self, found: "list[Bounded]") -> tuple[tuple[Array, Array], Array, Array]:
        """Norms and bounds of them, weights, and which examples are kept, from the norms of all leaves and bounds of what they add up."""
        norms, safe = (grouped_norms(list(x), self.labels, self.order) for x in zip(*found, strict=True))
        weights, keep, bounds = clip_weights(safe, self.real(safe.shape[0]), self.factors)
        # an example that is dropped is seen to be
        return (jnp.where(jnp.isfinite(safe), norms, safe), bounds), weights, keep

    def real(self, batch: int) -> Bool[Array, " batch"]:
        """Which examples are real."""
        return jnp.ones(batch, bool) if self.mask is None else self.mask


Norms = tuple[Float[Array, "batch groups"], Float[Array, "batch groups"]]
Sums = tuple[list[Array], Norms, Float[Array, " batch"], list[Array]]


def one_pass(
    program: Program, plan: Plan, leaves: list[Array], example_leaves: list[Array], clip: Clip, axis: Any
) -> Sums:
    """The clipped sums of all leaves, norms, losses and leaves of aux. What sites captured, and their cotangents, are kept for the sums."""
    batch = example_leaves[0].shape[0]
    differentiate = functools.partial(_differentiate, program, plan)
    if any(isinstance(site.use, ScatterUse) for site in plan.found.sites):  # means and sums of what is looked up
        outs, cores = with_cores(differentiate, leaves, example_leaves)
    else:
        outs, cores = differentiate(leaves, example_leaves), {}
    losses, aux, captured, cotangents, direct = outs

    def instantiated(captured, cotangents):
        terms = _terms(plan, captured, cotangents)
        groups = enumerate(plan.groups)
        return {k: _instantiate([terms[j] for j in group.sites]) for k, group in groups if group.rule == KEEP}

    def measure(captured, cotangents, direct, kept):
        terms = _terms(plan, captured, cotangents)
        found = [
            instantiated_norm([], kept[k], True) if k in kept else _measure(group, [terms[j] for j in group.sites])
            for k, group in enumerate(plan.groups)
        ]
        return _by_leaf(plan, len(leaves), clip.order, batch, found, direct)

    def sums(captured, cotangents, direct, kept, weights, keep, leaves):
        terms = _terms(plan, captured, cotangents)
        column = lambda leaf: weights[:, :, clip.labels[leaf]]
        bases = [
            weighted_sum(kept[k], column(group.leaf), keep)
            if k in kept
            else _total(group, [terms[j] for j in group.sites], column(group.leaf), keep)
            for k, group in enumerate(plan.groups)
        ]
        rest = {k: weighted_sum(grads, column(k), keep) for k, grads in direct.items()}
        return _assemble(plan, leaves, bases, rest)

    # Under explicit axes, products over a sharded batch are ambiguous: there the compiler is left to place them.
    rows = PartitionSpec(axis)
    kept = _automatic(instantiated, axis, rows)(captured, cotangents)
    # what was instantiated replaces what it was made of
    left = {j for group in plan.groups if group.rule != KEEP for j in group.sites}
    cotangents = {k: y for k, y in cotangents.items() if k in left}
    captured = {site.capture: captured[site.capture] for k, site in enumerate(plan.found.sites) if k in left}
    # what is measured must be what is added up, to the last bit
    inputs = (program.consts, leaves, example_leaves, clip.real(batch))
    values = settle((captured, cotangents, direct, kept), inputs, cores)
    norms, weights, keep = clip.weigh(_automatic(measure, axis, rows)(*values))
    out = _automatic(sums, axis, _specs(leaves, axis))(*values, weights, keep, leaves)
    return out, norms, losses, aux


def two_passes(
    program: Program, plan: Plan, leaves: list[Array], example_leaves: list[Array], clip: Clip, axis: Any
) -> Sums:
    """The same, forgetting the cotangents of a parameter once its norm is known, and computing them again for the sum.

    Both passes are turns of one compiled loop. So the cotangents that are added up are, to the last bit, those that were measured: a
    second backward pass of the loss times its weights would round differently, and half precision by far more than the bound allows.
    """
    batch = example_leaves[0].shape[0]

    def turn(is_first, weights, keep):
        # without the barrier the compiler would take most of a turn out of the loop, and keep all that it computes
        ours, theirs, _ = lax.optimization_barrier((leaves, example_leaves, weights))
        losses, aux, captured, cotangents, direct = _differentiate(program, plan, ours, theirs)

        def visit(captured, cotangents, direct, weights, keep, is_first, leaves):
            terms = _terms(plan, captured, cotangents)
            zero = jnp.zeros(batch, jnp.float32)

            def either(measure, add):
                """Only one of them is run: its result, and zeros for the other's."""
                struct = jax.eval_shape(add)
                return lax.cond(
                    is_first,
                    lambda: (*measure(), jnp.zeros(struct.shape, struct.dtype)),
                    lambda: (zero, zero, add()),
                )

            column = lambda leaf: weights[:, :, clip.labels[leaf]]
            found, bases, rest, measured = [], [], {}, {}
            for group in plan.groups:
                parts = [terms[k] for k in group.sites]
                measure = functools.partial(_measure, group, parts)
                add = functools.partial(_total, group, parts, column(group.leaf), keep)
                norm, safe, base = either(measure, add)
                found.append((norm, safe))
                bases.append(base)
            for leaf, grads in direct.items():
                measure = functools.partial(_measure_direct, grads, clip.order)
                add = functools.partial(weighted_sum, grads, column(leaf), keep)
                norm, safe, rest[leaf] = either(measure, add)
                measured[leaf] = (norm, safe)
            found = _by_leaf(plan, len(leaves), clip.order, batch, found, {})
            found = [measured.get(k, bounded) for k, bounded in enumerate(found)]
            return found, _assemble(plan, leaves, bases, rest)

        spec = PartitionSpec(axis)
        outs = (spec, _specs(leaves, axis))
        bounded, sums = _automatic(visit, axis, outs)(captured, cotangents, direct, weights, keep, is_first, leaves)
        norms, *found = clip.weigh(bounded)
        weights, keep = (jnp.where(is_first, new, old) for new, old in zip(found, (weights, keep), strict=True))
        return (weights, keep, sums), (norms, losses, aux)

    groups = max(clip.labels) + 1
    start = jnp.zeros((2, batch, groups), jnp.float32), jnp.zeros(batch, bool)
    if axis is not None:
        start = jax.reshard(start[0], PartitionSpec(None, axis)), jax.reshard(start[1], PartitionSpec(axis))
    closed, struct = jax.make_jaxpr(turn, return_shape=True)(jnp.array(True), *start)
    carried, treedef = jax.tree.structure(struct[0]).num_leaves, jax.tree.structure(struct)
    again = jex.jaxpr_as_fun(closed)
    empty = [jnp.zeros(v.shape, v.dtype, out_sharding=_sharding(v)) for v in closed.out_avals[2:carried]]

    def body(carry, is_first):
        outs = again(is_first, *carry[:2])
        return outs[:carried], outs[carried:]

    final, rows = lax.scan(body, [*start, *empty], jnp.array([True, False]))
    # norms are those of the first turn
    (_, _, sums), (norms, losses, aux) = jax.tree.unflatten(treedef, [*final, *(x[0] for x in rows)])
    return sums, norms, losses, aux


def _sharding(aval):
    return None if aval.sharding.mesh.empty else aval.sharding


def _automatic(function: Callable, axis: Any, out_sharding: Any) -> Callable:
    return function if axis is None else jax.sharding.auto_axes(function, out_sharding=out_sharding)


def _specs(leaves: list[Array], axis: Any) -> list[Any]:
    return [PartitionSpec()] * len(leaves) if axis is None else [jax.typeof(x).sharding.spec for x in leaves]


def _differentiate(program: Program, plan: Plan, leaves, example_leaves):
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
    at = {k: len(site.scans) for k, site in enumerate(found.sites)}
    at_captured = {site.capture: len(site.scans) for site in found.sites}
    return jax.vmap(one, out_axes=(0, 0, at_captured, at, 0))(example_leaves)


def _terms(plan: Plan, captured, cotangents) -> dict[int, Term]:
    """The terms of the sites whose cotangents are there."""
    sites = plan.found.sites
    return {k: make_term(sites[k], captured[sites[k].capture], y) for k, y in cotangents.items()}


def _instantiate(parts: list[Term]) -> Array:
    return functools.reduce(jnp.add, [instantiate(part) for part in parts])


def _measure(group: Group, parts: list[Term]) -> Bounded:
    """The norms, and bounds of what `_total` adds up."""
    if group.rule == OUTER:
        norm, safe = outer_norm(parts[0])
    elif group.rule == GRAM:
        norm, safe = gram_norm(parts)
    elif group.rule == RECOMPUTE:
        assert group.cut is not None
        norm, safe = recomputed_norm(parts, *group.cut)
    else:
        norm, safe = instantiated_norm(parts, _instantiate(parts), False)
    return norm.astype(jnp.float32), safe.astype(jnp.float32)


def _measure_direct(grads: Array, order: int) -> Bounded:
    (norm,) = norms_of([grads], order)
    return norm, at_most(norm, grads.shape[1:], order)


def _by_leaf(plan: Plan, number: int, order: int, batch: int, found: list[Bounded], direct: dict[int, Array]):
    """Norms and bounds of each leaf, from those of the groups and from the gradients of direct leaves."""
    parts: list[list[Bounded]] = [[] for _ in range(number)]
    for group, bounded in zip(plan.groups, found, strict=True):
        parts[group.leaf].append(bounded)
    for (leaf, grads), norm in zip(direct.items(), norms_of(list(direct.values()), order), strict=True):
        parts[leaf].append((norm, at_most(norm, grads.shape[1:], order)))
    zero = jnp.zeros(batch, jnp.float32)
    join = lambda values: combined(list(values), order)
    return [tuple(map(join, zip(*leaf, strict=True))) if leaf else (zero, zero) for leaf in parts]


def _total(group: Group, parts: list[Term], column: Array, keep: Array) -> Array:
    may_cancel = group.rule != OUTER
    return functools.reduce(jnp.add, [total(part, column, keep, may_cancel) for part in parts])


def _assemble(plan: Plan, leaves: list[Array], bases: list[Array], direct: dict[int, Array]) -> list[Array]:
    """The clipped sums of all leaves, from those of the groups and of the direct leaves."""
    out: list[Array | None] = [direct.get(k) for k in range(len(leaves))]
    dtypes = [np.result_type(leaf.dtype, np.float32) for leaf in leaves]
    for group, base in zip(plan.groups, bases, strict=True):
        k = group.leaf
        view = plan.found.sites[group.sites[0]].view
        part = _pull_back(view, leaves[k].shape, base.astype(dtypes[k]))
        so_far = out[k]
        out[k] = part if so_far is None else so_far + part
    pairs = zip(out, leaves, dtypes, strict=True)
    return [jnp.zeros(leaf.shape, dtype) if x is None else x.astype(dtype) for x, leaf, dtype in pairs]


def _pull_back(view: View, shape: tuple[int, ...], base: Array) -> Array:
    if not view.steps:
        return base
    (pulled,) = jax.linear_transpose(view.apply, jax.ShapeDtypeStruct(shape, base.dtype))(base)
    return pulled
