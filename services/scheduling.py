"""The concurrency primitives that services use: a clock, condition variables and greenlets.

The app uses `Threads` (greenlets under gevent, threads elsewhere). Tests replace it by a virtual clock and one
deterministic scheduler, so that thousands of interleavings run in a second.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from services.cancellation import CancelToken


class Condition(AbstractContextManager[object], Protocol):
    """The part of `threading.Condition` that is used."""

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool: ...

    def notify_all(self) -> None: ...


class Scheduler(Protocol):
    """A clock, condition variables and greenlets. Times are seconds."""

    def now(self) -> float:
        """Return monotonic seconds."""

    def time(self) -> float:
        """Return seconds since the epoch."""

    def condition(self) -> Condition: ...

    def spawn(self, name: str, function: Callable[[], object]) -> None:
        """Run `function` concurrently. It must handle its own exceptions."""


class ThreadScheduler:
    """The real scheduler: threads, which gevent's monkey-patching turns into greenlets, and the system's clocks."""

    def now(self) -> float:
        return time.monotonic()

    def time(self) -> float:
        return time.time()

    def condition(self) -> Condition:
        return threading.Condition()

    def spawn(self, name: str, function: Callable[[], object]) -> None:
        threading.Thread(target=function, name=name, daemon=True).start()


def pause(scheduler: Scheduler, seconds: float, token: CancelToken) -> None:
    """Sleep `seconds`. Raises Cancelled as soon as `token` is cancelled."""
    wait_for(scheduler.condition(), lambda: False, seconds, token)


def wait_for(changed: Condition, predicate: Callable[[], bool], timeout: float, token: CancelToken) -> bool:
    """Wait on `changed` until `predicate` holds, at most `timeout` seconds; return whether it does.

    Raises Cancelled as soon as `token` is cancelled.
    """

    def wake() -> None:
        with changed:
            changed.notify_all()

    with token.cancelling(wake), changed:
        changed.wait_for(lambda: token.cancelled or predicate(), timeout)
        token.check()
        return predicate()
