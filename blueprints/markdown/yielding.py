"""Yielding to the event loop while rendering, which is pure Python and takes up to a second per 100 kB.

In a native thread it would compete with the event loop for the interpreter lock at every system call; in slices the
loop has the interpreter to itself in between.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from services.yielding import Yielder

LONG = 4_000
"""Characters. Longer texts are rendered one at a time, because each concurrent one adds a slice to everyone's latency.
"""

_one_at_a_time = threading.Lock()
_spent = 0.0
"""Seconds since the last yield when the last text ended: twenty short texts add up to a long one."""


@contextmanager
def yielding(characters: int) -> Iterator[Yielder]:
    """Return the yielder to call often while rendering a text of this length."""
    global _spent
    if characters > LONG:
        _one_at_a_time.acquire()
    own = Yielder(_spent)
    try:
        yield own
    finally:
        _spent = own.spent
        if characters > LONG:
            _one_at_a_time.release()
