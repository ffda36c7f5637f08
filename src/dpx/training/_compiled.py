"""A step, or several at once, compiled ahead of time: a flat, donated carry, and what it takes of the device's memory."""

import collections
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from ._processes import digest
from ._state import TrainState, check_carry

Step = Callable[[TrainState, Any, Any, Any], TrainState]

# What is compiled stays compiled, for the next fit in this process. A carry and a batch make one key, of which a run has few.
_PROGRAMS: "collections.OrderedDict[Any, Any]" = collections.OrderedDict()
_MOST_PROGRAMS = 16

# What differs where the program does not: addresses of host callbacks, and whether an array was put on the only device or just is there.
_ACCIDENT = re.compile(
    r'backend_config = "\d+"|index = \d+ : ui64|0x[0-9a-f]{6,}|sdy.sharding = #sdy.sharding<@empty_mesh, [^>]*>(, )?|^ *sdy.mesh @empty_mesh.*$\n',
    re.MULTILINE,
)


class Compiled(eqx.Module):
    """A compiled step of one shape of batch: `compiled(state, batch, mask) -> state`, which takes the memory of the state that it is given.

    **Arguments:**

    - `microbatch_size`: how many examples are differentiated at once; None: what the gradient method does by itself.
    - `memory`: bytes on one device, by what they are for: `"total"`, and of it `"arguments"`, `"outputs"`, `"temporary"`, less what
        arguments and outputs share.
    - `count`: how many steps it takes at once.
    - `digest`: a hash of the program, which is that of another process where loss, optimiser, shapes, versions and devices are the same.
    - `unreached`: the paths of trained arrays that the loss does not depend on.
    - `run`: what JAX compiled: of the state's leaves, and of one `(batch, mask)` a step.
    """

    microbatch_size: int | None = eqx.field(static=True)
    memory: dict[str, int] = eqx.field(static=True)
    count: int = eqx.field(static=True)
    digest: str = eqx.field(static=True)
    unreached: tuple[str, ...] = eqx.field(static=True)
    run: Any = eqx.field(static=True)

    def __call__(self, state: TrainState, batch: Any, mask: Any) -> TrainState:
        """The state after the step. The arrays of `state` are gone afterwards; with several steps, the batch has one more axis in front."""
        leaves, treedef = jax.tree.flatten(state)
        pairs = ((batch, mask),)
        if self.count > 1:
            pairs = tuple(jax.tree.map(lambda x, i=i: x[i], (batch, mask)) for i in range(self.count))
        leaves, _ = self.run(leaves, pairs)
        return jax.tree.unflatten(treedef, leaves)


def lowered(step: Step, outputs: Callable[[TrainState], PyTree], state: TrainState, pairs: Any, constants: Any) -> Any:
    """As many steps as there are pairs of a batch and a mask, as a program of flat leaves that JAX can compile."""
    leaves, treedef = jax.tree.flatten(state)
    if len(pairs) > 1:  # a scan would say it in its own way
        check_carry(state, jax.eval_shape(step, state, *pairs[0], constants))

    def run(leaves, pairs, constants):
        def one(leaves, pair):
            state = step(jax.tree.unflatten(treedef, leaves), pair[0], pair[1], constants)
            return jax.tree.leaves(state), outputs(state)

        if len(pairs) == 1:
            leaves, out = one(leaves, pairs[0])
            return leaves, jax.tree.map(lambda x: x[None], out)
        # one body for all steps: what it compiles to does not depend on how many there are
        return jax.lax.scan(one, leaves, jax.tree.map(lambda *xs: jnp.stack(xs), *pairs))

    options: Any = {}
    if any(len(leaf.sharding.device_set) > 1 for leaf in leaves):
        # the state goes on where it is, or the next step would be another program
        options = {"out_shardings": ([leaf.sharding for leaf in leaves], None)}
    program = jax.jit(run, donate_argnums=0, **options).lower(leaves, pairs, constants)
    check_carry(state, jax.tree.unflatten(treedef, program.out_info[0]))
    return program


def compiled(
    program: Any, constants: Any, microbatch_size: int | None, count: int, unreached: tuple[str, ...]
) -> Compiled:
    """The program, compiled."""
    executable = program.compile()
    name = digest(_ACCIDENT.sub("", program.as_text()))

    def run(leaves, pairs):
        return executable(leaves, pairs, constants)

    return Compiled(microbatch_size, memory_of(executable), count, name, unreached, run)


def remembered(parts: tuple[Any, ...], options: Any, arguments: Any, make: Callable[[], Compiled]) -> Compiled:
    """What `make` compiles, or has compiled for the very same objects and for arguments of these shapes, dtypes and layouts, as `jax.jit` does."""
    place = lambda x: str(getattr(x, "sharding", None)) + str(getattr(x, "committed", None))
    leaves, treedef = jax.tree.flatten(arguments)
    layout = tuple((x.shape, str(x.dtype), place(x)) for x in leaves)
    key = (tuple(map(id, parts)), options, treedef, layout, str(jax.sharding.get_abstract_mesh()))
    if key not in _PROGRAMS:
        # together with the parts, whose identities nothing else gets as long as they are here
        _PROGRAMS[key] = make(), parts
        while len(_PROGRAMS) > _MOST_PROGRAMS:
            _PROGRAMS.popitem(last=False)
    _PROGRAMS.move_to_end(key)
    return _PROGRAMS[key][0]


def memory_of(executable: Any) -> dict[str, int]:
    """Bytes on one device. `peak_memory_in_bytes` is the arguments alone on some backends: it is not looked at."""
    found = executable.memory_analysis()
    if found is None:
        return {}
    sizes = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
        "shared": found.alias_size_in_bytes,
    }
    total = sizes["arguments"] + sizes["outputs"] + sizes["temporary"] - sizes["shared"]
    return {"total": total, **sizes}
