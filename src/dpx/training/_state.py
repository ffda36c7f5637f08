"""What a run carries from one step to the next, and how it is laid out on devices."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from .._tree import path_str
from ..optimizers import AverageState
from ..private_gradient import PrivateGradientState


class Skeleton:
    """What of a tree is no array (functions, flags, texts), as part of a tree's structure: it compares and hashes.

    **Arguments:**

    - `tree`: a PyTree with None in place of its arrays.
    """

    def __init__(self, tree: PyTree):
        self.tree = tree
        self._leaves, self._treedef = jax.tree.flatten(tree)

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Skeleton) or self._treedef != other._treedef:
            return False
        return all(_is_same(a, b) for a, b in zip(self._leaves, other._leaves, strict=True))

    def __hash__(self) -> int:
        return hash(self._treedef)


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(np.all(a == b))
    except (TypeError, ValueError):
        return False


class TrainState(eqx.Module):
    """What a run carries from one step to the next: arrays, to be donated, sharded and saved, and no more.

    **Arguments:**

    - `model`: the arrays of the model, None elsewhere; `whole_model` is the model.
    - `opt_state`: the optimiser's state.
    - `private`: the private gradient's state. Its `step` is the number of steps taken. It holds the secret of the noise.
    - `average`: the average of the trained parameters; None without one.
    - `skeleton`: what of the model is no array.
    """

    model: PyTree
    opt_state: PyTree
    private: PrivateGradientState
    average: AverageState | None
    skeleton: Skeleton = eqx.field(static=True)

    @property
    def whole_model(self) -> PyTree:
        """The model: arrays, and all else."""
        return eqx.combine(self.model, self.skeleton.tree)

    @property
    def averaged_model(self) -> PyTree | None:
        """The model with averaged parameters; None without an average."""
        return None if self.average is None else self.average.apply_to(self.whole_model)


def mesh_of(tree: PyTree) -> Mesh | None:
    """The mesh on which the arrays of a tree lie, or else the mesh in scope; None if there is none of several devices."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            mesh = leaf.sharding.mesh
            if isinstance(mesh, Mesh) and not mesh.empty:
                return mesh
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def placed(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Copies of arrays, to be donated: no other tree has them, and no two leaves are one.

    Every array that does not lie on the mesh is copied to all of its devices, so that a step's outputs lie where its inputs did: one compilation.
    Arrays keep no weak type, for the same reason.
    """

    def one(x):
        if isinstance(x, np.ndarray | np.generic | bool | int | float):
            x = jnp.asarray(x)  # an optimiser's own numbers
        if not isinstance(x, jax.Array):
            return x
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jnp.asarray(x, x.dtype)  # given a dtype it is not weak
        x = jnp.copy(x)
        if mesh is None or (isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh):
            return x
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(one, tree)


def check_carry(before: PyTree, after: PyTree) -> None:
    """Raises unless a step gives a state of the shapes and dtypes that it took, naming the leaf."""
    old, new = (jax.tree_util.tree_leaves_with_path(tree) for tree in (before, after))
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ValueError(
            "`Trainer.step` gives a state of another structure than it took. The optimiser's `update` must return a state like that of its `init`."
        )
    for (path, a), (_, b) in zip(old, new, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"`Trainer.step` takes `state{path_str(path)}` as {a.dtype}{list(a.shape)} and gives it as {b.dtype}{list(b.shape)}. The optimiser's "
                "`update` must return a state, and updates, of the shapes and dtypes that its `init` and the parameters have."
            )
