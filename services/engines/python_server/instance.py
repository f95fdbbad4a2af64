"""The model of a local server: loading, loaded, or being unloaded with its process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from services.engines.port import (
    HOST_DEVICE,
    Endpoint,
    EngineError,
    Evidence,
    Exit,
    GpuBytes,
    LoadFailed,
    Model,
    NoSleepMixin,
    OnExit,
    Report,
    Stage,
    Usage,
)
from services.engines.python_server.about import About
from services.engines.python_server.program import PythonServer
from services.engines.supervisor import ServiceError, ServiceStatus, Start, Supervisor
from services.http import FetchError, TooSlow, fetch
from services.sizes import format_part, format_size

FOLLOW_SECONDS = 0.1
WORKS_IN_RAM_BYTES = 4_000_000_000
"""RAM that a server takes beside a model that is wholly on a GPU: PyTorch's libraries and buffers."""
OUT_OF_MEMORY = ("out of memory", "memory ran out", "not enough memory")


@dataclass(frozen=True, slots=True)
class InstanceContext:
    """What an instance has from its engine.

    `gpu_bytes` maps (device, pid) to bytes, `free_bytes` a device to what is free there, `beside` a device to the ids
    of the models loaded there.
    """

    about: About
    program: PythonServer
    supervisor: Supervisor
    origin: str
    gpu_bytes: GpuBytes
    free_bytes: Callable[[str], int | None]
    beside: Callable[[str], list[str]]


