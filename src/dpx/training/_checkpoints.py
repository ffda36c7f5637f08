"""`Checkpoints`: where the records of a run are, and who may write there."""

import contextlib
import os
import queue
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx

from .._checks import described, flag, positive_int
from .._files import fsync
from .._types import FilePath, Integer
from ._record import DamagedRecord, Record, read, write

try:
    import fcntl
except ImportError:  # Windows, where nobody is kept out
    fcntl = None

_FILE = re.compile(r"step-(\d{12})\.dpx")
_SPREAD = re.compile(r"step-(\d{12})\.orbax.*")
_HALF = re.compile(r"\.[0-9a-f]{16}-(step-\d{12}\.dpx)")

_MSG_LOCKED = (
    "`Checkpoints({path!r})`: another run is writing there. Two runs in one folder would go on from each other's records, with one noise for two "
    "models. Give each a folder of its own, or wait for the other to end."
)
_MSG_NOT_WRITTEN = (
    "The record of step {step} could not be written to `{path}`: {error}. {stands} Make room, and start the run again: it goes on from there, and "
    "ends as if nothing had happened."
)


class Checkpoints(eqx.Module):
    """Where a run writes what it needs to go on after it was killed, and how often.

    ```python
    trainer = dpx.Trainer(plan, loss, optim, checkpoint=dpx.Checkpoints("run", every=100))
    result = trainer.fit(model, data)  # the same script, started again, goes on
    ```

    !!! success "Guarantee"

        A run that is killed at any instant and started again ends, on the same devices and versions, bit for bit like one that was not: model,
        optimiser, averages, noise, batches, clipping, metrics, history. A record is there whole or not at all, and is used only if each of
        its bits is as written. The first one is on the disk before the first step, so that no step is ever taken again with other noise.

    Records hold the secrets of the noise and of the sampling, which remove the privacy of everything that the run publishes, and are for nobody
    else to read (mode 0600, in a folder of mode 0700): destroy them when the run has ended. `TrainResult.publish` writes what may be shown.

    **Arguments:**

    - `path`: a folder for this run alone.
    - `every`: a record each so many steps, and at the end.
    - `keep`: how many of the last records stay.
    - `rebuild_noise`: leave the buffers of correlated noise out, which may be many times the model, and compute them again from the key when the
        run goes on. That costs as much as the noise of all steps so far, and gives the same bits.
    """

    path: Path = eqx.field(static=True)
    every: int = eqx.field(static=True)
    keep: int = eqx.field(static=True)
    rebuild_noise: bool = eqx.field(static=True)

    def __init__(self, path: FilePath, *, every: Integer = 100, keep: Integer = 3, rebuild_noise: bool = False):
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise ValueError(f"`Checkpoints(path=...)` must be the path of a folder; got {described(path)}.")
        # as it is now: a callback may change the working folder
        self.path = Path(os.path.abspath(os.fspath(path)))
        self.every = positive_int("Checkpoints(every=...)", every)
        self.keep = positive_int("Checkpoints(keep=...)", keep)
        self.rebuild_noise = flag("Checkpoints(rebuild_noise=...)", rebuild_noise)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of which there are records, in order."""
        return tuple(sorted(steps_in(self.path)))


def steps_in(folder: Path) -> list[int]:
    """The steps of the records in a folder."""
    if not folder.is_dir():
        return []
    return [int(match[1]) for name in os.listdir(folder) if (match := _FILE.fullmatch(name))]


def file_of(folder: Path, step: int) -> Path:
    """The name of a record's file."""
    return folder / f"step-{step:012d}.dpx"


class RunFolder:
    """A folder of records, open for one run: locked, and written to by one thread.

    **Arguments:**

    - `checkpoints`: where, and how many stay.
    - `after_removal`: called with a step whose record is gone, for what else belongs to it.
    """

    def __init__(self, checkpoints: Checkpoints, after_removal: Callable[[int], Any] = lambda step: None):
        self._folder, self._keep = checkpoints.path, checkpoints.keep
        self._after_removal = after_removal
        self._error: Exception | None = None
        self._queue: queue.Queue[tuple[int, Callable[[], Record]] | None] = queue.Queue(maxsize=1)
        self._thread: threading.Thread | None = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            fsync(self._folder.parent)
        except OSError as error:
            raise ValueError(f"`Checkpoints({str(self._folder)!r})`: no such folder can be made: {error}.") from None
        self._lock = _locked(self._folder)
        # what a killed run left half written; only whoever has the lock may clean up
        committed = steps_in(self._folder)
        for name in os.listdir(self._folder):
            if (match := _SPREAD.fullmatch(name)) and int(match[1]) not in committed:
                after_removal(int(match[1]))
            if _HALF.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):
                    (self._folder / name).unlink()

    def newest(self) -> tuple[int, Record] | None:
        """The last record that was committed.

        **Raises:** `DamagedRecord` if it is not as it was written. An older one is not used in its place without being asked for: a disk that has
        changed one file may have changed others, and somebody should look. To go on from the older one loses time and nothing else.
        """
        steps = sorted(steps_in(self._folder))
        if not steps:
            return None
        remedy = (
            "There is no older record: begin again in another folder, and count what this run has released as spent."
        )
        for step in reversed(steps[:-1]):
            with contextlib.suppress(DamagedRecord, ValueError):
                read(file_of(self._folder, step))
                remedy = (
                    f"The record of step {step} is intact. Look after the disk; then move `{file_of(self._folder, steps[-1]).name}` out of "
                    f"the folder: the run goes on from step {step}, with the same noise, and ends the same."
                )
                break
        return steps[-1], read(file_of(self._folder, steps[-1]), remedy)

    def save(self, step: int, make: Callable[[], Record], *, wait: bool) -> None:
        """Commits a record, now or in the background; raises what went wrong with an earlier one."""
        self._raise()
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_all, name="dpx checkpoints", daemon=True)
            self._thread.start()
        self._queue.put((step, make))
        if wait:
            self._queue.join()
            self._raise()

    def close(self, *, quietly: bool = False) -> None:
        """Waits for what is being written, lets others in, and raises what went wrong."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        os.close(self._lock)
        if not quietly:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        while (job := self._queue.get()) is not None:
            step, make = job
            try:
                if self._error is None:
                    self._write(step, make)
            except Exception as error:
                self._error = error
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, step: int, make: Callable[[], Record]) -> None:
        record = make()
        path = file_of(self._folder, step)
        try:
            write(path, record)
        except OSError as error:
            steps = steps_in(self._folder)
            stands = f"The record of step {max(steps)} stands." if steps else "There is no earlier record."
            raise RuntimeError(
                _MSG_NOT_WRITTEN.format(step=step, path=path, error=error.strerror or error, stands=stands)
            ) from error
        for old in sorted(steps_in(self._folder))[: -self._keep]:
            with contextlib.suppress(FileNotFoundError):
                file_of(self._folder, old).unlink()
            self._after_removal(old)


def _locked(folder: Path) -> int:
    """The lock of a folder, which the system takes back when the process ends, however it ends."""
    handle = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    if fcntl is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise RuntimeError(_MSG_LOCKED.format(path=str(folder))) from None
    return handle
