"""Everything that touches jaxprs: tracing the loss, finding the sites, running it again with taps. Long because a JAX
upgrade edits this file and no other.

The loss is traced once, for one example. `find_sites` interprets the program abstractly: each value is a `View` of one parameter, or
anything else. `run` interprets it for real, equation by equation, except that stretches without a site are handed back to JAX whole.
Every equation that is not understood makes the parameters it touches *direct*: they are differentiated per example by JAX's own rules.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from ._use import EinsumUse, ScatterUse, Use, find_use
from ._view import View, view_through, whole


class Program(eqx.Module):
    """The traced loss. Inputs are the leaves of the parameters, then those of one example; outputs the loss, then those of aux.

    **Arguments:**

    - `jaxpr`: the program.
    - `consts`: what the loss closes over, frozen parameters among it.
    - `num_params`: how many of the inputs are parameters.
    - `aux_tree`: the structure of aux.
    """

    jaxpr: Any = eqx.field(static=True)
    consts: list[Any]
    num_params: int = eqx.field(static=True)
    aux_tree: Any = eqx.field(static=True)


class Site(eqx.Module):
    """An equation that uses a view of a parameter in a way that a rule understands.

    **Arguments:**

    - `path`: index of the equation in each nested program, outermost first.
    - `view`: the parameter operand.
    - `operand`: its position.
    - `use`: what the rule says.
    - `scans`: for each enclosing scan, its length and the axis of the view's base that it iterates over; None where the parameter is the
        same at every step, so that the steps are one more sequence axis.
    - `scan_paths`: where those scans are.
    - `capture`: number of the captured value; sites of one scope that capture the same value the same way share it.
    - `output`: shape and dtype of the result, for one example.
    - `captured`: shape and dtype of the captured value.
    - `primitive`: the equation's primitive.
    """

    path: tuple[int, ...] = eqx.field(static=True)
    view: View = eqx.field(static=True)
    operand: int = eqx.field(static=True)
    use: EinsumUse | ScatterUse = eqx.field(static=True)
    scans: tuple[tuple[int, int | None], ...] = eqx.field(static=True)
    scan_paths: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    capture: int = eqx.field(static=True)
    output: jax.ShapeDtypeStruct = eqx.field(static=True)
    captured: jax.ShapeDtypeStruct = eqx.field(static=True)
    primitive: str = eqx.field(static=True)

    @property
    def tap_shape(self) -> tuple[int, ...]:
        return (*(length for length, _ in self.scans), *self.output.shape)


class Sites(eqx.Module):
    """What `find_sites` found.

    **Arguments:**

    - `sites`: the sites of all parameters that are not direct.
    - `direct`: leaves to differentiate per example, with the reason.
    - `entered`: paths of equations with a site inside.
    - `is_checkpointed`: whether one of them is `jax.checkpoint`.
    """

    sites: tuple[Site, ...] = eqx.field(static=True)
    direct: dict[int, str] = eqx.field(static=True)
    entered: frozenset[tuple[int, ...]] = eqx.field(static=True)
    is_checkpointed: bool = eqx.field(static=True)


def trace(loss: Callable, params: PyTree, example: PyTree) -> Program:
    """Traces the loss of one example, once. `params` and `example` may be shapes."""
    leaves, params_tree = jax.tree.flatten(params)
    example_leaves, example_tree = jax.tree.flatten(example)
    aux_tree = None

    def flat(leaves, example_leaves):
        nonlocal aux_tree
        out, aux = loss(jax.tree.unflatten(params_tree, leaves), jax.tree.unflatten(example_tree, example_leaves))
        aux_leaves, aux_tree = jax.tree.flatten(aux)
        return [out, *aux_leaves]

    closed = jax.make_jaxpr(flat)(leaves, example_leaves)
    return Program(closed.jaxpr, list(closed.consts), len(leaves), aux_tree)


def find_sites(program: Program, direct: dict[int, str]) -> Sites:
    """The sites of every leaf that is not in `direct`; leaves with a use that no rule covers are added to it."""
    direct = dict(direct)
    while True:
        search = _Search(direct)
        shapes = [v.aval.shape for v in program.jaxpr.invars[: program.num_params]]
        views: list[View | None] = [None if i in direct else whole(i, s) for i, s in enumerate(shapes)]
        views += [None] * (len(program.jaxpr.invars) - program.num_params)
        outs = search.walk(program.jaxpr, views, (), ())
        search.give_up([outs[0]], "is the loss itself")
        if not search.new:
            return Sites(tuple(search.sites), direct, frozenset(search.entered), search.is_checkpointed)
        # direct leaves are ordinary values: what they touch may become a site of another leaf
        direct |= search.new


def run(
    program: Program, found: Sites, leaves: list[Array], example_leaves: list[Array], taps: dict[int, Array]
) -> tuple[Array, list[Array], dict[int, Array]]:
    """Loss, leaves of aux, and captured values of one example; `taps` are added to the sites' results (they are zero)."""
    runner = _Runner({site.path: (k, site) for k, site in enumerate(found.sites)}, found.entered)
    outs, captured = runner.run(program.jaxpr, program.consts, [*leaves, *example_leaves], (), taps)
    return outs[0], outs[1:], captured


