"""What a plan states about the gradient that it made, and whether that is still so."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._checks import is_traced

_MSG_NOT_THE_PLAN = (
    "This gradient was made by a plan, whose statement rests on {stated}; it now has {got}. Change the plan, as with "
    "`plan.with_noise_multiplier(...)`, and make a new gradient of it: one plan for each choice, also in a sweep. A `dpx.PrivateGradient` that "
    "no plan made may be changed at will, and states nothing."
)


class Stated(NamedTuple):
    """What a plan's statement says about its gradient; hashable, so that it stays beside the numbers that `eqx.tree_at` can reach.

    **Arguments:**

    - `structure`: the tree of clipping, noise, normalizer and metrics, with all that is static in them.
    - `numbers`: path and value of each of its arrays.
    - `rest`: steps, participation and unit.
    """

    structure: Any
    numbers: tuple[tuple[str, tuple[float, ...]], ...]
    rest: tuple[Any, ...]


def stated_of(clipping: Any, noise: Any, normalizer: Any, metrics: Any, *rest: Any) -> Stated | None:
    """The record of these parts; None if a number among them is traced, about which nothing can be stated."""
    tree = {"clipping": clipping, "noise": noise, "normalizer": normalizer, "metrics": metrics}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if any(is_traced(leaf) for _, leaf in leaves):
        return None
    number = lambda leaf: tuple(np.asarray(leaf).ravel().tolist())
    name = lambda path: path[0].key + jax.tree_util.keystr(path[1:])
    return Stated(jax.tree.structure(tree), tuple((name(p), number(x)) for p, x in leaves), rest)


def check_stated(stated: Stated | None, clipping: Any, noise: Any, normalizer: Any, metrics: Any, *rest: Any) -> Array:
    """Whether these parts are those of the record, on the device; raises where the host can tell that they are not."""
    if stated is None:
        return jnp.array(True)
    tree = {"clipping": clipping, "noise": noise, "normalizer": normalizer, "metrics": metrics}
    if jax.tree.structure(tree) != stated.structure or rest != stated.rest:
        kinds = f"a `{type(clipping).__name__}`, a `{type(noise).__name__}` and {rest}, or other options of them"
        raise ValueError(
            _MSG_NOT_THE_PLAN.format(stated="another clipping, noise, or choice of metrics or steps", got=kinds)
        )
    is_same = [jnp.array(True)]
    for (path, numbers), leaf in zip(stated.numbers, jax.tree.leaves(tree), strict=True):
        if is_traced(leaf):
            is_same.append(_is_equal(leaf, np.asarray(numbers)))
        elif (got := tuple(np.asarray(leaf).ravel().tolist())) != numbers:
            shown = lambda n: ", ".join(f"{x:.9g}" for x in n[:3]) + (", ..." if len(n) > 3 else "")
            raise ValueError(_MSG_NOT_THE_PLAN.format(stated=f"{path} = {shown(numbers)}", got=shown(got)))
    return jnp.all(jnp.stack(is_same))


def _is_equal(leaf: Any, numbers: np.ndarray) -> Array:
    """Whether a traced leaf has these numbers: compared as they are, since cast to the leaf's own dtype 1.9 would be the integer 1."""
    is_integer = numbers.dtype.kind != "f" and not jnp.issubdtype(leaf.dtype, jnp.inexact)
    dtype = leaf.dtype if is_integer else jax.dtypes.canonicalize_dtype(np.float64)
    expected = numbers.astype(dtype)
    if leaf.size != numbers.size or (is_integer and not np.array_equal(expected, numbers)):
        return jnp.array(False)
    return jnp.all(leaf.astype(dtype) == expected.reshape(leaf.shape))
