"""What is made of a transfer while it runs: figures for people, and a look at the disk."""

from __future__ import annotations

from collections.abc import Callable

from services.downloads.disk import DiskCheck
from services.downloads.fetcher import Seen, Source
from services.downloads.progress import Figures, TransferProgress

DISK_SECONDS = 1.0
"""How often the disk is looked at."""


class TransferObserver:
    """Turns what a fetcher sees into figures, and looks after the disk meanwhile."""

    def __init__(
        self, disk: DiskCheck, source: Source, clock: Callable[[], float], tell: Callable[[Figures], None]
    ) -> None:
        self._disk = disk
        self._source = source
        self._clock = clock
        self._tell = tell
        self._progress = TransferProgress()
        self._checked_at = float("-inf")

    def see(self, seen: Seen) -> None:
        """Raises DownloadError when the disk fills up."""
        now = self._clock()
        figures = self._progress.advance(seen, now)
        self._tell(figures)
        if figures.phase == "downloading" and figures.total_bytes and now - self._checked_at >= DISK_SECONDS:
            self._checked_at = now
            self._disk.check(self._source, figures.total_bytes - figures.completed_bytes)
