"""Batches, made ahead of the steps that take them."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..plan import PrivacyPlan


def batches_of(plan: PrivacyPlan, data: Any, seed: int, start: int, sharding: Any) -> Iterator[tuple[Any, Any]]:
    """The run's batches and masks from step `start` on, on the devices that `sharding` says."""
    for pair in plan.batches(data, seed=seed, start=start):
        yield pair if sharding is None else _on_devices(pair, sharding)


def _on_devices(pair: Any, sharding: Any) -> Any:
    parts = sharding.num_devices
    size = jax.tree.leaves(pair)[0].shape[0]
    missing = -size % parts
    padded = lambda x: np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)]) if missing else x
    return jax.tree.map(lambda x: jax.device_put(padded(x), sharding), pair)


def sharding_of_batches(sharding: Any, mesh: Mesh | None) -> Any:
    """How batches are laid out: as given, else their rows over the first axis of the mesh; None without one."""
    if sharding is not None or mesh is None:
        return sharding
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))


class Ahead:
    """An iterator that is asked in a thread of its own, a few elements ahead. Its errors come where its elements are taken.

    **Arguments:**

    - `iterator`: what to ask.
    - `depth`: how many elements may wait.
    """

    def __init__(self, iterator: Iterator[Any], depth: int):
        self._iterator = iterator
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="dpx batches", daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        try:
            for element in self._iterator:
                if not self._put((element, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, item: tuple[Any, BaseException | None]) -> bool:
        while not self._is_closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def take(self) -> Any:
        """The next element."""
        element, error = self._queue.get()
        if isinstance(error, StopIteration):
            raise RuntimeError("The data ended before the plan's last step.")
        if error is not None:
            raise error
        return element

    def close(self) -> None:
        """Ends the thread."""
        self._is_closed.set()
        self._thread.join()
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()
