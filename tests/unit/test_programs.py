"""Names of the other programs that hold a device's memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from services.memory.ledger import Reading
from services.memory.programs import Program, largest_programs

MB = 10**6
HOG_BYTES = 400 * MB
HOLD = f"import sys; held = bytearray(b'x') * {HOG_BYTES}; print('here', flush=True); sys.stdin.read()"
HOST = Reading("host", "System memory", "host", 64_000 * MB, 0)


@pytest.fixture(scope="module")
def hog() -> Iterator[psutil.Process]:
    """A process that holds memory."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"here\n"
        yield psutil.Process(process.pid)
        process.stdin.close()


def with_pid(programs: tuple[Program, ...], pid: int) -> list[Program]:
    return [program for program in programs if pid in program.pids]


def on_gpu(held: dict[int, int]) -> Reading:
    return Reading("GPU-1", "GPU", "gpu", 24_000 * MB, 0, process_bytes=held)


def test_a_program_is_listed_with_its_host_memory(hog: psutil.Process) -> None:
    """Processes with the same name are added up."""
    (program,) = with_pid(largest_programs(HOST, ()), hog.pid)
    assert program.name == hog.name()
    assert program.bytes >= HOG_BYTES


def test_our_own_processes_and_their_children_are_left_out(hog: psutil.Process) -> None:
    """The process that holds memory is a child of the one that asks."""
    assert not with_pid(largest_programs(HOST, {hog.pid}), hog.pid)
    assert not with_pid(largest_programs(HOST, {os.getpid()}), hog.pid)


def test_on_a_gpu_the_drivers_figures_are_used(hog: psutil.Process) -> None:
    """A single process is listed with its pid; small or ended ones are not listed."""
    gone = max(psutil.pids()) + 10_000
    (program,) = largest_programs(on_gpu({hog.pid: 9_000 * MB, gone: 5_000 * MB}), ())
    assert (program.bytes, program.pids, program.place) == (9_000 * MB, (hog.pid,), f"process {hog.pid}")
    assert not largest_programs(on_gpu({hog.pid: 20 * MB}), ())


def test_line_breaks_in_names_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process can choose its own name."""
    monkeypatch.setattr(psutil.Process, "name", lambda _self: "a\nb\udcff" + "c" * 99)
    (program,) = largest_programs(on_gpu({os.getpid(): 9_000 * MB}), ())
    assert program.name == "a?b\ufffd" + "c" * 36
