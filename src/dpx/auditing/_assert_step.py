"""`assert_private_step`: the same laws for a mechanism that is not dpx's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.random as jr
import numpy as np

from .._checks import choice, flag, function, positive_float, positive_int, probability
from .._tree import leaf_paths
from .._types import Batch, Integer, RealScalarLike, Unchecked
from ..problem import check_batch
from ._assert_private import decided
from ._differences import ROWS, Subject, difference_laws, hostile_rows
from ._noise_laws import NoiseLaw
from ._probe import rows_of
from ._report import AuditReport
from ._residuals import Residuals, noise_laws
from ._sampling_laws import Found


def assert_private_step(
    step: Callable[..., Any],
    batch: Batch,
    *,
    sensitivity: RealScalarLike,
    noise_multiplier: RealScalarLike,
    normalizer: RealScalarLike = 1.0,
    noise: Unchecked[str] = "gaussian",
    masks: bool = True,
    false_alarm: RealScalarLike = 1e-6,
    steps: Integer = 60,
) -> AuditReport:
    """Asserts bound, mask and noise of one private step that is not dpx's: optax's, JAX-Privacy's, or one's own.

    ```python
    def step(batch, mask, key):
        x, y = batch
        grads = jax.vmap(jax.grad(lambda w, x, y: (w @ x - y) ** 2), (None, 0, 0))(w, x, y)
        scale = jnp.where(mask, 1 / jnp.maximum(jnp.linalg.norm(grads, axis=1), 1.0), 0.0)
        total = jnp.sum(jnp.where(mask[:, None], grads * scale[:, None], 0.0), axis=0)
        return (total + 2.0 * jax.random.normal(key, total.shape)) / 100

    w = jnp.ones(40)
    rows = np.ones((4, 40), np.float32), np.zeros(4, np.float32)
    dpx.auditing.assert_private_step(step, rows, sensitivity=1.0, noise_multiplier=2.0, normalizer=100)
    ```

    Of the tests of `assert_private` those that need neither a plan nor a loss: differences under one key (D0, D1, D2), the noise of a batch in which
    nobody is (N0 to N3), of several keys (I1) and leaves (I2). More noise than is stated is no failure here.

    **Arguments:**

    - `step`: `step(batch, mask, key) -> tree`: the noisy sum over the normalizer, a function of its arguments.
    - `batch`: a few rows.
    - `sensitivity`: how far one row may move the sum.
    - `noise_multiplier`: the noise's scale over the sensitivity.
    - `normalizer`: what the noisy sum is divided by.
    - `noise`: `"gaussian"`, or `"laplace"` (then the sensitivity is in the l1 norm).
    - `masks`: whether the step knows masks; if not, rows are left out instead, which recompiles a step, and noise is seen as the difference of two
        keys.
    - `false_alarm`, `steps`: as for `assert_private`.

    **Returns:** the `AuditReport`, which has passed.

    **Raises:** `PrivacyAuditError`, or `ValueError` for what cannot be audited.
    """
    name = "assert_private_step"
    function(f"{name}(step=...)", step, "step(batch, mask, key)")
    bound = positive_float(f"{name}(sensitivity=...)", sensitivity)
    multiplier = positive_float(f"{name}(noise_multiplier=...)", noise_multiplier)
    divisor = positive_float(f"{name}(normalizer=...)", normalizer)
    kind = choice(f"{name}(noise=...)", noise, ("gaussian", "laplace"))
    masked = flag(f"{name}(masks=...)", masks)
    level = probability(f"{name}(false_alarm=...)", false_alarm)
    number = positive_int(f"{name}(steps=...)", steps)
    batch, size = check_batch(batch)
    if size == 0:
        raise ValueError(f"`{name}(batch=...)` needs a row at least.")
    keys = jr.split(jr.key(0xD9A0D17), 2 * number + 1)
    rows = rows_of(batch, ROWS)
    paths = leaf_paths(step(rows, np.ones(ROWS, bool), keys[0]))

    def sums(data: tuple[Any, ...], mask: np.ndarray, key: Any = keys[0]) -> list[np.ndarray]:
        if not masked:
            data, mask = jax.tree.map(lambda x: x[mask], data), np.ones(int(mask.sum()), bool)
        return [np.asarray(x, np.float64) * divisor for x in jax.tree.leaves(step(data, mask, key))]

    subject = Subject(sums, bound, 1 if kind == "laplace" else 2, paths)
    hostile = hostile_rows(batch)
    found: list[Found] = [f for f in difference_laws(subject, hostile) if masked or f.code != "D2"]
    nobody = np.zeros(ROWS, bool)
    if masked:
        drawn = [sums(rows, nobody, key) for key in keys[1 : number + 1]]
        law = NoiseLaw(multiplier * bound, kind, None)
    else:
        # the sum cancels in the difference of two keys, whose noise is normal with twice the variance
        everyone = np.ones(ROWS, bool)
        pairs = [
            (sums(rows, everyone, a), sums(rows, everyone, b)) for a, b in zip(keys[1::2], keys[2::2], strict=True)
        ]
        drawn = [[x - y for x, y in zip(one, other, strict=True)] for one, other in pairs]
        if kind == "laplace":
            raise ValueError(
                f"`{name}(noise='laplace', masks=False)`: the difference of two Laplace numbers is none. Let the step take masks."
            )
        law = NoiseLaw(2**0.5 * multiplier * bound, kind, None)
    leaves = [np.stack([x[i].ravel() for x in drawn]) for i in range(len(paths))]
    if all(np.isfinite(x).all() for x in leaves):
        found += noise_laws(Residuals(leaves, paths), law, upwards=False)
    else:
        found.append(Found("N1", "the noise has the stated scale", "numbers that are not finite", holds=False))
    report = decided("white-box audit of a step", found, level)
    report.raise_if_failed()
    return report
