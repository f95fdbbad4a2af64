"""The queue of work: one job at a time, in a thread of its own, each of which can be cancelled."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from errors import Cancelled, RequestError

WAITING_LIMIT = 8
"""Jobs that may wait for the one that runs."""

log = logging.getLogger("local-servers")


@dataclass(frozen=True)
class Step:
    """One step of a job is done."""

    step: int
    steps: int


class Job:
    """A piece of work. Its events are steps, and at the end its result or exception."""

    def __init__(self, label: str, work: Callable[[Job], Any]) -> None:
        self.label = label
        self.events: SimpleQueue[Step | tuple[Any, Exception | None]] = SimpleQueue()
        self._work = work
        self._cancelled: str | None = None

    def step(self, done: int, total: int) -> None:
        """Report that a step is done. Raises Cancelled if the work is no longer wanted."""
        self.check()
        self.events.put(Step(done, total))

    def check(self) -> None:
        """Raise Cancelled if the work is no longer wanted."""
        if self._cancelled is not None:
            raise Cancelled(self._cancelled)

    def cancel(self, reason: str) -> None:
        self._cancelled = self._cancelled or reason

    def run(self) -> None:
        started = time.monotonic()
        log.info("%s started", self.label)
        result, error = None, None
        try:
            self.check()
            result = self._work(self)
        except Exception as raised:
            error = raised
        took = time.monotonic() - started
        if isinstance(error, Cancelled):
            log.info("%s cancelled after %.2f s: %s", self.label, took, error)
        elif isinstance(error, RequestError):
            log.warning("%s failed after %.2f s: %s", self.label, took, error)
        elif error is not None:
            log.error("%s failed after %.2f s", self.label, took, exc_info=error)
        else:
            log.info("%s finished in %.2f s", self.label, took)
        self.events.put((result, error))


class WorkQueue:
    """Runs jobs one at a time, in the order in which they came."""

    def __init__(self, limit: int = WAITING_LIMIT) -> None:
        self.limit = limit
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._last_seconds = 1.0
        self._closed: str | None = None
        threading.Thread(target=self._run, name="work", daemon=True).start()

    def figures(self) -> dict[str, int]:
        with self._changed:
            return {"running": int(self._running is not None), "waiting": len(self._waiting), "limit": self.limit}

    def submit(self, job: Job) -> None:
        """Put the job last. Raises RequestError if too many wait already or the server is stopping."""
        with self._changed:
            if self._closed:
                raise RequestError(503, "stopping", "The server is stopping.")
            if len(self._waiting) >= self.limit:
                wait = max(1, math.ceil(self._last_seconds))
                raise RequestError(429, "queue_full", f"{self.limit} requests are waiting already.", retry_after=wait)
            self._waiting.append(job)
            self._changed.notify_all()

    def cancel(self, job: Job, reason: str) -> None:
        """Remove a waiting job; a running one ends at its next step."""
        job.cancel(reason)
        with self._changed, suppress(ValueError):
            self._waiting.remove(job)
            log.info("%s cancelled while it waited: %s", job.label, reason)

    def close(self, timeout: float) -> None:
        """Take no more jobs, cancel all there are, and wait at most `timeout` seconds for the running one."""
        with self._changed:
            self._closed = "the server is stopping"
            waiting, running = list(self._waiting), self._running
        for job in waiting:
            self.cancel(job, self._closed)
            job.events.put((None, RequestError(503, "stopping", "The server is stopping.")))
        if running is not None:
            running.cancel(self._closed)
        with self._changed:
            self._changed.wait_for(lambda: self._running is None, timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                self._running = job = self._waiting.popleft()
            started = time.monotonic()
            job.run()
            with self._changed:
                self._running = None
                self._last_seconds = time.monotonic() - started
                self._changed.notify_all()
