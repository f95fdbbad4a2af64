"""Counts the requests in flight on an instance, so that it can be drained before it is unloaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from services.cancellation import CancelToken
from services.scheduling import Condition, wait_for


class Traffic:
    """Counter of requests in flight. Admission and close are atomic: no request enters after a drain began."""

    def __init__(self, clock: Callable[[], float] = time.time, changed: Condition | None = None) -> None:
        self._clock = clock
        self._changed = changed or threading.Condition(threading.Lock())
        self._open = True
        self._cut_short = False
        self._in_flight = 0
        self.activity_count = 0
        """Number of signs of activity so far: a chunk of any answer, or a successful probe."""
        self._activity_before = 0
        """`activity_count` when the first of the requests in flight was admitted."""
        self._last_used: float | None = None
        self._answered = 0
        self._busy_seconds = 0.0
        """Integral of requests in flight over time, in seconds."""
        self._counted_at = clock()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def answered(self) -> int:
        """Number of requests that have ended."""
        return self._answered

    @property
    def last_used(self) -> float | None:
        """Unix time when the last request ended, now if one is in flight, None if there was none."""
        return self._clock() if self._in_flight else self._last_used

    @property
    def mean_seconds(self) -> float | None:
        """Mean duration of a request, None before the first one ended.

        By Little's law, so that no request has to be timed: total time in flight over the number of requests.
        """
        return self._busy_seconds / self._answered if self._answered else None

    @property
    def unanswered(self) -> bool:
        """Whether no request is in flight and the last ones ended without one byte of an answer."""
        return self._answered > 0 and self._in_flight == 0 and self.activity_count == self._activity_before

    def note_activity(self) -> None:
        """Note that the engine showed activity."""
        self.activity_count += 1

    def enter(self) -> bool:
        """Admit a request; return False if the instance is being drained. Each True needs one `leave`."""
        with self._changed:
            if self._open:
                if self._in_flight == 0:
                    self._activity_before = self.activity_count
                self._count(self._clock(), 1)
            return self._open

    def leave(self) -> None:
        with self._changed:
            self._last_used = now = self._clock()
            self._count(now, -1)
            self._answered += 1
            if self._in_flight == 0:
                self._changed.notify_all()

    def close(self) -> None:
        """Admit no further requests."""
        with self._changed:
            self._open = False

    def wait_idle(self, timeout: float, token: CancelToken) -> bool:
        """Wait until no request is in flight. Return False after `timeout` seconds or `cut_drain_short`.

        Raises Cancelled as soon as `token` is cancelled.
        """
        wait_for(self._changed, lambda: self._in_flight == 0 or self._cut_short, timeout, token)
        return self._in_flight == 0

    def cut_drain_short(self) -> None:
        """End every wait for requests in flight, until `reopen`."""
        with self._changed:
            self._cut_short = True
            self._changed.notify_all()

    def reopen(self) -> None:
        """Admit requests again."""
        with self._changed:
            self._open, self._cut_short = True, False
            self._changed.notify_all()

    def _count(self, now: float, change: int) -> None:
        self._busy_seconds += self._in_flight * max(0.0, now - self._counted_at)
        self._counted_at = now
        self._in_flight += change
