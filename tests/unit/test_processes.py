"""Child processes, with small Python programs: stopped as a group; ended or adopted by the next run; never lost."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import psutil
import pytest

from services.engines.child_logs import AGE_SECONDS
from services.engines.processes import (
    MARK_VARIABLE,
    AdoptedProcess,
    ChildProcess,
    ProcessRecord,
    ProcessRegistry,
    Service,
)
from tests.support.console import ROOT, wait_until

SERVICE = Service("ollama", "http://127.0.0.1:11434")
SLEEPER = "import time; print('ready', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPER}"
WITH_RUNNER = (
    f"import subprocess, sys; runner = subprocess.Popen([sys.executable, '-c', {SLEEPER!r}], stdout=subprocess.PIPE); "
    f"runner.stdout.readline(); print('runner', runner.pid, flush=True); {SLEEPER}"
)
"""A server whose child survives its kill; prints a line once that child runs."""
GRACE = 5.0


class Run:
    """One run of the app on a state folder, and the exits of its children that it was told."""

    def __init__(self, folder: Path) -> None:
        self.registry = ProcessRegistry(folder)
        self.ended = Event()
        self.codes: list[int | None] = []

    def on_exit(self, code: int | None) -> None:
        self.codes.append(code)
        self.ended.set()

    def start(self, program: str = SLEEPER, service: Service | None = SERVICE, **options: bool) -> ChildProcess:
        argv = [sys.executable, "-c", program]
        log_path = self.registry.new_log("child")
        child = ChildProcess(argv, self.registry, log_path, self.on_exit, service=service, **options)
        if not options:
            wait_until(lambda: "ready" in child.log_tail(), "the child to be there", timeout=GRACE)
        return child

    def find(self, service: Service = SERVICE) -> AdoptedProcess | None:
        return self.registry.adopt(service, self.on_exit)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state folder; processes still recorded there are killed at the end."""
    yield tmp_path
    for path in (tmp_path / "processes").glob("*.json"):
        try:
            os.killpg(int(path.stem), signal.SIGKILL)
        except ProcessLookupError:
            continue
    wait_until(lambda: not list((tmp_path / "processes").glob("*.json")), "every child to end", timeout=GRACE)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def runner_of(child: ChildProcess) -> int:
    return int(child.log_tail().split()[1])


def test_the_next_run_ends_an_engine_and_keeps_a_service(state: Path) -> None:
    """A record without a role counts as an engine."""
    first = Run(state)
    engine, service = first.start(service=None), first.start()
    assert ProcessRegistry(state).end_leftovers() == [engine.pid]
    assert engine.wait(GRACE)
    assert not service.exited
    service.stop(GRACE)


def test_a_ready_engine_can_be_adopted_by_the_next_run(state: Path) -> None:
    """With all data that its use needs, readable by this user only; its exit is noticed, and its record deleted."""
    engine = Run(state).start(service=None)
    registry = ProcessRegistry(state)
    assert registry.engines() == []
    registry.note_ready(
        engine.pid, name="m", address="http://127.0.0.1:1", log_path=str(engine.log_path), spec="s", key="k"
    )
    assert registry.end_leftovers() == []
    (record,) = registry.engines()
    assert (record.pid, record.name, record.address, record.spec, record.key) == (
        engine.pid,
        "m",
        "http://127.0.0.1:1",
        "s",
        "k",
    )
    assert "'k'" not in repr(record)
    path = state / "processes" / f"{engine.pid}.json"
    assert path.stat().st_mode & 0o077 == 0
    ends: list[int | None] = []
    found = registry.take_over(record, ends.append)
    assert found.log_tail() == engine.log_tail()
    found.stop(GRACE)
    wait_until(lambda: ends == [None], "its end to be noticed")
    assert not path.exists()


def test_an_engine_that_is_not_adopted_is_ended(state: Path) -> None:
    """The run that listed the records ends it."""
    engine = Run(state).start(service=None)
    registry = ProcessRegistry(state)
    registry.note_ready(engine.pid, name="m", address="http://127.0.0.1:1", log_path="", spec="", key="")
    (record,) = registry.engines()
    registry.end(record)
    assert engine.wait(GRACE)
    assert registry.engines() == []


def test_a_record_of_an_older_version_is_an_engine(state: Path) -> None:
    """Old records have no role: pid, start time and program only."""
    engine = Run(state).start(service=None)
    started = psutil.Process(engine.pid).create_time()
    path = state / "processes" / f"{engine.pid}.json"
    path.write_text(f'{{"pid": {engine.pid}, "started": {started}, "program": "python"}}')
    assert ProcessRegistry(state).end_leftovers() == [engine.pid]
    assert engine.wait(GRACE)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": 1}', '{"pid": 1, "started": null, "program": "init"}'])
