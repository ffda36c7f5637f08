"""Arrays that only repeat a smaller one: what is kept of them is the smaller one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex

from ..._norms import Cores
from ._jaxpr import evaluate

# what moves and repeats numbers, and changes none
_MOVES = frozenset({"broadcast_in_dim", "reshape", "transpose", "squeeze", "rev"})


def with_cores(function: Callable[..., Any], *args: Any) -> tuple[Any, Cores]:
    """What `function` returns, and of those leaves that only repeat a smaller array, such as the cotangents of a mean, that array."""
    closed, struct = jax.make_jaxpr(function, return_shape=True)(*args)
    jaxpr: Any = closed.jaxpr
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *jax.tree.leaves(args)], strict=True))
    env |= evaluate(jaxpr, jaxpr.eqns, env)
    made = {eqn.outvars[0]: eqn for eqn in jaxpr.eqns if eqn.primitive.name in _MOVES and len(eqn.invars) == 1}
    outs, cores = [], {}
    for var in jaxpr.outvars:
        is_literal = isinstance(var, jex.Literal)
        outs.append(var.val if is_literal else env[var])
        core, moves, best = var, [], None
        while not isinstance(core, jex.Literal) and core in made:
            moves.insert(0, made[core])
            core = made[core].invars[0]
            if not isinstance(core, jex.Literal) and core.aval.size < (best[0] if best else var).aval.size:
                best = core, list(moves)
        if best is not None:
            cores[id(outs[-1])] = outs[-1], env[best[0]], _again(jaxpr, *best, var)
    return jax.tree.unflatten(jax.tree.structure(struct), outs), cores


def _again(jaxpr: Any, core: Any, moves: list[Any], var: Any) -> Callable[[Any], Any]:
    return lambda x: evaluate(jaxpr, moves, {core: x})[var]
