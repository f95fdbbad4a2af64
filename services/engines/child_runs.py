"""Runs a child process to its end, following what it writes: an installation, a download."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from services.cancellation import CancelToken
from services.engines.processes import ChildProcess, GroupLeader, ProcessRegistry

POLL_SECONDS = 0.2
STOP_SECONDS = 0.5
"""How long a cancelled child may take to end before it is killed."""
BLOCK_BYTES = 65_536


class Silent(Exception):
    """The child wrote nothing for too long, and was ended. `process` is the child."""

    def __init__(self, process: GroupLeader) -> None:
        super().__init__(f"it has written nothing for too long (process {process.pid})")
        self.process = process


def run_child(
    argv: Sequence[str],
    registry: ProcessRegistry,
    log_name: str,
    on_line: Callable[[str], None],
    token: CancelToken,
    *,
    silence_seconds: float,
    environment: Mapping[str, str] | None = None,
) -> GroupLeader:
    """Run a program and return it once it has ended; its output goes to a log, and to `on_line` line by line.

    The child is recorded, so that a later run of the app ends it after a crash. Raises OSError if it can't be started,
    Silent after `silence_seconds` without output, and Cancelled; the child has ended then.
    """
    token.check()
    unbuffered = {"PYTHONUNBUFFERED": "1", **(environment or {})}
    process = ChildProcess(argv, registry, registry.new_log(log_name), lambda _: None, unbuffered)
    try:
        _follow(process, on_line, token, silence_seconds)
    finally:
        process.stop(STOP_SECONDS)
    return process


def _follow(process: GroupLeader, on_line: Callable[[str], None], token: CancelToken, silence_seconds: float) -> None:
    wrote_at, position, rest = time.monotonic(), 0, b""
    while True:
        ended = process.wait(POLL_SECONDS)
        data, position = _read_on(process.log_path, position)
        *lines, rest = (rest + data)[-BLOCK_BYTES:].split(b"\n")
        for line in lines:
            on_line(line.decode("utf-8", "replace"))
        if data:
            wrote_at = time.monotonic()
        elif ended:
            return
        token.check()
        if time.monotonic() > wrote_at + silence_seconds:
            raise Silent(process)


def _read_on(path: Path, position: int) -> tuple[bytes, int]:
    """Return what a log has grown by since `position`, at most BLOCK_BYTES, and the new position."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            position = max(min(position, end), end - BLOCK_BYTES)
            file.seek(position)
            data = file.read(BLOCK_BYTES)
    except OSError:
        return b"", position
    return data, position + len(data)
