"""Logs of child processes: one private file each, bounded in size and number while the app runs.

A child appends to its log itself (`O_APPEND`), whether or not the app that started it still runs. A log can therefore
be truncated while the child writes: it continues at the new end.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from services.state_folder import PRIVATE_FOLDER, private_opener

MAX_BYTES = 10_000_000
"""A longer log is truncated to its last KEPT_BYTES."""
KEPT_BYTES = 1_000_000
MAX_PER_PROGRAM = 50
"""Limit of logs of ended children, for each program; the oldest are deleted."""
AGE_SECONDS = 7 * 86_400
TAIL_BYTES = 8_192
TRUNCATED = b"[Switchyard removed the beginning of this log]\n"


class ChildLogs:
    """A folder of logs named `PROGRAM-….log`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sequence = 0
        folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)

    def new(self, program: str) -> Path:
        """Return the path of a new log; `open_log` creates it."""
        self._sequence += 1
        return self._folder / f"{program}-{os.getpid()}-{int(time.time())}-{self._sequence}.log"

    def prune(self, in_use: Collection[str]) -> None:
        """Truncate long logs; delete old ones and those beyond MAX_PER_PROGRAM.

        `in_use` are the log paths of running children, which are not deleted. A log that can't be accessed is skipped.
        """
        ended: dict[str, list[tuple[float, Path]]] = defaultdict(list)
        for path in self._folder.glob("*.log"):
            with suppress(OSError):
                found = path.stat()
                if found.st_size > MAX_BYTES:
                    truncate_log(path)
                if str(path) not in in_use:
                    ended[_program(path)].append((found.st_mtime, path))
        oldest = time.time() - AGE_SECONDS
        for logs in ended.values():
            newest_first = sorted(logs, reverse=True)
            for number, (written, path) in enumerate(newest_first):
                if number >= MAX_PER_PROGRAM or written < oldest:
                    with suppress(OSError):
                        path.unlink()


def open_log(path: Path) -> BinaryIO:
    """Open a log for a child to append to."""
    return open(path, "ab", opener=private_opener)


def truncate_log(path: Path) -> None:
    """Truncate a log to its last whole lines, at most KEPT_BYTES. Bytes written at the same moment may be lost."""
    with path.open("r+b") as file:
        file.seek(-min(KEPT_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
        kept = file.read().partition(b"\n")[2]
    with path.open("ab") as file:
        file.truncate(0)
        file.write(TRUNCATED + kept)


def tail(path: Path, size: int = TAIL_BYTES) -> str:
    """Return the last whole lines of a text file, at most `size` bytes; empty if it can't be read."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - size))
            data = file.read()
    except OSError:
        return ""
    if end > size:
        data = data.partition(b"\n")[2]
    return data.decode("utf-8", "replace").strip()


def _program(path: Path) -> str:
    """Return the program of a log: `llama-server` for `llama-server-4711-1700000000-3.log`."""
    return path.name.rsplit("-", 3)[0]
