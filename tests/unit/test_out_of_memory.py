"""Which process the kernel kills when memory runs out, and how that is reported."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from threading import Event

import psutil
import pytest

from services.engines import out_of_memory
from services.engines.out_of_memory import (
    ADDED_SCORE,
    HIGHEST_SCORE,
    describe_sigkill,
    engine_score,
    is_killed,
    killed_since,
)
from services.engines.processes import ChildProcess, ProcessRegistry
from tests.support.console import TIMEOUT, wait_until

PARENT = (
    "import subprocess, sys, time; sys.stdin.readline(); "
    "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True); time.sleep(600)"
)


def score_of(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def set_kills(monkeypatch: pytest.MonkeyPatch, path: Path, kills: int | None) -> None:
    """Fake `/proc/vmstat` with this count of OOM kills; None for a kernel without it."""
    path.write_text("pgfault 1\n" + ("" if kills is None else f"oom_kill {kills}\n"))
    monkeypatch.setattr(out_of_memory, "VMSTAT", path)


def test_an_engine_is_killed_before_the_console(tmp_path: Path) -> None:
    """So are processes that the engine starts, such as the runner of an `ollama serve`."""
    registry = ProcessRegistry(tmp_path)
    ended = Event()
    argv = [sys.executable, "-c", PARENT]
    child = ChildProcess(argv, registry, registry.new_log("engine"), lambda _code: ended.set(), talk=True)
    child.send_line("begin")
    runner = int(next(child.lines()))
    mine = score_of("self")
    assert [score_of(pid) - mine for pid in (child.pid, runner)] == [ADDED_SCORE, ADDED_SCORE]
    child.stop(5)
    assert ended.wait(TIMEOUT)
    wait_until(lambda: not psutil.pid_exists(runner), "the runner to end")


def test_the_score_stays_within_the_kernels_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any score that a service manager has set for the console; on a system without scores nothing changes."""
    score = tmp_path / "oom_score_adj"
    monkeypatch.setattr(out_of_memory, "SCORE", score)
    for mine, engines in ((-500, -500 + ADDED_SCORE), (0, ADDED_SCORE), (950, HIGHEST_SCORE)):
        score.write_text(f"{mine}\n")
        assert engine_score() == engines
    score.unlink()
    assert engine_score() == ADDED_SCORE


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (4, 5, "was ended by the kernel (SIGKILL), because memory ran out: unload another model"),
        (4, 4, "the kernel did not run out of memory: a user or another program killed it"),
        (None, None, "as the kernel does when memory runs out"),
    ],
)
def test_a_kill_is_reported_with_its_likely_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int | None, after: int | None, words: str
) -> None:
    """The kernel counts its kills for memory, which distinguishes them from a person's kill."""
    vmstat = tmp_path / "vmstat"
    set_kills(monkeypatch, vmstat, before)
    registry = ProcessRegistry(tmp_path)
    ended = Event()
    child = ChildProcess(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        registry,
        registry.new_log("engine"),
        lambda _code: ended.set(),
    )
    set_kills(monkeypatch, vmstat, after)
    psutil.Process(child.pid).send_signal(signal.SIGKILL)
    assert ended.wait(TIMEOUT)
    assert child.killed
    assert words in child.describe_end()
    assert "SIGKILL" in child.describe_end()


def test_other_exits_are_reported_by_their_code(tmp_path: Path) -> None:
    registry = ProcessRegistry(tmp_path)
    ended = Event()
    argv = [sys.executable, "-c", "raise SystemExit(3)"]
    child = ChildProcess(argv, registry, registry.new_log("engine"), lambda _code: ended.set())
    assert ended.wait(TIMEOUT)
    assert child.describe_end() == "ended with exit code 3"
    assert not child.killed


def test_unknown_counts_are_no_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a missing file nor a missing line counts as a kill."""
    monkeypatch.setattr(out_of_memory, "VMSTAT", tmp_path / "none")
    assert not killed_since(1)
    assert not killed_since(None)
    assert "as the kernel does" in describe_sigkill(None)
    assert [is_killed(code) for code in (-9, 137, -15, 0, None)] == [True, True, False, False, False]