class _Search:
    def __init__(self, direct):
        self.direct, self.new = direct, {}
        self.sites, self.entered, self.captures = [], set(), {}
        self.is_checkpointed = False

    def give_up(self, views, reason):
        for view in views:
            if view is not None:
                self.new.setdefault(view.leaf, reason)

    def walk(self, jaxpr, views, path, scans) -> list[View | None]:
        """Records the sites of `jaxpr`, whose inputs are `views` (None: not a view); returns what its outputs are."""
        env = {var: view for var, view in zip(jaxpr.invars, views, strict=True) if view is not None}
        look = lambda atom: None if isinstance(atom, jex.Literal) else env.get(atom)
        for index, eqn in enumerate(jaxpr.eqns):
            inputs = [look(atom) for atom in eqn.invars]
            if any(view is not None for view in inputs):
                outs = self.equation(eqn, inputs, (*path, index), scans)
                env |= {var: view for var, view in zip(eqn.outvars, outs, strict=True) if view is not None}
        return [look(atom) for atom in jaxpr.outvars]

    def equation(self, eqn, inputs, path, scans) -> list[View | None]:
        name = eqn.primitive.name
        nothing: list[View | None] = [None] * len(eqn.outvars)
        dtypes = [getattr(var.aval, "dtype", None) for var in eqn.outvars]
        if name == "stop_gradient" or not any(d is not None and jnp.issubdtype(d, jnp.inexact) for d in dtypes):
            return nothing
        inner = getattr(self, f"enter_{name}", None)
        if inner is not None:
            before = len(self.sites)
            outs = inner(eqn, inputs, path, scans)
            if len(self.sites) > before:
                self.entered.add(path)
                self.is_checkpointed |= name in ("checkpoint", "remat2")
            return outs
        present = [k for k, view in enumerate(inputs) if view is not None]
        if len(present) == 1:
            (operand,) = present
            view = inputs[operand]
            moved = view_through(name, eqn.params, view, [var.aval.shape for var in eqn.outvars])
            if moved is not None:
                return list(moved)
            structs = tuple(_struct(atom.aval) for atom in eqn.invars)
            found = find_use(name, Use(eqn.params, operand, structs, _struct(eqn.outvars[0].aval)))
            if found is not None:
                self.add_site(eqn, operand, view, found, path, scans, structs)
                return nothing
        self.give_up(inputs, f"is used by `{name}`")
        return nothing

    def add_site(self, eqn, operand, view, use, path, scans, structs):
        if use_shape := getattr(use, "parameter_shape", None):
            view = view.reshape(use_shape)
        others = [k for k in range(len(eqn.invars)) if k != operand]
        captured = jax.eval_shape(use.capture, *(structs[k] for k in others))
        key = (path[:-1], tuple(id(eqn.invars[k]) for k in others), use.capture)
        number = self.captures.setdefault(key, len(self.captures))
        axis_at = dict(zip(view.depths, view.stack, strict=True))
        roles = tuple((length, axis_at.get(depth)) for depth, (_, length) in enumerate(scans))
        self.sites.append(
            Site(
                path,
                view,
                operand,
                use,
                roles,
                tuple(at for at, _ in scans),
                number,
                _struct(eqn.outvars[0].aval),
                captured,
                eqn.primitive.name,
            )
        )

    # Programs inside an equation. Results that are views of a parameter end the search for it, except where stated.

    def enter_jit(self, eqn, inputs, path, scans):
        return self.walk(eqn.params["jaxpr"].jaxpr, inputs, path, scans)

    enter_pjit = enter_closed_call = enter_jit

    def enter_checkpoint(self, eqn, inputs, path, scans) -> list[View | None]:
        outs = self.walk(eqn.params["jaxpr"], inputs, path, scans)
        self.give_up(outs, "is a result of `jax.checkpoint`")
        return [None] * len(outs)

    enter_remat2 = enter_checkpoint

    def enter_scan(self, eqn, inputs, path, scans):
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
        self.give_up(inputs[consts : consts + carry], "is carried by a scan")
        inner = [*inputs[:consts], *([None] * carry)]
        inner += [None if view is None else view.unstack(len(scans)) for view in inputs[consts + carry :]]
        outs = self.walk(eqn.params["jaxpr"].jaxpr, inner, path, (*scans, (path, eqn.params["length"])))
        self.give_up(outs, "is a result of a scan")
        return [None] * len(outs)

    def enter_cond(self, eqn, inputs, path, scans):
        self.give_up(inputs[:1], "chooses a branch")
        outs = [None] * len(eqn.outvars)
        for number, branch in enumerate(eqn.params["branches"]):
            outs = self.walk(branch.jaxpr, inputs[1:], (*path, number), scans)
            self.give_up(outs, "is a result of a branch")
        return [None] * len(outs)


