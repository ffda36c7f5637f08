"""One run of a plan with canaries, and what its strongest adversary sees of it."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from ..plan import PrivacyPlan
from ..private_gradient import PrivateGradient
from ..problem import takes_key, trainable
from ._canaries import GradientCanaries
from ._likelihood import best_size, groups_of
from ._probe import NOTHING, REAL, Probe, keyed
from ._sampling_laws import units_of

_SPARE = 20_000  # parameters without a canary, whose scores are surely out


class Run(NamedTuple):
    """What an attacker sees of a run, and what is known of it.

    **Arguments:**

    - `x`: the canaries' numbers in the noisy sums, `(steps, canaries, coordinates)`, the other rows' subtracted.
    - `spare`: those of parameters without a canary, `(steps, parameters)`.
    - `taken`: whose row was in which batch, `(steps, canaries)`.
    - `shifts`: how far a canary moves the sum, `(canaries, coordinates)`.
    """

    x: np.ndarray
    spare: np.ndarray
    taken: np.ndarray
    shifts: np.ndarray


def run_with_canaries(
    plan: PrivacyPlan, loss: Any, model: PyTree, rows: Any, canaries: GradientCanaries, included: np.ndarray, steps: int, seed: int,
    options: dict[str, Any],
) -> Run:  # fmt: skip
    number, sampler = canaries.number, plan.sampler
    rng = np.random.default_rng([seed, 0xA1])
    units = rng.choice(sampler.num_examples, number, replace=False)
    place = np.full(sampler.num_examples, -1)
    place[units] = np.arange(number)
    params, _ = trainable(model, options["filter_spec"])
    groups = max(plan.clipping.labels(params)) + 1
    size, contributions = best_size(plan.clipping, plan.clipping.init(params), groups)
    shifts = contributions[groups_of(plan, params, canaries.leaf)].reshape(number, -1)
    probe = keyed(
        Probe(loss, options["filter_spec"], False, None if loss else 0, size),
        loss is not None and takes_key(loss, len(rows)),
    )
    gradient = plan.private_gradient(probe, **options)
    secret = int(rng.integers(2**62))
    sets = [place[units_of(sampler, sampler.indices(secret, t))] for t in range(steps)]
    sets = [np.unique(s[s >= 0], return_counts=False) if _is_distinct(sampler) else s[s >= 0] for s in sets]
    own = 0 if rows is None else len(jax.tree.leaves(rows)[0])
    width = own + max(1, max(len(s) for s in sets))
    state = gradient.init(model, key=jr.key(int(rng.integers(2**32))))
    spare_leaf, spare_position = _spare(params, canaries, rng)
    others = _others(gradient, model, rows, canaries, own)
    labels = np.asarray(plan.clipping.labels(params))
    x, spare = np.zeros((steps, *shifts.shape)), np.zeros((steps, len(spare_leaf)))
    taken = np.zeros((steps, number), bool)
    for t, members in enumerate(sets):
        taken[t, members] = True
        data, mask = _batch(rows, canaries, included, members, own, width, plan.unit == "user")
        grads, new, _ = gradient(model, data, state, mask=mask)
        rescale = plan.clipping.rescale(state.clipping)
        by = np.ones(groups) if rescale is None else np.asarray(rescale, np.float64)
        flat = [np.asarray(g, np.float64).ravel() * plan.sampler.batch_size for g in jax.tree.leaves(grads)]
        flat = [g / by[labels[i]] - others[i] / by[labels[i]] for i, g in enumerate(flat)]
        pick = lambda leaf, position, flat=flat: _picked(flat, leaf, position)
        x[t] = pick(canaries.leaf, canaries.position).reshape(shifts.shape)
        spare[t] = pick(spare_leaf, spare_position)
        state = new
    return Run(x, spare, taken, shifts)


def _is_distinct(sampler: Any) -> bool:
    return not getattr(getattr(sampler, "base", sampler), "replace", False)


def _picked(flat: list[np.ndarray], leaf: np.ndarray, position: np.ndarray) -> np.ndarray:
    found = np.zeros(leaf.shape)
    for number, values in enumerate(flat):
        here = leaf == number
        if here.any():
            found[here] = values[position[here]]
    return found


def _spare(params: PyTree, canaries: GradientCanaries, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Parameters in which no canary is, of the leaves in which some are."""
    leaves, positions = [], []
    sizes = [x.size for x in jax.tree.leaves(params)]
    for number in np.unique(canaries.leaf):
        used = canaries.position[canaries.leaf == number]
        free = np.setdiff1d(np.arange(sizes[number]), used)
        leaves.append(np.full(len(free), number))
        positions.append(free)
    leaf, position = np.concatenate(leaves), np.concatenate(positions)
    if len(leaf) > _SPARE:
        keep = rng.choice(len(leaf), _SPARE, replace=False)
        leaf, position = leaf[keep], position[keep]
    return leaf, position


def _others(
    gradient: PrivateGradient, model: PyTree, rows: Any, canaries: GradientCanaries, own: int
) -> list[np.ndarray]:
    """What the user's own rows contribute in every step."""
    leaves = jax.tree.leaves(eqx.filter(model, gradient.filter_spec))
    if rows is None:
        return [np.zeros(1)] * len(leaves)
    shape = (own, *canaries.leaf.shape[1:])
    if gradient.unit == "user":
        examples = jax.tree.leaves(rows)[0].shape[1]
        shape = (own, examples, *canaries.leaf.shape[1:])
    total = gradient.clipped_sum(model, (*rows, np.full(shape, REAL, np.int32), np.zeros(shape, np.int32))).reveal()
    return [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(total)]


def _batch(
    rows: Any,
    canaries: GradientCanaries,
    included: np.ndarray,
    members: np.ndarray,
    own: int,
    width: int,
    is_user: bool,
) -> tuple[tuple[Any, ...], Any]:
    """A batch of one size: the user's rows, the canaries of it (those that are out as rows without a gradient), and padding."""
    count = len(members)
    leaf = np.full((width, *canaries.leaf.shape[1:]), NOTHING, np.int32)
    position = np.zeros_like(leaf)
    leaf[:own] = REAL
    out = (slice(None), *(None,) * (canaries.leaf.ndim - 1))
    leaf[own : own + count] = np.where(included[members][out], canaries.leaf[members], NOTHING)
    position[own : own + count] = canaries.position[members]
    mask = np.arange(width) < own + count
    examples = 1
    data: tuple[Any, ...] = ()
    if rows is not None:
        take = np.arange(width) % own
        data = jax.tree.map(lambda x: np.asarray(x)[take], rows)
        if is_user:
            examples = jax.tree.leaves(rows)[0].shape[1]
    if is_user:
        spread = lambda c: np.repeat(c[:, None], examples, axis=1)
        leaf, position, mask = spread(leaf), spread(position), spread(mask)
    return (*data, leaf, position), jnp.asarray(mask)
