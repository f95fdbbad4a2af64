"""Calls a function again and again in the background: the one loop behind every regular look, check and clean-up."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)


class Periodic:
    """Calls `act` in a thread of its own, a greenlet under gevent, until it is stopped.

    The first call comes `first_seconds` after the start, each other one `seconds` after the end of the one before, so
    that no two overlap. What `act` raises ends nothing: it is logged, and not again as long as it stays the same.
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
        """Begin. Nothing happens where it has begun or was stopped before."""
        if self._thread is None and not self._stopped.is_set():
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def wait_called(self, timeout: float) -> bool:
        """Wait for the end of the first call, at most `timeout` seconds; whether it is over."""
        return self._called.wait(timeout)

    def stop(self, timeout: float = 0.0) -> None:
        """Call no more. A call under way goes on; its end is waited for, at most `timeout` seconds."""
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
            log.error("what is done regularly failed", what=self._name, exc_info=error)
