"""Log files of child processes are truncated and pruned while the app runs, without disturbing the children."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.engines import child_logs
from services.engines.child_logs import AGE_SECONDS, TRUNCATED, ChildLogs, open_log, tail, truncate_log
from services.engines.ollama.load import LoadObserver
from services.engines.port import Evidence
from tests.support.console import TIMEOUT, wait_until


@pytest.fixture
def logs(tmp_path: Path) -> ChildLogs:
    return ChildLogs(tmp_path / "logs")


def test_a_child_keeps_writing_to_a_truncated_log(logs: ChildLogs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last complete lines are kept, and new output is appended. (Such a log filled the disk.)"""
    monkeypatch.setattr(child_logs, "MAX_BYTES", 100_000)
    monkeypatch.setattr(child_logs, "KEPT_BYTES", 10_000)
    path = logs.new("talker")
    program = "import sys; [print(f'line {n}', flush=True) for n in range(20_000)]; sys.stdin.readline(); print('more')"
    with open_log(path) as log:
        child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=log, text=True)
    wait_until(lambda: tail(path).endswith("line 19999"), "the child to write its last line")
    logs.prune({str(path)})
    assert path.stat().st_size < 12_000
    assert path.stat().st_mode & 0o077 == 0
    child.communicate("go on\n", timeout=TIMEOUT)
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines[0] == TRUNCATED
    first = int(lines[1].split()[1])
    assert lines[1:-1] == [f"line {n}\n".encode() for n in range(first, 20_000)]
    assert lines[-1] == b"more\n"


def test_logs_are_limited_per_program(logs: ChildLogs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest logs are kept, and those that a running child writes to."""
    monkeypatch.setattr(child_logs, "MAX_PER_PROGRAM", 3)
    now = time.time()
    crashing = [logs.new("llama-server") for _ in range(6)]
    other = logs.new("ollama-serve")
    for age, path in enumerate([*reversed(crashing), other]):
        path.write_text("x")
        os.utime(path, (now - age, now - age))
    logs.prune({str(crashing[0])})
    assert [path.exists() for path in crashing] == [True, False, False, True, True, True]
    assert other.exists()


def test_old_logs_are_deleted(logs: ChildLogs) -> None:
    """After a week; but not the log of a child that runs and writes nothing."""
    silent, gone = logs.new("a"), logs.new("a")
    for path in (silent, gone):
        path.write_text("x")
        os.utime(path, (time.time() - AGE_SECONDS - 60,) * 2)
    logs.prune({str(silent)})
    assert silent.exists()
    assert not gone.exists()


def test_a_load_is_followed_through_a_truncated_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ollama's lines after the truncation are still read."""
    monkeypatch.setattr(child_logs, "KEPT_BYTES", 100)
    path = tmp_path / "ollama-serve.log"
    path.write_text("earlier\n" * 1000)
    seen: list[Evidence] = []
    observer = LoadObserver(path, lambda: None, None, seen.append)
    truncate_log(path)
    observer.update()
    with path.open("a") as log:
        log.write('level=DEBUG msg="model load progress 0.50"\n')
    observer.update()
    assert [evidence.fraction for evidence in seen] == [0.5]
