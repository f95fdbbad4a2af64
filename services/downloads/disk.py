"""Whether what is still to come fits on the disk it goes to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from services.downloads.fetcher import DownloadError, Source
from services.native_threads import NativeThreadPool
from services.sizes import format_size

CALL_SECONDS = 5.0
"""How long a disk may take to say how much room it has."""

log = structlog.get_logger(__name__)


class DiskCheck:
    """`folders` tells where each source's files go; None for what is on another machine, or unknown.

    `margin_bytes` stay free whatever is downloaded.
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
        """Raises DownloadError `disk_full` when `left_bytes` more don't fit. What can't be known passes.

        So does a download with nothing left to come, which needs no room however little there is.
        """
        find = self._folders.get(source)
        folder = find() if find is not None else None
        if folder is None or not left_bytes:
            return
        try:
            free = self._threads[source](self._free_on, folder)
        except OSError as error:
            log.warning("how much room there is can't be told", folder=str(folder), error=str(error))
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
    """The folder, or the nearest one above that is there already."""
    return next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
