"""The loop that calls a function periodically in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)


class Periodic:
    """Calls `act` in a thread of its own, a greenlet under gevent, until stopped.

    The first call comes `first_seconds` after the start, each later one `seconds` after the end of the one before, so
    that calls never overlap. An exception is logged, and not again while it stays the same; the loop goes on.
    """

    def __init__(self, name: str, act: Callable[[], object], seconds: float, *, first_seconds: float = 0.0) -> None:
        self._name = name
        self._act = act
        self._seconds = seconds
        self._first_seconds = first_seconds
        self._stopped = threading.Event()
        self._called = threading.Event()
        self._thread: threading.Thread | None = None
        self._trouble = ""

    @property
    def running(self) -> bool:
        return self._thread is not None and not self._stopped.is_set()

    def start(self) -> None:
        """Start the thread. Does nothing if it was started or stopped before."""
        if self._thread is None and not self._stopped.is_set():
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def wait_called(self, timeout: float) -> bool:
        """Wait until the first call has ended, at most `timeout` seconds; return whether it has."""
        return self._called.wait(timeout)

    def stop(self, timeout: float = 0.0) -> None:
        """Stop calling. A call under way goes on; wait for its end at most `timeout` seconds."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        pause = self._first_seconds
        while not self._stopped.wait(pause):
            try:
                self._act()
                self._trouble = ""
            except Exception as error:
                self._note(error)
            self._called.set()
            pause = self._seconds

    def _note(self, error: Exception) -> None:
        if repr(error) != self._trouble:
            self._trouble = repr(error)
            log.error("a periodic task failed", task=self._name, exc_info=error)
