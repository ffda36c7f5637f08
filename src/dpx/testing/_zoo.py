"""Small models with losses that know what their examples look like."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array


class ZooLoss(eqx.Module):
    """The loss of one example of a model of `dpx.testing.models`: squared error of what the model makes of it.

    **Arguments:**

    - `kind`: which model of the zoo it belongs to.
    - `example`: shapes and dtypes of one example, as positional arguments.
    """

    kind: str = eqx.field(static=True)
    example: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)

    def __call__(self, model: Any, x: Any, y: Any) -> Array:
        x, y = jnp.asarray(x), jnp.asarray(y)
        match self.kind:
            case "list":
                out = model[0] @ x + model[1] * model[2]
            case "embedding":
                out = model["readout"] @ jnp.tanh(jnp.mean(model["table"][x], axis=0))
            case _:
                out = jnp.ravel(model(x))
        return jnp.mean((out - y) ** 2)

    def batch(self, size: int, key: Any) -> tuple[Array, ...]:
        """So many random examples."""
        keys = jr.split(key, len(self.example))
        return tuple(
            jr.normal(k, (size, *s.shape), s.dtype)
            if jnp.issubdtype(s.dtype, jnp.floating)
            else jr.randint(k, (size, *s.shape), 0, 5, s.dtype)
            for k, s in zip(keys, self.example, strict=True)
        )


def zoo(seed: int) -> list[tuple[str, Any, ZooLoss]]:
    """Name, model and loss of each."""
    keys = jr.split(jr.key(seed), 5)
    of = lambda shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    y = of((3,))
    image = eqx.nn.Sequential([
        eqx.nn.Conv2d(2, 3, 3, key=keys[1]), eqx.nn.Lambda(jnp.tanh), eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(12, 3, key=keys[2]),
    ])  # fmt: skip
    table = {"table": jr.normal(keys[3], (5, 4)), "readout": jr.normal(keys[4], (3, 4)), "steps": jnp.array(7)}
    return [
        (
            "list",
            [jr.normal(keys[0], (3, 4)), jnp.ones(3), jnp.full(3, 0.5, jnp.float32)],
            ZooLoss("list", (of((4,)), y)),
        ),
        ("perceptron", eqx.nn.MLP(4, 3, 5, 1, activation=jnp.tanh, key=keys[0]), ZooLoss("perceptron", (of((4,)), y))),
        ("embedding", table, ZooLoss("embedding", (of((4,), jnp.int32), y))),
        ("convolution", image, ZooLoss("convolution", (of((2, 4, 4)), y))),
    ]
