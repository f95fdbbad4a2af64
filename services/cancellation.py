"""Cancellation token for blocking work: a load, a download, the pull of an image."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Cancelled(Exception):
    """The work was cancelled."""


class CancelToken:
    """Cancellation token of one piece of work. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callback: Callable[[], None] | None = None
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Cancel the work. Idempotent."""
        with self._lock:
            self._cancelled.set()
            callback = self._callback
        if callback is not None:
            callback()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Set the callback that cancels the work from now on; it must not block.

        Raises Cancelled if already cancelled.
        """
        with self._lock:
            self._callback = callback
        self.check()

    @contextmanager
    def cancelling(self, callback: Callable[[], None]) -> Iterator[None]:
        """Context manager: `on_cancel` for one step. Raises Cancelled on entry if already cancelled."""
        try:
            self.on_cancel(callback)
            yield
        finally:
            with self._lock:
                self._callback = None

    def check(self) -> None:
        """Raise Cancelled if the work was cancelled."""
        if self.cancelled:
            raise Cancelled

    def wait(self, seconds: float) -> None:
        """Sleep `seconds`. Raises Cancelled as soon as the work is cancelled."""
        self._cancelled.wait(seconds)
        self.check()
