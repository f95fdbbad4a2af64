"""GGUF files as they were at the latest look, which runs beside the event loop: their disk may be slow, or hang.

One look asks for everything, in a thread of its own: the folder's files, and those that settings list elsewhere.
Between two looks all answers come from memory. A file is read only when its size or time has changed.
"""

from __future__ import annotations

import stat
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from services.engines.llamacpp.gguf import GGUFError, GGUFHeader, is_first_part, read_header, split_parts
from services.offhub import SharedCall, off_hub

log = structlog.get_logger(__name__)

LOOK_SECONDS = 30.0
"""A look that takes longer is not waited for: what the one before it saw is taken to be there still."""

Stamp = tuple[int, int]
"""Size in bytes and time of change in nanoseconds."""
NO_STAMP: Stamp = (0, 0)
"""Of what is no file, or can't be looked at."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What reading a GGUF file gave. `fault` says in words why it can't be used, `header` is None then."""

    stamp: Stamp
    header: GGUFHeader | None
    size_bytes: int
    fault: str | None


@dataclass(frozen=True, slots=True)
class _Look:
    """`found` lie in the models folder; `stamps` are theirs, and of the others that were asked for."""

    found: tuple[Path, ...] = ()
    stamps: dict[Path, Stamp] = field(default_factory=dict)
    trouble: str | None = None


class ModelFiles:
    """The files of the models folder, and others by their path. Every method may be called from any greenlet."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._others: set[Path] = set()
        self._read: dict[Path, ModelFile] = {}
        self._last = _Look()
        self._look_now = SharedCall(lambda: _look(folder, tuple(self._others)))

    def look(self) -> tuple[Path, ...]:
        """Look anew; the models in the folder, each by its first part, in order."""
        before = self._last
        try:
            self._last = self._look_now(LOOK_SECONDS)
        except TimeoutError as error:
            self._last = replace(before, trouble=f"{error}; files that are new are not seen")
        if self._last.trouble is not None and self._last.trouble != before.trouble:
            log.warning("the models folder can't be read", folder=str(self._folder), error=self._last.trouble)
        return self._last.found

    def read(self, path: Path) -> ModelFile:
        """What is in a file as it was at the latest look; waits for the disk where that is not known."""
        stamp = self._stamp(path)
        known = self._read.get(path)
        if known is None or known.stamp != stamp:
            try:
                known = off_hub(_read, path, stamp)
            except TimeoutError:  # asked again at the next look
                return ModelFile(stamp, None, stamp[0], f"The file {path.name} is too slow to read.")
            self._read[path] = known
        return known

    def known(self, path: Path) -> ModelFile | None:
        """The same without waiting for anything; None for a file that was never read."""
        return self._read.get(path)

    def path_of(self, source: str) -> Path:
        """Where a model's source lies: a path by itself, or below the models folder."""
        path = Path(source).expanduser()
        if path.is_absolute() or path in self._last.found:
            return path
        return path if self._stamp(path) != NO_STAMP else self._folder / path

    def _stamp(self, path: Path) -> Stamp:
        stamp = self._last.stamps.get(path)
        if stamp is None:
            self._others.add(path)
            try:
                stamp = self._last.stamps[path] = off_hub(_stamp, path)
            except TimeoutError:
                return NO_STAMP
        return stamp


def _look(folder: Path, others: Collection[Path]) -> _Look:
    trouble = None
    stamps: dict[Path, Stamp] = {}
    try:
        stamps = {path: _stamp(path) for path in sorted(folder.rglob("*.gguf"))}
    except OSError as error:
        trouble = str(error)
    found = tuple(path for path, stamp in stamps.items() if stamp != NO_STAMP and is_first_part(path))
    return _Look(found, {**stamps, **{path: _stamp(path) for path in others}}, trouble)


def _stamp(path: Path) -> Stamp:
    try:
        seen = path.stat()
    except OSError:
        return NO_STAMP
    return (seen.st_size, seen.st_mtime_ns) if stat.S_ISREG(seen.st_mode) else NO_STAMP


def _read(path: Path, stamp: Stamp) -> ModelFile:
    try:
        parts = split_parts(path)
        header = read_header(path)
        size = sum(part.stat().st_size for part in parts)
    except FileNotFoundError:
        return ModelFile(stamp, None, 0, f"The file {path.name} is not there.")
    except (GGUFError, OSError) as error:
        return ModelFile(stamp, None, stamp[0], str(error))
    return ModelFile(stamp, header, size, None)
