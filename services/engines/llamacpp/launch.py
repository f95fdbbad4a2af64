"""Starts llama.cpp servers: the embedded one (a wheel), or a native `llama-server`."""

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
STANDBY_DELAY_SECONDS = 0.5
"""Delay after a load before the next process is started in advance, so that it doesn't slow down the first token."""

OnEnd = Callable[[int | None], None]
"""Takes the exit code in subprocess's convention, None if unknown."""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What a server process has to load. `context_length` is tokens over all `parallel` slots together."""

    path: str
    mapped: bool
    alias: str
    context_length: int
    parallel: int
    threads: int
    device: str
    arguments: tuple[str, ...] = ()


class ServerHandle:
    """A server process that was given a load request.

    Bytes read before `count_from_here` (Python, libraries) are left out of `bytes_read`. A native server can't say when
    it starts on the model, so everything it reads counts.
    """

    def __init__(self, process: GroupLeader, origin: str | None = None) -> None:
        self.process = process
        self._origin = origin
        self._announced = threading.Event()
        self._before: tuple[int, int] | None = None if origin is None else (0, 0)
        self._read = 0

    def origin(self) -> str | None:
        """Return the origin where it answers or will answer; None while unknown."""
        return self._origin

    @property
    def announced(self) -> bool:
        """Whether the process itself has said that it serves the model."""
        return self._announced.is_set()

    def announce(self, origin: str) -> None:
        """Note that the process says that it serves the model at `origin`."""
        self._origin = origin
        self._announced.set()

    def wait(self, timeout: float) -> None:
        """Wait until it is announced or `timeout` seconds have passed. The end of the process is not waited for."""
        self._announced.wait(timeout)

    def count_from_here(self) -> None:
        """Start counting the bytes of the model."""
        self._before = _bytes_consumed(self.process.pid) or (0, 0)

    def bytes_read(self) -> int | None:
        """Return the model's bytes in memory so far, read or mapped and touched; None while unknown."""
        consumed = _bytes_consumed(self.process.pid)
        if consumed is None or self._before is None:
            return None
        self._read = max(self._read, *(now - before for now, before in zip(consumed, self._before, strict=True)))
        return self._read


class Launcher(Protocol):
    """Starts server processes."""

    @property
    def kind(self) -> str: ...

    def prepare(self) -> None:
        """Do in advance what doesn't depend on the model."""

    def start(self, request: LoadRequest, key: str, on_end: OnEnd) -> ServerHandle: ...

    def close(self) -> None: ...


class NativeLauncher:
    """Runs a `llama-server` given by name or path."""

    def __init__(self, command: str, registry: ProcessRegistry) -> None:
        self._command = command
        self._registry = registry

    @property
    def kind(self) -> str:
        return f"native {self._command}"

    def prepare(self) -> None:
        """Do nothing: a native server can't be started without its model."""

    def start(self, request: LoadRequest, key: str, on_end: OnEnd) -> ServerHandle:
        port = _free_port()
        argv = [self._command, "--model", request.path, "--alias", request.alias, "--host", "127.0.0.1"]
        argv += ["--port", str(port), "--ctx-size", str(request.context_length), "--parallel", str(request.parallel)]
        argv += ["--threads", str(request.threads), "--no-webui"]
        argv += [] if request.mapped else ["--no-mmap"]
        argv += request.arguments
        environment = {"LLAMA_API_KEY": key}  # not an argument: every process list shows those
        if request.device != HOST_DEVICE:
            environment["CUDA_VISIBLE_DEVICES"] = request.device
        try:
            process = ChildProcess(argv, self._registry, self._registry.new_log("llama-server"), on_end, environment)
        except OSError as error:
            reason = error.strerror or str(error)
            raise EngineError(
                f"The llama-server {self._command!r} can't be started: {reason}. Check the setting llamacpp_server."
            ) from None
        return ServerHandle(process, f"http://127.0.0.1:{port}")

    def close(self) -> None:
        """Do nothing: no process is kept."""


class EmbeddedLauncher:
    """Runs `server.py`. With `standby`, one process of it is always started in advance.

    Starting Python and importing llama.cpp is 55 of the 75 ms that a tiny model takes to its first token (measured with
    xllamacpp 2026.10 on two cores); a process that has done that already takes 16 ms.
    """

    kind = "embedded"

    def __init__(self, registry: ProcessRegistry, standby: bool = True) -> None:
        self._registry = registry
        self._keep_standby = standby
        self._lock = threading.Lock()
        self._standby: _EmbeddedServer | None = None
        self._closed = False

    def start(self, request: LoadRequest, key: str, on_end: OnEnd) -> ServerHandle:
        server = self._take() or _EmbeddedServer(self._registry)
        return server.begin(request, key, on_end, then=self.prepare)

    def prepare(self) -> None:
        """Start the standby process, if enabled and there is none."""
        with self._lock:
            if self._keep_standby and not self._closed and (self._standby is None or self._standby.process.exited):
                self._standby = _EmbeddedServer(self._registry)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            standby, self._standby = self._standby, None
        if standby is not None:
            standby.process.stop(STANDBY_STOP_SECONDS)

    def _take(self) -> _EmbeddedServer | None:
        with self._lock:
            standby, self._standby = self._standby, None
        return standby if standby is not None and not standby.process.exited else None


class _EmbeddedServer:
    """One `server.py` process, on standby or serving."""

    def __init__(self, registry: ProcessRegistry) -> None:
        self._on_end: OnEnd | None = None
        argv = [sys.executable, "-I", "-S", str(PROGRAM), sysconfig.get_paths()["platlib"]]
        self.process = ChildProcess(argv, registry, registry.new_log("llamacpp"), self._ended, talk=True)

    def begin(self, request: LoadRequest, key: str, on_end: OnEnd, then: Callable[[], None]) -> ServerHandle:
        self._on_end = on_end
        server = ServerHandle(self.process)
        with suppress(OSError):  # the process has ended; its watcher reports that
            self.process.send_line(json.dumps({**asdict(request), "key": key}))
        threading.Thread(target=self._listen, args=(server, then), name="llamacpp-events", daemon=True).start()
        return server

    def _listen(self, server: ServerHandle, then: Callable[[], None]) -> None:
        with suppress(OSError, ValueError):  # the socket is closed when the process has ended
            for line in self.process.lines():
                event = json.loads(line)
                if event["event"] == "loading":
                    server.count_from_here()
                elif event["event"] == "ready":
                    server.announce(event["origin"])
                    self.process.wait(STANDBY_DELAY_SECONDS)
                    then()

    def _ended(self, code: int) -> None:
        if self._on_end is not None:
            self._on_end(code)


def _bytes_consumed(pid: int) -> tuple[int, int] | None:
    """Return the bytes that a process read with system calls, and the bytes of mapped files that it touched."""
    try:
        process = psutil.Process(pid)
        return process.io_counters().read_chars, process.memory_info().shared
    except (psutil.Error, OSError):
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
