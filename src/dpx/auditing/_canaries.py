"""Canaries: rows whose presence an attack is to tell, made to be told as well as can be."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import PyTree

from .._checks import check_tuple, instance, positive_float, positive_int
from .._tree import leaf_paths
from .._types import Batch, Integer, PRNGKey, RealScalarLike, Unchecked
from ..clipping import AbstractClipping
from ..plan import PrivacyPlan
from ..problem import has_parameter, trainable
from ..random import check_seed, fresh_seed
from ._coins import Coins
from ._likelihood import one_step_scores
from ._probe import NOTHING, REAL, Probe, keyed, rows_of

_SIZE = 1e4


class GradientCanaries(eqx.Module):
    r"""Rows whose gradient is a large number in ONE parameter and zero elsewhere (Dirac canaries), each in a parameter of its own.

    Clipped, such a gradient is the clip norm in that parameter. So the canaries of one run do not disturb each other, and in Gaussian noise their
    scores are independent and normal given the coins.

    ```python
    canaries = dpx.auditing.gradient_canaries(model, 3)
    coins = dpx.auditing.flip_coins(3)
    data = canaries.rows((x, y), coins)  # three rows more
    private_grad = plan.private_gradient(canaries.loss(loss))
    ```

    **Arguments:**

    - `leaf`, `position`: of each canary, which leaf of the trained parameters, and which of its numbers in order; shape `(canaries,)`, or `(canaries,
        groups)` where it is in several clip groups at once.
    - `filter_spec`: what is trained.
    """

    leaf: np.ndarray
    position: np.ndarray
    filter_spec: PyTree

    @property
    def number(self) -> int:
        """How many canaries there are."""
        return len(self.leaf)

    def loss(
        self, loss: Callable[..., Any], *, size: RealScalarLike = _SIZE, has_aux: bool = False
    ) -> Callable[..., Any]:
        """`loss(model, *example, leaf, position)`: of a row of yours the loss as it is, of a canary one whose gradient is `size` in its parameter.

        What your loss gives on a canary's row does not matter, NaN included.
        """
        size = positive_float("GradientCanaries.loss(size=...)", size)
        return keyed(Probe(loss, self.filter_spec, has_aux, None, size), has_parameter(loss, "key"))

    def rows(self, data: Batch, coins: Coins) -> tuple[Any, ...]:
        """The data with a row for each canary at the end and two arguments more; those that are out are rows without a gradient.

        An empty row in the place of one that is out is what `"replace_special"` means, and under Poisson sampling adding and removing.
        """
        check_tuple("data", data)
        instance("GradientCanaries.rows(coins=...)", coins, Coins, "flip_coins(1000)")
        if coins.number != self.number:
            raise ValueError(f"`GradientCanaries.rows(data, coins)`: {self.number} canaries, and {coins.number} coins.")
        size = len(jax.tree.leaves(data)[0])
        if size == 0:
            raise ValueError("`GradientCanaries.rows(data, ...)` needs a row at least, to copy its shape.")
        copies = rows_of(data, self.number)
        join = lambda a, b: np.concatenate([np.asarray(a), np.asarray(b)])
        out = (slice(None), *(None,) * (self.leaf.ndim - 1))
        leaf = np.where(coins.included[out], self.leaf, NOTHING).astype(np.int32)
        own = np.full((size, *self.leaf.shape[1:]), REAL, np.int32)
        columns = join(own, leaf), join(np.zeros_like(own), self.position.astype(np.int32))
        return (*jax.tree.map(join, data, copies), *columns)

    def values(self, grads: PyTree) -> np.ndarray:
        """The numbers of a gradient in the canaries' parameters, in the shape of `leaf`."""
        flat = [x.ravel() for x in jax.tree.leaves(grads)]
        found = np.zeros(self.leaf.shape)
        for number, x in enumerate(flat):
            here = self.leaf == number
            if here.any():
                found[here] = np.asarray(x[self.position[here]], np.float64)
        return found

    def scores(self, plan: PrivacyPlan, grads: PyTree, others: PyTree = None) -> np.ndarray:
        """The log likelihood ratio of every canary, in or out, after ONE step; add them up over steps.

        For clipping without a state, and noise that is independent between steps.

        **Arguments:**

        - `plan`: which made the gradient.
        - `grads`: what the step returned.
        - `others`: the clipped sum of all other rows of the batch (`private_grad.clipped_sum(...).reveal()`), which the adversary of
            differential privacy knows; None if there were none.
        """
        values = self.values(grads) * plan.sampler.batch_size
        if others is not None:
            values = values - self.values(others)
        return one_step_scores(plan, values, self.leaf, grads)


