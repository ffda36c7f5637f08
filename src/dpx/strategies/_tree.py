"""Binary trees: the classical mechanism for continual sums."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from .._checks import flag, positive_int
from ._base import MSG_NO_REPLAY, AbstractAnalysedStrategy, check_steps
from ._error import is_prefix, matrix_error, squared_rows_error
from ._sensitivity import GRAM_STEPS, check_participation, gram_sensitivity
from ._stream import Ring, init_ring, map_pairs, poison, push, weighted_sum


class TreeAggregation(AbstractAnalysedStrategy[Ring]):
    r"""Tree aggregation: a prefix sum is the sum of the noisy dyadic nodes in its binary representation.

    Each step completes one node that a prefix ever reads, of height $v_2(t)$ for $t$ counted from 1, so that one draw a step is
    enough, and the decoder, hence $C$, is square and lower triangular. In the `honaker` variant a node is estimated from its own
    noise and that of all nodes below it, with weights inverse to their variances; the draws of the right children, which are only
    ever read together, are one draw of their joint variance. So `materialize` gives the $C$ whose noise has the covariance of the
    tree's, not the (taller) matrix of the tree's nodes. Keeps $\lfloor \log_2 n \rfloor + 1$ copies of the parameters.

    !!! success "Guarantee"

        The sensitivity is that of the whole tree, every node released: $\sqrt{\lfloor \log_2 n \rfloor + 1}$ for one participation,
        exact for the naive variant and an upper bound for the other; an upper bound for several. Past the horizon the noise is NaN.

    **Arguments:**

    - `steps`: the horizon $n$.
    - `honaker`: use the variance-reduced estimates; False for the naive mechanism.
    - `restart_every`: start a new tree after so many steps; None for one tree.
    - `tight`: take the sensitivity of what is released instead of the whole tree's, exact for one participation and smaller for
        the `honaker` variant (9.47 for 11, squared, at $n = 1024$). Builds a matrix of the size of a tree.

    ??? cite "Reference"

        Dwork, Naor, Pitassi and Rothblum, *Differential privacy under continual observation*, STOC 2010. Honaker, *Efficient use of
        differentially private binary trees*, 2015. Kairouz et al., *Practical and private (deep) learning without sampling or
        shuffling*, ICML 2021.
    """

    steps: int | None = eqx.field(static=True)
    honaker: bool = eqx.field(static=True)
    restart_every: int | None = eqx.field(static=True)
    tight: bool = eqx.field(static=True)
    bands: int | None = eqx.field(static=True)
    replay_depth: int | None = eqx.field(static=True)

    def __init__(self, steps: int, *, honaker: bool = True, restart_every: int | None = None, tight: bool = False):
        self.steps = positive_int("TreeAggregation(steps=...)", steps)
        call = "TreeAggregation(restart_every=...)"
        self.restart_every = None if restart_every is None else positive_int(call, restart_every)
        if self.restart_every is not None and self.restart_every > self.steps:
            raise ValueError(
                f"`{call}` must be at most `steps`; got {self.restart_every} for {self.steps}. Use None for one tree."
            )
        self.honaker = flag("TreeAggregation(honaker=...)", honaker)
        self.tight = flag("TreeAggregation(tight=...)", tight)
        self.bands = None
        self.replay_depth = None

    @property
    def _tree_steps(self) -> int:
        assert self.steps is not None
        return self.steps if self.restart_every is None else self.restart_every

    def _variances(self) -> np.ndarray:
        """Of the estimate of a node, by height."""
        height = np.arange(self._tree_steps.bit_length())
        return 1 / (2 - np.exp2(-height)) if self.honaker else np.ones(len(height))

    def _rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """By height: how a finished node is made of its draw and of the nodes in memory, and how all of them are read.

        `own[v]` and `past[v, h]` make node `v`; `read[v, h]` is the weight of node `h` in the increment of the prefix sum, which
        gains node `v` and loses those below it.
        """
        height = np.arange(self._tree_steps.bit_length())
        below = height[None, :] < height[:, None]
        own, past, weight = np.ones(len(height)), np.zeros(below.shape), np.ones(len(height))
        if self.honaker:
            # T_v = fresh + (left + right) / 2, read as T_v / (2 - 2^-v); unrolled along the right children, all finished now
            own = np.sqrt((4 - np.exp2(-2.0 * height)) / 3)
            past = np.where(below, np.exp2(-np.abs(height[:, None] - height[None, :]).astype(np.float64)), 0.0)
            weight = 1 / (2 - np.exp2(-height.astype(np.float64)))
        return own, past, np.diag(weight) - np.where(below, weight[None, :], 0.0)

    def _decoder(self, steps: int) -> np.ndarray:
        """$A C^{-1}$ of one tree: row t is the noise of prefix t in terms of the draws."""
        own, past, read = self._rows()
        weight = np.diag(read)
        nodes = np.zeros((len(own), steps))
        prefixes = np.zeros((steps, steps))
        for t in range(1, steps + 1):
            v = _height(t)
            node = past[v] @ nodes
            node[t - 1] += own[v]
            nodes[v] = node
            bits = (t >> np.arange(len(own))) & 1
            prefixes[t - 1] = (bits * weight) @ nodes
        return prefixes

    def materialize(self, steps: int) -> np.ndarray:
        from scipy.linalg import block_diag, solve_triangular

        steps = check_steps("TreeAggregation.materialize", steps, self.steps)
        size = min(self._tree_steps, steps)
        tree = solve_triangular(self._decoder(size), np.tril(np.ones((size, size))), lower=True)
        full, rest = divmod(steps, size)
        return np.asarray(block_diag(*[tree] * full, *([tree[:rest, :rest]] if rest else [])))

    def init(self, struct: PyTree[Any]) -> PyTree:
        return init_ring(struct, self._tree_steps.bit_length())

    def step(self, z: PyTree[Array], buffers: Ring) -> tuple[PyTree[Array], Ring]:
        own, past, read = (jnp.asarray(rows, jnp.float32) for rows in self._rows())
        position = jnp.mod(buffers.count, self._tree_steps) + 1
        height = jax.lax.population_count(jnp.bitwise_and(position, -position) - 1)
        scale = poison(buffers.count, self.steps)

        def one(z: Array, slots: Array) -> tuple[Array, Array]:
            node = own[height].astype(slots.dtype) * z.astype(slots.dtype)
            if self.honaker:
                node = node + weighted_sum(past[height], slots, height)
            # the node that is overwritten has weight 0, so the noise is read after the write, which can then be in place
            slots = push(slots, node, height)
            x = scale.astype(slots.dtype) * weighted_sum(read[height], slots, buffers.count + slots.shape[0])
            return x.astype(z.dtype), slots

        x, slots = map_pairs(one, z, buffers.slots)
        return x, Ring(buffers.count + 1, slots)

    def replay(self, regenerate: Callable[[Any], PyTree[Array]], step: Int[Array, ""]) -> PyTree[Array]:
        raise ValueError(MSG_NO_REPLAY.format(name="TreeAggregation"))

    def sensitivity(self, steps: int, min_separation: int = 1, max_participations: int | None = 1) -> float:
        check_steps("TreeAggregation.sensitivity", steps, self.steps)
        steps, separation, k = check_participation("TreeAggregation", steps, min_separation, max_participations)
        if self.tight:
            matrix = self.materialize(steps)
            return gram_sensitivity(matrix.T @ matrix, separation, k)
        # a node of 2^h steps holds at most min(k, ceil(2^h / b)) participations, and the nodes of one height hold k in all
        tree = min(self._tree_steps, steps)
        bound = math.sqrt(sum(k * min(k, -(-(2**h) // separation)) for h in range(tree.bit_length())))
        if k == 1 or steps > GRAM_STEPS:
            return bound
        return min(bound, gram_sensitivity(self._node_gram(steps), separation, k))

    def _node_gram(self, steps: int) -> np.ndarray:
        """How many of the tree's finished nodes two steps share."""
        tree = min(self._tree_steps, steps)
        index = np.arange(steps)
        within, block = index % tree, index // tree
        gram = np.zeros((steps, steps))
        for h in range(tree.bit_length()):
            node = np.where(within >> h < tree >> h, block * tree + (within >> h), -1)
            gram += (node[:, None] == node[None, :]) & (node >= 0)[:, None]
        return gram

    def inverse_row_power(self, steps: int) -> np.ndarray:
        steps = check_steps("TreeAggregation.inverse_row_power", steps, self.steps)
        own, past, read = self._rows()
        # The nodes below the one that a step completes are made of disjoint sets of draws, so their squared norms add up, and
        # all depends on the node's height alone.
        nodes, rows = np.zeros(len(own)), np.zeros(len(own))
        for v in range(len(own)):
            nodes[v] = own[v] ** 2 + np.square(past[v]) @ nodes
            below = np.where(np.arange(len(own)) < v, nodes, 0.0)
            rows[v] = (read[v, v] * own[v]) ** 2 + np.square(read[v, v] * past[v] + read[v]) @ below
        position = np.arange(steps) % self._tree_steps + 1
        # the height is how often 2 divides the position
        return rows[np.frexp(position & -position)[1] - 1]

    def decoder_error(self, queries: np.ndarray, kind: str) -> float:
        steps = len(queries)
        if not is_prefix(queries):
            return matrix_error(self.materialize(steps), queries, kind)
        # the nodes in a binary representation are independent; finished trees keep the noise they ended with
        position = np.arange(steps) % self._tree_steps + 1
        bits = (position[:, None] >> np.arange(self._tree_steps.bit_length())[None, :]) & 1
        last = (self._tree_steps >> np.arange(self._tree_steps.bit_length())) & 1
        finished = np.arange(steps) // self._tree_steps
        return squared_rows_error(bits @ self._variances() + finished * float(last @ self._variances()), kind)


def _height(t: int) -> int:
    return (t & -t).bit_length() - 1
