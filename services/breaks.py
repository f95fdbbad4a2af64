"""Breaks in work that takes long and waits for nothing, so that it leaves the one event loop to everybody else."""

from __future__ import annotations

import time

SLICE_SECONDS = 0.005
BREAK_SECONDS = 0.0005
"""Not 0: gevent runs what is ready before it looks at sockets; one loop of `sleep(0)` kept those waiting for 0.5 s."""


class Breaks:
    """Called often, it takes a break once a slice has gone by since the last one; `spent` seconds have gone already."""

    def __init__(self, spent: float = 0.0) -> None:
        self._since = time.monotonic() - spent

    @property
    def spent(self) -> float:
        """Seconds since the last break."""
        return time.monotonic() - self._since

    def __call__(self) -> None:
        if self.spent >= SLICE_SECONDS:
            time.sleep(BREAK_SECONDS)
            self._since = time.monotonic()
