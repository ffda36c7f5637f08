"""What becomes of a step: the rules, and what of its public inputs they look at."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from .._tree import is_finite
from ._state import PrivateGradientState, Result

_NO_LIMIT = np.iinfo(np.int32).max


def outcome(
    state: PrivateGradientState, steps: int | None, *, is_good: Bool[Array, ""], is_the_plans: Bool[Array, ""]
) -> Any:
    """The result of the step from `state`. What went wrong at an earlier step stays; else budget comes before the plan, and that before numbers."""
    result = Result.where(is_good, state.result, Result.non_finite)
    result = Result.where(is_the_plans, result, Result.not_the_plan)
    result = Result.where(has_budget(state, steps), result, Result.budget_spent)
    return Result.where(state.result == Result.successful, result, state.result)


def has_budget(state: PrivateGradientState, steps: int | None) -> Bool[Array, ""]:
    """Whether the step from `state` is one of the run's."""
    return state.step < (_NO_LIMIT if steps is None else steps)


def are_usable(params: PyTree, others: PyTree, positive: PyTree) -> Bool[Array, ""]:
    """Whether the PUBLIC inputs of a step can give a gradient at all.

    Parameters that are not finite make every example's gradient NaN; each is left out, and what remains is finite, pure noise. They are known
    to whoever sees the gradients, so to stop there tells nothing. That the losses of a batch are NaN must NOT be looked at here: it depends on
    the examples, and whether a run stops is published. `dpx.metrics.Dropped` tells how many were left out, with noise.

    **Arguments:**

    - `params`: what is trained.
    - `others`: what else is computed with. A frozen infinity may be meant, as in an attention mask; NaN may not.
    - `positive`: numbers that must be positive and finite.
    """
    leaves = [jnp.all(x > 0) & jnp.all(x < jnp.inf) for x in jax.tree.leaves(positive)]
    leaves += [~jnp.any(jnp.isnan(x)) for x in jax.tree.leaves(eqx.filter(others, eqx.is_inexact_array))]
    return jnp.all(jnp.stack([is_finite(eqx.filter(params, eqx.is_inexact_array)), *leaves]))
