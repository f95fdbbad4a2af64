"""The switcher's mailbox: calls from any greenlet, run one after another in a single one.

Two invariants. A message must not block: a slow engine, driver or database would delay everyone (an earlier version ran
jobs inside the mailbox, and re-entered itself while one waited). And an exception belongs to the message that raised
it: it is raised in the sender, and no other message is affected.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, cast

import structlog

from services.scheduling import Condition, Scheduler

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

REPLY_SECONDS = 10.0
"""Time limit for the reply to a call. Handlers take microseconds, so only a bug exceeds it."""


class MailboxClosed(Exception):
    """The mailbox is closed, or did not reply in time."""


class _Reply(Generic[T]):
    def __init__(self, changed: Condition) -> None:
        self._changed = changed
        self._done = False
        self._value: T | None = None
        self._error: BaseException | None = None

    def set(self, value: T | None, error: BaseException | None = None) -> None:
        with self._changed:
            self._value, self._error, self._done = value, error, True
            self._changed.notify_all()

    def wait(self) -> T:
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, REPLY_SECONDS):
                raise MailboxClosed("The switcher does not answer.")
        if self._error is not None:
            raise self._error
        return cast(T, self._value)


@dataclass(frozen=True, slots=True)
class _Message:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    reply: _Reply[Any] | None


class Mailbox:
    """Runs messages in order. `after_each` is called after every message, before its sender gets the reply."""

    def __init__(self, scheduler: Scheduler, after_each: Callable[[], None] = lambda: None) -> None:
        self._scheduler = scheduler
        self._after_each = after_each
        self._changed = scheduler.condition()
        self._messages: deque[_Message] = deque()
        self._open = True

    @property
    def open(self) -> bool:
        return self._open

    def post(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Queue a call and return at once. What it raises is logged. Ignored once closed."""
        self._put(_Message(_bound(function, kwargs), args, None))

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Queue a call, wait for it, and return its result or raise its exception.

        Never call this within a message: it would wait for itself. Raises MailboxClosed.
        """
        reply: _Reply[T] = _Reply(self._scheduler.condition())
        if not self._put(_Message(_bound(function, kwargs), args, reply)):
            raise MailboxClosed("Switchyard is stopping.")
        return reply.wait()

    def close(self) -> None:
        """Accept no further messages; those already queued still run."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def run(self) -> None:
        """Run messages until closed. The greenlet that calls this is the single writer."""
        while (message := self._next()) is not None:
            self._handle(message)

    def _put(self, message: _Message) -> bool:
        with self._changed:
            if self._open:
                self._messages.append(message)
                self._changed.notify_all()
            return self._open

    def _next(self) -> _Message | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._messages) or not self._open)
            return self._messages.popleft() if self._messages else None

    def _handle(self, message: _Message) -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = message.function(*message.args)
        except Exception as raised:
            error = raised
            if message.reply is None:
                log.exception("a message to the switcher failed", message=_name(message.function))
        try:
            self._after_each()
        except Exception:
            log.exception("publishing after a message failed", message=_name(message.function))
        if message.reply is not None:
            message.reply.set(value, error)


def _bound(function: Callable[..., T], kwargs: dict[str, Any]) -> Callable[..., T]:
    if not kwargs:
        return function
    return lambda *args: function(*args, **kwargs)


def _name(function: Callable[..., object]) -> str:
    return getattr(function, "__name__", repr(function))
