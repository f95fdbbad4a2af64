"""Two ways to start a llama.cpp server: the embedded one (a wheel), or a native `llama-server`."""

from __future__ import annotations

import json
import socket
import sys
import sysconfig
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import psutil

from services.engines.port import HOST_DEVICE, EngineError
from services.engines.processes import ChildProcess, GroupLeader, ProcessRegistry

PROGRAM = Path(__file__).with_name("server.py")
STANDBY_STOP_SECONDS = 2.0
SETTLE_SECONDS = 0.5
"""How long after a load the next process is started ahead: not while the first token is being waited for."""

OnEnd = Callable[[int | None], None]
"""Takes the exit code as subprocess counts, None when nobody can say."""


@dataclass(frozen=True, slots=True)
class Order:
    """What one server process is to load. `context_length` is tokens over all `parallel` slots together."""

    path: str
    mapped: bool
    alias: str
    context_length: int
    parallel: int
    threads: int
    device: str
    arguments: tuple[str, ...] = ()


class Started:
    """A server process that was given its order.

    What it read before `count_from_here` (Python, libraries) is left out of `bytes_read`; a native server can't say
    when it begins with the model, so all it reads counts from its start.
    """

    def __init__(self, process: GroupLeader, origin: str | None = None) -> None:
        self.process = process
        self._origin = origin
        self._before: tuple[int, int] | None = None if origin is None else (0, 0)
        self._read = 0

    def origin(self) -> str | None:
        """Where it answers, or will; None while that is unknown."""
        return self._origin

    def announce(self, origin: str) -> None:
        self._origin = origin

    def count_from_here(self) -> None:
        """The process begins with the model now."""
        self._before = _bytes_through(self.process.pid) or (0, 0)

    def bytes_read(self) -> int | None:
        """Bytes of the model that came in so far: read, or mapped and touched. None while nobody can say."""
        through = _bytes_through(self.process.pid)
        if through is None or self._before is None:
            return None
        self._read = max(self._read, *(now - before for now, before in zip(through, self._before, strict=True)))
        return self._read


class Launcher(Protocol):
    @property
    def kind(self) -> str: ...

    def prepare(self) -> None:
        """Do ahead what can be done before a model is named."""

    def start(self, order: Order, key: str, on_end: OnEnd) -> Started: ...

    def close(self) -> None: ...


class NativeLauncher:
    """Runs a `llama-server` found by name or path."""

    def __init__(self, command: str, registry: ProcessRegistry) -> None:
        self._command = command
        self._registry = registry

    @property
    def kind(self) -> str:
        return f"native {self._command}"

    def prepare(self) -> None:
        """Nothing can be done ahead."""

    def start(self, order: Order, key: str, on_end: OnEnd) -> Started:
        port = _free_port()
        argv = [self._command, "--model", order.path, "--alias", order.alias, "--host", "127.0.0.1"]
        argv += ["--port", str(port), "--ctx-size", str(order.context_length), "--parallel", str(order.parallel)]
        argv += ["--threads", str(order.threads), "--no-webui"]
        argv += [] if order.mapped else ["--no-mmap"]
        argv += order.arguments
        environment = {"LLAMA_API_KEY": key}  # not an argument: those show in every process list
        if order.device != HOST_DEVICE:
            environment["CUDA_VISIBLE_DEVICES"] = order.device
        try:
            process = ChildProcess(argv, self._registry, self._registry.new_log("llama-server"), on_end, environment)
        except OSError as error:
            reason = error.strerror or str(error)
            raise EngineError(
                f"The llama-server {self._command!r} can't be started: {reason}. Check the setting llamacpp_server."
            ) from None
        return Started(process, f"http://127.0.0.1:{port}")

    def close(self) -> None:
        """Nothing is kept."""


class EmbeddedLauncher:
    """Runs `server.py`, one process of it always started ahead when `standby` is on.

    Starting Python and importing llama.cpp is 55 of the 75 ms that a tiny model takes to its first token (measured
    with xllamacpp 2026.10 on two cores); a process that waits with that behind it needs 16 ms.
    """

    kind = "embedded"

    def __init__(self, registry: ProcessRegistry, standby: bool = True) -> None:
        self._registry = registry
        self._keep_one = standby
        self._lock = threading.Lock()
        self._waiting: _Embedded | None = None
        self._closed = False

    def start(self, order: Order, key: str, on_end: OnEnd) -> Started:
        embedded = self._take() or _Embedded(self._registry)
        return embedded.begin(order, key, on_end, then=self.prepare)

    def prepare(self) -> None:
        """Have one process waiting, if that is wanted and none is."""
        with self._lock:
            if self._keep_one and not self._closed and (self._waiting is None or self._waiting.process.exited):
                self._waiting = _Embedded(self._registry)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.process.stop(STANDBY_STOP_SECONDS)

    def _take(self) -> _Embedded | None:
        with self._lock:
            waiting, self._waiting = self._waiting, None
        return waiting if waiting is not None and not waiting.process.exited else None


class _Embedded:
    """One `server.py`, waiting for its order or serving."""

    def __init__(self, registry: ProcessRegistry) -> None:
        self._on_end: OnEnd | None = None
        argv = [sys.executable, "-I", "-S", str(PROGRAM), sysconfig.get_paths()["platlib"]]
        self.process = ChildProcess(argv, registry, registry.new_log("llamacpp"), self._ended, talk=True)

    def begin(self, order: Order, key: str, on_end: OnEnd, then: Callable[[], None]) -> Started:
        self._on_end = on_end
        started = Started(self.process)
        with suppress(OSError):  # it died just now: its end is reported by the watcher
            self.process.stdin.write(json.dumps({**asdict(order), "key": key}) + "\n")
            self.process.stdin.flush()
        threading.Thread(target=self._listen, args=(started, then), name="llamacpp-events", daemon=True).start()
        return started

    def _listen(self, started: Started, then: Callable[[], None]) -> None:
        with suppress(OSError, ValueError):  # the pipe ends with the process
            for line in self.process.stdout:
                event = json.loads(line)
                if event["event"] == "loading":
                    started.count_from_here()
                elif event["event"] == "ready":
                    started.announce(event["origin"])
                    self.process.wait(SETTLE_SECONDS)
                    then()

    def _ended(self, code: int) -> None:
        if self._on_end is not None:
            self._on_end(code)


def _bytes_through(pid: int) -> tuple[int, int] | None:
    """Bytes that the process read with system calls, and bytes of files that it has mapped and touched."""
    try:
        process = psutil.Process(pid)
        return process.io_counters().read_chars, process.memory_info().shared
    except (psutil.Error, OSError):
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
