"""Finds the other programs that hold a device's memory, so that people know which one to close."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

from services.memory.ledger import Reading
from services.text import fix_surrogates

MAX_PROGRAMS = 3
"""Limit of programs returned."""
MIN_BYTES = 50_000_000
"""Programs with less memory are not returned."""
MAX_NAME_LENGTH = 40


@dataclass(frozen=True, slots=True)
class Program:
    """All processes of one name, and the memory they hold on a device."""

    name: str
    bytes: int
    pids: tuple[int, ...]

    @property
    def place(self) -> str:
        """Its process id, or the number of its processes."""
        return f"process {self.pids[0]}" if len(self.pids) == 1 else f"{len(self.pids)} processes"


def largest_programs(reading: Reading, ours: Collection[int]) -> tuple[Program, ...]:
    """Return the programs that hold most of a device, the largest first.

    Leaves out the processes `ours` and their descendants. Empty if other processes can't be accessed (another user,
    another pid namespace). Reads files of every process, so it must not run in the event loop.
    """
    parents = _parents()
    held = reading.process_bytes if reading.kind == "gpu" else _private_bytes(parents)
    own = _descendants(ours, parents)
    found: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for pid, size in held.items():
        if pid not in own:
            with suppress(psutil.Error):
                found[_printable(psutil.Process(pid).name())][pid] = size
    programs = [Program(name, sum(sizes.values()), tuple(sorted(sizes))) for name, sizes in found.items()]
    programs.sort(key=lambda program: (-program.bytes, program.name))
    return tuple(program for program in programs[:MAX_PROGRAMS] if program.bytes >= MIN_BYTES)


def _parents() -> dict[int, int]:
    """Map each process to its parent."""
    found = {}
    for pid in psutil.pids():
        with suppress(psutil.Error):
            found[pid] = psutil.Process(pid).ppid()
    return found


def _private_bytes(pids: Iterable[int]) -> Mapping[int, int]:
    """Map each process to its resident bytes without file pages, which the kernel can reclaim."""
    held = {}
    for pid in pids:
        with suppress(psutil.Error):
            memory = psutil.Process(pid).memory_info()
            held[pid] = max(0, memory.rss - getattr(memory, "shared", 0))
    return held


def _descendants(roots: Collection[int], parents: Mapping[int, int]) -> set[int]:
    """Return these processes and all their descendants."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for pid, parent in parents.items():
        children[parent].append(pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children[pid]
    return found


def _printable(name: str) -> str:
    """Return a process name with unprintable characters replaced: processes choose their own names."""
    return "".join(c if c.isprintable() else "?" for c in fix_surrogates(name))[:MAX_NAME_LENGTH]
