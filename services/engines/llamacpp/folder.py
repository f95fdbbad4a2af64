"""The GGUF files of the models folder, and of models that the settings list, as they were last seen.

The folder may be a network share that is slow, or hangs for hours: reading it once held the event loop for 3 s at every
look. So a thread of its own does all of that, one look at a time, and everyone else reads what the last one saw.
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
from services.offhub import SharedCall

log = structlog.get_logger(__name__)

WAIT_SECONDS = 2.0
"""How long who asks for a look waits for it."""
READ_SECONDS = 10.0
"""How long one look reads headers; the next one goes on with the rest."""
SLOW_SECONDS = (60, 30, 10, 5, 2, 1)
"""From the last of these on a look is called slow."""
MOST_ENTRIES = 100_000
"""How much of the folder is looked through: who names a whole disk by mistake waits no longer than for that."""


Stamp = tuple[int, int]
"""Size in bytes and time of change in nanoseconds."""
NO_STAMP: Stamp = (0, 0)
"""Of what is not there, or can't be looked at."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a look at a model's file gave; it is read again when its `stamp`, its size and time, is another one.

    `size_bytes` counts all parts of a split model, None when it isn't there. `fault` says in words why it can't be
    loaded. `places` are the paths of all its parts, and where they lead if they are links.
    """

    path: Path
    stamp: Stamp
    header: GGUFHeader | None
    size_bytes: int | None
    fault: str | None
    places: tuple[str, ...] = ()

    @property
    def version(self) -> str | None:
        """Tells it from another file in its place; None when there is none, as far as is known."""
        return None if self.stamp == NO_STAMP else "{}-{}".format(*self.stamp)


@dataclass(frozen=True, slots=True)
class _Look:
    """What one look saw: the files found in the folder, everything known of them and the listed ones, and its trouble.

    `paths` leads from what the settings call a file to where it is.
    """

    found: tuple[Path, ...] = ()
    files: Mapping[Path, ModelFile] = field(default_factory=lambda: MappingProxyType({}))
    paths: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))
    seconds: float = 0.0
    error: str | None = None


class ModelFolder:
    """`on_change` is told when `notice` has become another one."""

    def __init__(
        self, path: Path, on_change: Callable[[], object] = lambda: None, *, wait_seconds: float = WAIT_SECONDS
    ) -> None:
        self.path = path
        self._on_change = on_change
        self._wait_seconds = wait_seconds
        self._listed: frozenset[str] = frozenset()
        self._last: _Look | None = None
        self._look = SharedCall(self._look_now)
        self._notice: str | None = None

    @property
    def notice(self) -> str | None:
        """What people should know about the folder: that it is slow, silent, or can't be read. No I/O."""
        return self._notice

    def refresh(self) -> None:
        """Look again. Returns when that is done, or takes too long: it goes on then, and what is known stays."""
        answered = True
        try:
            self._look(self._wait_seconds)
        except TimeoutError:
            answered = False
        notice = self._say(answered)
        if notice != self._notice:
            self._notice = notice
            log.warning("the models folder", notice=notice) if notice else log.info("the models folder is well again")
            self._on_change()

    def found(self) -> list[ModelFile]:
        """Every model in the folder that was read, in the order of their names. No I/O."""
        last = self._last or _Look()
        return [last.files[path] for path in last.found]

    def file(self, source: str) -> ModelFile:
        """A model's file by what the settings call it: a path, absolute or below the folder. Never raises.

        No I/O for what was looked at before; else it is looked at now, and from now on.
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
        last = self._last or _Look()
        path = last.paths.get(source)
        return None if path is None else last.files.get(path)

    def _say(self, answered: bool) -> str | None:
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

    # In a thread of its own, without gevent: nothing below shares anything with greenlets but what it replaces whole.

    def _look_now(self) -> None:
        began = time.monotonic()
        last = self._last or _Look()
        error, readable = None, True
        try:
            found = _walk(self.path)
        except _TooMuch as too_much:
            found, error = too_much.found, f"holds more than {MOST_ENTRIES} files: not all of it is looked through."
        except OSError as failure:
            found, readable = list(last.found), False
            reason = failure.strerror or str(failure)
            error = f"can't be read: {reason}. Its models are listed as they were last seen."
        paths = {source: self._resolve(source) for source in self._listed} | {str(path): path for path in found}
        files: dict[Path, ModelFile] = {}
        for path in paths.values():
            file = last.files.get(path)
            if readable or file is None:
                file = _read_again(file, path, has_time=time.monotonic() - began < READ_SECONDS)
            if file is not None:
                files[path] = file
        self._last = _Look(
            found=tuple(path for path in found if path in files),
            files=MappingProxyType(files),
            paths=MappingProxyType(paths),
            seconds=time.monotonic() - began,
            error=error,
        )

    def _resolve(self, source: str) -> Path:
        path = _expanded(source)
        return path if path.is_absolute() or path.exists() else self.path / path


class _TooMuch(Exception):
    def __init__(self, found: list[Path]) -> None:
        super().__init__()
        self.found = found


def _walk(folder: Path) -> list[Path]:
    """Every GGUF file below a folder that stands for a model, sorted; folders that are links are left out.

    Raises OSError when the folder itself is there and can't be read, and _TooMuch.
    """
    found: list[Path] = []
    pending, entries = [str(folder)], 0
    while pending:
        here = pending.pop()
        try:
            with os.scandir(here) as listing:
                for entry in listing:
                    entries += 1
                    if entries > MOST_ENTRIES:
                        raise _TooMuch(sorted(found))
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.name.endswith(".gguf") and _is_model(entry):
                        found.append(Path(entry.path))
        except FileNotFoundError:
            continue  # gone meanwhile, or a folder that nobody has made yet
        except OSError:
            if here == str(folder):
                raise
    return sorted(found)


def _read_again(known: ModelFile | None, path: Path, *, has_time: bool) -> ModelFile | None:
    """What a file is now; what it was where nothing changed or there is no time to read it."""
    stamp = _stamp(path)
    if known is not None and known.stamp == stamp:
        return known
    return _read(path, stamp) if has_time else known


def _is_model(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file() and is_first_part(Path(entry.name))
    except OSError:  # a link that leads round in a circle
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
    return ModelFile(path, stamp, header, size, fault, places_of(parts))


def places_of(parts: Sequence[Path]) -> tuple[str, ...]:
    """The paths of a model's files, and where they lead if they are links."""
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
    except RuntimeError:  # a home that nobody has
        return path
