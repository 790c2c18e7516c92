"""Notes a SIGTERM while a run is open, so that the run ends after a step and a save."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax


class Termination:
    """Whether a SIGTERM came between `listen` and `stop`.

    A second one, or one in a process forked from this one, acts as it did before `listen`. With several processes JAX
    listens instead: all must end after the same step, whichever got the signal.
    """

    def __init__(self) -> None:
        self.heard, self._before, self._process = False, None, None

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._process, self._before = os.getpid(), signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, number: int, frame: Any) -> None:
        if self.heard or os.getpid() != self._process:
            signal.signal(signal.SIGTERM, self._before)
            signal.raise_signal(signal.SIGTERM)
        self.heard = True

    def stop(self) -> None:
        if self._process is not None:
            signal.signal(signal.SIGTERM, self._before)
