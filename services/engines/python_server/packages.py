"""The Python that runs the local servers, and which of the packages they need it lacks.

Nothing is imported to find that out: a package's metadata lies beside it on the disk.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

REQUIREMENTS = "requirements.txt"
PINNED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.]+)")


@dataclass(frozen=True, slots=True)
class Requirement:
    """A package, and which versions of it will do."""

    text: str
    name: str
    accepts: Callable[[str], bool]


class Packages:
    """The packages in `servers_dir`'s requirements, looked for in the virtual environment `env`, or beside the app.

    The environment counts if it exists: it is complete then, because it is built beside and renamed.
    """

    def __init__(self, servers_dir: Path, env: Path) -> None:
        self.servers_dir = servers_dir.absolute()
        self.requirements = self.servers_dir / REQUIREMENTS
        self.env = env.absolute()
        self._lock = threading.Lock()
        self._seen: tuple[tuple[int | None, ...], tuple[str, ...]] | None = None

    @property
    def python(self) -> str:
        """The interpreter that is used: the environment's, else the app's own."""
        own = python_in(self.env)
        return str(own) if own.exists() else sys.executable

    def missing(self) -> tuple[str, ...]:
        """Return the requirements that are not met, as written, such as `diffusers==0.35.1`. Cached, so call it often.

        All of them if the file can't be read: without it nothing can be started.
        """
        state = self._state()
        with self._lock:
            if self._seen is None or self._seen[0] != state:
                self._seen = state, tuple(self._look())
            return self._seen[1]

    def _look(self) -> Iterable[str]:
        try:
            lines = self.requirements.read_text(encoding="utf-8").splitlines()
        except OSError:
            return [f"the file {self.requirements}"]
        places = self._places()
        return [wanted.text for wanted in read_requirements(lines) if not _is_met(wanted, places)]

    def _places(self) -> list[str]:
        return [str(place) for place in _site_folders(self.env)] if python_in(self.env).exists() else sys.path

    def _state(self) -> tuple[int | None, ...]:
        """Return what changes whenever a package is installed or removed: the times of the folders."""
        return tuple(_time_of(place) for place in (self.requirements, *map(Path, self._places())))


def python_in(env: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return env / "bin" / "python"


def read_requirements(lines: Sequence[str]) -> list[Requirement]:
    """Return the requirements in the lines of a file that apply to this machine; options are left out."""
    texts = (line.split(" #")[0].strip() for line in lines)
    found = (_requirement(text) for text in texts if text and not text.startswith(("#", "-")))
    return [wanted for wanted in found if wanted is not None]


def _requirement(text: str) -> Requirement | None:
    """Return one requirement; None if it does not apply here or is none.

    A pinned version, as in our own file, is read here: importing `packaging` takes 1.3 MB of every app.
    """
    pinned = PINNED.fullmatch(text)
    if pinned is not None:
        name, version = pinned.groups()
        return Requirement(text, name, lambda found: found.partition("+")[0] == version)  # +cpu is a build of it
    from packaging.requirements import InvalidRequirement
    from packaging.requirements import Requirement as AnyRequirement

    try:
        wanted = AnyRequirement(text)
    except InvalidRequirement:
        return None
    if wanted.marker is not None and not wanted.marker.evaluate():
        return None
    return Requirement(str(wanted), wanted.name, lambda found: wanted.specifier.contains(found, prereleases=True))


def _is_met(wanted: Requirement, places: list[str]) -> bool:
    found = next(iter(Distribution.discover(name=wanted.name, path=places)), None)
    return found is not None and wanted.accepts(found.version)


def _site_folders(env: Path) -> list[Path]:
    return sorted(env.glob("lib/python3*/site-packages"))


def _time_of(place: Path) -> int | None:
    try:
        return place.stat().st_mtime_ns
    except OSError:
        return None
