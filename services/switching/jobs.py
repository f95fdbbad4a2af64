"""What is asked of the switcher, and how the answer is followed: a job with its events."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from services.config import Strategy
from services.switching.plan import Plan

Replace = Literal["cancel", "queue", "refuse"]
"""What a new switch does with the one under way."""

Outcome = Literal["success", "already_loaded", "failed", "cancelled"]


class SwitchError(Exception):
    """Why a job did not do what was asked. `code` is the contract's, the text is for people."""

    def __init__(self, code: str, message: str, **details: object) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details: Mapping[str, object] = details


class Cancelled(Exception):
    """The job under way has been called off."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One event of seed 001's stream: `stage`, `progress`, `complete` or `error`, numbered from 1."""

    number: int
    name: str
    data: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for.

    `activate`: requests for "auto" go to the target afterwards. `instead_of` is unloaded for it in any case.
    """

    kind: Literal["switch", "stop", "restart", "remove"]
    model: str
    requested_by: str
    strategy: Strategy | None = None
    confirm: bool | None = None
    auto_unload: bool | None = None
    activate: bool = True
    instead_of: str | None = None


@dataclass(eq=False)
class Job:
    """One request on its way through the switcher. Written by the switcher alone, followed by anyone."""

    request: Request
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    created: float = field(default_factory=time.monotonic)
    plan: Plan | None = None
    outcome: Outcome | None = None
    error: SwitchError | None = None
    unloaded: list[str] = field(default_factory=list)
    load_seconds: float | None = None
    cancel_reason: str | None = None
    superseded: bool = False
    bringing: bool = False
    """Whether something it needs is being downloaded: it has touched nothing yet, so others may go between."""
    _events: list[JobEvent] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _started: bool = False

    @property
    def target(self) -> str:
        return self.request.model

    @property
    def done(self) -> bool:
        return self.outcome is not None

    @property
    def seconds(self) -> float:
        """Seconds since it was asked for."""
        return time.monotonic() - self.created

    def tell(self, event: str, **data: object) -> None:
        with self._changed:
            self._events.append(JobEvent(len(self._events) + 1, event, data))
            self._changed.notify_all()

    def mark_started(self) -> None:
        """The target's load has begun: a caller that doesn't want to wait has its answer."""
        with self._changed:
            self._started = True
            self._changed.notify_all()

    def finish(self, outcome: Outcome, error: SwitchError | None = None) -> None:
        with self._changed:
            self.outcome, self.error = outcome, error
            self._changed.notify_all()

    def wait_started(self, timeout: float) -> bool:
        """Wait until the target's load began, or the job ended."""
        with self._changed:
            return self._changed.wait_for(lambda: self._started or self.done, timeout)

    def wait_done(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.done, timeout)

    def follow(self, after: int = 0, heartbeat: float = 10.0) -> Iterator[JobEvent | None]:
        """Every event numbered above `after`, as it comes, until the job is done; None when nothing did for a while."""
        seen = after
        while True:
            fresh, done = self._newer(seen, heartbeat)
            yield from fresh
            seen += len(fresh)
            if done and not fresh:
                return
            if not fresh:
                yield None

    def _newer(self, seen: int, timeout: float) -> tuple[list[JobEvent], bool]:
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) > seen or self.done, timeout)
            return self._events[seen:], self.done
