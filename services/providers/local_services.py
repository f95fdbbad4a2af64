"""`ollama serve` as a local service: started, stopped, polled, and adopted after a restart of the app.

A server started by another program is used and never stopped; one of ours goes on when the app ends. Relies on this
behaviour of Ollama 0.24.0: it logs requests to stdout, everything else to stderr; SIGTERM ends it within 10 ms with
exit code 0; SIGKILL leaves its runner, a child in its process group; if its port is taken it exits with 1 and `Error:
listen tcp 127.0.0.1:11434: bind: address already in use`.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from services.engines.child_logs import tail
from services.engines.ollama.health import NOT_ASKED, Health
from services.engines.ollama.watch import OllamaWatch
from services.engines.processes import ChildProcess, GroupLeader, ProcessRegistry, Service
from services.providers.ollama_address import Address, Listener, listener_on

NAME = "ollama"
START_POLL_SECONDS = 0.05
STOP_GRACE_SECONDS = 10.0
CAUSE_BYTES = 65_536
"""Bytes of a log's end that are searched for a cause, which Go prints above its stacks."""
CAUSE_LINE = re.compile(r"^(?:Error: |(?=panic: |fatal error: |SIG[A-Z]+: ))(.+)", re.MULTILINE)
"""What Ollama, and the Go runtime, write to stderr when they exit with an error."""

State = Literal["running", "stopped", "starting", "stopping", "failed", "unreachable"]


