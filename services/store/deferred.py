"""Database writes that no caller waits for: a locked or failing database must not fail a load or block the switcher."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import structlog

from services.notes import Notes
from services.scheduling import Scheduler, ThreadScheduler
from services.store.errors import StoreError
from services.store.records import LoadRecord

log = structlog.get_logger(__name__)

MAX_WAITING = 1000
"""Limit of queued writes while the database can't be written; the oldest are dropped."""
PAUSE_SECONDS = 1.0
DELAY_SECONDS = 0.1
"""Delay of writes that are not urgent: written at once, the record of a load came before the model's first token."""


class DeferredWrites:
    """Runs writes in order, in a greenlet of its own.

    While the database can't be used, writes stay queued and are retried every `pause` seconds. A write that fails for
    another reason is logged and dropped.
    """

    def __init__(self, scheduler: Scheduler | None = None, pause: float = PAUSE_SECONDS) -> None:
        self._scheduler = scheduler or ThreadScheduler()
        self._pause = pause
        self._changed = self._scheduler.condition()
        self._waiting: deque[Callable[[], object]] = deque(maxlen=MAX_WAITING)
        self._urgent = False
        self._closed = False
        self._ended = False
        self._scheduler.spawn("deferred-writes", self._run)

    def put(self, write: Callable[[], object], *, urgent: bool = True) -> None:
        """Queue a write. Never blocks. One that is not urgent may begin DELAY_SECONDS later."""
        with self._changed:
            self._waiting.append(write)
            self._urgent = self._urgent or urgent
            self._changed.notify_all()

    def close(self, timeout: float = 5.0) -> None:
        """Run the queued writes, at most `timeout` seconds; what can't be written is lost."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._ended, timeout)

    def _run(self) -> None:
        while (write := self._next()) is not None:
            self._run_write(write)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _run_write(self, write: Callable[[], object]) -> None:
        logged = False
        while True:
            try:
                write()
            except StoreError as error:
                if not logged:
                    log.warning("a database write has to wait", error=str(error))
                logged = True
                if self._paused():
                    continue
                log.warning("a database write was given up at shutdown", error=str(error))
            except Exception as error:
                log.warning("a database write failed", error=str(error))
            return

    def _paused(self) -> bool:
        """Wait before the next try; return False if there is to be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, self._pause)
            return not self._closed

    def _next(self) -> Callable[[], object] | None:
        with self._changed:
            if not self._waiting:
                self._urgent = False
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
                self._changed.wait_for(lambda: self._urgent or self._closed, DELAY_SECONDS)
            return self._waiting.popleft() if self._waiting else None


class DeferredNotes:
    """Notes, read directly and written through DeferredWrites."""

    def __init__(self, notes: Notes, writes: DeferredWrites) -> None:
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
    """Load records, read directly and written through DeferredWrites."""

    def __init__(self, loads: _Loads, writes: DeferredWrites) -> None:
        self._loads = loads
        self._writes = writes

    def add(self, record: LoadRecord) -> None:
        self._writes.put(lambda: self._loads.add(record), urgent=False)

    def recent_all(self, limit: int) -> list[LoadRecord]:
        return self._loads.recent_all(limit)
