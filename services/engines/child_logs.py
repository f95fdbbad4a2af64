"""The logs of child processes: one file each, private, bounded in size and in number while the app runs.

A child appends to its log by itself (`O_APPEND`), whoever started it and whether that one still lives. So its log can
be shortened under it: the child goes on at the new end.
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

LONGEST_BYTES = 10_000_000
"""A longer log is cut to its last KEPT_BYTES."""
KEPT_BYTES = 1_000_000
MOST_OF_A_KIND = 50
"""Logs kept of children that have ended, for each program; the oldest go first."""
AGE_SECONDS = 7 * 86_400
TAIL_BYTES = 8_192
CUT = b"[Switchyard cut off what was before this]\n"


class ChildLogs:
    """A folder of logs called `PROGRAM-….log`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sequence = 0
        folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)

    def new(self, program: str) -> Path:
        """A path for another child's log, which `open_log` makes."""
        self._sequence += 1
        return self._folder / f"{program}-{os.getpid()}-{int(time.time())}-{self._sequence}.log"

    def prune(self, in_use: Collection[str]) -> None:
        """Cut logs that have become too long, and delete old ones and those that are too many.

        `in_use` are the paths of children that are alive: theirs stay. A log that can't be seen to is left for the next
        time.
        """
        ended: dict[str, list[tuple[float, Path]]] = defaultdict(list)
        for path in self._folder.glob("*.log"):
            with suppress(OSError):
                found = path.stat()
                if found.st_size > LONGEST_BYTES:
                    shorten(path)
                if str(path) not in in_use:
                    ended[_program(path)].append((found.st_mtime, path))
        oldest = time.time() - AGE_SECONDS
        for logs in ended.values():
            newest_first = sorted(logs, reverse=True)
            for number, (written, path) in enumerate(newest_first):
                if number >= MOST_OF_A_KIND or written < oldest:
                    with suppress(OSError):
                        path.unlink()


def open_log(path: Path) -> BinaryIO:
    """Open a log for a child to append to."""
    return open(path, "ab", opener=private_opener)


def shorten(path: Path) -> None:
    """Cut a log to its last whole lines, KEPT_BYTES at most. What is written in this very moment may be lost."""
    with path.open("r+b") as file:
        file.seek(-min(KEPT_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
        kept = file.read().partition(b"\n")[2]
    with path.open("ab") as file:
        file.truncate(0)
        file.write(CUT + kept)


def tail(path: Path, size: int = TAIL_BYTES) -> str:
    """The last whole lines of a text file, at most `size` bytes; empty when there is none."""
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
    """`llama-server` of `llama-server-4711-1700000000-3.log`."""
    return path.name.rsplit("-", 3)[0]
