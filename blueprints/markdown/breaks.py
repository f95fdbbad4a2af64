"""Breaks in rendering, so that a long text leaves the one event loop to everybody else.

Rendering is pure Python and takes up to a second per 100 kB. In a thread it would compete with the event loop for the
interpreter at every system call; in slices the loop has it to itself in between.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SLICE_SECONDS = 0.005
BREAK_SECONDS = 0.0005
"""Not 0: gevent runs what is ready before it looks at sockets; one loop of `sleep(0)` kept those waiting for 0.5 s."""
LONG = 4_000
"""Characters. Of longer texts one at a time is rendered: each adds its slice to what everybody else waits for."""

_one_at_a_time = threading.Lock()


class Breaks:
    """Takes a break whenever rendering, by anybody, has gone on for a slice since the last one."""

    _owed = 0.0

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __call__(self) -> None:
        if Breaks._owed + time.monotonic() - self._began >= SLICE_SECONDS:
            Breaks._owed = 0.0
            time.sleep(BREAK_SECONDS)
            self._began = time.monotonic()

    def end(self) -> None:
        Breaks._owed += time.monotonic() - self._began


@contextmanager
def breaks(characters: int) -> Iterator[Breaks]:
    """What to call often while a text of so many characters is rendered."""
    if characters > LONG:
        _one_at_a_time.acquire()
    own = Breaks()
    try:
        yield own
    finally:
        own.end()
        if characters > LONG:
            _one_at_a_time.release()
