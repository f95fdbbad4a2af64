"""What is asked of the switcher, and how the answer is followed: a job with its events."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from services.abort import Abort, Aborted
from services.config import Strategy
from services.scheduling import Condition, Scheduler, Threads
from services.switching.events import SwitchView
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


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One event of seed 001's stream: `stage`, `progress`, `complete` or `error`, numbered from 1."""

    number: int
    name: str
    data: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class SwitchOptions:
    """How a switch is to be made; None leaves a choice to the settings.

    `activate`: requests for "auto" go to the target afterwards. `instead_of` names a model that is unloaded for it even
    where there is room for both. What isn't `lasting` is dropped once everyone who asked for it has withdrawn.
    """

    strategy: Strategy | None = None
    confirm: bool | None = None
    auto_unload: bool | None = None
    activate: bool = True
    instead_of: str | None = None
    lasting: bool = True

    def joined(self, other: SwitchOptions) -> SwitchOptions:
        """Both in one, with the rights and wishes of either."""
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
    """What was asked for."""

    kind: Literal["switch", "stop", "restart", "remove"]
    model: str
    requested_by: str
    options: SwitchOptions = SWITCH_DEFAULTS

    @property
    def switches(self) -> bool:
        return self.kind in ("switch", "restart")

    def joined(self, other: Request) -> Request:
        """Both requests in one, for the same model."""
        return replace(self, options=self.options.joined(other.options))


@dataclass(eq=False)
class Chain:
    """What a chain of switches, each superseding the one before, owes to those who ran before the first.

    `active` is the model that was the active one then, `unloaded` what the chain has unloaded and not brought back, in
    order. A switch that supersedes another inherits its chain, so that the last one can restore it all. Unloading one
    of them by hand strikes it off.
    """

    active: str | None = None
    unloaded: list[str] = field(default_factory=list)
    begun: bool = False

    def begin(self, active: str | None) -> None:
        """The first switch of the chain begins, while `active` is the active model."""
        if not self.begun:
            self.active, self.begun = active, True

    def add(self, model_id: str) -> None:
        if model_id not in self.unloaded:
            self.unloaded.append(model_id)

    def strike(self, model_id: str) -> None:
        if model_id in self.unloaded:
            self.unloaded.remove(model_id)


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended. `view` is its switch as people will see it, None for jobs that are none."""

    outcome: Outcome
    error: SwitchError | None = None
    view: SwitchView | None = None


@dataclass(eq=False)
class Job:
    """One request on its way through the switcher, followed by anyone.

    The switcher alone accepts, cancels and ends it; the greenlet that carries it out tells its events.
    """

    request: Request
    scheduler: Scheduler = field(default_factory=Threads, repr=False)
    chain: Chain = field(default_factory=Chain)
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    plan: Plan | None = None
    outcome: Outcome | None = None
    error: SwitchError | None = None
    unloaded: list[str] = field(default_factory=list)
    load_seconds: float | None = None
    token: Abort = field(default_factory=Abort, repr=False)
    cancel_reason: str | None = None
    superseded: bool = False
    restoring: bool = False
    """Whether it brings back what it had unloaded. Only a switch that supersedes it can end that."""
    touched: bool = False
    """Whether it has begun to change what is loaded; before that it can be withdrawn without a trace."""
    sealed: bool = False
    """Whether its end is decided: whoever wants the same now needs a job of their own."""
    askers: int = 0
    """Requests of clients that wait for it."""

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
        """Seconds since it was asked for."""
        return self.scheduler.now() - self.created

    def cancel(self, reason: str, *, superseded: bool = False) -> None:
        """Ask it to end. The first reason counts; once it restores, only a switch that supersedes it ends that."""
        self.superseded = self.superseded or superseded
        if self.restoring and not superseded:
            return
        if self.cancel_reason is None:
            self.cancel_reason = reason
        self.token()

    def join(self, request: Request) -> bool:
        """Have it do what `request` asks as well; False when it is too late, or another matter."""
        ours = self.request
        with self._changed:
            if (ours.kind, ours.model) != (request.kind, request.model) or self.sealed or self.cancelled or self.done:
                return False
            if self.touched and request.options.instead_of not in (None, ours.options.instead_of):
                return False
            self.request = ours.joined(request)
            return True

    def seal(self, request: Request | None = None) -> bool:
        """Decide its end; False when somebody joined since `request`, whose wishes have to be looked at first."""
        with self._changed:
            if request is not None and self.request is not request:
                return False
            self.sealed = True
            return True

    def touch(self) -> None:
        """It begins to change what is loaded. Raises Aborted when it was cancelled before."""
        self.token.check()
        self.touched = True

    def begin_restoring(self) -> Abort:
        """It is over, what it unloaded comes back; returns the token that a superseding switch cancels."""
        self.restoring = True
        self.token = Abort()
        if self.superseded:
            self.token()
        return self.token

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
        """The end, said once; later calls are a fault of the caller."""
        with self._changed:
            assert self.outcome is None, f"job {self.id} has ended already"
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


__all__ = ["Aborted", "Chain", "Ending", "Job", "JobEvent", "Outcome", "Replace", "Request", "SwitchError"]
