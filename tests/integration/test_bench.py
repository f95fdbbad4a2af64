"""The benchmark: a short run, beside other gateways on the PATH that work, break, or never get that far."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bench.peers import PEERS, PeerError
from bench.rig import Rig
from tests.support.console import DEMO_MODELS, ROOT

GATEWAYS = ROOT / "tests" / "fakes" / "gateways.py"
LIMIT = 220
"""Seconds. It takes 25 on two idle cores."""
NOWHERE = 9
"""The discard port: these gateways never relay anything."""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the front of the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig(DEMO_MODELS, short=True) as rig:
        yield rig


def test_a_short_run_measures_everything_whatever_other_gateways_do(programs: Path, tmp_path: Path):
    """It succeeds; gateways that relay have their rows, and of one that breaks in mid-run a row says so."""
    working = tmp_path / "working"
    working.mkdir()
    for peer in PEERS:
        shutil.copy(GATEWAYS, working / peer.program)
        script(programs / peer.program, f'exec {shlex.quote(str(working / peer.program))} "$@"')
    shutil.copy(working / "llama-server", programs / "llama-server")  # which starts the program at its own path
    script(programs / "litellm", f'FAKE_GATEWAY_BREAKS=10 exec {shlex.quote(str(working / "litellm"))} "$@"')

    done = subprocess.run(
        [sys.executable, "-m", "bench", "--short"], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False
    )

    assert done.returncode == 0, done.stderr
    for name in ("llama-swap", "llama-server's router"):
        for what in ("added time to first token", "streams/s", "non-streamed requests/s"):
            assert f"| over {name}: {what}" in done.stdout
    assert "| over LiteLLM | not measured: " in done.stdout
    assert "wrong answers, such as: HTTP/1.1 500 Broken" in done.stdout
    assert re.search(r"^\| \d+ streams at once \| (\d+) complete", done.stdout, re.MULTILINE)
    for engine in ("embedded", r"Ollama \(fake\)"):
        assert re.search(rf"^\| {engine} \| .* \| \d+ \|$", done.stdout, re.MULTILINE)
    assert "llama-swap 0, LiteLLM 0, llama-server's router 0;" in done.stdout
    assert done.stdout.endswith("a short run: its figures say nothing.\n")
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(working) in command(process)]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("echo no license >&2\nexit 3", "it ended with 3: no license"),
        ("sleep 600 &\nexec sleep 600", "it did not become ready"),
    ],
)
def test_a_gateway_that_never_answers_is_given_up_and_ended(rig: Rig, programs: Path, lines: str, reason: str):
    for peer in PEERS:
        pids = programs / "pids"
        script(programs / peer.program, f"echo $$ >> {pids}\n{lines}")
        with pytest.raises(PeerError, match=reason), peer.running(rig, NOWHERE, ready_seconds=0.3):
            pytest.fail("it is not running")
        for pid in pids.read_text().split():
            assert not [process for process in psutil.process_iter() if group(process) == int(pid)]


def test_a_gateway_that_cannot_be_started_is_given_up(rig: Rig, programs: Path):
    program = programs / "litellm"
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    (peer,) = (peer for peer in PEERS if peer.program == "litellm")
    with pytest.raises(PeerError, match="it can't be started"), peer.running(rig, NOWHERE):
        pytest.fail("it is not running")
    assert peer.version() == ""


def script(path: Path, lines: str) -> None:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)


def command(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ())


def group(process: psutil.Process) -> int:
    """The process group of a process that runs; 0 if it has ended."""
    try:
        return 0 if process.status() == psutil.STATUS_ZOMBIE else os.getpgid(process.pid)
    except (psutil.Error, ProcessLookupError):
        return 0
