"""From who is in a batch to batches on devices: each process draws all numbers, and loads its own rows."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from jaxtyping import PyTree

from .._checks import instance, integer, positive_int
from .._types import Integer, Unchecked
from ..random import check_seed
from ..sampling import AbstractSampler, check_step
from ._as_source import Data, as_source
from ._base import Reader
from ._batches import Batches
from ._layout import Layout, Part, checked_sharding, on_devices
from ._workers import Workers

_EXAMPLE = "dpx.PoissonSampler(60_000, 256, 5_000)"


def feed(
    sampler: Unchecked[AbstractSampler],
    source: Data,
    *,
    seed: Integer,
    start: Integer = 0,
    sharding: Unchecked[Sharding | None] = None,
    microbatch_size: Unchecked[Integer | None] = None,
    prefetch: Integer = 2,
    workers: Integer = 0,
) -> Batches[jax.Array]:
    """The batches of a run, on the devices before they are needed: what a plan's `batches` are, up to where padding stands.

    ```python
    with jax.set_mesh(mesh):
        for batch, mask in dpx.data.feed(plan.sampler, source, seed=seed, sharding=NamedSharding(mesh, jax.P("data"))):
            state = step(state, batch, mask)
    ```

    !!! success "Guarantee"

        - Batch $t$ is a pure function of `(seed, t)`: no state of the feed is to be saved, and a run may go on with another number of processes,
            devices, threads or workers. The real rows and their order are those of `plan.batches`, so that an example's own key, which a loss
            gets by its rank among real rows, is the same as well.
        - Every process draws the same numbers and loads the rows of its own devices only; nothing is communicated.
        - Shapes come from public numbers alone. The size is a multiple of devices x microbatch, and grows if more rows are drawn, in all processes
            alike (once in 10^9 batches). A batch with nobody in it is yielded like any other.
        - Every device has as many real rows as another, give or take one, in the same places, so that all skip the same microbatches of padding.
        - An error in reading is raised at the step that it belongs to.

    **Arguments:**

    - `sampler`: who is in a batch.
    - `source`: what `dpx.data.as_source` takes, with `sampler.num_rows` rows.
    - `seed`: the secret of the sampling, up to 128 bits, the same in all processes (`dpx.random.shared_seed()`).
    - `start`: number of the first batch.
    - `sharding`: how the leading axis is laid out: a `NamedSharding` whose spec names the mesh axes of the batch, which may span processes. By
        default the one device, or replicas on the mesh in scope.
    - `microbatch_size`: how many rows one device computes at once: the gradient method's `microbatch_size` over the number of devices.
    - `prefetch`: how many batches are made ahead, by a thread; 0 makes each when it is asked for. Each takes memory on the devices.
    - `workers`: how many processes read rows, for sources that compute (decode images, say). They are started by `spawn`, so a script needs
        `if __name__ == "__main__":`, and the source is pickled. The sampler and its seed are not sent to them. 0 reads in the thread, which is
        enough for arrays and memory maps.

    **Returns:**

    An iterator of `(batch, mask)` with a `len`, the number of batches left. When it is dropped, or by its `close()`, its thread and workers end.
    """
    instance("feed(sampler=...)", sampler, AbstractSampler, _EXAMPLE)
    if microbatch_size is not None:
        microbatch_size = positive_int("feed(microbatch_size=...)", microbatch_size)
    layout = Layout(checked_sharding(sharding), microbatch_size)
    place = lambda part, local: on_devices(part, local, layout.sharding)
    prefetch, workers = _count("prefetch", prefetch), _count("workers", workers)
    return _batches("feed", sampler, source, seed, start, layout, place, prefetch, workers)


def gather_batches(
    sampler: AbstractSampler, data: Data, *, seed: int, start: Integer = 0, prefetch: int = 0
) -> Batches[np.ndarray]:
    """The batches from step `start` on in memory, each padded with zeros to the sampler's physical size, with their masks.

    Where a unit has several rows of the data (`UserSampler`), leaves have shape `(physical size, rows of a unit, ...)`, and the mask is of
    shape `(physical size, rows of a unit)`.

    **Arguments:**

    - `sampler`: who is in a batch.
    - `data`: what `as_source` takes, with `sampler.num_rows` rows.
    - `seed`: the secret of the sampling.
    - `start`: number of the first batch.
    - `prefetch`: how many batches are made ahead, by a thread.
    """
    return _batches("batches", sampler, data, seed, start, Layout(None, None), lambda part, local: local, prefetch, 0)


def _batches(
    name: str,
    sampler: AbstractSampler,
    data: Any,
    seed: Any,
    start: Any,
    layout: Layout,
    place: Callable[[Part, np.ndarray], Any],
    prefetch: int,
    workers: int,
) -> Batches[Any]:
    reader = Reader(as_source(data), sampler)
    seed = check_seed(f"{name}(seed=...)", seed)
    start = integer(f"{name}(start=...)", start)
    if start != sampler.steps:  # nothing left to do is no mistake: a finished run was resumed
        check_step(sampler, start)
    loader = _Loader(sampler, reader, seed, layout, place, Workers(reader.source, workers) if workers else None)
    return Batches(loader, range(start, sampler.steps), prefetch, max(1, workers))


def _count(name: str, value: Any) -> int:
    number = integer(f"feed({name}=...)", value)
    if number < 0:
        raise ValueError(f"`feed({name}=...)` must be at least 0; got {number}.")
    return number


class _Loader:
    """Makes one batch: draws who is in it, reads the rows of this process, and lays them out.

    **Arguments:**

    - `sampler`, `reader`, `seed`, `layout`: who, from where, and on which device.
    - `place`: makes a leaf of what this process holds of it.
    - `workers`: the processes that read; None reads here.
    """

    def __init__(
        self,
        sampler: AbstractSampler,
        reader: Reader,
        seed: int,
        layout: Layout,
        place: Callable[[Part, np.ndarray], Any],
        workers: Workers | None,
    ):
        self.sampler, self.reader, self.seed, self.layout, self.place = sampler, reader, seed, layout, place
        self.workers = workers
        self.size = layout.physical_size(sampler.physical_batch_size)

    def begin(self, step: int) -> Any:
        rows = _checked_rows(self.sampler, self.sampler.indices(self.seed, step), self.reader.num_rows)
        size = self.size if len(rows) <= self.size else self.layout.physical_size(8 * -(-len(rows) // 8))
        part = self.layout.part(rows, size)
        numbers = part.rows[part.rows >= 0]
        if self.workers is None or len(numbers) == 0:
            return part, self.reader.rows(numbers)
        self.reader.check_length()
        return part, self.workers.ask(numbers)

    def end(self, begun: Any) -> tuple[tuple[PyTree, ...], Any]:
        part, leaves = begun
        if not isinstance(leaves, list):
            leaves = self.reader.checked(leaves.result(), int(np.sum(part.rows >= 0)))
        mask = np.zeros((len(part.begins) * part.block, *part.rows.shape[1:]), bool)
        mask[part.positions] = part.rows >= 0
        placed = [self.place(part, _padded(leaf, part, mask)) for leaf in leaves]
        return jax.tree.unflatten(self.reader.treedef, placed), self.place(part, mask)

    def close(self) -> None:
        if self.workers is not None:
            self.workers.close()


def _checked_rows(sampler: AbstractSampler, rows: np.ndarray, num_rows: int) -> np.ndarray:
    low = 0 if rows.ndim == 1 else -1
    if rows.size and not low <= rows.min() <= rows.max() < num_rows:
        raise ValueError(
            f"`{type(sampler).__name__}.indices` must give rows of the data, from 0 to {num_rows - 1}; got {rows.min()} to {rows.max()}."
        )
    return rows


def _padded(leaf: np.ndarray, part: Part, mask: np.ndarray) -> np.ndarray:
    """The rows of a leaf where they belong, among zeros."""
    out = np.zeros((*mask.shape, *leaf.shape[1:]), leaf.dtype)
    if mask.ndim == 1 and len(part.positions) and part.positions[-1] == len(part.positions) - 1:
        out[: len(leaf)] = leaf  # sorted, so these are the first ones: a block copy
    else:
        out[mask] = leaf
    return out
