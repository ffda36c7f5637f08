"""Which rule finds the norm of which parameter: least time, from static shapes, subject to memory."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._jaxpr import Program, Site, Sites, find_sites
from ._norm import adds_rows
from ._term import Outer, Rows, Term, axis_to_cut, features, make_term, sequence, sizes

# Arithmetic that a device does in the time in which it moves one byte of float32: about right for CPUs and GPUs alike.
_FLOPS_PER_BYTE = 8

OUTER, GRAM, KEEP, RECOMPUTE = "outer product", "Gram", "instantiate", "instantiate and recompute"


class Group(eqx.Module):
    """Sites whose gradients add up: the uses of one parameter, or of one of several disjoint parts of it.

    **Arguments:**

    - `leaf`: which parameter.
    - `sites`: positions in `Sites.sites`.
    - `rule`: `"outer product"`, `"Gram"`, `"instantiate"` or `"instantiate and recompute"`.
    - `flops`: of the norm, for the batch, beyond ordinary backpropagation.
    - `memory`: bytes held for it.
    - `cut`: under the last rule, the axis of the parameter's base that is cut, and into how many pieces.
    """

    leaf: int = eqx.field(static=True)
    sites: tuple[int, ...] = eqx.field(static=True)
    rule: str = eqx.field(static=True)
    flops: int = eqx.field(static=True)
    memory: int = eqx.field(static=True)
    cut: tuple[int, int] | None = eqx.field(static=True, default=None)


class Plan(eqx.Module):
    """The sites, and how their norms are found.

    **Arguments:**

    - `found`: the sites and the direct leaves.
    - `groups`: what is done with the sites.
    - `passes`: 1 if captured values and cotangents are kept until the clip factors are known, 2 if they are computed again.
    """

    found: Sites = eqx.field(static=True)
    groups: tuple[Group, ...] = eqx.field(static=True)
    passes: int = eqx.field(static=True)


def make_plan(program: Program, batch: int, memory_budget: int | None, direct: dict[int, str], passes: int = 1) -> Plan:
    """Finds the sites and chooses. Leaves in `direct` are differentiated per example."""
    params = program.jaxpr.invars[: program.num_params]
    direct = {k: "has no elements" for k, v in enumerate(params) if 0 in v.aval.shape} | direct
    while True:
        found = find_sites(program, direct)
        by_leaf: dict[int, dict[tuple, list[int]]] = {}
        for number, site in enumerate(found.sites):
            parts = by_leaf.setdefault(site.view.leaf, {})
            parts.setdefault((site.view.steps, site.view.shape), []).append(number)
        overlapping = {
            leaf: "is used in parts that may overlap" for leaf, parts in by_leaf.items() if _overlap(found.sites, parts)
        }
        overlapping |= {site.view.leaf: "is used for nothing" for site in found.sites if _is_empty(site)}
        if not overlapping:
            break
        direct = found.direct | overlapping
    terms = [_term_struct(site, batch) for site in found.sites]
    # instantiated gradients replace what they are made of; beyond that they may take as much memory again
    own = [batch * _scanned(site) * (_bytes(site.captured) + _bytes(site.output)) for site in found.sites]
    room = sum(_bytes(t) for t in terms) if memory_budget is None else max(0, memory_budget - sum(own))
    groups = [
        _Candidate(leaf, tuple(part), terms, sum(own[k] for k in part), room)
        for leaf, parts in by_leaf.items()
        for part in parts.values()
    ]
    used = 0
    for group in sorted(groups, key=lambda g: -g.gain):
        if group.rule == KEEP:
            memory = group.options[KEEP][1]
            more = max(0, memory - group.own)
            others = [r for r in group.options if r != KEEP and (group.options[r][1] < memory or passes == 2)]
            # nothing outlives the first of two passes
            if others and (passes == 2 or used + more > room):
                group.rule = min(others, key=group.time)
            else:
                used += more
    cut = lambda g: g.cut if g.rule == RECOMPUTE else None
    return Plan(found, tuple(Group(g.leaf, g.sites, g.rule, *g.options[g.rule], cut=cut(g)) for g in groups), passes)


def need_per_example(program: Program, plan: Plan) -> int:
    """Bytes that one example holds from its forward pass to the clipped sum, by `plan`, which is for one example."""
    found = plan.found
    captured = {site.capture: _scanned(site) * _bytes(site.captured) for site in found.sites}
    cotangents = [_scanned(site) * _bytes(site.output) for site in found.sites]
    direct = [_bytes(_abstract(program.jaxpr.invars[leaf].aval)) for leaf in found.direct]
    kept = sum(group.memory for group in plan.groups if group.rule == KEEP)
    passing = [group.memory for group in plan.groups if group.rule != KEEP]
    if plan.passes == 1:
        return sum(captured.values()) + sum(cotangents) + sum(direct) + kept + max(passing, default=0)
    # what is taken out of a scan is there all at once; otherwise one parameter follows the other
    stacked = sum(size for size, site in zip(cotangents, found.sites, strict=True) if site.scans)
    at_once = [
        group.memory + sum(cotangents[k] for k in group.sites if not found.sites[k].scans) for group in plan.groups
    ]
    return sum(captured.values()) + stacked + max([*at_once, *direct], default=0)


def time_per_pass(plan: Plan) -> int:
    """Operations of one more forward and backward pass of the sites of `plan`, which is for one example."""
    sites = plan.found.sites
    terms = [_term_struct(site, 1) for site in sites]
    products = sum(math.prod(t.shape) * _positions(t) for t in terms if isinstance(t, Outer))
    return 4 * products + 3 * _FLOPS_PER_BYTE * sum(_bytes(t) for t in terms)


def time_to_move(size: int) -> int:
    """Operations in the time that it takes to read, or to write, so many bytes."""
    return _FLOPS_PER_BYTE * size


def _is_empty(site: Site) -> bool:
    return 0 in (*site.view.shape, *site.captured.shape, *site.tap_shape)


def _positions(term: Term) -> int:
    length = sizes(term)
    return math.prod(length[j] for j in sequence(term))


def _scanned(site: Site) -> int:
    return math.prod(length for length, _ in site.scans)


def _abstract(aval) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _overlap(sites: tuple[Site, ...], parts: dict[tuple, list[int]]) -> bool:
    views = [sites[numbers[0]].view for numbers in parts.values()]
    return any(not a.is_disjoint(b) for k, a in enumerate(views) for b in views[:k])


def _term_struct(site: Site, batch: int) -> Term:
    lengths = [length for length, _ in site.scans]
    captured = jax.ShapeDtypeStruct((*lengths, batch, *site.captured.shape), site.captured.dtype)
    cotangent = jax.ShapeDtypeStruct((*lengths, batch, *site.output.shape), site.output.dtype)
    return jax.eval_shape(lambda e, y: make_term(site, e, y), captured, cotangent)


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


class _Candidate:
    """The rules that apply to a group, each with (FLOPs, bytes), and the fastest."""

    def __init__(self, leaf: int, sites: tuple[int, ...], all_terms: list[Term], own: int, room: int):
        self.leaf, self.sites, self.own = leaf, sites, own
        terms = [all_terms[k] for k in sites]
        batch = sizes(terms[0])["b"]
        size = math.prod(terms[0].shape)
        seq = sum(_positions(t) for t in terms)
        self.products = batch * size * seq
        self.has_rows = any(isinstance(t, Rows) for t in terms)
        self.cut = None
        self.options: dict[str, tuple[int, int]] = {}
        if len(terms) == 1 and seq == 1 and isinstance(terms[0], Outer):
            self.options[OUTER] = (2 * sum(math.prod(x.shape) for x in (terms[0].a, terms[0].y)), 8 * batch)
        elif _concatenable(terms):
            self.options[GRAM] = _gram_cost(terms, batch, seq)
        if OUTER not in self.options:
            # a table's gradient is zero but for a few rows: to instantiate it is only ever a last resort
            flops = batch * size * (2 if self.has_rows else 2 * seq)
            self.options[KEEP] = (flops, 4 * batch * size)
            axis = axis_to_cut(terms)
            if axis is not None:
                # a piece is small beside what it is made of, and beside the whole, unless there is room for more
                limit = max(room, min(self.own, 4 * batch * size) // 4)
                divisors = [n for n in range(1, terms[0].shape[axis] + 1) if terms[0].shape[axis] % n == 0]
                pieces = next((n for n in divisors if 4 * batch * size <= n * limit), divisors[-1])
                self.cut = (axis, pieces)
                self.options[RECOMPUTE] = (flops, 4 * batch * size // pieces)
        self.rule = min((rule for rule in self.options if rule != RECOMPUTE), key=self.time)
        self.gain = 0.0
        if self.rule == KEEP and len(self.options) > 1:
            other = min(self.time(rule) for rule in self.options if rule != KEEP)
            self.gain = (other - self.time(KEEP)) / self.options[KEEP][1]

    def time(self, rule: str) -> float:
        flops, memory = self.options[rule]
        if rule == RECOMPUTE:
            # every piece is written and read once
            memory = self.options[KEEP][1]
        if rule in (GRAM, RECOMPUTE) and not self.has_rows:
            # the clipped sum is then one more product; instantiated gradients only need adding up
            flops += 2 * self.products
        return flops + 3 * memory * _FLOPS_PER_BYTE


def _gram_cost(terms: list[Term], batch: int, seq: int) -> tuple[int, int]:
    common, left, right = features(terms[0])
    count = lambda labels: math.prod(terms[0].shape[j] for j in labels)
    pairs = batch * count(common) * seq**2
    if all(isinstance(t, Rows) for t in terms) and adds_rows(seq, count(right)):
        return 2 * pairs * count(right), 4 * (pairs + batch * count(common) * seq * count(right))
    wide = count(left) * all(isinstance(t, Outer) for t in terms) + count(right)
    return 2 * pairs * wide, 8 * pairs


def _concatenable(terms: list[Term]) -> bool:
    """Whether all terms are products of factors over the same two sets of axes."""
    common, left, right = features(terms[0])
    for term in terms:
        c, a, b = features(term)
        is_row = isinstance(term, Rows)
        if c != common or {a, b} != {left, right} or (is_row and a != (term.axis,)):
            return False
    rows = {term.axis for term in terms if isinstance(term, Rows)}
    return len(rows) <= 1
