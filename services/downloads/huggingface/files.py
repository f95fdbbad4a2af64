"""Where a repository's files lie below the models folder, finished and unfinished.

A finished file is `<models_dir>/<owner>/<repo>/<path in the repository>`. Until then it is beside that place as
`<file>.<start of its digest>.incomplete`: on the same file system, so that the last step is one rename; never named
`*.gguf`, which the embedded engine takes for a model; and never gone on with when the hub has other bytes by now.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from services.downloads.fetcher import DownloadError
from services.downloads.huggingface.names import HubName, choose

SUFFIX = ".incomplete"
DIGEST_CHARACTERS = 16


class ModelsLayout:
    """The models folder as a place for one model's files; the engine never sees half of a split one."""

    place = "the models folder"
    advice = "Check it and try again."
    together = True

    def __init__(self, models_dir: Path, name: HubName) -> None:
        self._folder = folder_of(models_dir, name)
        self._name = name

    def choose(self, listed: Iterable[str]) -> Sequence[str]:
        return choose(self._name, listed)

    def destination(self, path: str, _digest: str) -> Path:
        return self._folder / path

    def leftovers(self, destinations: Collection[Path]) -> Iterable[Path]:
        return [
            other
            for destination in destinations
            for other in destination.parent.glob(f"*{SUFFIX}")
            if other.name.startswith(f"{destination.name}.")
        ]

    def finish(self, commit: str | None, digests: Mapping[str, str]) -> None:
        """Nothing is left to do."""


def folder_of(models_dir: Path, name: HubName) -> Path:
    return models_dir / name.owner / name.repo


def unfinished(destination: Path, digest: str) -> Path:
    return destination.with_name(f"{destination.name}.{digest[:DIGEST_CHARACTERS]}{SUFFIX}")


@contextmanager
def held(path: Path, what: str) -> Iterator[BinaryIO]:
    """An unfinished file, open at its end and locked: two downloads may name the same file (by tag and by path).

    Created where there is none, and not left behind empty. Raises DownloadError `busy` when another download has it:
    `what` is being fetched, in words.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(
                "busy",
                f"Another download is fetching {what} just now. Try again when it is done.",
                may_resume=True,
            ) from None
        try:
            yield file
        finally:
            if os.fstat(file.fileno()).st_size == 0:
                path.unlink(missing_ok=True)


def discard(models_dir: Path, name: HubName) -> None:
    """Remove the unfinished files that `name` covers, but for those being fetched, and folders left empty."""
    folder = folder_of(models_dir, name)
    for path in list(folder.rglob(f"*{SUFFIX}")):
        in_repo = path.relative_to(folder).as_posix().removesuffix(SUFFIX).rpartition(".")[0]
        if name.covers(in_repo):
            remove(path)
    below = sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True)
    for empty in (*below, folder, folder.parent):
        with suppress(OSError):
            empty.rmdir()


def remove(unfinished_file: Path) -> None:
    """Remove it, unless a download has it."""
    with suppress(DownloadError, FileNotFoundError), held(unfinished_file, unfinished_file.name):
        unfinished_file.unlink()
