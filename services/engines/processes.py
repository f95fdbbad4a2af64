"""Child processes that can't get lost: in process groups of their own, recorded on disk, stopped or found again.

Children outlive a worker that restarts or is killed, so each is recorded in `<state_dir>/processes/` before it is used.
The next start ends the engines that an earlier run left behind (`ProcessRegistry.end_leftovers`), except those that
answered already and can be adopted (`ProcessRegistry.engines`); a service goes on and is adopted
(`ProcessRegistry.adopt`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
import structlog

from services.engines import out_of_memory
from services.engines.child_logs import ChildLogs, open_log, tail
from services.engines.spawn import exit_code, spawn
from services.state_folder import PRIVATE_FILE, PRIVATE_FOLDER

log = structlog.get_logger(__name__)

START_TIME_TOLERANCE = 1.0
"""Seconds. If the start times of a record and a pid differ by more, the pid belongs to another process."""
POLL_SECONDS = 0.1
"""Interval at which a process that isn't our child is polled: only a parent is notified of the end."""
MARK_VARIABLE = "STARTED_BY_SWITCHYARD"
"""Environment variable that holds a unique mark, inherited by all processes that the child starts."""
FOR_US_ALONE = frozenset({"OPENAI_API_KEY", "SWITCHYARD_OPENAI_API_KEY"})
"""Environment variables that no child inherits."""


OnExit = Callable[[int | None], None]
"""Takes the exit code in subprocess's convention, None if unknown."""


@dataclass(frozen=True, slots=True)
class Service:
    """Makes a child a service, which outlives the app: its name, and the URL where it answers."""

    name: str
    address: str


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """The record of one child on disk.

    `started` is the start time (seconds since the epoch), which identifies a process without a `mark`. A service has a
    `name` and an `address`. An engine that answers has its model's id as `name`, its `address`, the `spec` it was
    started with and the `key` for its API; these are empty before.
    """

    pid: int
    started: float | None
    program: str
    role: str = "engine"
    mark: str = ""
    name: str = ""
    address: str = ""
    log: str = ""
    spec: str = ""
    key: str = field(default="", repr=False)


