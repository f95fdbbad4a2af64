"""Starting a program by posix_spawn: its group, its streams, what it inherits, and how its end is told."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from services.engines.spawn import exit_code, spawn


def _run(folder: Path, program: str, *arguments: str) -> tuple[int, str]:
    """Run a Python program to its end; return its exit code and what it wrote to stdout."""
    out = folder / "out"
    with open(os.devnull, "r+b") as nothing, out.open("wb") as stdout:
        argv = [sys.executable, "-c", program, *arguments]
        pid = spawn(argv, dict(os.environ), nothing.fileno(), stdout.fileno(), stdout.fileno())
        return exit_code(pid), out.read_text()


def test_it_leads_a_session_of_its_own(tmp_path: Path) -> None:
    """A closed terminal, or a Ctrl+C in it, must not end an engine before the app has answered its requests."""
    assert _run(tmp_path, "import os; print(os.getpid() == os.getpgid(0) == os.getsid(0))") == (0, "True\n")


def test_it_inherits_nothing_but_its_streams(tmp_path: Path) -> None:
    """gunicorn's listening socket is inheritable: an engine that outlives the app would keep the port taken."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        program = "import os, sys\ntry: os.fstat(int(sys.argv[1]))\nexcept OSError: print('closed')"
        assert _run(tmp_path, program, str(listener.fileno())) == (0, "closed\n")


def test_signals_that_python_ignores_have_their_default_action_again() -> None:
    """A program that ignores SIGPIPE writes to a closed pipe for ever. The signal is told as a negative exit code."""
    with open(os.devnull, "r+b") as nothing:
        argv = ["/bin/sh", "-c", "kill -PIPE $$; exit 3"]
        assert exit_code(spawn(argv, {}, *(nothing.fileno(),) * 3)) == -signal.SIGPIPE


def test_a_program_that_is_not_there_is_an_error_of_its_name(tmp_path: Path) -> None:
    with open(os.devnull, "r+b") as nothing, pytest.raises(FileNotFoundError, match="nowhere"):
        spawn([str(tmp_path / "nowhere")], {}, *(nothing.fileno(),) * 3)
