"""Observes a running transfer: computes its figures and checks the disk."""

from __future__ import annotations

from collections.abc import Callable

from services.downloads.disk import DiskCheck
from services.downloads.fetcher import Source, TransferUpdate
from services.downloads.progress import Figures, TransferProgress

DISK_SECONDS = 1.0
"""Interval between disk checks."""


class TransferObserver:
    """Publishes figures for a fetcher's updates, and checks the disk meanwhile."""

    def __init__(
        self, disk: DiskCheck, source: Source, clock: Callable[[], float], publish: Callable[[Figures], None]
    ) -> None:
        self._disk = disk
        self._source = source
        self._clock = clock
        self._publish = publish
        self._progress = TransferProgress()
        self._checked_at = float("-inf")

    def observe(self, update: TransferUpdate) -> None:
        """Take in an update. Raises DownloadError if the disk is full."""
        now = self._clock()
        figures = self._progress.advance(update, now)
        self._publish(figures)
        if figures.phase == "downloading" and figures.total_bytes and now - self._checked_at >= DISK_SECONDS:
            self._checked_at = now
            self._disk.check(self._source, figures.total_bytes - figures.completed_bytes)
