"""Shape-typed aliases, shared by every room."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, SupportsIndex, TypeVar

import jax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Real, Shaped

RealScalarLike = Real[ArrayLike, ""]
"""A Python, NumPy or JAX scalar: what constructors accept before they store it strictly."""

Adjacency = Literal["add_or_remove_one", "replace_one", "replace_special"]
"""What neighbouring data sets are; `dpx.accounting.NEIGHBOURS` has them in words."""

Unit = Literal["example", "user"]
"""What a private gradient clips: what one example gives, or all that one user's examples do."""

if TYPE_CHECKING:
    _T = TypeVar("_T")
    Unchecked = Annotated[_T, "looked at where it is used, and refused by name, with the remedy"]
else:

    class Unchecked:
        """What an editor knows of an argument, of which nothing is checked at run time before it is looked at by name."""

        def __class_getitem__(cls, item):
            return Any


Integer = Unchecked[SupportsIndex]
Batch = Unchecked[tuple[PyTree, ...]]
Mask = Unchecked[ArrayLike]
PRNGKey = Unchecked[Array]
FilePath = Unchecked[str | os.PathLike[str]]

Params = PyTree[Array | None]
"""The trainable leaves of a model, `None` elsewhere: `eqx.filter(model, filter_spec)`."""

Struct = PyTree[jax.ShapeDtypeStruct | Array | None]
"""Shapes, dtypes and shardings of `Params`, or arrays that have them."""

Examples = PyTree[Shaped[Array, "batch ..."], " E"]
"""A batch: one leading axis, of equal length, on every leaf."""

PerExampleLoss = Callable[[Any, Any], tuple[Array, Any]]
"""`(params, example) -> (scalar loss, aux)` for ONE example; frozen leaves are closed over."""

FactorsFromNorms = Callable[[Float[Array, "batch groups"]], Float[Array, "batch groups"]]
"""Clip factors of every (example, group), from the norms of their gradients."""


Quantise = Callable[[list[Float[Array, "batch ..."]]], list[Int[Array, "batch ..."]]]
"""Rounds the clipped contributions of a batch, leaf by leaf, to integers."""


class Participation(NamedTuple):
    """In which steps of a run one example may take part.

    **Arguments:**

    - `min_separation`: at least this many steps lie between the starts of two participations (1: no restriction).
    - `max_participations`: at most this many in the run; None if nothing bounds it but the number of steps.
    """

    min_separation: int
    max_participations: int | None
