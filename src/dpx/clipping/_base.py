"""The interface of clipping: how much one example may contribute to the sum."""

import abc
from typing import Generic, TypeVar

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Key, PyTree

from .._types import Params

State = TypeVar("State")


class AbstractClipping(eqx.Module, Generic[State]):
    r"""Bounds the contribution of one example.

    Parameters are partitioned into groups. From the norms $\|g_{i,k}\|$ of example $i$'s gradient in each group $k$ come factors
    $w_{i,k}$; example $i$ contributes $(w_{i,k} g_{i,k})_k$, whose norm is at most `sensitivity` whatever $g_i$ is. After the noise,
    group $k$ is multiplied by the public number `rescale[k]`; so a clip norm that changes from step to step (adaptive clipping), or
    noise that is allotted unevenly between groups, leaves the sensitivity of what the noise is added to constant.
    """

    order: eqx.AbstractVar[int]
    r"""Contributions are bounded in the $\ell_1$ (1) or the $\ell_2$ (2) norm."""

    @property
    @abc.abstractmethod
    def sensitivity(self) -> Float[Array, ""]:
        """Largest norm of one example's contribution: how far the un-noised sum moves when an example is added or removed."""

    @property
    @abc.abstractmethod
    def side_noise_multipliers(self) -> tuple[Float[Array, ""], ...]:
        """Noise multipliers of the Gaussian queries (of sensitivity 1) that `update` makes of the same batch at every step. The gradient's noise
        is raised so that all together are one Gaussian mechanism of the stated multiplier."""

    @abc.abstractmethod
    def init(self, params: Params) -> PyTree:
        """The state before the first step."""

    @abc.abstractmethod
    def labels(self, params: Params) -> tuple[int, ...]:
        """The group of each leaf of `params`, in flattening order, numbered from zero without gaps."""

    @abc.abstractmethod
    def factors(self, norms: Float[Array, "batch groups"], state: PyTree) -> Float[Array, "batch groups"]:
        """Clip factors from finite, non-negative norms, which are never smaller than the true ones."""

    @abc.abstractmethod
    def rescale(self, state: PyTree) -> Float[Array, " groups"] | None:
        """By what each group of the private sum is multiplied; None where by one."""

    @abc.abstractmethod
    def update(
        self,
        state: State,
        norms: Float[Array, "batch groups"],
        mask: Bool[Array, " batch"],
        expected_batch_size: Float[Array, ""],
        key: Key[Array, ""],
    ) -> State:
        """The state after a step; what it learns from the norms is made private here, with noise from `key`."""


class AbstractQueryFreeClipping(AbstractClipping[State]):
    """Clipping that asks nothing of the batch beside the clipped sum, and learns nothing from its norms."""

    @property
    def side_noise_multipliers(self) -> tuple[Float[Array, ""], ...]:
        return ()

    def update(
        self,
        state: State,
        norms: Float[Array, "batch groups"],
        mask: Bool[Array, " batch"],
        expected_batch_size: Float[Array, ""],
        key: Key[Array, ""],
    ) -> State:
        del norms, mask, expected_batch_size, key
        return state


class AbstractStatelessClipping(AbstractQueryFreeClipping[PyTree]):
    """Clipping that learns nothing from one step to the next."""

    def init(self, params: Params) -> PyTree:
        del params
        return ()


class AbstractOneGroupClipping(AbstractStatelessClipping):
    """Clipping that knows the whole gradient's norm and nothing else."""

    def labels(self, params: Params) -> tuple[int, ...]:
        return (0,) * len(jax.tree.leaves(params))

    def rescale(self, state: PyTree) -> None:
        del state


class AbstractSlackClipping(AbstractQueryFreeClipping[State]):
    """Clipping that learns from what short gradients leave unused of their norm, beside which it asks nothing of the batch.

    An example's slack stands beside its clipped gradient, and gets noise with it, as further coordinates of one query: its sensitivity bounds the
    norm of both together.
    """

    @property
    @abc.abstractmethod
    def slack_size(self) -> int:
        """How many numbers an example contributes beside its gradient."""

    @abc.abstractmethod
    def slack(self, norms: Float[Array, " batch"], state: PyTree) -> Float[Array, "batch slack"]:
        """What each example contributes beside its gradient, from finite norms of whole gradients, which are never smaller than the true ones."""

    @abc.abstractmethod
    def learn(self, state: State, released: Float[Array, " slack"], expected_batch_size: Float[Array, ""]) -> State:
        """The state after a step, from the noisy sum of the slacks, which is private."""