class _Runner:
    def __init__(self, sites: dict[tuple[int, ...], tuple[int, Site]], entered):
        self.sites, self.entered = sites, entered

    def inside(self, path, taps):
        """The taps of the sites inside the equation at `path`."""
        return {k: taps[k] for at, (k, _) in self.sites.items() if at[: len(path)] == path}

    def run(self, jaxpr, consts, args, path, taps) -> tuple[list[Array], dict[int, Array]]:
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        read = lambda atom: atom.val if isinstance(atom, jex.Literal) else env[atom]
        captured, waiting = {}, []

        def flush():
            if waiting:
                env.update(evaluate(jaxpr, waiting, env))
                waiting.clear()

        for index, eqn in enumerate(jaxpr.eqns):
            at = (*path, index)
            if at not in self.sites and at not in self.entered:
                waiting.append(eqn)
                continue
            flush()
            if at in self.sites:
                number, site = self.sites[at]
                env.update(evaluate(jaxpr, [eqn], env))
                others = [read(atom) for k, atom in enumerate(eqn.invars) if k != site.operand]
                # without the stop, JAX would carry tangents of what is captured to the end of every scan
                captured[site.capture] = lax.stop_gradient(site.use.capture(*others))
                outs = [_tap(env[eqn.outvars[0]], taps[number])]
            else:
                again = getattr(self, f"run_{eqn.primitive.name}")
                outs, more = again(eqn, [read(atom) for atom in eqn.invars], at, self.inside(at, taps))
                captured |= more
            env.update(zip(eqn.outvars, outs, strict=True))
        flush()
        return [read(atom) for atom in jaxpr.outvars], captured

    def run_jit(self, eqn, args, path, taps):
        closed = eqn.params["jaxpr"]
        return self.run(closed.jaxpr, closed.consts, args, path, taps)

    run_pjit = run_closed_call = run_jit

    def run_checkpoint(self, eqn, args, path, taps):
        again = lambda args, taps: self.run(eqn.params["jaxpr"], (), args, path, taps)
        return jax.checkpoint(again, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(args, taps)

    run_remat2 = run_checkpoint

    def run_scan(self, eqn, args, path, taps):
        closed, consts, carry = eqn.params["jaxpr"], eqn.params["num_consts"], eqn.params["num_carry"]
        const_args, init, xs = args[:consts], args[consts : consts + carry], args[consts + carry :]

        def body(state, step):
            xs, taps = step
            outs, captured = self.run(closed.jaxpr, closed.consts, [*const_args, *state, *xs], path, taps)
            return outs[:carry], (outs[carry:], captured)

        options = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
        final, (ys, captured) = lax.scan(body, init, (xs, taps), **options)
        return [*final, *ys], captured

    def run_cond(self, eqn, args, path, taps):
        zeros = {}
        for at, (_, site) in self.sites.items():
            if at[: len(path)] == path:
                scans = zip(site.scans, site.scan_paths, strict=True)
                lengths = tuple(length for (length, _), scan_path in scans if len(scan_path) > len(path))
                zeros[site.capture] = (lengths, site.captured)

        def branch(number, closed):
            def call(*args):
                outs, captured = self.run(closed.jaxpr, closed.consts, args, (*path, number), taps)
                # a branch that was not taken has a zero cotangent, so that any finite value will do for what it would have captured
                missing = {k: jnp.zeros((*n, *s.shape), s.dtype) for k, (n, s) in zeros.items() if k not in captured}
                return outs, captured | missing

            return call

        branches = [branch(number, closed) for number, closed in enumerate(eqn.params["branches"])]
        return lax.switch(args[0], branches, *args[1:])


def evaluate(jaxpr, eqns, env) -> dict[Any, Array]:
    """The results of `eqns`, some of those of `jaxpr`, by handing them to JAX as one program."""
    inputs, made = {}, {}
    for eqn in eqns:
        for atom in eqn.invars:
            if not isinstance(atom, jex.Literal) and atom not in made:
                inputs.setdefault(atom)
        made |= dict.fromkeys(var for var in eqn.outvars if type(var).__name__ != "DropVar")
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    names = jaxpr.debug_info.with_unknown_names()
    part = jex.Jaxpr((), list(inputs), list(made), list(eqns), effects, names)
    outs = jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ()))(*(env[var] for var in inputs))
    return dict(zip(made, outs, strict=True))


@jax.custom_jvp
def _tap(y, tap):
    # not y + tap: the tap never reaches the compiled program, where a scan would slice its zeros at every step
    del tap
    return y


@_tap.defjvp
def _(primals, tangents):
    return primals[0], tangents[0] + tangents[1]


def _struct(aval) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
