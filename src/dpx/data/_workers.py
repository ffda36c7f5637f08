"""Processes that read rows, for sources that compute."""

import multiprocessing
import pickle
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from ._base import AbstractSource

_MSG_DIED = (
    "A worker process of `feed(workers=...)` died. Workers are started anew and import the script that started them, so it needs `if __name__ == "
    '"__main__":` around what it runs; otherwise the system may have ended it for want of memory, of which every worker needs its own.'
)


class Workers:
    """Processes with a source each, which are sent numbers and send back rows.

    **Arguments:**

    - `source`: the source, which is pickled.
    - `number`: of processes.
    """

    def __init__(self, source: AbstractSource, number: int):
        try:
            pickled = pickle.dumps(source)
        except Exception as error:
            raise ValueError(
                f"`feed(workers={number})` sends the source to other processes, and {type(source).__name__} cannot be pickled ({error}). Define its "
                "class at the top of a module, open files in `rows` rather than before, or leave `workers` out."
            ) from error
        # spawned, since a fork of a process in which JAX has threads may wait forever for a lock
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(number, context, _receive, (pickled,))

    def ask(self, indices: np.ndarray) -> "Answer":
        """Asks the next free worker for rows."""
        try:
            return Answer(self._pool.submit(_rows, indices))
        except BrokenProcessPool as error:
            raise RuntimeError(_MSG_DIED) from error

    def close(self) -> None:
        """Ends the processes, without waiting for what was asked."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Answer:
    """Rows that are on their way.

    **Arguments:**

    - `future`: of them.
    """

    def __init__(self, future: "Future[Any]"):
        self._future = future

    def result(self) -> Any:
        """The rows, as soon as they are there; raises what reading them raised."""
        try:
            return self._future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(_MSG_DIED) from error


_SOURCE: list[AbstractSource] = []


def _receive(pickled: bytes) -> None:
    """In a worker: keeps the source."""
    _SOURCE[:] = [pickle.loads(pickled)]


def _rows(indices: np.ndarray) -> Any:
    return _SOURCE[0].rows(indices)
