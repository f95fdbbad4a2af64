"""A check of another program that everybody who asks meanwhile shares."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

R = TypeVar("R")


class Probe(Generic[R]):
    """Runs `ask`, which blocks for a bounded time, at most once at a time, and keeps its result for a while.

    Thread-safe. `fresh_seconds` is how long a result counts, from when it was asked for.
    """

    def __init__(self, ask: Callable[[], R], fresh_seconds: float = 0.0) -> None:
        self._ask = ask
        self._fresh_seconds = fresh_seconds
        self._lock = threading.Lock()
        self._under_way: Future[R] | None = None
        self._latest: Future[R] | None = None
        self._asked_at = float("-inf")

    def begin(self, *, fresh: bool = False) -> Future[R]:
        """Begin a check, join the one under way, or return the latest unless it has to be `fresh`.

        The future raises what `ask` raises.
        """
        with self._lock:
            if self._under_way is not None:
                return self._under_way
            if self._latest is not None and not fresh and time.monotonic() - self._asked_at < self._fresh_seconds:
                return self._latest
            self._under_way = outcome = Future[R]()
            self._asked_at = time.monotonic()
        threading.Thread(target=self._run, args=(outcome,), name="probe", daemon=True).start()
        return outcome

    @property
    def latest(self) -> Future[R] | None:
        """The last check that has ended, however long ago; None before the first."""
        return self._latest

    def _run(self, outcome: Future[R]) -> None:
        result: R | None = None
        failure: BaseException | None = None
        try:
            result = self._ask()
        except BaseException as error:
            failure = error
        with self._lock:
            self._latest, self._under_way = outcome, None
        if failure is not None:
            outcome.set_exception(failure)
        else:
            outcome.set_result(result)  # type: ignore[arg-type]
