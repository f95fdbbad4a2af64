"""The GGUF files of the models folder and of listed models, as last scanned.

The folder may be a network share that is slow or hangs for hours: scanning it once blocked the event loop for 3 s each
time. So a thread of its own scans, one scan at a time, and everyone else reads the result of the last one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import structlog

from services.engines.llamacpp.gguf import GGUFError, GGUFHeader, is_first_part, parts_here, read_header
from services.native_threads import SharedCall

log = structlog.get_logger(__name__)

WAIT_SECONDS = 2.0
"""How long a caller waits for the scan it requested."""
READ_SECONDS = 10.0
"""How long one scan reads headers; the next one continues."""
SLOW_SECONDS = (60, 30, 10, 5, 2, 1)
"""Thresholds, in seconds, from which a scan is reported as slow."""
MAX_ENTRIES = 100_000
"""Limit of directory entries, for a folder that is a whole disk by mistake."""


Stamp = tuple[int, int]
"""Size in bytes and modification time in nanoseconds."""
NO_STAMP: Stamp = (0, 0)
"""Stamp of a file that does not exist or can't be accessed."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a scan found out about a model's file. The file is read again when its `stamp` changes.

    `size_bytes` is the total of a split model's parts, None if the file does not exist. `fault` says why it can't be
    loaded. `all_paths` are the paths of all parts, and their targets if they are links.
    """

    path: Path
    stamp: Stamp
    header: GGUFHeader | None
    size_bytes: int | None
    fault: str | None
    all_paths: tuple[str, ...] = ()

    @property
    def version(self) -> str | None:
        """Identifies the file's content; None if there is no file, as far as is known."""
        return None if self.stamp == NO_STAMP else "{}-{}".format(*self.stamp)


@dataclass(frozen=True, slots=True)
class _Scan:
    """Result of one scan: files found in the folder, all known files including listed ones, and the folder's error.

    `paths` maps a source in the settings to the file's path.
    """

    found: tuple[Path, ...] = ()
    files: Mapping[Path, ModelFile] = field(default_factory=lambda: MappingProxyType({}))
    paths: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))
    seconds: float = 0.0
    error: str | None = None


class ModelFolder:
    """The models folder. `on_change` is called when `notice` has changed."""

    def __init__(
        self, path: Path, on_change: Callable[[], object] = lambda: None, *, wait_seconds: float = WAIT_SECONDS
    ) -> None:
        self.path = path
        self._on_change = on_change
        self._wait_seconds = wait_seconds
        self._listed: frozenset[str] = frozenset()
        self._last: _Scan | None = None
        self._scan = SharedCall(self._scan_now)
        self._notice: str | None = None

    @property
    def notice(self) -> str | None:
        """Message about the folder: it is slow, does not answer, or can't be read. None if all is well. No I/O."""
        return self._notice

    def refresh(self) -> None:
        """Scan again. Returns when that is done or takes too long; the scan then goes on, and the last result stays."""
        answered = True
        try:
            self._scan(self._wait_seconds)
        except TimeoutError:
            answered = False
        notice = self._describe(answered)
        if notice != self._notice:
            self._notice = notice
            log.warning("the models folder", notice=notice) if notice else log.info("the models folder is fine again")
            self._on_change()

    def found(self) -> list[ModelFile]:
        """Return every model file in the folder, sorted by path. No I/O."""
        last = self._last or _Scan()
        return [last.files[path] for path in last.found]

    def file(self, source: str) -> ModelFile:
        """Return a model's file by its source in the settings: a path, absolute or below the folder. Never raises.

        No I/O for a source that was scanned before. A new source is scanned now, and from now on.
        """
        known = self._known(source)
        if known is None:
            self._listed |= {source}
            self.refresh()
            known = self._known(source)
        if known is not None:
            return known
        path = _expanded(source)
        path = path if path.is_absolute() else self.path / path
        return ModelFile(path, NO_STAMP, None, None, f"The file {path.name} could not be read yet: its folder is slow.")

    def _known(self, source: str) -> ModelFile | None:
        last = self._last or _Scan()
        path = last.paths.get(source)
        return None if path is None else last.files.get(path)

    def _describe(self, answered: bool) -> str | None:
        if not answered:
            seen = "Its models are listed as they were last seen" if self._last else "Its models will be listed"
            more = ", new ones once it answers again." if self._last else " once it answers."
            return f"The models folder {self.path} does not answer. {seen}{more}"
        assert self._last is not None
        if self._last.error is not None:
            return f"The models folder {self.path} {self._last.error}"
        slow = next((step for step in SLOW_SECONDS if self._last.seconds >= step), None)
        if slow is None:
            return None
        return (
            f"The models folder {self.path} is slow: a look through it takes more than {slow} s. New and changed files "
            "are noticed late."
        )

    # In a native thread without gevent. What is shared with greenlets is immutable and replaced as a whole.

    def _scan_now(self) -> None:
        began = time.monotonic()
        last = self._last or _Scan()
        error, readable = None, True
        try:
            found = _walk(self.path)
        except _TooManyEntries as too_many:
            found, error = too_many.found, f"holds more than {MAX_ENTRIES} files: not all of it is looked through."
        except OSError as failure:
            found, readable = list(last.found), False
            reason = failure.strerror or str(failure)
            error = f"can't be read: {reason}. Its models are listed as they were last seen."
        paths = {source: self._resolve(source) for source in self._listed} | {str(path): path for path in found}
        files: dict[Path, ModelFile] = {}
        for path in paths.values():
            file = last.files.get(path)
            if readable or file is None:
                file = _reread_if_changed(file, path, has_time=time.monotonic() - began < READ_SECONDS)
            if file is not None:
                files[path] = file
        self._last = _Scan(
            found=tuple(path for path in found if path in files),
            files=MappingProxyType(files),
            paths=MappingProxyType(paths),
            seconds=time.monotonic() - began,
            error=error,
        )

    def _resolve(self, source: str) -> Path:
        path = _expanded(source)
        return path if path.is_absolute() or path.exists() else self.path / path


