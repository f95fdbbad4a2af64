"""Runs blocking native calls (NVML, large files) in native threads, with a time limit.

Such a call in a greenlet would freeze the gevent worker. A disk or driver that hangs keeps its thread for good, so
these threads are not those of gevent's own pool: that has ten, which also resolve host names. What is called
periodically has a single thread (`SharedCall`).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

THREADS = 8
"""Size of the shared pool."""
CALL_SECONDS = 30.0
"""Time limit of a call in the shared pool, including the wait for a thread."""


class NativeThreadPool:
    """A pool of native threads for calls that may hang together: one disk, one network share.

    Calls that hang only use up the threads of their own pool.
    """

    def __init__(self, threads: int, seconds: float) -> None:
        self._threads = threads
        self._seconds = seconds
        self._pool: Any = None

    def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` in a pool thread if this process runs on gevent, else directly.

        Raises what it raises, and TimeoutError (an OSError) if it takes longer than the pool's limit, including the
        wait for a thread. The function must not start processes, nor touch unlocked data that greenlets share.
        """
        if not _on_gevent():
            return function(*args, **kwargs)
        import gevent
        from gevent.threadpool import ThreadPool

        if self._pool is None:
            self._pool = ThreadPool(self._threads)
        with gevent.Timeout(self._seconds, TimeoutError(f"a native call did not end within {self._seconds:.0f} s")):
            return cast("_Result[R]", self._pool.apply(_result_of, (function, args, kwargs))).unwrap()


_shared: NativeThreadPool | None = None


def run_in_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function` in the shared pool, for calls that hang only if the whole machine does."""
    global _shared
    if _shared is None:
        _shared = NativeThreadPool(THREADS, CALL_SECONDS)
    return _shared(function, *args, **kwargs)


def compute_in_thread(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `function` in gevent's own pool.

    For pure computations, which can't hang and need not wait behind calls that do.
    """
    if not _on_gevent():
        return function(*args, **kwargs)
    import gevent

    result = gevent.get_hub().threadpool.apply(_result_of, (function, args, kwargs))
    return cast("_Result[R]", result).unwrap()


class _Result(Generic[R]):
    """What a function returned or raised. gevent would print the traceback of an exception raised in its pool."""

    def __init__(self, value: R | None, error: BaseException | None = None) -> None:
        self._value = value
        self._error = error

    def unwrap(self) -> R:
        if self._error is not None:
            raise self._error
        return cast(R, self._value)


def _result_of(function: Callable[..., R], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Result[R]:
    try:
        return _Result(function(*args, **kwargs))
    except BaseException as error:
        return _Result(None, error)


class SharedCall(Generic[R]):
    """A native function that may hang, shared by all callers: at most one call is under way, in a thread of its own.

    A caller that arrives during a call waits for the next one, which all of them share: a result is never older than
    the caller's request.
    """

    def __init__(self, function: Callable[[], R]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._latest: _Call[R] | None = None
        self._pool: Any = None

    def __call__(self, timeout: float) -> R:
        """Return the function's result, or raise what it raises.

        Raises TimeoutError once the call has taken `timeout` seconds. Callers that arrive after that get it at once, so
        that nobody waits for a call that hangs.
        """
        before = self._latest
        if before is not None:
            before.wait(timeout)
        with self._lock:
            call = self._latest
            if call is None or call is before:
                self._latest = call = _Call(self._begin())
        call.wait(timeout)
        return call.outcome.get().unwrap()

    def _begin(self) -> _Outcome[_Result[R]]:
        if not _on_gevent():
            return _Thread(self._function)
        from gevent.threadpool import ThreadPool

        if self._pool is None:
            self._pool = ThreadPool(1)
        return cast("_Outcome[_Result[R]]", self._pool.spawn(_result_of, self._function, (), {}))


class _Outcome(Protocol[R_co]):
    """Future of a call; gevent's AsyncResult is one."""

    def ready(self) -> bool: ...

    def wait(self, timeout: float) -> object: ...

    def get(self) -> R_co: ...


class _Call(Generic[R]):
    """One call, and when it began."""

    def __init__(self, outcome: _Outcome[_Result[R]]) -> None:
        self.outcome = outcome
        self._began = time.monotonic()

    def wait(self, timeout: float) -> None:
        """Wait for the result. Raises TimeoutError if the call takes longer than `timeout` seconds from its start."""
        if not self.outcome.ready():
            self.outcome.wait(max(0.0, self._began + timeout - time.monotonic()))
        if not self.outcome.ready():
            raise TimeoutError(f"a native call did not end within {timeout:.1f} s")


class _Thread(Generic[R]):
    """A call in a daemon thread, for processes without gevent."""

    def __init__(self, function: Callable[[], R]) -> None:
        self._function = function
        self._over = threading.Event()
        self._result: _Result[R]
        threading.Thread(target=self._run, name="native-call", daemon=True).start()

    def _run(self) -> None:
        self._result = _result_of(self._function, (), {})
        self._over.set()

    def ready(self) -> bool:
        return self._over.is_set()

    def wait(self, timeout: float) -> object:
        return self._over.wait(timeout)

    def get(self) -> _Result[R]:
        return self._result


def _on_gevent() -> bool:
    monkey = sys.modules.get("gevent.monkey")  # not imported means not patched
    return monkey is not None and monkey.is_module_patched("threading")
