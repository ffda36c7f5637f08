"""What a private gradient carries from one step to the next, and what became of it."""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Int, Key, PyTree, UInt32

from .._checks import described
from ..random import key_of_words, key_words


class Result(eqx.Enumeration):
    """What became of a private step."""

    successful = "Every step so far was private and finite."
    budget_spent = "A step was asked for past the last one that the privacy budget covers; its gradients are NaN."
    non_finite = (
        "The private gradient, or something public that it needs (the model's parameters, the state, the noise multiplier, a clip norm, the "
        "normalizer, the scaling), became infinite or NaN, or was not positive where it must be; its gradients are NaN from there on."
    )
    not_the_plan = (
        "The noise, clipping, normalizer or metrics of a plan's gradient were changed after the plan had made it, so that its statement is not about "
        "this run; the gradients are NaN. Make one plan for each choice."
    )


class PrivateGradientState(eqx.Module):
    """What a `PrivateGradient` carries from one step to the next; a PyTree of plain arrays that can be saved, donated and sharded.

    ```python
    eqx.tree_serialise_leaves("run.eqx", (model, state))
    model, state = eqx.tree_deserialise_leaves("run.eqx", (model, private_grad.init(model)))
    ```

    **Arguments:**

    - `key`: the secret that all noise of the run is folded from. Whoever has it can remove the noise.
    - `step`: number of steps taken.
    - `noise`: the noise's buffers.
    - `clipping`: the clipping's state.
    - `metrics`: the state of each metric by name; its `value` is private.
    - `result`: `Result.successful`, or what went wrong.
    """

    # the key's words, and not the typed key, which neither `eqx.tree_serialise_leaves` nor other checkpoints can store
    key_data: UInt32[Array, "*lanes words"]
    step: Int[Array, ""]
    noise: PyTree
    clipping: PyTree
    metrics: dict[str, Any]
    result: Result
    key_impl: Any = eqx.field(static=True)

    def __init__(
        self, key: Key[Array, "*lanes"], step: Any, noise: PyTree, clipping: PyTree, metrics: Any, result: Any
    ):
        self.key_data, self.key_impl = key_words(key)
        self.step = step
        self.noise = noise
        self.clipping = clipping
        self.metrics = metrics
        self.result = result

    @property
    def key(self) -> Key[Array, "*lanes"]:
        """The typed key."""
        return key_of_words(self.key_data, self.key_impl)

    def raise_if_failed(self) -> None:
        """Raises `RuntimeError`, on the host, if a step overran the budget or was not finite. Waits for the device."""
        if self.result == Result.successful:
            return
        message = Result[self.result]
        raise RuntimeError(f"{message} (after {int(self.step)} steps)")


def check_state(batch: Any, state: Any, metrics: Iterable[str] = ()) -> None:
    """Raises if the state is none, stands where the batch should, or is one of other metrics."""
    call = "private_grad(model, batch, state, mask=mask)"
    if isinstance(batch, PrivateGradientState):
        raise ValueError(f"`{call}` takes its arguments in this order; got the state before the batch.")
    if not isinstance(state, PrivateGradientState):
        raise ValueError(
            f"`{call}`: `state` must come from `private_grad.init(model)`, or from the step before; got {described(state)}."
        )
    if set(state.metrics) != set(metrics):
        raise ValueError(
            f"`private_grad(model, batch, state)`: `state` is of another private gradient, with metrics {sorted(state.metrics)} and not "
            f"{sorted(metrics)}. Begin with `private_grad.init(model)`."
        )