def test_an_invalid_record_is_deleted(state: Path, text: str) -> None:
    path = state / "processes" / "1.json"
    registry = ProcessRegistry(state)
    path.write_text(text)
    assert registry.end_leftovers() == []
    assert not path.exists()


def test_a_service_is_found_again_with_its_data(state: Path) -> None:
    """With its pid, start time and log; only under its own name and address."""
    service = Run(state).start()
    second = Run(state)
    second.registry.end_leftovers()
    assert second.find(Service("ollama", "http://127.0.0.1:11500")) is None
    assert second.find(Service("flux", SERVICE.address)) is None
    found = second.find()
    assert found is not None
    assert found.pid == service.pid
    assert abs(found.started_at - service.started_at) < 1
    assert found.log_tail() == "ready"
    assert not found.exited
    assert not found.wait(0)
    service.stop(GRACE)


def test_a_found_service_can_be_stopped_with_all_it_started(state: Path) -> None:
    service = Run(state).start(WITH_RUNNER)
    runner = runner_of(service)
    second = Run(state)
    found = second.find()
    assert found is not None
    found.stop(GRACE)
    assert found.exited
    assert second.ended.wait(GRACE)
    assert second.codes == [None]
    assert gone(service.pid)
    wait_until(lambda: gone(runner), "the runner to end", timeout=GRACE)
    assert Run(state).find() is None


def test_a_found_service_that_ignores_sigterm_is_killed(state: Path) -> None:
    service = Run(state).start(STUBBORN)
    found = Run(state).find()
    assert found is not None
    found.stop(0.2)
    assert found.exited
    assert gone(service.pid)


def test_the_end_of_a_child_is_noticed_and_its_runner_ended(state: Path) -> None:
    """If only the server is killed, its runner would keep its memory without the watcher."""
    run = Run(state)
    service = run.start(WITH_RUNNER)
    runner = runner_of(service)
    os.kill(service.pid, signal.SIGKILL)
    assert run.ended.wait(1.0), "the exit must be noticed within a second"
    assert run.codes == [-signal.SIGKILL]
    wait_until(lambda: gone(runner), "the runner to end", timeout=GRACE)


@dataclass
class EarlierService:
    """A service with a runner, started by an earlier run; this process isn't its parent."""

    leader: subprocess.Popen[bytes]
    runner: int
    mark: str

    def record(self) -> ProcessRecord:
        pid, now = self.leader.pid, time.time()
        return ProcessRecord(pid, now, "ollama", "service", self.mark, SERVICE.name, SERVICE.address, os.devnull)


@pytest.fixture
def earlier() -> Iterator[EarlierService]:
    mark = "its-mark"
    argv = [sys.executable, "-c", WITH_RUNNER]
    environment = {**os.environ, MARK_VARIABLE: mark}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment, start_new_session=True) as leader:
        assert leader.stdout is not None
        service = EarlierService(leader, int(leader.stdout.readline().split()[1]), mark)
        yield service
        with suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
    wait_until(lambda: gone(service.runner), "the runner to end", timeout=GRACE)


def test_the_end_of_an_adopted_service_is_noticed_and_its_runner_ended(state: Path, earlier: EarlierService) -> None:
    """Its parent doesn't reap it, so it stays a zombie; that counts as ended."""
    run = Run(state)
    run.registry.add(earlier.record())
    found = run.find()
    assert found is not None
    os.kill(earlier.leader.pid, signal.SIGKILL)
    assert run.ended.wait(1.0), "the exit must be noticed within a second"
    assert found.exited
    wait_until(lambda: gone(earlier.runner), "the runner to end", timeout=GRACE)
    assert not list((state / "processes").iterdir())


def test_the_runner_of_a_service_that_exited_between_runs_is_ended(state: Path, earlier: EarlierService) -> None:
    """The next run doesn't find the service, and ends the rest of its process group."""
    run = Run(state)
    run.registry.add(earlier.record())
    earlier.leader.kill()
    earlier.leader.wait(GRACE)
    assert not gone(earlier.runner)
    assert run.find() is None
    assert run.registry.end_leftovers() == []
    wait_until(lambda: gone(earlier.runner), "the runner to end", timeout=GRACE)
    assert not list((state / "processes").iterdir())


@pytest.mark.parametrize("mark", ["another-mark", ""])
def test_a_process_group_without_our_mark_is_left_alone(state: Path, earlier: EarlierService, mark: str) -> None:
    """The process group id of a dead service may belong to another program, which must not be killed."""
    run = Run(state)
    run.registry.add(replace(earlier.record(), mark=mark))
    earlier.leader.kill()
    earlier.leader.wait(GRACE)
    run.registry.end_leftovers()
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(earlier.runner).wait(0.2)