def gradient_canaries(
    model: PyTree,
    num_canaries: Integer,
    *,
    filter_spec: PyTree = eqx.is_inexact_array,
    seed: Integer | None = None,
    clipping: Unchecked[AbstractClipping | None] = None,
) -> GradientCanaries:
    """Dirac canaries in distinct parameters, at least one in every trained leaf that has room.

    **Arguments:**

    - `model`: the model.
    - `num_canaries`: how many, at most as many as there are parameters.
    - `filter_spec`: what is trained.
    - `seed`: of the choice; by default from the operating system.
    - `clipping`: where it clips groups on their own, a canary is in one parameter of each group that has enough of them.

    **Raises:** `ValueError` for fewer canaries than leaves, or more than parameters.
    """
    number = positive_int("gradient_canaries(num_canaries=...)", num_canaries)
    params, _ = trainable(model, filter_spec)
    seed = fresh_seed() if seed is None else check_seed("gradient_canaries(seed=...)", seed)
    rng = np.random.default_rng([seed, 0xCA])
    sizes = [x.size for x in jax.tree.leaves(params)]
    labels = [0] * len(sizes) if clipping is None else list(clipping.labels(params))
    groups = []
    for group in sorted(set(labels)):
        members = [i for i, g in enumerate(labels) if g == group and sizes[i]]
        if sum(sizes[i] for i in members) >= number and len(members) <= number:
            groups.append(members)
    if not groups:
        room = max(sum(sizes[i] for i in range(len(sizes)) if labels[i] == g) for g in set(labels))
        raise ValueError(
            f"`gradient_canaries(num_canaries={number})`: every canary needs a parameter of its own, and every leaf a canary; there are "
            f"{len(leaf_paths(params))} leaves and {room} parameters{' in the largest clip group' if len(set(labels)) > 1 else ''}."
        )
    columns = [_spread(members, sizes, number, rng) for members in groups]
    leaf, position = (np.stack(x, axis=1) for x in zip(*columns, strict=True))
    if len(groups) == 1:
        leaf, position = leaf[:, 0], position[:, 0]
    return GradientCanaries(leaf, position, filter_spec)


