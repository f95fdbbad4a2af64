"""Children that the app started and could not write down, because it was killed in between."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from services.engines.processes import ChildProcess, ProcessRegistry
from tests.support.console import ROOT, wait_until

SLEEPER = "import time; time.sleep(600)"
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


def test_a_child_that_was_never_recorded_is_ended_by_the_next_run(tmp_path: Path) -> None:
    """The app is killed between starting an engine and writing it down: nobody would ever find it."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_BETWEEN, str(tmp_path), SLEEPER],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    orphan = psutil.Process(int(killed.stdout))
    try:
        assert ProcessRegistry(tmp_path).end_leftovers() == [orphan.pid]
        wait_until(lambda: not _alive(orphan), "the orphan to end")
        assert list((tmp_path / "processes").iterdir()) == []
    finally:
        with suppress(psutil.NoSuchProcess):
            orphan.kill()


def test_what_is_recorded_or_can_not_be_started_is_announced_no_more(tmp_path: Path) -> None:
    """Else each start would look through all processes of the machine for it."""
    registry = ProcessRegistry(tmp_path)
    child = ChildProcess([sys.executable, "-c", SLEEPER], registry, registry.new_log("child"), lambda _code: None)
    with pytest.raises(OSError, match="nowhere"):
        ChildProcess(["/nowhere"], registry, registry.new_log("child"), lambda _code: None)
    assert [path.suffix for path in (tmp_path / "processes").iterdir()] == [".json"]
    child.stop(5)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
