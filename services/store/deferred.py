"""Writes to the database that nobody waits for: a failing or locked one must not fail a load, nor stop the switcher."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import structlog

from services.scheduling import Scheduler, Threads
from services.store.errors import StoreError
from services.store.records import LoadRecord

log = structlog.get_logger(__name__)

WAITING_AT_MOST = 1000
"""Writes kept while the database can't be written; the oldest are dropped then."""
PAUSE_SECONDS = 1.0


class DeferredWrites:
    """Carries out writes in order, in a greenlet of its own.

    While the database can't be used they wait, and are tried again every `pause` seconds. One that fails for another
    reason is logged, and no other suffers.
    """

    def __init__(self, scheduler: Scheduler | None = None, pause: float = PAUSE_SECONDS) -> None:
        self._scheduler = scheduler or Threads()
        self._pause = pause
        self._changed = self._scheduler.condition()
        self._waiting: deque[Callable[[], object]] = deque(maxlen=WAITING_AT_MOST)
        self._closed = False
        self._ended = False
        self._scheduler.spawn("deferred-writes", self._run)

    def put(self, write: Callable[[], object]) -> None:
        """Have `write` called soon. Returns at once."""
        with self._changed:
            self._waiting.append(write)
            self._changed.notify_all()

    def close(self, timeout: float = 5.0) -> None:
        """Write what waits, for at most `timeout` seconds; what can't be written now is lost."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended, timeout)

    def _run(self) -> None:
        while (write := self._next()) is not None:
            self._carry_out(write)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _carry_out(self, write: Callable[[], object]) -> None:
        told = False
        while True:
            try:
                write()
            except StoreError as error:
                if not told:
                    log.warning("writing to the database has to wait", error=str(error))
                told = True
                if self._paused():
                    continue
                log.warning("something is not written to the database any more", error=str(error))
            except Exception as error:
                log.warning("something could not be written to the database", error=str(error))
            return

    def _paused(self) -> bool:
        """Wait before another try; False when there is to be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, self._pause)
            return not self._closed

    def _next(self) -> Callable[[], object] | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
            return self._waiting.popleft() if self._waiting else None


class _Notes(Protocol):
    def get(self, key: str) -> str | None: ...

    def put(self, key: str, value: str) -> None: ...


class DeferredNotes:
    """Notes that are read at once and written a little later."""

    def __init__(self, notes: _Notes, writes: DeferredWrites) -> None:
        self._notes = notes
        self._writes = writes

    def get(self, key: str) -> str | None:
        return self._notes.get(key)

    def put(self, key: str, value: str) -> None:
        self._writes.put(lambda: self._notes.put(key, value))


class _Loads(Protocol):
    def add(self, record: LoadRecord) -> None: ...

    def recent_all(self, limit: int) -> list[LoadRecord]: ...


class DeferredLoads:
    """Past loads, likewise."""

    def __init__(self, loads: _Loads, writes: DeferredWrites) -> None:
        self._loads = loads
        self._writes = writes

    def add(self, record: LoadRecord) -> None:
        self._writes.put(lambda: self._loads.add(record))

    def recent_all(self, limit: int) -> list[LoadRecord]:
        return self._loads.recent_all(limit)