class ServiceError(Exception):
    """A service can't be started or stopped. `code` is for programs; the text is for people: what, why, what to do.

    Codes: remote_service, ollama_not_found, port_in_use, service_failed, service_timeout, start_cancelled, not_ours,
    stop_failed. `log_tail` is the end of the service's log, empty if there is none.
    """

    def __init__(self, code: str, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.log_tail = log_tail


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """Status of a service. `started_at` is seconds since the epoch; unknown is None.

    `ours`: this app started it, now or in an earlier run. `local`: it is on this machine, or would be. `pid` and
    `started_at` of a server that isn't ours are known if this user may see the process. `binary` is the program that
    would be started. `error` says why it failed, or why it is unreachable.
    """

    state: State
    local: bool
    port: int
    service: str = NAME
    ours: bool = False
    pid: int | None = None
    started_at: float | None = None
    version: str | None = None
    binary: str | None = None
    log_tail: str = ""
    error: str | None = None
    can_start: bool = False
    can_stop: bool = False

    @property
    def uptime_seconds(self) -> float | None:
        return None if self.started_at is None else max(0.0, time.time() - self.started_at)


def find_ollama(configured: str | None) -> str | None:
    """Return the ollama program: the configured one or the one on PATH; None if it is missing or not executable."""
    return shutil.which(str(Path(configured).expanduser()) if configured else NAME)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A start in progress, shared by all callers."""

    cancelled: threading.Event = field(default_factory=threading.Event)
    outcome: Future[ServiceStatus] = field(default_factory=Future)


class OllamaService:
    """The Ollama that `watch` polls: its status and, if it is on this machine, its start and stop.

    `environment` returns, at each start, what to add to our environment. `on_change` is called from any thread when
    anything but the log's tail has changed. Times are seconds.
    """

    def __init__(
        self,
        watch: OllamaWatch,
        registry: ProcessRegistry,
        *,
        find_binary: Callable[[], str | None],
        environment: Callable[[], Mapping[str, str]] = dict,
        on_change: Callable[[], None] = lambda: None,
        start_timeout: float = 15.0,
        stop_grace: float = STOP_GRACE_SECONDS,
    ) -> None:
        self._address = Address.parse(watch.api.base_url)
        self._watch = watch
        self._registry = registry
        self._find_binary = find_binary
        self._environment = environment
        self._on_change = on_change
        self._start_timeout = start_timeout
        self._stop_grace = stop_grace
        self._lock = threading.Lock()
        self._operating = threading.Lock()
        self._closing = threading.Event()
        self._attempt: _Attempt | None = None
        self._stopping = False
        self._failure: ServiceError | None = None
        self._health = NOT_ASKED
        self._changed_at = float("-inf")
        """Time of the last start, stop or crash (monotonic seconds): older health checks are outdated."""
        self._listener: Listener | None = None
        self._process: GroupLeader | None = None
        self._service = Service(NAME, self._address.url)
        self._status = self._describe(None)
        if self._address.local:
            self._process = registry.adopt(self._service, self._on_exit)
        self._status = self._describe(find_binary())
        watch.on_health(self._on_health)

    @property
    def reachable(self) -> bool:
        """Whether it answered the last health check."""
        return self._status.state == "running"

    @property
    def log_path(self) -> Path | None:
        """Log of the server that we started; None without one."""
        process = self._running_process()
        return None if process is None else process.log_path

    def status(self) -> ServiceStatus:
        """No I/O; returns the cached value."""
        return self._status

    def refresh(self) -> ServiceStatus:
        """Check its health now; takes at most about 2 s."""
        self._watch.check_health()
        return self._status

    def close(self) -> None:
        """Publish no more changes. A server that we started goes on, and the next run adopts it."""
        self._closing.set()

    def start(self) -> ServiceStatus:
        """Start the server, or join a start in progress; return once it answers, whoever started it.

        Raises ServiceError.
        """
        if not self._address.local:
            raise self._remote("started")
        with self._lock:
            attempt, first = self._attempt or _Attempt(), self._attempt is None
            self._attempt = attempt
        if not first:
            return attempt.outcome.result()
        try:
            with self._operating:
                self._bring_up(attempt.cancelled)
        except BaseException as error:
            self._end_attempt(error if isinstance(error, ServiceError) else None)
            attempt.outcome.set_exception(error)
            raise
        status = self._end_attempt(None)
        attempt.outcome.set_result(status)
        return status

    def stop(self) -> ServiceStatus:
        """Stop the server that we started, and its runners; cancel a start in progress. Raises ServiceError.

        Does nothing if nothing runs.
        """
        if not self._address.local:
            raise self._remote("stopped")
        with self._lock:
            if self._attempt is not None:
                self._attempt.cancelled.set()
        with self._operating:
            process = self._running_process()
            if process is not None:
                return self._take_down(process)
        status = self.refresh()
        if self._health.is_listening:
            raise ServiceError("not_ours", "This Ollama was started by another program; stop it there.")
        return status

    def dismiss(self) -> ServiceStatus:
        """Clear the last failure, because somebody has read it."""
        with self._lock:
            self._failure = None
        return self._publish()

    def _bring_up(self, cancelled: threading.Event) -> None:
        """Return once the server answers; stop a process that was started in vain. Raises ServiceError."""
        with self._lock:
            self._failure = None
        if self.refresh().state == "running":
            return
        running = self._running_process()
        if running is not None:
            self._await_answer(running, cancelled, "Stop it, then start it again.")
            return
        started = self._spawn()
        try:
            self._await_answer(started, cancelled, "It was stopped again; its log may say why.")
        except ServiceError:
            started.stop(self._stop_grace)
            with self._lock:
                self._forget()
            raise

    def _spawn(self) -> GroupLeader:
        binary = self._find_binary()
        if binary is None:
            raise ServiceError(
                "ollama_not_found",
                "Ollama is not installed here, or not where the setting ollama_binary says: install it from "
                "https://ollama.com/download, or name the program in the setting ollama_binary.",
            )
        environment = {**self._environment(), "OLLAMA_HOST": self._address.authority}
        try:
            process = ChildProcess(
                [binary, "serve"],
                self._registry,
                self._registry.new_log("ollama-serve"),
                self._on_exit,
                environment,
                discard_stdout=True,  # one line per request: our own polls would drown everything else
                service=self._service,
            )
        except OSError as error:
            raise ServiceError(
                "service_failed",
                f"The program {binary} can't be started: {error.strerror or error}. Check the setting ollama_binary.",
            ) from None
        with self._lock:
            self._process = process
            self._listener = None
            self._changed_at = time.monotonic()
        self._publish()
        return process

    def _await_answer(self, process: GroupLeader, cancelled: threading.Event, advice: str) -> None:
        deadline = time.monotonic() + self._start_timeout
        while True:
            if cancelled.is_set():
                raise ServiceError("start_cancelled", "The start of Ollama was cancelled: it was told to stop.")
            if process.wait(START_POLL_SECONDS):  # checked first: another program on the port may never answer
                raise self._start_failure(process)
            if self.refresh().state == "running":
                return
            if time.monotonic() > deadline:
                raise ServiceError(
                    "service_timeout",
                    f"Ollama (process {process.pid}) did not answer at {self._address.url} within "
                    f"{self._start_timeout:.0f} s. {advice}",
                    process.log_tail(),
                )

    def _start_failure(self, process: GroupLeader) -> ServiceError:
        said = tail(process.log_path, CAUSE_BYTES)
        if "bind: address already in use" in said:
            return ServiceError(
                "port_in_use",
                f"Ollama can't use port {self._address.port}: {listener_on(self._address.port)} listens there already. "
                "Stop that program, or give Ollama another port in the setting ollama_base_url.",
                process.log_tail(),
            )
        return ServiceError(
            "service_failed", f"Ollama {process.describe_end()} while starting{_because(said)}", process.log_tail()
        )

    def _take_down(self, process: GroupLeader) -> ServiceStatus:
        with self._lock:
            self._stopping = True
        self._publish()
        try:
            process.stop(self._stop_grace)
        finally:
            with self._lock:
                self._stopping = False
                self._failure = None
                if process.exited:
                    self._forget()
            status = self._publish()
        if not process.exited:
            raise ServiceError(
                "stop_failed",
                f"Ollama (process {process.pid}) did not end, not even when it was killed: it may be waiting for a "
                "disk or a driver. Try again later, or restart this machine.",
                process.log_tail(),
            )
        return status

    def _end_attempt(self, error: ServiceError | None) -> ServiceStatus:
        """Note the end of a start, with its error if it failed."""
        with self._lock:
            self._attempt = None
            if error is not None and error.code not in ("ollama_not_found", "start_cancelled"):
                self._failure = error
        return self._publish()

    def _on_exit(self, _code: int | None) -> None:
        if not self._closing.is_set():
            self._publish()

    def _note_crash(self) -> None:
        """Note a process of ours that ended unasked. Called with the lock held."""
        process = self._process
        if process is None or not process.exited or self._attempt is not None or self._stopping:
            return
        self._forget()
        if process.exit_code != 0:  # 0: it was told to stop
            cause = f"Ollama {process.describe_end()}{_because(tail(process.log_path, CAUSE_BYTES))}"
            self._failure = ServiceError("service_failed", cause, process.log_tail())

    def _forget(self) -> None:
        """Forget our ended process and its last health. Called with the lock held."""
        self._process = None
        self._health = NOT_ASKED
        self._changed_at = time.monotonic()

    def _running_process(self) -> GroupLeader | None:
        process = self._process
        return None if process is None or process.exited else process

    def _remote(self, done: str) -> ServiceError:
        return ServiceError(
            "remote_service",
            f"The Ollama at {self._address.url} is not on this machine, so it can't be {done} from here. "
            f"It has to be {done} where it runs.",
        )

    def _on_health(self, health: Health) -> None:
        """Take in the result of a health check."""
        listener = self._listener
        if health.version is None or not self._address.local or self._running_process() is not None:
            listener = None
        elif listener is None:
            listener = listener_on(self._address.port)
        with self._lock:
            if health.at > self._changed_at:
                self._health, self._listener = health, listener
                if health.version is not None:
                    self._failure = None
        self._publish()

    def _publish(self) -> ServiceStatus:
        binary = self._find_binary()
        with self._lock:
            self._note_crash()
            before = self._status
            after = self._status = self._describe(binary)
        if replace(before, log_tail="") != replace(after, log_tail=""):
            self._on_change()
        return after

    def _describe(self, binary: str | None) -> ServiceStatus:
        state, error = self._state()
        process = self._running_process()
        listener = self._listener or Listener()
        failed_log = self._failure.log_tail if self._failure is not None else ""
        local = self._address.local
        return ServiceStatus(
            state=state,
            local=local,
            port=self._address.port,
            ours=process is not None,
            pid=listener.pid if process is None else process.pid,
            started_at=listener.started_at if process is None else process.started_at,
            version=self._health.version,
            binary=binary,
            log_tail=failed_log if process is None else process.log_tail(),
            error=error,
            can_start=local and binary is not None and state in ("stopped", "failed"),
            can_stop=state == "starting" or (process is not None and state != "stopping"),
        )

    def _state(self) -> tuple[State, str | None]:
        if self._stopping:
            return "stopping", None
        if self._health.version is not None:
            return "running", None
        if self._attempt is not None:
            return "starting", None
        if self._running_process() is not None:
            return "unreachable", self._health.error or f"Ollama runs, but nothing answers at {self._address.url}."
        if self._failure is not None:
            return "failed", self._failure.message
        if self._health.error is not None:
            return "unreachable", self._health.error
        if not self._address.local:
            return "unreachable", f"Nothing answers at {self._address.url}. Check that Ollama runs there."
        return "stopped", None


def _because(log_text: str) -> str:
    """Return the first line of a log that names a cause, to follow a main clause; ends the sentence either way."""
    telling = CAUSE_LINE.search(log_text)
    return "." if telling is None else f": {telling[1].strip().rstrip('.')}."