class ProcessRegistry:
    """Records of all running children, one small file each."""

    def __init__(self, state_dir: Path) -> None:
        self._records = state_dir / "processes"
        self._records.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
        self._logs = ChildLogs(state_dir / "logs")

    def new_log(self, program: str) -> Path:
        """Return the path of a new log for a child."""
        return self._logs.new(program)

    def announce(self, mark: str) -> None:
        """Record that a child with this mark is about to be started.

        An app killed between the start and the record would otherwise leave an engine that no later run knows about: a
        soak found one that ran on for ever.
        """
        self._announcement(mark).touch(mode=PRIVATE_FILE)

    def retract(self, mark: str) -> None:
        """Remove an announcement, because the child was recorded or could not be started."""
        self._announcement(mark).unlink(missing_ok=True)

    def add(self, record: ProcessRecord) -> None:
        """Write a record, readable by this user only, atomically: a partial record would lose the child."""
        draft = self._records / f"{record.pid}.draft"
        draft.touch(mode=PRIVATE_FILE)
        draft.write_text(json.dumps(asdict(record)), encoding="utf-8")
        draft.replace(self._path(record.pid))
        if record.mark:
            self.retract(record.mark)

    def add_child(self, pid: int, program: str, log_path: Path | None = None) -> None:
        """Record a child that the next start has to end if this app can't. `program` is its path or name."""
        self.add(ProcessRecord(pid, _start_time(pid), Path(program).name, log=str(log_path or "")))

    def note_ready(self, pid: int, *, name: str, address: str, log_path: str, spec: str, key: str) -> None:
        """Complete the record of an engine that answers now, so that a later run can take it over.

        If that can't be written, the engine serves nevertheless, and the next start ends it like an unfinished one.
        """
        record = _read(self._path(pid))
        if record is not None:
            try:
                self.add(replace(record, name=name, address=address, log=log_path, spec=spec, key=key))
            except OSError as error:
                log.warning("an engine's record can't be completed", pid=pid, error=str(error))

    def engines(self) -> list[ProcessRecord]:
        """Return the running engines that answered when an earlier run ended."""
        records = [record for path in self._records.glob("*.json") if (record := _read(path)) is not None]
        return [r for r in records if r.role == "engine" and r.address and _is_alive(r)]

    def take_over(self, engine: ProcessRecord, on_exit: OnExit) -> AdoptedProcess:
        """Return a handle on one of `engines`. Raises psutil.NoSuchProcess if it has ended."""
        if not _is_alive(engine):
            raise psutil.NoSuchProcess(engine.pid)
        return AdoptedProcess(engine, self, on_exit)

    def is_alive(self, engine: ProcessRecord) -> bool:
        """Return whether one of `engines` still runs; its pid may have been reused."""
        return _is_alive(engine)

    def end(self, engine: ProcessRecord) -> None:
        """Kill one of `engines` that is not adopted."""
        log.warning("ending an engine that an earlier run left behind", pid=engine.pid, model=engine.name)
        signal_group(engine.pid, signal.SIGKILL)
        self.remove(engine.pid)

    def remove(self, pid: int) -> None:
        self._path(pid).unlink(missing_ok=True)

    def end_leftovers(self) -> list[int]:
        """Kill the engines that an earlier run left before they answered; return their pids.

        Also kills children that were announced and not recorded. Services are left running; what an ended service has
        left behind is killed.
        """
        ended = self._end_unrecorded()
        for path in self._records.glob("*.json"):
            record = _read(path)
            if record is not None and record.role == "service":
                if _is_same_process(record):
                    continue
                _end_orphans(record.pid, record.mark)
            elif record is not None and _is_alive(record):
                if record.address:
                    continue
                signal_group(record.pid, signal.SIGKILL)
                ended.append(record.pid)
            path.unlink(missing_ok=True)
        if ended:
            log.warning("ended processes that an earlier run left behind", pids=ended)
        return ended

    def adopt(self, service: Service, on_exit: OnExit) -> AdoptedProcess | None:
        """Return a handle on the recorded service of an earlier run, None if there is none or it has ended."""
        records = [record for path in self._records.glob("*.json") if (record := _read(path)) is not None]
        records.sort(key=lambda record: record.started or 0, reverse=True)
        for record in records:
            same = (record.role, record.name, record.address) == ("service", service.name, service.address)
            if same and _is_same_process(record):
                with suppress(psutil.NoSuchProcess):
                    return AdoptedProcess(record, self, on_exit)
        return None

    def prune_logs(self) -> None:
        """Prune the logs of children (`ChildLogs.prune`). May block on a slow disk."""
        records = (_read(path) for path in self._records.glob("*.json"))
        self._logs.prune({record.log for record in records if record is not None})

    def _end_unrecorded(self) -> list[int]:
        """Kill children that were announced and never recorded; return their pids."""
        begun = {path.stem for path in self._records.glob("*.begun")}
        recorded = {record.mark for path in self._records.glob("*.json") if (record := _read(path)) is not None}
        lost = begun - recorded
        ended = [pid for pid in psutil.pids() if _mark_of(pid) in lost] if lost else []
        for pid in ended:
            signal_group(_group_of(pid) or pid, signal.SIGKILL)
        for mark in begun:
            self.retract(mark)
        return ended

    def _path(self, pid: int) -> Path:
        return self._records / f"{pid}.json"

    def _announcement(self, mark: str) -> Path:
        return self._records / f"{mark}.begun"


