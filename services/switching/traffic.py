"""Counts the requests that an instance is answering, so that it can be drained before it is unloaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from services.abort import Abort
from services.scheduling import Condition, wait_for


class Traffic:
    """Counts requests in flight. Closing and counting are one atomic step: no request enters after a drain began."""

    def __init__(self, clock: Callable[[], float] = time.time, changed: Condition | None = None) -> None:
        self._clock = clock
        self._changed = changed or threading.Condition(threading.Lock())
        self._open = True
        self._hurried = False
        self._in_flight = 0
        self.signs = 0
        """How often an engine gave a sign of life: a piece of any answer."""
        self._signs_before = 0
        """How many there had been when the first of those inside came in."""
        self._last_used: float | None = None
        self._answered = 0
        self._busy_seconds = 0.0
        """Seconds times requests in flight, since the beginning."""
        self._counted_at = clock()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def last_used(self) -> float | None:
        """Unix time of the last request's end, now while one is being answered, None when there was none."""
        return self._clock() if self._in_flight else self._last_used

    @property
    def mean_seconds(self) -> float | None:
        """How long an answer took in the mean, None before there was one.

        By Little's law, so that no request has to be timed: the time spent in flight over the number of answers.
        """
        return self._busy_seconds / self._answered if self._answered else None

    @property
    def unanswered(self) -> bool:
        """Whether no request is in flight, and the last ones ended without a byte of an answer."""
        return self._answered > 0 and self._in_flight == 0 and self.signs == self._signs_before

    def heard(self) -> None:
        """The engine has given a sign of life."""
        self.signs += 1

    def enter(self) -> bool:
        """Count one request in; False when the instance is being drained. Each True needs one `leave`."""
        with self._changed:
            if self._open:
                if self._in_flight == 0:
                    self._signs_before = self.signs
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
        """Admit no request from now on."""
        with self._changed:
            self._open = False

    def wait_idle(self, timeout: float, token: Abort) -> bool:
        """Wait for those inside; False when some are still there after `timeout` seconds, or once `hurry` was called.

        Raises Aborted as soon as `token` is cancelled.
        """
        wait_for(self._changed, lambda: self._in_flight == 0 or self._hurried, timeout, token)
        return self._in_flight == 0

    def hurry(self) -> None:
        """Have nobody wait for those inside any more, until it is reopened."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()

    def reopen(self) -> None:
        """Take a drain back."""
        with self._changed:
            self._open, self._hurried = True, False
            self._changed.notify_all()

    def _count(self, now: float, change: int) -> None:
        self._busy_seconds += self._in_flight * max(0.0, now - self._counted_at)
        self._counted_at = now
        self._in_flight += change
