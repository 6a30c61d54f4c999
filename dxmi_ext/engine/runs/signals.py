"""Stopping a run by SIGTERM or Ctrl-C without losing work. Imports the standard library."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO_SECONDS = 0.1  # timeout(1), for example, signals both the process and its group


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; its state is saved.

    Args:
        number: the signal.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.status = 128 + number  # exit status, as shells report it


class StopSignals:
    """Turns the first signal into ``Stopped``, and the second into an immediate exit (status 128 + signal).

    A context manager that installs handlers and restores the previous ones. Outside of the main thread, where
    Python allows no handlers, it does nothing.
    """

    def __init__(self) -> None:
        self._asked: float | None = None  # when
        self._number: int = signal.SIGTERM  # which, if this process received one
        self._held = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def pending(self) -> bool:
        """Whether a stop is requested; true only within ``held``."""
        return self._asked is not None

    def ask(self) -> None:
        """Requests a stop, as another rank has received a signal."""
        if self._asked is None:
            self._asked = time.monotonic()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
        self._before = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, a signal only sets ``pending``; ``Stopped`` is raised afterwards."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.pending:
            raise Stopped(self._number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked, self._number = now, number
            if not self._held:
                raise Stopped(number)
        elif now - self._asked > _ECHO_SECONDS:
            os._exit(128 + number)  # like SIGKILL: every file is complete or absent
