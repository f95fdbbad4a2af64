"""Cancellation token for blocking work: a load, a download, the pull of an image."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Aborted(Exception):
    """The work was cancelled."""


class Abort:
    """Cancels one piece of work wherever it is. Called from any thread, once or more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._act: Callable[[], None] | None = None
        self._requested = threading.Event()

    @property
    def requested(self) -> bool:
        return self._requested.is_set()

    def __call__(self) -> None:
        with self._lock:
            self._requested.set()
            act = self._act
        if act is not None:
            act()

    def applies_to(self, act: Callable[[], None]) -> None:
        """What stops it from now on; must not block. Raises Aborted when that was asked for already."""
        with self._lock:
            self._act = act
        self.check()

    @contextmanager
    def acting(self, act: Callable[[], None]) -> Iterator[None]:
        """As `applies_to`, for the time of one step. Raises Aborted on entry when that was asked for already."""
        try:
            self.applies_to(act)
            yield
        finally:
            with self._lock:
                self._act = None

    def check(self) -> None:
        """Raises Aborted when stopping was asked for."""
        if self.requested:
            raise Aborted

    def wait(self, seconds: float) -> None:
        """Pause; raises Aborted as soon as stopping is asked for."""
        self._requested.wait(seconds)
        self.check()
