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

from ..._tree import grouped, per_example_power, root, weighted_sum
from .._base import clip_weights
from ._jaxpr import Program, run
from ._norm import gram_norm, outer_norm, recomputed_norm
from ._plan import GRAM, OUTER, RECOMPUTE, Group, Plan
from ._term import Term, instantiate, make_term, total
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

    def weigh(self, powers: list[Array], errors: list[Array]) -> tuple[Array, Array, Array]:
        """Norms, weights, and which examples are kept, from what each leaf adds to the power of the norm, and to its rounding error."""
        power = grouped(powers, self.labels)
        safe = root(power + grouped(errors, self.labels), self.order)
        mask = jnp.ones_like(safe[:, 0], bool) if self.mask is None else self.mask
        return root(power, self.order), *clip_weights(safe, mask, self.factors)


Sums = tuple[list[Array], Float[Array, "batch groups"], Float[Array, " batch"], list[Array]]


def one_pass(
    program: Program, plan: Plan, leaves: list[Array], example_leaves: list[Array], clip: Clip, axis: Any
) -> Sums:
    """The clipped sums of all leaves, norms, losses and leaves of aux. What sites captured, and their cotangents, are kept for the sums."""
    batch = example_leaves[0].shape[0]
    losses, aux, captured, cotangents, direct = _differentiate(program, plan, leaves, example_leaves)

    def squares(captured, cotangents, direct):
        terms = _terms(plan, captured, cotangents)
        found = [_square(group, [terms[k] for k in group.sites]) for group in plan.groups]
        powers, errors = _by_leaf(plan, len(leaves), clip.order, batch, [f[:2] for f in found], direct)
        return powers, errors, {k: f[2] for k, f in enumerate(found) if f[2] is not None}

    def sums(captured, cotangents, direct, kept, weights, keep, leaves):
        terms = _terms(plan, captured, cotangents)
        column = lambda leaf: weights[:, clip.labels[leaf]]
        bases = [
            weighted_sum(kept[k], column(group.leaf), keep)
            if k in kept
            else _total([terms[j] for j in group.sites], column(group.leaf), keep)
            for k, group in enumerate(plan.groups)
        ]
        rest = {k: weighted_sum(grads, column(k), keep) for k, grads in direct.items()}
        return _assemble(plan, leaves, bases, rest)

    # Under explicit axes, products over a sharded batch are ambiguous: there the compiler is left to place them.
    powers, errors, kept = _automatic(squares, axis, PartitionSpec(axis))(captured, cotangents, direct)
    norms, weights, keep = clip.weigh(powers, errors)
    out = _automatic(sums, axis, _specs(leaves, axis))(captured, cotangents, direct, kept, weights, keep, leaves)
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

            column = lambda leaf: weights[:, clip.labels[leaf]]
            found, bases, rest, direct_found = [], [], {}, {}
            for group in plan.groups:
                parts = [terms[k] for k in group.sites]
                measure = functools.partial(lambda group, parts: _square(group, parts)[:2], group, parts)
                add = functools.partial(_total, parts, column(group.leaf), keep)
                power, error, base = either(measure, add)
                found.append((power, error))
                bases.append(base)
            for leaf, grads in direct.items():
                measure = functools.partial(lambda grads: (per_example_power(grads, clip.order), zero), grads)
                add = functools.partial(weighted_sum, grads, column(leaf), keep)
                power, _, rest[leaf] = either(measure, add)
                direct_found[leaf] = power
            powers, errors = _by_leaf(plan, len(leaves), clip.order, batch, found, {})
            powers = [direct_found.get(k, power) for k, power in enumerate(powers)]
            return powers, errors, _assemble(plan, leaves, bases, rest)

        spec = PartitionSpec(axis)
        outs = (spec, spec, _specs(leaves, axis))
        powers, errors, sums = _automatic(visit, axis, outs)(
            captured, cotangents, direct, weights, keep, is_first, leaves
        )
        norms, *found = clip.weigh(powers, errors)
        weights, keep = (jnp.where(is_first, new, old) for new, old in zip(found, (weights, keep), strict=True))
        return (weights, keep, sums), (norms, losses, aux)

    groups = max(clip.labels) + 1
    start = jnp.zeros((batch, groups), jnp.float32), jnp.zeros(batch, bool)
    if axis is not None:
        start = jax.reshard(start, PartitionSpec(axis))
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


def _terms(plan: Plan, captured, cotangents) -> list[Term]:
    return [make_term(site, captured[site.capture], cotangents[k]) for k, site in enumerate(plan.found.sites)]


def _square(group: Group, parts: list[Term]) -> tuple[Array, Array, Array | None]:
    """The squared norms, how far rounding may have lowered them, and instantiated gradients where they are kept."""
    kept = None
    if group.rule == OUTER:
        power = outer_norm(parts[0])
        error = jnp.zeros_like(power)
    elif group.rule == GRAM:
        power, error = gram_norm(parts)
    elif group.rule == RECOMPUTE:
        assert group.cut is not None
        power, error = recomputed_norm(parts, *group.cut)
    else:
        kept = functools.reduce(jnp.add, [instantiate(part) for part in parts])
        power = per_example_power(kept, 2)
        error = jnp.zeros_like(power)
    return power.astype(jnp.float32), error.astype(jnp.float32), kept


def _by_leaf(plan: Plan, number: int, order: int, batch: int, found, direct: dict[int, Array]):
    """Powers and errors of each leaf, from those of the groups and from the gradients of direct leaves."""
    powers: list[list[Array]] = [[] for _ in range(number)]
    errors: list[list[Array]] = [[] for _ in range(number)]
    for group, (power, error) in zip(plan.groups, found, strict=True):
        powers[group.leaf].append(power)
        errors[group.leaf].append(error)
    for leaf, grads in direct.items():
        powers[leaf].append(per_example_power(grads, order))
    zero = jnp.zeros(batch, jnp.float32)
    add = lambda parts: functools.reduce(jnp.add, parts) if parts else zero
    return [add(parts) for parts in powers], [add(parts) for parts in errors]


def _total(parts: list[Term], column: Array, keep: Array) -> Array:
    return functools.reduce(jnp.add, [total(part, column, keep) for part in parts])


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