class GroupLeader:
    """A running process that leads its own process group, whether or not it is our child.

    `started_at` is seconds since the epoch.
    """

    def __init__(self, pid: int, started_at: float, log_path: Path) -> None:
        self.pid = pid
        self.started_at = started_at
        self.log_path = log_path
        self._exited = threading.Event()
        self._oom_kills = out_of_memory.oom_kills()

    @property
    def exited(self) -> bool:
        return self._exited.is_set()

    @property
    def exit_code(self) -> int | None:
        """Exit code in subprocess's convention; None while it runs, or if unknown."""
        return None

    def wait(self, timeout: float) -> bool:
        """Wait for its end, at most `timeout` seconds; return whether it has ended."""
        return self._exited.wait(timeout)

    def stop(self, grace: float) -> None:
        """Send SIGTERM to the group, and SIGKILL after `grace` seconds; return when the process is gone."""
        if not self.exited:
            signal_group(self.pid, signal.SIGTERM)
        if not self.wait(grace):
            log.warning("process ignored SIGTERM, killing it", pid=self.pid, grace=grace)
            signal_group(self.pid, signal.SIGKILL)
            self.wait(grace)

    def describe_end(self) -> str:
        """Describe how it ended unasked; the text follows the process's name."""
        if self.exit_code is None:
            since = ". The kernel killed a process meanwhile, because memory ran out"
            return f"has ended by itself{since if out_of_memory.killed_since(self._oom_kills) else ''}"
        return out_of_memory.describe_sigkill(self._oom_kills) if self.killed else describe_exit_code(self.exit_code)

    @property
    def killed(self) -> bool:
        """Whether it was ended by SIGKILL."""
        return out_of_memory.is_killed(self.exit_code)

    def log_tail(self) -> str:
        """Return the last whole lines of its log."""
        return tail(self.log_path)


def _inherited() -> dict[str, str]:
    """Return our environment without what is for us alone: programs print theirs when they start or crash."""
    return {name: value for name, value in os.environ.items() if name not in FOR_US_ALONE}


class ChildProcess(GroupLeader):
    """A program started by this app.

    stderr goes to `log_path`, so that it outlives both processes. With `talk`, stdin and stdout are a socket
    (`send_line`, `lines`); else stdout joins the log, or is discarded with `discard_stdout`. `on_exit(code)` is called
    from a watcher thread. With `service`, it is recorded as a service. Raises OSError if it can't be started.
    """

    def __init__(
        self,
        argv: Sequence[str],
        registry: ProcessRegistry,
        log_path: Path,
        on_exit: Callable[[int], None],
        environment: Mapping[str, str] | None = None,
        talk: bool = False,
        discard_stdout: bool = False,
        service: Service | None = None,
    ) -> None:
        self._registry = registry
        self._on_exit = on_exit
        mark = {MARK_VARIABLE: uuid.uuid4().hex}
        self._exit_code: int | None = None
        self._talk: socket.socket | None = None
        registry.announce(mark[MARK_VARIABLE])
        try:
            pid = self._spawn(argv, {**_inherited(), **(environment or {}), **mark}, log_path, talk, discard_stdout)
        except BaseException:
            registry.retract(mark[MARK_VARIABLE])
            raise
        out_of_memory.raise_score(pid)
        super().__init__(pid, time.time(), log_path)
        record = ProcessRecord(
            self.pid, _start_time(self.pid), Path(argv[0]).name, mark=mark[MARK_VARIABLE], log=str(log_path)
        )
        if service is not None:
            record = replace(
                record,
                started=self.started_at,
                role="service",
                name=service.name,
                address=service.address,
            )
        try:
            registry.add(record)
        except OSError:  # not recorded, so no later run would find it: a full disk left engines running for ever
            signal_group(self.pid, signal.SIGKILL)
            exit_code(self.pid)
            self._hang_up()
            registry.retract(record.mark)
            raise
        threading.Thread(target=self._watch, name=f"watch-{self.pid}", daemon=True).start()

    @property
    def exit_code(self) -> int | None:
        return self._exit_code

    def send_line(self, line: str) -> None:
        """Write a line to its stdin. Raises OSError if it has ended."""
        assert self._talk is not None, "it was not started to talk"
        self._talk.sendall(f"{line}\n".encode())

    def lines(self) -> Iterator[str]:
        """Yield the lines that it writes to stdout, until it ends. Raises OSError if it has ended before."""
        assert self._talk is not None, "it was not started to talk"
        with self._talk.makefile("r", encoding="utf-8", errors="replace") as stdout:
            yield from stdout

    def _spawn(
        self, argv: Sequence[str], environment: Mapping[str, str], log_path: Path, talk: bool, discard_stdout: bool
    ) -> int:
        with open_log(log_path) as log_file, open(os.devnull, "r+b") as nothing:
            stderr = log_file.fileno()
            if not talk:
                stdout = nothing.fileno() if discard_stdout else stderr
                return spawn(argv, environment, nothing.fileno(), stdout, stderr)
            ours, theirs = socket.socketpair()
            os.set_blocking(theirs.fileno(), True)  # gevent's are not: the child would read the end before a first line
            with theirs:
                try:
                    pid = spawn(argv, environment, theirs.fileno(), theirs.fileno(), stderr)
                except BaseException:
                    ours.close()
                    raise
            self._talk = ours
            return pid

    def _watch(self) -> None:
        code = self._exit_code = exit_code(self.pid)
        signal_group(self.pid, signal.SIGKILL)  # processes that it started and left behind
        self._registry.remove(self.pid)
        self._exited.set()
        self._hang_up()
        self._on_exit(code)

    def _hang_up(self) -> None:
        """Close our end of the socket, once whoever reads `lines` has read the last one."""
        if self._talk is not None:
            self._talk.close()


