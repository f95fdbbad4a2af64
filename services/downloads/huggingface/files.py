"""Where a repository's files are in the models folder, complete and partial.

A complete file is `<models_dir>/<owner>/<repo>/<path in the repository>`. A partial one is beside it, named
`<file>.<start of its digest>.incomplete`: on the same file system, so that completing it is a rename; never `*.gguf`,
which the embedded engine takes for a model; and never resumed if the repository has other content by now.
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

PARTIAL_SUFFIX = ".incomplete"
DIGEST_CHARACTERS = 16


class ModelsLayout:
    """The models folder as a `Layout`; the engine never sees half of a split model."""

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
            for other in destination.parent.glob(f"*{PARTIAL_SUFFIX}")
            if other.name.startswith(f"{destination.name}.")
        ]

    def finish(self, commit: str | None, digests: Mapping[str, str]) -> None:
        """Do nothing."""


def folder_of(models_dir: Path, name: HubName) -> Path:
    return models_dir / name.owner / name.repo


def partial_path(destination: Path, digest: str) -> Path:
    return destination.with_name(f"{destination.name}.{digest[:DIGEST_CHARACTERS]}{PARTIAL_SUFFIX}")


@contextmanager
def locked(path: Path, what: str) -> Iterator[BinaryIO]:
    """Context manager: open a partial file at its end and lock it.

    Two downloads may name the same file (by tag and by path). Created if missing, and not left behind empty. Raises
    DownloadError `busy` if another download has locked it; `what` is the file's name for people.
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
    """Delete the partial files that `name` covers, except locked ones, and folders left empty."""
    folder = folder_of(models_dir, name)
    for path in list(folder.rglob(f"*{PARTIAL_SUFFIX}")):
        in_repo = path.relative_to(folder).as_posix().removesuffix(PARTIAL_SUFFIX).rpartition(".")[0]
        if name.covers(in_repo):
            remove(path)
    below = sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True)
    for empty in (*below, folder, folder.parent):
        with suppress(OSError):
            empty.rmdir()


def remove(partial_file: Path) -> None:
    """Delete a partial file unless a download has locked it."""
    with suppress(DownloadError, FileNotFoundError), locked(partial_file, partial_file.name):
        partial_file.unlink()
