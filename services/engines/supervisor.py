"""A local server process: started once for all callers, followed, stopped, and found again after a restart of the app.

What differs between servers is a `Program`. A server started by another program is used and never stopped; one of ours
goes on when the app ends, and the next run adopts it by its record.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from services.engines.child_logs import tail
from services.engines.processes import ChildProcess, GroupLeader, ProcessRegistry, Service
from services.engines.server_address import Address, Listener, listener_on

STOP_GRACE_SECONDS = 10.0
CAUSE_BYTES = 65_536
"""Bytes of a log's end that are searched for a cause, which a runtime may print above its stacks."""
PORT_TAKEN = "address already in use"
"""The kernel's words for it (EADDRINUSE), which programs of any language repeat in their logs."""

State = Literal["running", "stopped", "starting", "stopping", "failed", "unreachable"]


class ServiceError(Exception):
    """A service can't be started or stopped. `code` is for programs; the text is for people: what, why, what to do.

    Codes: remote_service, ollama_not_found, packages_missing, port_in_use, service_failed, service_timeout,
    start_cancelled, not_ours, stop_failed. `log_tail` is the end of the service's log, empty if there is none.
    """

    def __init__(self, code: str, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.log_tail = log_tail


@dataclass(frozen=True, slots=True)
class Preparation:
    """What a server does before it answers, as it reports it: bytes done and in all, None if it doesn't count."""

    stage: Literal["downloading", "loading"]
    completed_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Health:
    """Result of one check of a server. Nothing is set if nothing listens.

    `answers`: it is the right server, and ready. `preparing`: it is the right server and will be ready; `preparation`
    says how far it is, if it tells. `error` is for people: why what listens is not usable. `at` is when the check began
    (monotonic seconds), `seconds` how long the answer took. `refused`: the host refused the connection, so no server
    can be running there.
    """

    at: float
    version: str | None = None
    error: str | None = None
    refused: bool = False
    answers: bool = False
    preparing: bool = False
    preparation: Preparation | None = None
    seconds: float | None = None

    @property
    def is_listening(self) -> bool:
        """Whether something listens at the address."""
        return self.answers or self.preparing or self.error is not None


NOT_ASKED = Health(float("-inf"))


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a server. `environment` is added to ours."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    discard_stdout: bool = False


class Program(Protocol):
    """A server program: what is its own about starting, checking and explaining it."""

    @property
    def name(self) -> str:
        """Its name for programs, such as `ollama`."""

    @property
    def title(self) -> str:
        """Its name for people, such as `Ollama`."""

    @property
    def address_setting(self) -> str:
        """The setting that says where it answers."""

    @property
    def log_name(self) -> str:
        """The first part of its logs' names."""

    @property
    def check_seconds(self) -> float:
        """Interval between health checks while it starts."""

    def find(self) -> str | None:
        """Return what would be started; None if it can't be, because something is missing. Called often."""

    def command(self) -> Command:
        """Return how to start it now. Raises ServiceError if something is missing."""

    def not_executable(self, program: str, reason: str) -> str:
        """Say that `program` could not be executed, and what to do."""

    def check(self) -> None:
        """Check the server's health now, and pass the result to `Supervisor.note`; takes a few seconds at most."""

    def cause_in(self, log: str) -> str | None:
        """Return the first cause of its end in the end of its log, None if there is none."""


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """Status of a service. `started_at` is seconds since the epoch; unknown is None.

    `ours`: this app started it, now or in an earlier run. `local`: it is on this machine, or would be. `pid` and
    `started_at` of a server that isn't ours are known if this user may see the process. `binary` is what would be
    started. `error` says why it failed, or why it is unreachable. `preparation` is how far a start is.
    """

    state: State
    local: bool
    port: int
    service: str = "ollama"
    ours: bool = False
    pid: int | None = None
    started_at: float | None = None
    version: str | None = None
    binary: str | None = None
    log_tail: str = ""
    error: str | None = None
    can_start: bool = False
    can_stop: bool = False
    preparation: Preparation | None = None

    @property
    def uptime_seconds(self) -> float | None:
        return None if self.started_at is None else max(0.0, time.time() - self.started_at)


class Start:
    """A start in progress, shared by all callers."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        """Seconds that may pass without an answer and without progress."""
        self._cancelled = threading.Event()
        self._outcome: Future[ServiceStatus] = Future()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        self._cancelled.set()

    def end(self, outcome: ServiceStatus | BaseException) -> None:
        if isinstance(outcome, ServiceStatus):
            self._outcome.set_result(outcome)
        else:
            self._outcome.set_exception(outcome)

    def wait(self, timeout: float | None = None) -> ServiceStatus:
        """Wait until the server answers. Raises ServiceError, and TimeoutError after `timeout` seconds."""
        return self._outcome.result(timeout)


class Supervisor:
    """A server at an address: its status and, if it is on this machine, its start and stop.

    Whoever polls the server passes each health check to `note`. `on_change` is called from any thread when anything but
    the log's tail and the bytes of a preparation have changed. Times are seconds.
    """

    def __init__(
        self,
        program: Program,
        address: Address,
        registry: ProcessRegistry,
        *,
        on_change: Callable[[], None] = lambda: None,
        start_timeout: float = 15.0,
        stop_grace: float = STOP_GRACE_SECONDS,
    ) -> None:
        self.address = address
        self._program = program
        self._registry = registry
        self._on_change = on_change
        self._start_timeout = start_timeout
        self._stop_grace = stop_grace
        self._lock = threading.Lock()
        self._operating = threading.Lock()
        self._closing = threading.Event()
        self._start: Start | None = None
        self._stopping = False
        self._failure: ServiceError | None = None
        self._health = NOT_ASKED
        self._changed_at = float("-inf")
        """Time of the last start, stop or crash (monotonic seconds): older health checks are outdated."""
        self._listener: Listener | None = None
        self._process: GroupLeader | None = None
        self._service = Service(program.name, address.url)
        self._status = self._describe(None)
        if address.local:
            self._process = registry.adopt(self._service, self._on_exit)
        self._status = self._describe(program.find())

    @property
    def process(self) -> GroupLeader | None:
        """The server that we started, while it runs."""
        process = self._process
        return None if process is None or process.exited else process

    def status(self) -> ServiceStatus:
        """No I/O; returns the cached value."""
        return self._status

    def refresh(self) -> ServiceStatus:
        """Check its health now; takes as long as the program's check."""
        self._program.check()
        return self._status

    def close(self) -> None:
        """Publish no more changes. A server that we started goes on, and the next run adopts it."""
        self._closing.set()

    def start(self) -> ServiceStatus:
        """Start the server, or join a start in progress; return once it answers, whoever started it.

        Raises ServiceError.
        """
        return self.begin().wait()

    def begin(self) -> Start:
        """Begin to start the server, or join a start in progress; return at once. Raises ServiceError."""
        if not self.address.local:
            raise self._remote("started")
        with self._lock:
            start, first = self._start or Start(self._start_timeout), self._start is None
            self._start = start
        if first:
            threading.Thread(target=self._run, args=(start,), name=f"start-{self._program.name}", daemon=True).start()
        return start

    def stop(self, grace: float | None = None) -> ServiceStatus:
        """Stop the server that we started, and its children; cancel a start in progress. Raises ServiceError.

        It is killed after `grace` seconds (None: as configured). Does nothing if nothing runs.
        """
        if not self.address.local:
            raise self._remote("stopped")
        with self._lock:
            if self._start is not None:
                self._start.cancel()
        with self._operating:
            process = self.process
            if process is not None:
                return self._take_down(process, self._stop_grace if grace is None else grace)
        status = self.refresh()
        if self._health.is_listening:
            raise ServiceError("not_ours", f"This {self._program.title} was started by another program; stop it there.")
        return status

    def dismiss(self) -> ServiceStatus:
        """Clear the last failure, because somebody has read it."""
        with self._lock:
            self._failure = None
        return self._publish()

    def note(self, health: Health) -> None:
        """Take in the result of a health check."""
        listener = self._listener
        if not health.is_listening or health.error or not self.address.local or self.process is not None:
            listener = None
        elif listener is None:
            listener = listener_on(self.address.port)
        with self._lock:
            if health.at > self._changed_at:
                self._health, self._listener = health, listener
                if health.answers:
                    self._failure = None
        self._publish()

    def _run(self, start: Start) -> None:
        """Bring the server up on behalf of all callers of one start."""
        try:
            with self._operating:  # released only once the start is over, so that a `stop` that cancelled it waits
                try:
                    self._bring_up(start)
                except BaseException as error:
                    self._end_start(error if isinstance(error, ServiceError) else None)
                    raise
                status = self._end_start(None)
        except BaseException as error:
            start.end(error)
        else:
            start.end(status)

    def _bring_up(self, start: Start) -> None:
        """Return once the server answers; stop a process that was started in vain. Raises ServiceError."""
        with self._lock:
            self._failure = None
        status = self.refresh()
        if status.state == "running":
            return
        running = self.process
        if running is not None:
            self._await_answer(running, start, "Stop it, then start it again.")
            return
        if start.cancelled:
            raise self._cancelled()
        started = self._spawn()
        try:
            self._await_answer(started, start, "It was stopped again; its log may say why.")
        except ServiceError:
            started.stop(self._stop_grace)
            with self._lock:
                self._forget()
            raise

    def _spawn(self) -> GroupLeader:
        command = self._program.command()
        try:
            process = ChildProcess(
                command.argv,
                self._registry,
                self._registry.new_log(self._program.log_name),
                self._on_exit,
                command.environment,
                discard_stdout=command.discard_stdout,
                service=self._service,
            )
        except OSError as error:
            reason = error.strerror or str(error)
            raise ServiceError("service_failed", self._program.not_executable(command.argv[0], reason)) from None
        with self._lock:
            self._process = process
            self._listener = None
            self._changed_at = time.monotonic()
        self._publish()
        return process

    def _await_answer(self, process: GroupLeader, start: Start, advice: str) -> None:
        moved_at, seen = time.monotonic(), self._health.preparation
        while True:
            if start.cancelled:
                raise self._cancelled()
            if process.wait(self._program.check_seconds):  # checked first: another program on the port may never answer
                raise self._start_failure(process)
            if self.refresh().state == "running":
                return
            if self._health.preparation != seen:
                moved_at, seen = time.monotonic(), self._health.preparation
            if time.monotonic() > moved_at + start.timeout:
                raise ServiceError(
                    "service_timeout",
                    f"{self._program.title} (process {process.pid}) did not answer at {self.address.url} within "
                    f"{start.timeout:.0f} s. {advice}",
                    process.log_tail(),
                )

    def _cancelled(self) -> ServiceError:
        title = self._program.title
        return ServiceError("start_cancelled", f"The start of {title} was cancelled: it was told to stop.")

    def _start_failure(self, process: GroupLeader) -> ServiceError:
        said = tail(process.log_path, CAUSE_BYTES)
        title = self._program.title
        if PORT_TAKEN in said.lower():
            return ServiceError(
                "port_in_use",
                f"{title} can't use port {self.address.port}: {listener_on(self.address.port)} listens there "
                f"already. Stop that program, or give {title} another port in the setting "
                f"{self._program.address_setting}.",
                process.log_tail(),
            )
        return ServiceError(
            "service_failed",
            f"{title} {process.describe_end()} while starting{self._because(said)}",
            process.log_tail(),
        )

    def _take_down(self, process: GroupLeader, grace: float) -> ServiceStatus:
        with self._lock:
            self._stopping = True
        self._publish()
        try:
            process.stop(grace)
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
                f"{self._program.title} (process {process.pid}) did not end, not even when it was killed: it may be "
                "waiting for a disk or a driver. Try again later, or restart this machine.",
                process.log_tail(),
            )
        return status

    def _end_start(self, error: ServiceError | None) -> ServiceStatus:
        """Note the end of a start, with its error if it failed."""
        with self._lock:
            self._start = None
            if error is not None and error.code not in ("ollama_not_found", "packages_missing", "start_cancelled"):
                self._failure = error
        return self._publish()

    def _on_exit(self, _code: int | None) -> None:
        if not self._closing.is_set():
            self._publish()

    def _note_crash(self) -> None:
        """Note a process of ours that ended unasked. Called with the lock held."""
        process = self._process
        if process is None or not process.exited or self._start is not None or self._stopping:
            return
        self._forget()
        if process.exit_code != 0:  # 0: it was told to stop
            because = self._because(tail(process.log_path, CAUSE_BYTES))
            cause = f"{self._program.title} {process.describe_end()}{because}"
            self._failure = ServiceError("service_failed", cause, process.log_tail())

    def _forget(self) -> None:
        """Forget our ended process and its last health. Called with the lock held."""
        self._process = None
        self._health = NOT_ASKED
        self._changed_at = time.monotonic()

    def _remote(self, done: str) -> ServiceError:
        return ServiceError(
            "remote_service",
            f"The {self._program.title} at {self.address.url} is not on this machine, so it can't be {done} from "
            f"here. It has to be {done} where it runs.",
        )

    def _publish(self) -> ServiceStatus:
        found = self._program.find()
        with self._lock:
            self._note_crash()
            before = self._status
            after = self._status = self._describe(found)
        if _without_figures(before) != _without_figures(after):
            self._on_change()
        return after

    def _describe(self, found: str | None) -> ServiceStatus:
        state, error = self._state()
        process = self.process
        listener = self._listener or Listener()
        failed_log = self._failure.log_tail if self._failure is not None else ""
        local = self.address.local
        return ServiceStatus(
            state=state,
            local=local,
            port=self.address.port,
            service=self._program.name,
            ours=process is not None,
            pid=listener.pid if process is None else process.pid,
            started_at=listener.started_at if process is None else process.started_at,
            version=self._health.version,
            binary=found,
            log_tail=failed_log if process is None else process.log_tail(),
            error=error,
            can_start=local and found is not None and state in ("stopped", "failed"),
            can_stop=self._start is not None or (process is not None and state != "stopping"),
            preparation=self._health.preparation if state == "starting" else None,
        )

    def _state(self) -> tuple[State, str | None]:
        if self._stopping:
            return "stopping", None
        if self._health.answers:
            return "running", None
        if self._start is not None or self._health.preparing:
            return "starting", None
        title, url = self._program.title, self.address.url
        if self.process is not None:
            return "unreachable", self._health.error or f"{title} runs, but nothing answers at {url}."
        if self._failure is not None:
            return "failed", self._failure.message
        if self._health.error is not None:
            return "unreachable", self._health.error
        if not self.address.local:
            return "unreachable", f"Nothing answers at {url}. Check that {title} runs there."
        return "stopped", None

    def _because(self, log_text: str) -> str:
        """Return the cause in a log, to follow a main clause; ends the sentence either way."""
        cause = self._program.cause_in(log_text)
        return "." if cause is None else f": {cause.strip().rstrip('.')}."


def _without_figures(status: ServiceStatus) -> ServiceStatus:
    """Return a status without what changes all the time: every page would be rendered again for each of them."""
    seen = status.preparation
    return replace(status, log_tail="", preparation=None if seen is None else Preparation(seen.stage))
