"""The single writer's mailbox: calls from anywhere, run one after another in one greenlet.

Two invariants. Nothing that is put in here may block: a slow engine, driver or database would delay everyone (the
mailbox once ran jobs itself, and re-entered itself while one waited). And an exception belongs to the message that
raised it: its sender is told, nobody else notices.
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
"""When a call fails for want of an answer. Handlers take microseconds: this bounds a fault, not a wait."""


class MailboxClosed(Exception):
    """The writer has ended, or does not answer."""


class _Reply(Generic[T]):
    def __init__(self, changed: Condition) -> None:
        self._changed = changed
        self._done = False
        self._value: T | None = None
        self._error: BaseException | None = None

    def give(self, value: T | None, error: BaseException | None = None) -> None:
        with self._changed:
            self._value, self._error, self._done = value, error, True
            self._changed.notify_all()

    def take(self) -> T:
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
    """Runs messages in order. `after_each` is called after every one, before its sender is answered."""

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
        """Have the writer call `function`; doesn't wait. What it raises is logged. Ignored once closed."""
        self._put(_Message(_bound(function, kwargs), args, None))

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Have the writer call `function`, and return what it returns or raise what it raises.

        Never from within a message. Raises MailboxClosed.
        """
        reply: _Reply[T] = _Reply(self._scheduler.condition())
        if not self._put(_Message(_bound(function, kwargs), args, reply)):
            raise MailboxClosed("Switchyard is stopping.")
        return reply.take()

    def close(self) -> None:
        """Take no more messages; those that were sent are still dealt with."""
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def run(self) -> None:
        """Deal with messages until closed. This greenlet is the writer."""
        while (message := self._next()) is not None:
            self._deal_with(message)

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

    def _deal_with(self, message: _Message) -> None:
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
            log.exception("what follows a message failed", message=_name(message.function))
        if message.reply is not None:
            message.reply.give(value, error)


def _bound(function: Callable[..., T], kwargs: dict[str, Any]) -> Callable[..., T]:
    if not kwargs:
        return function
    return lambda *args: function(*args, **kwargs)


def _name(function: Callable[..., object]) -> str:
    return getattr(function, "__name__", repr(function))
