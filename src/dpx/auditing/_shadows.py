"""Many models of one training procedure: shadow models of attacks."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from .._checks import described, flag, function
from .._types import Unchecked


def train_shadows(train: Callable[[Any], PyTree], keys: Any, *, vectorised: Unchecked[bool | None] = None) -> PyTree:
    """Trains one model for each key, in one compiled program.

    ```python
    def train(key_and_member):
        key, member = key_and_member
        return eqx.nn.Linear(3, 1, key=key)  # trained on the rows that `member` says

    number = 4
    keys = jax.random.split(jax.random.key(0), number), np.ones((number, 10), bool)
    models = dpx.auditing.train_shadows(train, keys)
    predictions = eqx.filter_vmap(lambda model: model(jnp.ones(3)))(models)
    ```

    **Arguments:**

    - `train`: `train(key) -> model`, traceable by JAX.
    - `keys`: keys, or a tree of arrays with one entry for each model: keys and the masks of their data, say.
    - `vectorised`: True trains all at once (`eqx.filter_vmap`), False one after another (`jax.lax.map`), which compiles sooner and is quicker on
        processors; None decides by the device.

    **Returns:** the model, with a leading axis on its arrays.
    """
    function("train_shadows(train=...)", train, "train(key) -> model")
    leaves = jax.tree.leaves(keys)
    sizes = {x.shape[0] if getattr(x, "ndim", 0) else None for x in leaves if hasattr(x, "shape")}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(
            f"`train_shadows(keys=...)` must be `jax.random.split(key, number)`, or a tree of arrays of that length; got {described(keys)}."
        )
    if vectorised is None:
        vectorised = jax.default_backend() != "cpu"
    if flag("train_shadows(vectorised=...)", vectorised):
        return eqx.filter_jit(eqx.filter_vmap(train))(keys)
    rest: list[Any] = []

    def one(key: Any) -> PyTree:
        arrays, static = eqx.partition(train(key), eqx.is_array)
        rest.append(static)
        return arrays

    arrays = jax.jit(lambda k: jax.lax.map(one, k))(jax.tree.map(jax.numpy.asarray, keys))
    return eqx.combine(arrays, rest[-1])
