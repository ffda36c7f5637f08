"""A signal to end, answered after a record."""

import os
import signal
import threading
from typing import Any


class Signals:
    """Notes that the process was asked to end (SIGTERM), so that a record can be written first; after that the process gets the signal again.

    **Arguments:**

    - `is_on`: whether there is anywhere to write to.
    """

    def __init__(self, is_on: bool):
        # only the main thread can be told of signals
        self._is_on = is_on and threading.current_thread() is threading.main_thread()
        self.has_come = False
        self._before: Any = None

    def __enter__(self) -> "Signals":
        if self._is_on:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        del number, frame
        self.has_come = True

    def __exit__(self, *_: Any) -> None:
        if self._is_on:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)
            if self.has_come:
                os.kill(os.getpid(), signal.SIGTERM)
