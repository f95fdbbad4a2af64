"""Calls that run side by side, each with a cancellation token of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from services.cancellation import Cancelled, CancelToken
from services.scheduling import Scheduler


class CallTokens:
    """The tokens of the calls under way in one run: a CancelToken ends one call only. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: set[CancelToken] = set()
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @contextmanager
    def token(self) -> Iterator[CancelToken]:
        """Context manager: the token of one call. Raises Cancelled on entry if the run was cancelled."""
        token = CancelToken()
        with self._lock:
            if self._cancelled:
                raise Cancelled
            self._under_way.add(token)
        try:
            yield token
        finally:
            with self._lock:
                self._under_way.discard(token)

    def cancel(self) -> None:
        """Cancel every call under way, and every later one. Idempotent; does not block."""
        with self._lock:
            self._cancelled = True
            tokens = list(self._under_way)
        for token in tokens:
            token.cancel()


def run_side_by_side(
    scheduler: Scheduler, name: str, works: Sequence[Callable[[], object]], at_once: int, stop: Callable[[], object]
) -> None:
    """Run all works, at most `at_once` at a time, in order; return when the last one has ended.

    The first exception ends this early: no further work begins, `stop` is called to end those under way, and it is
    raised once they have ended.
    """
    changed = scheduler.condition()
    waiting = iter(works)
    errors: list[BaseException] = []
    workers = min(at_once, len(works))
    ended = 0

    def next_work() -> Callable[[], object] | None:
        with changed:
            return None if errors else next(waiting, None)

    def worker() -> None:
        nonlocal ended
        try:
            while (work := next_work()) is not None:
                work()
        except BaseException as error:
            with changed:
                errors.append(error)
            stop()
        finally:
            with changed:
                ended += 1
                changed.notify_all()

    for number in range(workers):
        scheduler.spawn(f"{name}-{number}", worker)
    with changed:
        changed.wait_for(lambda: ended == workers)
    if errors:
        raise errors[0]