class ServerInstance(NoSleepMixin):
    """One model on the server. `start` is the start of its server; None for a server that was found ready.

    `needed_bytes` is the estimate for `device`, for a message about memory that was short.
    """

    def __init__(
        self,
        context: InstanceContext,
        model: Model,
        device: str,
        needed_bytes: int,
        on_exit: OnExit,
        start: Start | None = None,
    ) -> None:
        self.model = model
        self._context = context
        self._device = device
        self._needed_bytes = needed_bytes
        self._on_exit = on_exit
        self._start = start
        self._free_before = context.free_bytes(device)
        self._lock = threading.Lock()
        self._stopping = False
        self._ended = False
        self._serves: int | None = None
        """The process that serves it, once it is ready; None if unknown."""
        self._ready = start is None
        if start is None:
            self._serves = context.supervisor.status().pid

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def pid(self) -> int | None:
        return self._serves if self._ready else self._context.supervisor.status().pid

    def wait_ready(self, report: Report, timeout: float) -> Endpoint:
        """Block until the server reports its model as loaded. Time that brings progress does not count as waiting."""
        if self._start is not None and not self._ready:
            self._start.timeout = timeout
            status = self._follow(self._start, report)
            with self._lock:
                self._serves, self._ready = status.pid, True
        return Endpoint(self._context.origin)

    def warm_up(self, timeout: float) -> None:
        """Have it do a small piece of real work."""
        about = self._context.about
        try:
            answer = fetch("POST", f"{self._context.origin}{about.path}", body=dict(about.body), timeout=timeout)
        except FetchError as error:
            self._fail_if_gone()
            raise LoadFailed(f"It did not answer its first request: {error}.", self.log_tail()) from None
        if answer.status != 200:
            words = _error_in(answer.text)
            raise LoadFailed(self._with_advice(f"Its first answer was an error: {words}"), self.log_tail())

    def responds(self, timeout: float) -> bool | None:
        """Ask `/health`, which a thread of its own answers: without an answer, the whole process hangs."""
        try:
            fetch("GET", f"{self._context.origin}/health", timeout=timeout)
        except TooSlow:
            return False
        except FetchError:
            return None  # a connection error: the end of the process is noticed otherwise
        return None

    def usage(self) -> Usage | None:
        report, pid = self._context.program.report, self.pid
        if pid is None or self._ended:
            return None
        try:
            memory = psutil.Process(pid).memory_info()
        except psutil.Error:
            held = report.memory_bytes
            return None if held is None else Usage(self._device, held)
        mapped = min(memory.shared, memory.rss)
        if self._device == HOST_DEVICE:
            return Usage(HOST_DEVICE, memory.rss, mapped_bytes=mapped)
        if report.device == "cpu":
            return Usage(self._device, 0, spilled_bytes=memory.rss)
        held = self._context.gpu_bytes(self._device, pid)
        on_gpu = report.memory_bytes if held is None else held
        spilled = memory.rss if memory.rss > WORKS_IN_RAM_BYTES else 0
        return None if on_gpu is None else Usage(self._device, on_gpu, spilled_bytes=spilled)

    def stop(self, grace: float) -> None:
        with self._lock:
            if self._ended:
                return  # its server may serve another instance by now
            self._stopping = True
        if self.model.started_elsewhere:
            self._go_on()
            raise EngineError(
                f"Another program started the {self._context.about.title} server that holds {self.model.id}, so it is "
                "not stopped from here. Stop it there."
            )
        try:
            self._context.supervisor.stop(grace)
        except ServiceError as error:
            if self._context.supervisor.process is None:  # ours is gone; what answers now is another program's
                self._end()
                return
            self._go_on()
            raise EngineError(error.message) from None
        self._end()

    def log_tail(self) -> str:
        return self._context.supervisor.status().log_tail

    def warning(self) -> str | None:
        status, report = self._context.supervisor.status(), self._context.program.report
        words = []
        if not self._ready:
            return None
        if status.state == "unreachable" and status.error:
            words.append(status.error)
        if report.model is not None and self._context.about.source_of(report.model) != self.model.source:
            words.append(f"It was started with another model, {report.model}.")
        if report.aesthetic_error is not None:
            words.append(f"It scores without aesthetics: {report.aesthetic_error}")
        if self._device != HOST_DEVICE and report.device == "cpu":
            words.append("It runs on the processor, which is slower: its Python packages don't know the GPU.")
        if self.model.started_elsewhere:
            words.append("Another program started it, so it is not stopped from here.")
        return " ".join(words) or None

    def note(self, status: ServiceStatus) -> None:
        """Take in a new status of the server: its end, or its replacement by another process."""
        with self._lock:
            if not self._ready or self._stopping or self._ended:
                return
            gone = status.state in ("stopped", "failed", "starting")
            replaced = status.pid is not None and self._serves is not None and status.pid != self._serves
            if not gone and not replaced:
                return
            self._ended = True
        title = self._context.about.title
        if status.state == "failed" and status.error:
            self._on_exit(Exit(self._with_advice(status.error).rstrip(".")))
        else:
            self._on_exit(Exit(f"{title} was stopped by another program", released=True))

    def _follow(self, start: Start, report: Report) -> ServiceStatus:
        """Wait for the end of a start, and report its progress. Raises LoadFailed."""
        seen: Evidence | None = None
        while True:
            try:
                return start.wait(FOLLOW_SECONDS)
            except TimeoutError:
                evidence = self._evidence()
                if evidence is not None and evidence != seen:
                    report(evidence)
                    seen = evidence
            except ServiceError as error:
                if self._context.supervisor.process is None:  # else `stop` has to end it: an earlier run started it
                    self._end()
                if self._stopping:
                    raise LoadFailed("It was stopped while loading.", error.log_tail) from None
                raise LoadFailed(self._with_advice(error.message), error.log_tail) from None

    def _evidence(self) -> Evidence | None:
        """Return what the server says that it does; None until it says so, because stages never go back."""
        seen = self._context.supervisor.status().preparation
        if seen is None:
            return None
        done, total = seen.completed_bytes, seen.total_bytes
        stage: Stage = "downloading" if seen.stage == "downloading" else "loading_weights"
        if done is None or not total:
            return Evidence(stage)
        verb = "downloaded" if stage == "downloading" else "read"
        return Evidence(stage, min(1.0, done / total), f"{format_part(done, total)} {verb}")

    def _with_advice(self, cause: str) -> str:
        """Add to a cause that is about memory: what was free, what it needs, and what to unload."""
        if not any(words in cause.lower() for words in OUT_OF_MEMORY):
            return cause
        told = [cause if cause.endswith(".") else f"{cause}."]
        needed = self._context.program.report.needed_bytes or self._needed_bytes
        if "free" not in cause and self._free_before is not None and needed:
            free, need = format_size(self._free_before), format_size(needed)
            told.append(f"{free} were free on {self._device} before it was loaded, and it needs about {need}.")
        others = [model for model in self._context.beside(self._device) if model != self.model.id]
        if others:
            told.append(f"Unload {' or '.join(others)} to make room.")
        else:
            told.append("Close other programs that hold memory, or choose a smaller model.")
        return " ".join(told)

    def _fail_if_gone(self) -> None:
        if self._stopping:
            raise LoadFailed("It was stopped while loading.", self.log_tail())
        deadline = time.monotonic() + 1.0  # a connection breaks a moment before the end of its process is known
        while time.monotonic() < deadline:
            status = self._context.supervisor.status()
            if status.state == "failed" and status.error:
                raise LoadFailed(self._with_advice(status.error), status.log_tail)
            time.sleep(FOLLOW_SECONDS)

    def _go_on(self) -> None:
        with self._lock:
            self._stopping = False  # it goes on serving, so a later end has to be reported

    def _end(self) -> None:
        with self._lock:
            self._ended = True


def _error_in(text: str) -> str:
    """Return the message of an error document, or the beginning of what came instead."""
    try:
        said = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:300]
    return str(said)
