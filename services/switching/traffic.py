"""Counts the requests that an instance is answering, so that it can be drained before it is unloaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Traffic:
    """A door with a counter. Closing it and counting are one atomic step: nobody slips in after a drain began."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._changed = threading.Condition(threading.Lock())
        self._open = True
        self._in_flight = 0
        self._last_used: float | None = None

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def last_used(self) -> float | None:
        """Unix time of the last request's end, now while one is being answered, None when there was none."""
        return self._clock() if self._in_flight else self._last_used

    def enter(self) -> bool:
        """Count one request in; False when the instance is being drained. Each True needs one `leave`."""
        with self._changed:
            if self._open:
                self._in_flight += 1
            return self._open

    def leave(self) -> None:
        with self._changed:
            self._in_flight -= 1
            self._last_used = self._clock()
            if self._in_flight == 0:
                self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Let nobody in, and wait for those inside; False when some are still there after `timeout` seconds."""
        with self._changed:
            self._open = False
            return self._changed.wait_for(lambda: self._in_flight == 0 or self._open, timeout)

    def reopen(self) -> None:
        """Take a drain back."""
        with self._changed:
            self._open = True
            self._changed.notify_all()
