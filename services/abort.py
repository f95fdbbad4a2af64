"""Cancellation token for blocking work: a load, a download, the pull of an image."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Aborted(Exception):
    """The work was cancelled."""


class Abort:
    """Cancellation token of one piece of work. Calling it cancels; thread-safe and idempotent."""

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
        """Set the callback that cancels the work from now on; it must not block.

        Raises Aborted if already cancelled.
        """
        with self._lock:
            self._act = act
        self.check()

    @contextmanager
    def acting(self, act: Callable[[], None]) -> Iterator[None]:
        """Context manager: `applies_to` for one step. Raises Aborted on entry if already cancelled."""
        try:
            self.applies_to(act)
            yield
        finally:
            with self._lock:
                self._act = None

    def check(self) -> None:
        """Raise Aborted if cancelled."""
        if self.requested:
            raise Aborted

    def wait(self, seconds: float) -> None:
        """Sleep `seconds`. Raises Aborted as soon as it is cancelled."""
        self._requested.wait(seconds)
        self.check()
