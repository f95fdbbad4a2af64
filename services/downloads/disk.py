"""Checks whether the rest of a download fits on its disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from services.downloads.fetcher import DownloadError, Source
from services.native_threads import NativeThreadPool
from services.sizes import format_size

CALL_SECONDS = 5.0
"""Time limit for querying a disk's free space."""

log = structlog.get_logger(__name__)


class DiskCheck:
    """Checks free space. `folders` returns where each source's files go, None if unknown or on another machine.

    `margin_bytes` always stay free.
    """

    def __init__(
        self,
        folders: Mapping[Source, Callable[[], Path | None]],
        *,
        margin_bytes: int,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._folders = folders
        self._threads = {source: NativeThreadPool(1, CALL_SECONDS) for source in folders}  # each disk may hang
        self._margin_bytes = margin_bytes
        self._free_bytes = free_bytes

    def check(self, source: Source, left_bytes: int | None) -> None:
        """Raise DownloadError `disk_full` if `left_bytes` more don't fit. Passes if unknown.

        A download with nothing left to come always passes.
        """
        find = self._folders.get(source)
        folder = find() if find is not None else None
        if folder is None or not left_bytes:
            return
        try:
            free = self._threads[source](self._free_on, folder)
        except OSError as error:
            log.warning("free disk space can't be determined", folder=str(folder), error=str(error))
            return
        if left_bytes > free - self._margin_bytes:
            left, room, margin = map(format_size, (left_bytes, free, self._margin_bytes))
            raise DownloadError(
                "disk_full",
                f"{left} more have to be downloaded, but only {room} are free in {folder}, and {margin} of that stay "
                "free (setting disk_margin_gb). Delete a model or other files, then try again.",
                may_resume=True,
            )

    def _free_on(self, folder: Path) -> int:
        return self._free_bytes(_existing(folder))


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest ancestor that exists."""
    return next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
