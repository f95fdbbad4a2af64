"""The breaks that rendering takes. It is pure Python, and takes up to a second per 100 kB.

In a thread it would compete with the event loop for the interpreter at every system call; in slices the loop has it to
itself in between.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from services.breaks import Breaks

LONG = 4_000
"""Characters. Of longer texts one at a time is rendered: each adds its slice to what everybody else waits for."""

_one_at_a_time = threading.Lock()
_spent = 0.0
"""Seconds since the last break, at the end of the last text: twenty short ones make a long one."""


@contextmanager
def breaks(characters: int) -> Iterator[Breaks]:
    """What to call often while a text of so many characters is rendered."""
    global _spent
    if characters > LONG:
        _one_at_a_time.acquire()
    own = Breaks(_spent)
    try:
        yield own
    finally:
        _spent = own.spent
        if characters > LONG:
            _one_at_a_time.release()
