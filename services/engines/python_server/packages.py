"""The Python that runs the local servers, and which of the packages they need it lacks.

Nothing is imported to find that out: a package's metadata lies beside it on the disk.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

REQUIREMENTS = "requirements.txt"


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
        return [str(wanted) for wanted in read_requirements(lines) if not _is_met(wanted, places)]

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
    found = []
    for line in lines:
        text = line.split(" #")[0].strip()
        if not text or text.startswith(("#", "-")):
            continue
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            continue
        if wanted.marker is None or wanted.marker.evaluate():
            found.append(wanted)
    return found


def _is_met(wanted: Requirement, places: list[str]) -> bool:
    found = next(iter(Distribution.discover(name=wanted.name, path=places)), None)
    return found is not None and wanted.specifier.contains(found.version, prereleases=True)


def _site_folders(env: Path) -> list[Path]:
    return sorted(env.glob("lib/python3*/site-packages"))


def _time_of(place: Path) -> int | None:
    try:
        return place.stat().st_mtime_ns
    except OSError:
        return None
