"""Native calls that block (NVML, large files) and would freeze a gevent worker: run beside it, and never for ever.

A disk or a driver that hangs keeps the thread it got. So the threads are not the hub's, of which there are ten and
which look up host names as well; and what is asked again and again has a single one.
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
CALL_SECONDS = 30.0
"""How long a call may take, the wait for a thread included."""


class NativeThreads:
    """Threads of their own for what may hang together (one disk, one network share), so that it takes no others'."""

    def __init__(self, threads: int, seconds: float) -> None:
        self._threads = threads
        self._seconds = seconds
        self._pool: Any = None

    def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` in one of them when this process runs on gevent, directly otherwise.

        What it raises is raised here, and TimeoutError (an OSError) when it is not done in time, the wait for a thread
        included. It must not start processes, nor touch what greenlets share without a lock.
        """
        if not _on_gevent():
            return function(*args, **kwargs)
        import gevent
        from gevent.threadpool import ThreadPool

        if self._pool is None:
            self._pool = ThreadPool(self._threads)
        with gevent.Timeout(self._seconds, TimeoutError(f"a native call did not end within {self._seconds:.0f} s")):
            return cast("_Result[R]", self._pool.apply(_result_of, (function, args, kwargs))).unwrap()


_shared: NativeThreads | None = None


def off_hub(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """As `NativeThreads`, in threads that all share who use this: for what hangs only if the machine does."""
    global _shared
    if _shared is None:
        _shared = NativeThreads(THREADS, CALL_SECONDS)
    return _shared(function, *args, **kwargs)


def compute_off_hub(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """As `off_hub`, for what only computes: it can't hang, and shares no thread with what can."""
    if not _on_gevent():
        return function(*args, **kwargs)
    import gevent

    result = gevent.get_hub().threadpool.apply(_result_of, (function, args, kwargs))
    return cast("_Result[R]", result).unwrap()


class _Result(Generic[R]):
    """What a function returned or raised. gevent prints the traceback of whatever is raised within its threads."""

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
    """A native function that may hang, called for many who ask: one call at most is under way, in a thread of its own.

    Who asks while one is under way shares the next one with all who do: an answer is never older than the question.
    """

    def __init__(self, function: Callable[[], R]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._latest: _Call[R] | None = None
        self._pool: Any = None

    def __call__(self, timeout: float) -> R:
        """What it returns. Raises what it raises, and TimeoutError once a call has taken `timeout` seconds.

        Who asks when that is over already is told at once, so that nobody else waits for what hangs.
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
    """What comes of a call; gevent's AsyncResult is one."""

    def ready(self) -> bool: ...

    def wait(self, timeout: float) -> object: ...

    def get(self) -> R_co: ...


class _Call(Generic[R]):
    """One call, and when it began."""

    def __init__(self, outcome: _Outcome[_Result[R]]) -> None:
        self.outcome = outcome
        self._began = time.monotonic()

    def wait(self, timeout: float) -> None:
        """Raises TimeoutError unless it has ended `timeout` seconds after it began."""
        if not self.outcome.ready():
            self.outcome.wait(max(0.0, self._began + timeout - time.monotonic()))
        if not self.outcome.ready():
            raise TimeoutError(f"a native call did not end within {timeout:.1f} s")


class _Thread(Generic[R]):
    """A call in a thread that doesn't hold up the end of the process, where there is no gevent."""

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