def _spread(
    members: list[int], sizes: list[int], number: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct parameters of these leaves: one of each, and the rest anywhere."""
    edges = np.concatenate([[0], np.cumsum([sizes[i] for i in members])])
    first = edges[:-1] + rng.integers(0, np.diff(edges))
    total = int(edges[-1])
    rest = rng.choice(total, min(total, number + len(members)), replace=False)
    rest = rest[~np.isin(rest, first)][: number - len(first)]
    chosen = rng.permutation(np.concatenate([first, rest]))
    which = np.searchsorted(edges, chosen, side="right") - 1
    return np.asarray(members, np.int32)[which], (chosen - edges[which]).astype(np.int32)


class RandomDirections(eqx.Module):
    r"""Canaries with gradients in random directions, for an attacker who sees only an update, or the final model.

    !!! success "Guarantee"

        The score of a direction that was never shown is $N(0, 1)$, exactly, whatever the update is: it is an inner product of independent normal
        numbers with it, divided by its norm.

    Of $k$ that were all shown each disturbs the others: the effective $\mu$ is $1 / \sqrt{\sigma^2 + (k - 1) / d}$ in $d$ dimensions. Gaussians
    fitted to
    scores give an ESTIMATE of epsilon (`two_gaussians_epsilon`).

    **Arguments:**

    - `key`: from which the directions follow.
    - `number`: how many there are.
    - `filter_spec`: what is trained.

    ??? cite "Reference"

        Andrew et al., *One-shot empirical privacy estimation for federated learning*, ICLR 2024 (arXiv:2302.03098).
    """

    key: PRNGKey
    number: int = eqx.field(static=True)
    filter_spec: PyTree

    def __init__(self, key: PRNGKey, number: Integer, *, filter_spec: PyTree = eqx.is_inexact_array):
        self.key = key
        self.number = positive_int("RandomDirections(number=...)", number)
        self.filter_spec = filter_spec

    def direction(self, params: PyTree, index: Any) -> PyTree:
        """Independent standard normal numbers in the shapes of the trained parameters."""
        leaves, treedef = jax.tree.flatten(params)
        keys = jr.split(jr.fold_in(self.key, index), len(leaves))
        return jax.tree.unflatten(treedef, [jr.normal(keys[i], x.shape, jnp.float32) for i, x in enumerate(leaves)])

    def loss(self, loss: Callable[..., Any], *, size: RealScalarLike = _SIZE) -> Callable[..., Any]:
        """`loss(model, *example, index)`: of a row with `index` -1 the loss as it is, with -2 none, else one whose gradient is `size` times the
        direction."""
        size = positive_float("RandomDirections.loss(size=...)", size)

        def directed(model: PyTree, *args: Any) -> Any:
            *example, index = args
            params, static = eqx.partition(model, self.filter_spec)
            is_real = index == REAL
            seen = jax.tree.map(lambda p: jnp.where(is_real, p, jax.lax.stop_gradient(p)), params)
            own = loss(eqx.combine(seen, static), *example)
            own = jnp.where(is_real, own, jnp.zeros((), own.dtype)).astype(jnp.float32)
            along = self.direction(params, jnp.maximum(index, 0))
            terms = jax.tree.map(lambda d, p: jnp.sum(d * p.astype(jnp.float32)), along, params)
            total = jax.tree.reduce(jnp.add, terms, jnp.zeros(()))
            return own + jnp.where(index >= 0, jnp.float32(size) * total, 0.0)

        return directed

    def scores(self, update: PyTree) -> np.ndarray:
        """The inner product of each direction with an update, over its norm; shape `(number,)`. Negative updates (of descent) score low: give
        `-update`, or the gradient."""
        update = eqx.filter(update, eqx.is_inexact_array)
        leaves = jax.tree.leaves(update)
        norm = jnp.sqrt(sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves), jnp.zeros(())))

        def one(index: Any) -> Any:
            along = self.direction(update, index)
            terms = jax.tree.map(lambda d, x: jnp.sum(d * x.astype(jnp.float32)), along, update)
            return jax.tree.reduce(jnp.add, terms, jnp.zeros(())) / norm

        return np.asarray(jax.lax.map(one, jnp.arange(self.number)), np.float64)


class InputCanaries(NamedTuple):
    """Rows for an attacker who chooses inputs, not gradients, and sees models: loose, but nothing of the training code must change.

    **Arguments:**

    - `rows`: the rows, a tuple of the loss's arguments.
    """

    rows: tuple[Any, ...]

    def included(self, data: Batch, coins: Coins) -> tuple[Any, ...]:
        """The data with those rows at its end whose coin says so."""
        check_tuple("data", data)
        instance("InputCanaries.included(coins=...)", coins, Coins, "flip_coins(1000)")
        if coins.number != len(jax.tree.leaves(self.rows)[0]):
            raise ValueError(f"`InputCanaries.included(data, coins)` needs a coin for each row; got {coins.number}.")
        take = np.flatnonzero(coins.included)
        return jax.tree.map(lambda a, b: np.concatenate([np.asarray(a), np.asarray(b)[take]]), data, self.rows)

    def scores(self, loss: Callable[..., Any], before: PyTree, after: PyTree) -> np.ndarray:
        """How much the loss of each row fell in training: high if it was in."""
        losses = lambda model: jax.vmap(lambda *row: loss(model, *row))(*self.rows)
        return np.asarray(losses(before), np.float64) - np.asarray(losses(after), np.float64)


def input_canaries(
    data: Batch, num_canaries: Integer, *, labels: Integer | None = None, seed: Integer | None = None
) -> InputCanaries:
    """Mislabelled rows: copies of rows of the data, drawn without replacement, whose last argument is replaced by another label.

    **Arguments:**

    - `data`: PUBLIC or made-up rows; a copy of a private one would tell about it.
    - `num_canaries`: how many.
    - `labels`: how many labels there are, if the last argument is one of them; None leaves it as it is.
    - `seed`: of the choice; by default from the operating system.
    """
    check_tuple("data", data)
    number = positive_int("input_canaries(num_canaries=...)", num_canaries)
    size = len(jax.tree.leaves(data)[0])
    if number > size:
        raise ValueError(f"`input_canaries(num_canaries={number})`: there are {size} rows to take them from.")
    seed = fresh_seed() if seed is None else check_seed("input_canaries(seed=...)", seed)
    rng = np.random.default_rng([seed, 0x1C])
    take = rng.choice(size, number, replace=False)
    rows = jax.tree.map(lambda x: np.asarray(x)[take], data)
    if labels is not None:
        count = positive_int("input_canaries(labels=...)", labels)
        last = np.asarray(rows[-1])
        if count < 2 or not np.issubdtype(last.dtype, np.integer):
            raise ValueError(
                "`input_canaries(labels=...)`: at least two, and the last argument of the data must be integers."
            )
        shift = rng.integers(1, count, last.shape)
        rows = (*rows[:-1], ((last + shift) % count).astype(last.dtype))
    return InputCanaries(rows)