class AdoptedProcess(GroupLeader):
    """A service or engine that an earlier run started.

    `on_exit(None)` is called from a watcher thread when it is gone: only a parent learns the exit code. Raises
    psutil.NoSuchProcess if it is gone already.
    """

    def __init__(self, record: ProcessRecord, registry: ProcessRegistry, on_exit: OnExit) -> None:
        self._process = psutil.Process(record.pid)
        super().__init__(record.pid, record.started or self._process.create_time(), Path(record.log))
        self._mark = record.mark
        self._registry = registry
        self._on_exit = on_exit
        threading.Thread(target=self._watch, name=f"watch-{self.pid}", daemon=True).start()

    def _watch(self) -> None:
        while _is_running(self._process):
            time.sleep(POLL_SECONDS)
        _end_orphans(self.pid, self._mark)
        self._registry.remove(self.pid)
        self._exited.set()
        self._on_exit(None)


def describe_exit_code(code: int) -> str:
    """Describe an exit code: `ended with exit code 3`, `was ended by SIGKILL`."""
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}"
    return f"was ended by signal {-code}"


def signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process group; does nothing if it is gone."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _end_orphans(group: int, mark: str) -> None:
    """SIGKILL what an ended service has left in its process group.

    The group's id may have been reused, so nothing is done unless a member carries the service's mark. While one does,
    the kernel can't reuse the id.
    """
    members = [pid for pid in psutil.pids() if _group_of(pid) == group]
    if any(_carries(pid, mark) for pid in members):
        log.warning("killing processes that a service left behind", service=group, pids=members)
        signal_group(group, signal.SIGKILL)


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _carries(pid: int, mark: str) -> bool:
    return bool(mark) and _mark_of(pid) == mark


def _mark_of(pid: int) -> str | None:
    """Return the mark a process was started with; None if it has none, is gone, or belongs to another user."""
    try:
        return psutil.Process(pid).environ().get(MARK_VARIABLE)
    except psutil.Error:
        return None


def _start_time(pid: int) -> float | None:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def _is_running(process: psutil.Process) -> bool:
    """Return whether this very process runs: a zombie has ended, and its pid may have been reused."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_alive(record: ProcessRecord) -> bool:
    """Return whether a recorded process runs; one without a mark is identified by its start time."""
    if record.mark:
        return _is_same_process(record)
    now = _start_time(record.pid)
    return now is not None and record.started is not None and abs(now - record.started) < START_TIME_TOLERANCE


def _is_same_process(record: ProcessRecord) -> bool:
    """Return whether the recorded process runs, identified by its mark.

    A start time would not do for a process that runs for weeks: it is computed from the wall clock, which is adjusted
    when a machine resumes.
    """
    return _group_of(record.pid) == record.pid and _carries(record.pid, record.mark)


def _read(path: Path) -> ProcessRecord | None:
    """Read a record; None if it can't be read or has no start time (the child ended before it was recorded)."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        texts = {key: str(record.get(key, "")) for key in ("program", "mark", "name", "address", "log", "spec", "key")}
        role = str(record.get("role", "engine"))
        return ProcessRecord(pid=int(record["pid"]), started=float(record["started"]), role=role, **texts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
