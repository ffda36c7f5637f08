"""One clip norm for each group of parameters."""

from typing import Literal, TypedDict, Unpack, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._checks import choice, flag, usable
from .._types import Params, RealScalarLike, Unchecked
from ._base import AbstractQueryFreeClipping
from ._flat import usable_norm
from ._grouping import Grouping, block, layer, parse_norms, split_norm, total_norm

Allocation = Literal["global", "equal", "optimal"]


class GroupOptions(TypedDict, total=False):
    """What `GroupClipping.per_layer` passes on."""

    unit_norm: bool
    allocation: Allocation


class GroupClipping(AbstractQueryFreeClipping[PyTree]):
    r"""Clips each group of parameters on its own: $g_k \min(1, C_k / \|g_k\|)$ in group $k$.

    ```python
    clipping = dpx.GroupClipping.per_layer(model, norm=1.0)
    ```

    The sensitivity is $\|C\| = \sqrt{\sum_k C_k^2}$. How the noise is allotted between groups changes neither it nor the accounting: group
    $k$ gets noise of standard deviation $\sigma \gamma_k$ with $\sum_k (C_k / \gamma_k)^2 = 1$, where

    - `"global"`: $\gamma_k = \|C\|$, the same noise everywhere;
    - `"equal"`: $\gamma_k = C_k \sqrt K$, the same ratio of noise to clip norm in all $K$ groups;
    - `"optimal"`: $\gamma_k^2 = C_k / \sqrt{d_k} \cdot \sum_j C_j \sqrt{d_j}$, the least noise variance in total, for groups of $d_k$ numbers.

    !!! success "Guarantee"

        One example's contribution has norm at most `sensitivity` $(1 + 10^{-6})$, for every input and dtype. A gradient that is not finite in
        any group contributes exactly zero in all.

    **Arguments:**

    - `norms`: the clip norms: a tree prefix of the model, with a number where a group begins (and None where nothing is trained).
    - `unit_norm`: divide what is clipped by $\|C\|$, so that the sensitivity is 1.
    - `allocation`: `"global"`, `"equal"` or `"optimal"`.

    ??? cite "Reference"

        McMahan et al., *A general approach to adding differential privacy to iterative training procedures*, 2018; He et al., *Exploring the limits
        of differentially private deep learning with group-wise clipping*, ICLR 2023.
    """

    norms: Float[Array, " groups"]
    grouping: Grouping
    unit_norm: bool = eqx.field(static=True)
    allocation: Allocation = eqx.field(static=True)
    order: int = eqx.field(static=True)

    def __init__(self, norms: PyTree, unit_norm: bool = False, allocation: Unchecked[Allocation] = "global"):
        values, self.grouping = parse_norms("GroupClipping(norms=...)", norms)
        self.norms = jnp.stack(values)
        self.unit_norm = flag("GroupClipping(unit_norm=...)", unit_norm)
        self.allocation = choice("GroupClipping(allocation=...)", allocation, get_args(Allocation))
        self.order = 2

    @classmethod
    def per_layer(
        cls,
        model: PyTree,
        norm: RealScalarLike,
        *,
        filter_spec: PyTree = eqx.is_inexact_array,
        **options: Unpack[GroupOptions],
    ) -> "GroupClipping":
        r"""One group for each module that holds parameters, a total `norm` split into $K$ equal norms $C / \sqrt K$.

        **Arguments:**

        - `model`: the model.
        - `norm`: the sensitivity, $\|C\|$.
        - `filter_spec`: what is trained, as for `PrivateGradient`.
        - `options`: `unit_norm`, `allocation`.

        A stack of layers that is scanned over is one array for all of them, and so one group.
        """
        return cls(split_norm("GroupClipping.per_layer", model, norm, filter_spec, layer), **options)

    @classmethod
    def per_block(
        cls,
        model: PyTree,
        norm: RealScalarLike,
        *,
        filter_spec: PyTree = eqx.is_inexact_array,
        **options: Unpack[GroupOptions],
    ) -> "GroupClipping":
        """The same with one group for each element of the outermost lists, such as `.blocks[3]`, and each other field of the model."""
        return cls(split_norm("GroupClipping.per_block", model, norm, filter_spec, block), **options)

    @property
    def sensitivity(self) -> Float[Array, ""]:
        total = total_norm(usable_norm(self.norms))
        return usable(jnp.ones_like(total), total > 0) if self.unit_norm else total

    def labels(self, params: Params) -> tuple[int, ...]:
        return self.grouping.labels(params)

    def init(self, params: Params) -> PyTree:
        """The gain of each group: contributions are multiplied by it before the noise and divided after."""
        labels = self.labels(params)
        if self.allocation == "global":
            return jnp.ones_like(self.norms)
        if self.allocation == "equal":
            return total_norm(self.norms) / (self.norms * jnp.sqrt(jnp.float32(len(self.norms))))
        dimensions = np.zeros(len(self.norms))
        for group, leaf in zip(labels, jax.tree.leaves(params), strict=True):
            dimensions[group] += leaf.size
        weights = jnp.asarray(np.sqrt(dimensions / dimensions.max()), jnp.float32)
        shares = self.norms * weights
        deviations = jnp.sqrt(self.norms / weights * jnp.sum(shares))
        return total_norm(self.norms) / deviations

    def factors(self, norms: Float[Array, "batch groups"], state: PyTree) -> Float[Array, "batch groups"]:
        numerators = self.norms * state / (total_norm(self.norms) if self.unit_norm else 1.0)
        return numerators[None] / jnp.maximum(norms, self.norms[None])

    def rescale(self, state: PyTree) -> Float[Array, " groups"]:
        return 1 / state
