"""Jobs of the switcher: requests, their results, and the event stream that followers read."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from services.cancellation import CancelToken
from services.config import Strategy
from services.scheduling import Condition, Scheduler, ThreadScheduler
from services.switching.events import SwitchView
from services.switching.plan import Plan

Replace = Literal["cancel", "queue", "refuse"]
"""What a new switch does about the one under way."""

Outcome = Literal["success", "already_loaded", "failed", "cancelled"]


class SwitchError(Exception):
    """Why a job did not do what was requested. `code` is an error code of the HTTP contract, the text is for people."""

    def __init__(self, code: str, message: str, **details: object) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details: Mapping[str, object] = details


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One server-sent event of a job: `stage`, `progress`, `complete` or `error`, numbered from 1."""

    number: int
    name: str
    data: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class SwitchOptions:
    """Options of a switch; None leaves a choice to the settings.

    `activate`: make the target the active model. `instead_of`: a model to unload even if there is room for both.
    `lasting`: keep the job even when all clients that wait for it have disconnected.
    """

    strategy: Strategy | None = None
    confirm: bool | None = None
    auto_unload: bool | None = None
    activate: bool = True
    instead_of: str | None = None
    lasting: bool = True

    def merged_with(self, other: SwitchOptions) -> SwitchOptions:
        """Return options that grant the permissions of both and take the other's choices first."""
        return replace(
            self,
            strategy=other.strategy or self.strategy,
            confirm=self.confirm or other.confirm,
            auto_unload=other.auto_unload if self.auto_unload is False else self.auto_unload,
            activate=self.activate or other.activate,
            instead_of=other.instead_of or self.instead_of,
            lasting=self.lasting or other.lasting,
        )


SWITCH_DEFAULTS = SwitchOptions()


@dataclass(frozen=True, slots=True)
class Request:
    """What a job was asked to do."""

    kind: Literal["switch", "stop", "restart", "remove"]
    model: str
    requested_by: str
    options: SwitchOptions = SWITCH_DEFAULTS

    @property
    def switches(self) -> bool:
        """Whether the job ends with the target loaded."""
        return self.kind in ("switch", "restart")

    def merged_with(self, other: Request) -> Request:
        """Return one request with the options of both, which name the same model."""
        return replace(self, options=self.options.merged_with(other.options))


@dataclass(eq=False)
class Chain:
    """Debt of a chain of switches, each superseding the one before: the models to restore if the last one fails.

    `active` was the active model before the first switch; `unloaded` lists what the chain unloaded and has not loaded
    again, in order. A superseding switch inherits the chain, so that the last one can restore everything. Unloading a
    model by hand takes it off the list.
    """

    active: str | None = None
    unloaded: list[str] = field(default_factory=list)
    begun: bool = False

    def begin(self, active: str | None) -> None:
        """Note the active model when the first switch of the chain begins; later calls do nothing."""
        if not self.begun:
            self.active, self.begun = active, True

    def add(self, model_id: str) -> None:
        if model_id not in self.unloaded:
            self.unloaded.append(model_id)

    def discard(self, model_id: str) -> None:
        if model_id in self.unloaded:
            self.unloaded.remove(model_id)


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended. `view` is the final state of its switch, None for other kinds of jobs."""

    outcome: Outcome
    error: SwitchError | None = None
    view: SwitchView | None = None


@dataclass(eq=False)
class Job:
    """One request on its way through the switcher, with an event log that any number of clients can follow.

    The switcher alone accepts, cancels and finishes it; the greenlet that runs it publishes its events. Thread-safe.
    """

    request: Request
    scheduler: Scheduler = field(default_factory=ThreadScheduler, repr=False)
    chain: Chain = field(default_factory=Chain)
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    plan: Plan | None = None
    outcome: Outcome | None = None
    error: SwitchError | None = None
    unloaded: list[str] = field(default_factory=list)
    load_seconds: float | None = None
    token: CancelToken = field(default_factory=CancelToken, repr=False)
    cancel_reason: str | None = None
    superseded: bool = False
    restoring: bool = False
    """Whether it is loading again what it had unloaded. Only a superseding switch can interrupt that."""
    has_changes: bool = False
    """Whether it has begun to change what is loaded. Until then it can be withdrawn without a trace."""
    sealed: bool = False
    """Whether its result is decided. A sealed job accepts no further requests."""
    waiters: int = 0
    """Number of clients waiting for it whose request is not `lasting`."""

    def __post_init__(self) -> None:
        self.created = self.scheduler.now()
        self._events: list[JobEvent] = []
        self._changed: Condition = self.scheduler.condition()
        self._started = False

    @property
    def target(self) -> str:
        return self.request.model

    @property
    def done(self) -> bool:
        return self.outcome is not None

    @property
    def cancelled(self) -> bool:
        return self.cancel_reason is not None

    @property
    def seconds(self) -> float:
        """Seconds since it was requested."""
        return self.scheduler.now() - self.created

    def cancel(self, reason: str, *, superseded: bool = False) -> None:
        """Request cancellation; the first reason counts.

        Only a superseding switch interrupts a job that is restoring.
        """
        self.superseded = self.superseded or superseded
        if self.restoring and not superseded:
            return
        if self.cancel_reason is None:
            self.cancel_reason = reason
        self.token.cancel()

    def join(self, request: Request) -> bool:
        """Merge `request` into this job. Return False if it asks for something else, or comes too late."""
        ours = self.request
        with self._changed:
            if (ours.kind, ours.model) != (request.kind, request.model) or self.sealed or self.cancelled or self.done:
                return False
            if self.has_changes and request.options.instead_of not in (None, ours.options.instead_of):
                return False
            self.request = ours.merged_with(request)
            return True

    def seal(self, request: Request | None = None) -> bool:
        """Close the job to further requests. Return False if the request is no longer `request`.

        The caller decides on the basis of `request`; when another client has joined since, it has to decide again.
        """
        with self._changed:
            if request is not None and self.request is not request:
                return False
            self.sealed = True
            return True

    def begin_changes(self) -> None:
        """Mark that it begins to change what is loaded. Raises Cancelled if it was cancelled before."""
        self.token.check()
        self.has_changes = True

    def begin_restoring(self) -> CancelToken:
        """Begin the rollback; return its token, which only a superseding switch cancels."""
        self.restoring = True
        self.token = CancelToken()
        if self.superseded:
            self.token.cancel()
        return self.token

    def publish(self, event: str, **data: object) -> None:
        """Append an event and wake all followers."""
        with self._changed:
            self._events.append(JobEvent(len(self._events) + 1, event, data))
            self._changed.notify_all()

    def mark_started(self) -> None:
        """Mark that the target's load has begun, for callers that don't wait for its end."""
        with self._changed:
            self._started = True
            self._changed.notify_all()

    def finish(self, outcome: Outcome, error: SwitchError | None = None) -> None:
        """Set the outcome, exactly once."""
        with self._changed:
            assert self.outcome is None, f"job {self.id} has ended already"
            self.outcome, self.error = outcome, error
            self._changed.notify_all()

    def wait_started(self, timeout: float) -> bool:
        """Wait until the target's load has begun or the job has ended."""
        with self._changed:
            return self._changed.wait_for(lambda: self._started or self.done, timeout)

    def wait_done(self, timeout: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.done, timeout)

    def follow(self, after: int = 0, heartbeat: float = 10.0) -> Iterator[JobEvent | None]:
        """Yield every event numbered above `after` until the job is done.

        Yields None after `heartbeat` seconds without an event.
        """
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


__all__ = ["Chain", "Job", "JobEvent", "JobResult", "Outcome", "Replace", "Request", "SwitchError"]
