"""Which other programs hold a device's memory, by name: for whoever has to close one to make room."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import psutil

from services.memory.ledger import Reading
from services.text import fix_surrogates

MOST = 3
"""How many are named."""
LEAST_BYTES = 50_000_000
"""What holds less is not worth closing."""
LONGEST_NAME = 40


@dataclass(frozen=True, slots=True)
class Program:
    """All processes of one name, and what they hold of one device together."""

    name: str
    bytes: int
    pids: tuple[int, ...]

    @property
    def place(self) -> str:
        """Its process, or how many it has, in words."""
        return f"process {self.pids[0]}" if len(self.pids) == 1 else f"{len(self.pids)} processes"


def largest_programs(reading: Reading, ours: Collection[int]) -> tuple[Program, ...]:
    """The programs that hold most of a device, the largest first: few, and none that holds little.

    The processes `ours` and all that they have started are left out. Empty where this user may not see other processes,
    or they are in another pid namespace. Reads files of each process, so it must not run in the event loop.
    """
    parents = _parents()
    held = reading.process_bytes if reading.kind == "gpu" else _private_bytes(parents)
    own = _descendants(ours, parents)
    found: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for pid, size in held.items():
        if pid not in own:
            with suppress(psutil.Error):
                found[_tidy(psutil.Process(pid).name())][pid] = size
    programs = [Program(name, sum(sizes.values()), tuple(sorted(sizes))) for name, sizes in found.items()]
    programs.sort(key=lambda program: (-program.bytes, program.name))
    return tuple(program for program in programs[:MOST] if program.bytes >= LEAST_BYTES)


def _parents() -> dict[int, int]:
    """Each process and its parent."""
    found = {}
    for pid in psutil.pids():
        with suppress(psutil.Error):
            found[pid] = psutil.Process(pid).ppid()
    return found


def _private_bytes(pids: Iterable[int]) -> Mapping[int, int]:
    """What each process holds in this machine's RAM, without pages of files, which the kernel can take back."""
    held = {}
    for pid in pids:
        with suppress(psutil.Error):
            memory = psutil.Process(pid).memory_info()
            held[pid] = max(0, memory.rss - getattr(memory, "shared", 0))
    return held


def _descendants(roots: Collection[int], parents: Mapping[int, int]) -> set[int]:
    """These processes, and all that they have started."""
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


def _tidy(name: str) -> str:
    """A process names itself, so it can be called anything."""
    return "".join(c if c.isprintable() else "?" for c in fix_surrogates(name))[:LONGEST_NAME]
