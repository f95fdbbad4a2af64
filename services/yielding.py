"""Cooperative yielding for long computations, so that the single event loop keeps serving others."""

from __future__ import annotations

import time

SLICE_SECONDS = 0.005
YIELD_SECONDS = 0.0005
"""Not 0: gevent runs ready greenlets before it polls sockets, and a loop of `sleep(0)` delayed those by 0.5 s."""


class Yielder:
    """Callable that yields to the event loop once SLICE_SECONDS have passed since the last yield.

    `spent` is the time already used when it is made.
    """

    def __init__(self, spent: float = 0.0) -> None:
        self._since = time.monotonic() - spent

    @property
    def spent(self) -> float:
        """Seconds since the last yield."""
        return time.monotonic() - self._since

    def __call__(self) -> None:
        if self.spent >= SLICE_SECONDS:
            time.sleep(YIELD_SECONDS)
            self._since = time.monotonic()