class _TooManyEntries(Exception):
    def __init__(self, found: list[Path]) -> None:
        super().__init__()
        self.found = found


def _walk(folder: Path) -> list[Path]:
    """Return every GGUF file below a folder that represents a model, sorted; directories that are links are skipped.

    Raises OSError if the folder itself exists and can't be read, and _TooManyEntries.
    """
    found: list[Path] = []
    pending, entries = [str(folder)], 0
    while pending:
        here = pending.pop()
        try:
            with os.scandir(here) as listing:
                for entry in listing:
                    entries += 1
                    if entries > MAX_ENTRIES:
                        raise _TooManyEntries(sorted(found))
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.name.endswith(".gguf") and _is_model(entry):
                        found.append(Path(entry.path))
        except FileNotFoundError:
            continue  # deleted meanwhile, or the folder does not exist yet
        except OSError:
            if here == str(folder):
                raise
    return sorted(found)


def _reread_if_changed(known: ModelFile | None, path: Path, *, has_time: bool) -> ModelFile | None:
    """Return a file's current state: the known one if its stamp is unchanged or there is no time left to read it."""
    stamp = _stamp(path)
    if known is not None and known.stamp == stamp:
        return known
    return _read(path, stamp) if has_time else known


def _is_model(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file() and is_first_part(Path(entry.name))
    except OSError:  # a circular link
        return False


def _read(path: Path, stamp: Stamp) -> ModelFile:
    header, fault = None, None
    try:
        header = read_header(path)
    except FileNotFoundError:
        return ModelFile(path, stamp, None, None, f"The file {path.name} is not there.")
    except GGUFError as error:
        fault = str(error)
    except OSError as error:
        fault = f"The file {path.name} can't be read: {error.strerror or error}."
    try:
        parts = parts_here(path)
        size = sum(part.stat().st_size for part in parts)
    except OSError:
        parts, size = [path], stamp[0]
    return ModelFile(path, stamp, header, size, fault, all_paths_of(parts))


def all_paths_of(parts: Sequence[Path]) -> tuple[str, ...]:
    """Return the paths of a model's files, and their targets if they are links."""
    return tuple(dict.fromkeys(place(str(part)) for part in parts for place in (os.path.abspath, os.path.realpath)))


def _stamp(path: Path) -> Stamp:
    try:
        stat = path.stat()
    except OSError:
        return NO_STAMP
    return (stat.st_size, stat.st_mtime_ns)


def _expanded(source: str) -> Path:
    path = Path(source)
    try:
        return path.expanduser()
    except RuntimeError:  # a user without a home directory
        return path
