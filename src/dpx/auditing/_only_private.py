"""`assert_only_private`: whether anything of the data leaves a step beside the private gradient."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .._checks import described, function
from .._sensitive import Sensitive
from .._tree import path_str
from .._types import Batch, Unchecked
from ..private_gradient import PrivateGradientState
from ._report import AuditedLaw, AuditReport

_LAW = "with the private gradient replaced by a constant, a step returns the same for any two batches, bit by bit"
_MSG_NEVER = (
    "`assert_only_private(step, private_grad, args_a, args_b)`: `step` never called the private gradient that it was given, so nothing was tested. "
    "It is called as `step(private_grad, *args)`."
)
_MSG_SAME = "`assert_only_private(step, private_grad, args_a, args_b)`: both are the same, so that nothing is tested. Let them differ in the batch."


class _Counter:
    def __init__(self):
        self.calls = 0

    def __repr__(self) -> str:
        return "a counter"


class _Constant(eqx.Module):
    """A private gradient whose gradients, and all that is private in its state, do not depend on the batch; diagnostics do.

    **Arguments:**

    - `real`: what it stands for.
    - `counter`: how often it was called.
    """

    real: Any
    counter: _Counter = eqx.field(static=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("real", "counter"):
            raise AttributeError(name)
        return getattr(self.real, name)

    def __call__(self, model: PyTree, batch: Batch, state: Any, **options: Any) -> tuple[PyTree, Any, Any]:
        self.counter.calls += 1
        grads, new, diagnostics = self.real(model, batch, state, **options)
        # not zero, which a scaling by the batch's loss would leave as it is
        constant = jax.tree.map(lambda g: jnp.full_like(g, 2.0**-10), grads)
        if isinstance(new, PrivateGradientState):
            # what clipping and metrics learn is private, and the noise's buffers hold nothing of the batch
            new = PrivateGradientState(state.key, new.step, state.noise, state.clipping, state.metrics, state.result)
        return constant, new, diagnostics


def assert_only_private(
    step: Callable[..., Any], private_grad: Any, args_a: Unchecked[tuple[Any, ...]], args_b: Unchecked[tuple[Any, ...]]
) -> AuditReport:
    """Asserts that a training step uses its batch through the private gradient alone.

    `step(private_grad, *args)` is run twice, with batches that differ, and with a stand-in whose gradients are constant. If the two outcomes differ
    in a single bit, something of the batch got around it: a loss that scales the update, a statistic of the batch in the model, diagnostics that were
    revealed, the realised size of the batch.

    ```python
    def step(private_grad, model, state, batch, mask):
        grads, state, _ = private_grad(model, batch, state, mask=mask)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads)), state

    private_grad = plan.private_gradient(loss)
    state = private_grad.init(model)
    mask = np.ones(4, bool)
    args = lambda rows: (model, state, (x[rows], y[rows]), mask)
    dpx.auditing.assert_only_private(step, private_grad, args(slice(0, 4)), args(slice(4, 8)))
    ```

    **Arguments:**

    - `step`: `step(private_grad, *args) -> outputs`; compiled or not. `Sensitive` outputs are sealed, and may differ.
    - `private_grad`: a `PrivateGradient` or `PrivateSum`, or a function that returns `(grads, state, ...)`.
    - `args_a`, `args_b`: arguments that differ in the batch (and its mask) and in nothing else.

    **Returns:** the `AuditReport`, which has passed.

    **Raises:**

    - `PrivacyAuditError` that names the output.
    - `ValueError` if both are the same, or the private gradient was never called.
    """
    name = "assert_only_private"
    function(f"{name}(step=...)", step, "step(private_grad, *args)")
    if not callable(private_grad):
        raise ValueError(f"`{name}(private_grad=...)` must be a private gradient; got {described(private_grad)}.")
    for call, args in (("args_a", args_a), ("args_b", args_b)):
        if not isinstance(args, tuple):
            raise ValueError(f"`{name}({call}=...)` must be a tuple of the step's arguments; got {described(args)}.")
    if not _differences(args_a, args_b):
        raise ValueError(_MSG_SAME)
    counter = _Counter()
    stand_in = _Constant(private_grad, counter)
    first = step(stand_in, *args_a)
    second = step(stand_in, *args_b)
    if not counter.calls:
        raise ValueError(_MSG_NEVER)
    different = _differences(first, second)
    title = "two steps with a constant in the place of the private gradient"
    if not different:
        law = AuditedLaw("X", _LAW, True, "the same outputs")
        return AuditReport(title, (law,), 0.0)
    laws = tuple(AuditedLaw("X", _LAW, False, text, where) for where, text in different)
    report = AuditReport(title, laws, 0.0)
    report.raise_if_failed()
    return report


def _differences(a: Any, b: Any) -> list[tuple[str, str]]:
    """Paths of what differs, and how."""
    sealed = lambda x: isinstance(x, Sensitive)
    one, other = (jax.tree_util.tree_flatten_with_path(x, is_leaf=sealed) for x in (a, b))
    if one[1] != other[1]:
        return [("", "outputs of another structure")]
    found = []
    for (path, x), (_, y) in zip(one[0], other[0], strict=True):
        if sealed(x) or _is_same(x, y):
            continue
        found.append((path_str(path), "other numbers" if eqx.is_array_like(x) else "another value"))
    return found


def _is_same(x: Any, y: Any) -> bool:
    if any(hasattr(z, "dtype") for z in (x, y)):
        is_key = lambda z: isinstance(z, jax.Array) and jnp.issubdtype(z.dtype, jax.dtypes.prng_key)
        if is_key(x) or is_key(y):
            return is_key(x) and is_key(y) and bool(np.array_equal(jax.random.key_data(x), jax.random.key_data(y)))
        x, y = np.asarray(x), np.asarray(y)
        return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    return x is y or bool(x == y)
