"""Which rule finds the norm of which parameter: least time, from static shapes, subject to memory."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._jaxpr import Program, Site, Sites, find_sites
from ._term import Outer, Rows, Term, features, make_term, sequence, sizes

# Arithmetic that a device does in the time in which it moves one byte of float32: about right for CPUs and GPUs alike.
_FLOPS_PER_BYTE = 8


class Group(eqx.Module):
    """Sites whose gradients add up: the uses of one parameter, or of one of several disjoint parts of it.

    **Arguments:**

    - `leaf`: which parameter.
    - `sites`: positions in `Sites.sites`.
    - `rule`: `"outer product"`, `"Gram"` or `"instantiate"`.
    - `flops`: of the norm, for the batch, beyond ordinary backpropagation.
    - `memory`: bytes held for it.
    """

    leaf: int = eqx.field(static=True)
    sites: tuple[int, ...] = eqx.field(static=True)
    rule: str = eqx.field(static=True)
    flops: int = eqx.field(static=True)
    memory: int = eqx.field(static=True)


class Plan(eqx.Module):
    """The sites, and how their norms are found.

    **Arguments:**

    - `found`: the sites and the direct leaves.
    - `groups`: what is done with the sites.
    """

    found: Sites = eqx.field(static=True)
    groups: tuple[Group, ...] = eqx.field(static=True)


def make_plan(program: Program, batch: int, memory_budget: int | None, direct: dict[int, str]) -> Plan:
    """Finds the sites and chooses. Leaves in `direct` are differentiated per example."""
    while True:
        found = find_sites(program, direct)
        by_leaf: dict[int, dict[tuple, list[int]]] = {}
        for number, site in enumerate(found.sites):
            parts = by_leaf.setdefault(site.view.leaf, {})
            parts.setdefault((site.view.steps, site.view.shape), []).append(number)
        overlapping = {
            leaf: "is used in parts that may overlap" for leaf, parts in by_leaf.items() if _overlap(found.sites, parts)
        }
        if not overlapping:
            break
        direct = found.direct | overlapping
    terms = [_term_struct(site, batch) for site in found.sites]
    groups = [_Candidate(leaf, tuple(part), terms) for leaf, parts in by_leaf.items() for part in parts.values()]
    # instantiated gradients may take as much memory as the captured activations and cotangents do
    held = sum(_bytes(t) for t in terms)
    budget = held if memory_budget is None else memory_budget - held
    used = 0
    for group in sorted(groups, key=lambda g: -g.gain):
        if group.rule == "instantiate" and "Gram" in group.options:
            memory = group.options["instantiate"][1]
            if used + memory > budget and group.options["Gram"][1] < memory:
                group.rule = "Gram"
            else:
                used += memory
    return Plan(found, tuple(Group(g.leaf, g.sites, g.rule, *g.options[g.rule]) for g in groups))


def need_per_example(program: Program, plan: Plan) -> int:
    """Bytes that one example holds from its forward pass to the clipped sum, by `plan`, which is for one example."""
    found = plan.found
    captured = {site.capture: _scanned(site) * _bytes(site.captured) for site in found.sites}
    cotangents = sum(_scanned(site) * _bytes(site.output) for site in found.sites)
    direct = sum(_bytes(_abstract(program.jaxpr.invars[leaf].aval)) for leaf in found.direct)
    kept = sum(group.memory for group in plan.groups if group.rule == "instantiate")
    passing = max((group.memory for group in plan.groups if group.rule != "instantiate"), default=0)
    return sum(captured.values()) + cotangents + direct + kept + passing


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

    def __init__(self, leaf: int, sites: tuple[int, ...], all_terms: list[Term]):
        self.leaf, self.sites = leaf, sites
        terms = [all_terms[k] for k in sites]
        length = sizes(terms[0])
        batch = length["b"]
        size = math.prod(terms[0].shape)
        steps = [math.prod(sizes(t)[j] for j in sequence(t)) for t in terms]
        seq = sum(steps)
        self.options = {}
        if len(terms) == 1 and seq == 1 and isinstance(terms[0], Outer):
            self.options["outer product"] = (2 * sum(math.prod(x.shape) for x in (terms[0].a, terms[0].y)), 8 * batch)
        elif _concatenable(terms):
            common, left, right = features(terms[0])
            count = lambda labels: math.prod(terms[0].shape[j] for j in labels)
            wide = count(left) * all(isinstance(t, Outer) for t in terms) + count(right)
            pairs = batch * count(common) * seq**2
            self.options["Gram"] = (2 * pairs * wide, 8 * pairs)
        if "outer product" not in self.options:
            has_rows = any(isinstance(t, Rows) for t in terms)
            # a table's gradient is zero but for a few rows: to instantiate it is only ever a last resort
            flops = batch * size * (2 if has_rows else 2 * seq)
            self.options["instantiate"] = (flops, 4 * batch * size)
        self.rule = min(
            self.options,
            key=lambda rule: self._time(rule, batch * size * seq, has_rows=any(isinstance(t, Rows) for t in terms)),
        )
        self.gain = 0.0
        if self.rule == "instantiate" and "Gram" in self.options:
            cost = [self._time(rule, batch * size * seq, False) for rule in ("Gram", "instantiate")]
            self.gain = (cost[0] - cost[1]) / self.options["instantiate"][1]

    def _time(self, rule: str, products: int, has_rows: bool) -> float:
        flops, memory = self.options[rule]
        if rule == "Gram" and not has_rows:
            flops += (
                2 * products
            )  # the clipped sum is then one more product; instantiated gradients only need adding up
        return flops + 3 * memory * _FLOPS_PER_BYTE


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
