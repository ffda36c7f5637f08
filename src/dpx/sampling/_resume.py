"""What a checkpoint keeps of a sampler: nothing but where batches depend on those before."""

from typing import Any

import numpy as np

from .._checks import described, instance
from .._types import Integer, Unchecked
from ._base import AbstractSampler

_EXAMPLE = "dpx.PoissonSampler(60_000, 256, 5_000)"


def resume_state(sampler: Unchecked[AbstractSampler], seed: Integer, step: Integer) -> dict[str, np.ndarray]:
    """What a run that is resumed at `step` is given, to spare a replay of all steps before it.

    Batches are pure functions of `(seed, step)` either way: this is about time. Most samplers need nothing. Those whose batches depend on earlier
    ones (`MinSepSampler`, also within `UserSampler`) give the batches that `step` depends on. A sampler of one's own has methods of these names,
    `resume_state(seed, step)` and `resume(seed, step, state)`, if it replays.

    ```python
    state = dpx.sampling.resume_state(sampler, seed, step)  # into the checkpoint, which is as secret as the seed
    dpx.sampling.resume(sampler, seed, step, state)  # in another process, before the first batch
    ```

    **Arguments:**

    - `sampler`: the sampler.
    - `seed`: of the run.
    - `step`: of the next batch, up to the number of steps. It costs a replay if it is more than 8 batches behind the latest that was asked for.

    **Returns:** arrays by name, which may be empty; they say who was in the last batches, so they are secret.
    """
    instance("resume_state(sampler=...)", sampler, AbstractSampler, _EXAMPLE)
    own: Any = getattr(sampler, "resume_state", None)
    return {} if own is None else own(seed, step)


def resume(
    sampler: Unchecked[AbstractSampler], seed: Integer, step: Integer, state: Unchecked[dict[str, np.ndarray]]
) -> None:
    """Hands over what `resume_state` gave for the same sampler, seed and step, so that batch `step` is not replayed.

    **Raises:** `ValueError` where it was given for another run or step, or was changed since.
    """
    instance("resume(sampler=...)", sampler, AbstractSampler, _EXAMPLE)
    if not isinstance(state, dict):
        raise ValueError(f"`resume(state=...)` must be what `resume_state` gave; got {described(state)}.")
    own: Any = getattr(sampler, "resume", None)
    if own is not None:
        own(seed, step, state)
    elif state:
        raise ValueError(
            f"`resume(state=...)` is of another sampler: a {type(sampler).__name__} needs nothing to go on; got {', '.join(state)}."
        )
