"""The iterator over a run's batches, made ahead by a thread."""

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax
from jaxtyping import PyTree

Mask = TypeVar("Mask")


@runtime_checkable
class Loader(Protocol):
    """How a batch is made, in two parts, so that the first of several can be under way."""

    def begin(self, step: int) -> Any:
        """Draws a batch and asks for its rows."""
        ...

    def end(self, begun: Any) -> tuple[tuple[PyTree, ...], Any]:
        """The batch and its mask."""
        ...

    def close(self) -> None:
        """Ends what was started for it."""
        ...


class Batches(Iterator[tuple[tuple[PyTree, ...], Mask]], Generic[Mask]):
    """An iterator of `(batch, mask)`, one for every step that is left; `len` says how many.

    An error in making a batch is raised where that batch is due, with all before it delivered; whoever goes on nevertheless is given the same batch,
    tried again, and never the one after it.

    **Arguments:**

    - `loader`: makes a batch.
    - `steps`: which steps.
    - `prefetch`: how many batches may wait; 0 makes each when it is asked for.
    - `ahead`: how many are begun before the first of them is ended.
    """

    def __init__(self, loader: Loader, steps: range, prefetch: int = 0, ahead: int = 1):
        self._loader = loader
        self._steps = steps
        self._prefetch = prefetch
        self._ahead = ahead
        self._lock = threading.Lock()
        self._maker: _Maker | None = None
        self._close = weakref.finalize(self, loader.close)

    def __len__(self) -> int:
        return len(self._steps)

    def __next__(self) -> tuple[tuple[PyTree, ...], Mask]:
        with self._lock:
            if not self._steps:
                self._stop()
                self._close()
                raise StopIteration
            step = self._steps[0]
            made = self._ready(step) if self._prefetch else _made(self._loader, self._loader.begin, step)
            if isinstance(made, _Failure):
                raise made.error
            self._steps = self._steps[1:]
            return made

    def close(self) -> None:
        """Ends the thread, and the processes, that make batches ahead; nothing is left to iterate over."""
        with self._lock:
            self._stop()
            self._steps = self._steps[:0]
            self._close()

    def _ready(self, step: int) -> Any:
        while True:
            if self._maker is None:
                self._maker = _Maker(self._loader, self._steps, self._prefetch, self._ahead)
                # the thread knows the maker, not the iterator, so that an iterator that is dropped ends it
                self._end = weakref.finalize(self, self._maker.stop)
            number, made = self._maker.get()
            if isinstance(made, _Failure) or number != step:
                self._stop()  # whoever asks again is given the same step
            if isinstance(made, _Failure) or number == step:
                return made

    def _stop(self) -> None:
        if self._maker is not None:
            self._end()
            self._maker = None


class _Failure:
    """An error, on its way to whoever asked for the batch.

    **Arguments:**

    - `error`: what was raised.
    """

    def __init__(self, error: BaseException):
        # one that would end the loop over batches, as if the run were over
        if isinstance(error, StopIteration):
            error = RuntimeError("The source raised StopIteration: it ended before the run did.")
        self.error = error


class _Maker:
    """A thread that makes batches in order until it is stopped, or one fails.

    **Arguments:** as for `Batches`.
    """

    def __init__(self, loader: Loader, steps: range, prefetch: int, ahead: int):
        self._stopped = threading.Event()
        self._ready: queue.Queue[tuple[int, Any]] = queue.Queue(prefetch)
        # what is a setting of the caller's thread is one of this, too
        config: Any = jax.config
        settings = config.jax_enable_x64, config.jax_default_device
        self._thread = threading.Thread(
            target=self._run, args=(loader, steps, ahead, *settings), name="dpx-feed", daemon=True
        )
        self._thread.start()

    def _run(self, loader: Loader, steps: range, ahead: int, has_x64: bool, device: Any) -> None:
        begun: deque[Any] = deque()
        waiting = iter(steps)
        with jax.enable_x64(has_x64), jax.default_device(device):
            for step in steps:
                while len(begun) < ahead and (next_step := next(waiting, None)) is not None:
                    begun.append(_made(None, loader.begin, next_step))
                first = begun.popleft()
                made = first if isinstance(first, _Failure) else _made(None, loader.end, first)
                if not self._put((step, made)) or isinstance(made, _Failure):
                    return

    def _put(self, item: tuple[int, Any]) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def get(self) -> tuple[int, Any]:
        """The next batch, as soon as it is made, and the step that it belongs to."""
        while True:
            try:
                return self._ready.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():  # in a fork, say, where no thread goes on
                    return -1, _Failure(
                        RuntimeError("The thread that makes batches is gone; ask for batches after a fork, not before.")
                    )

    def stop(self) -> None:
        """Ends the thread, and waits for it where it is about to end."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(5.0)
        while not self._ready.empty():  # batches on devices
            try:
                self._ready.get_nowait()
            except queue.Empty:
                pass


def _made(loader: Loader | None, begin: Callable[[Any], Any], step: Any) -> Any:
    """What a call gives, or how it failed."""
    try:
        made = begin(step)
        return made if loader is None else loader.end(made)
    except BaseException as error:
        return _Failure(error)