def test_a_reused_pid_is_not_adopted(state: Path) -> None:
    """Even with the same start time: after a reboot pids repeat."""
    run = Run(state)
    stranger = run.start(service=None)
    run.registry.add(
        ProcessRecord(stranger.pid, stranger.started_at, "ollama", "service", "mark", SERVICE.name, SERVICE.address)
    )
    assert run.find() is None
    run.registry.end_leftovers()
    assert not stranger.exited
    stranger.stop(GRACE)


def test_of_two_recorded_services_the_newest_is_found(state: Path) -> None:
    run = Run(state)
    older, newer = run.start(), run.start()
    found = Run(state).find()
    assert found is not None
    assert found.pid == newer.pid
    for child in (older, newer):
        child.stop(GRACE)


def test_a_week_old_log_is_deleted_unless_its_service_runs(state: Path) -> None:
    """An idle server may write nothing to its log for weeks."""
    run = Run(state)
    service = run.start()
    forgotten = run.registry.new_log("gone")
    forgotten.write_text("over")
    long_ago = time.time() - AGE_SECONDS - 60
    for path in (service.log_path, forgotten):
        os.utime(path, (long_ago, long_ago))
    run.registry.prune_logs()
    assert service.log_path.exists()
    assert not forgotten.exists()
    service.stop(GRACE)


def test_a_mute_child_logs_its_stderr_alone(state: Path) -> None:
    program = "import sys; print('a request'); print('a cause', file=sys.stderr)"
    child = Run(state).start(program, discard_stdout=True)
    assert child.wait(GRACE)
    assert child.log_tail() == "a cause"
    assert child.exit_code == 0


def test_a_child_that_can_not_be_recorded_is_ended_at_once(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a full disk the next run could not find it, so it must not continue."""
    run = Run(state)
    pids: list[int] = []

    def refuse(record: ProcessRecord) -> None:
        pids.append(record.pid)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run.registry, "add", refuse)
    with pytest.raises(OSError, match="No space left"):
        run.start(service=None)
    assert gone(pids[0])


def test_an_engine_with_an_incomplete_record_keeps_running(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A good load must not fail because the data for the next run can't be written."""
    run = Run(state)
    engine = run.start(service=None)

    def refuse(_record: ProcessRecord) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run.registry, "add", refuse)
    run.registry.note_ready(engine.pid, name="m", address="a", log_path="l", spec="s", key="k")
    assert not engine.exited


KILLED_IN_BETWEEN = """
import os, pathlib, signal, sys
from services.engines.processes import ChildProcess, ProcessRegistry

class Killed(ProcessRegistry):
    def add(self, record):
        print(record.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

registry = Killed(pathlib.Path(sys.argv[1]))
ChildProcess([sys.executable, "-c", sys.argv[2]], registry, registry.new_log("child"), print)
"""


def test_a_child_that_was_never_recorded_is_ended_by_the_next_run(state: Path) -> None:
    """If the app is killed between starting an engine and recording it, the next run must find it."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_BETWEEN, str(state), SLEEPER],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    orphan = psutil.Process(int(killed.stdout))
    try:
        assert ProcessRegistry(state).end_leftovers() == [orphan.pid]
        wait_until(lambda: not _alive(orphan), "the orphan to end")
        assert list((state / "processes").iterdir()) == []
    finally:
        with suppress(psutil.NoSuchProcess):
            orphan.kill()


def test_the_announcement_of_a_child_ends_with_its_record_or_failure(state: Path) -> None:
    """Otherwise each start would search all processes of the machine for it."""
    run = Run(state)
    child = run.start()
    with pytest.raises(OSError, match="nowhere"):
        ChildProcess(["/nowhere"], run.registry, run.registry.new_log("child"), run.on_exit)
    assert [path.suffix for path in (state / "processes").iterdir()] == [".json"]
    child.stop(GRACE)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_children_do_not_inherit_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs print their environment when they crash; what the caller adds is passed on."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-inherited")
    monkeypatch.setenv("SWITCHYARD_OPENAI_API_KEY", "sk-inherited")
    monkeypatch.setenv("ANYTHING_ELSE", "kept")
    run = Run(tmp_path)
    child = run.start(f"import os; print(sorted(os.environ.values()), flush=True); {SLEEPER}")
    said = child.log_tail()
    child.stop(GRACE)
    assert "sk-inherited" not in said
    assert "'kept'" in said
