"""One download as people and scripts see it, and as the store keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from services.downloads.fetcher import Source
from services.store.records import DownloadRecord, DownloadState

FINAL: frozenset[DownloadState] = frozenset({"complete", "failed", "cancelled"})
MOVING: frozenset[DownloadState] = frozenset({"downloading", "verifying"})


class DownloadNotFound(Exception):
    """There is no such download. The text is for people."""

    def __init__(self, download_id: str) -> None:
        super().__init__(f"There is no download {download_id[:64]!r}. It may have been taken off the list.")


@dataclass(frozen=True, slots=True)
class Download:
    """One download as people and scripts see it.

    Sizes are bytes, times Unix seconds, unknown is None. `message` says what it does, or what went wrong and what to
    do; `error` is the code of that. `position` counts from 1 among those that wait. `version` grows with each change.
    """

    id: str
    source: Source
    model: str
    state: DownloadState
    requested_by: str
    created_at: float
    message: str = "Waiting for its turn"
    percent: int = 0
    completed_bytes: int = 0
    total_bytes: int | None = None
    bytes_per_second: int | None = None
    eta_seconds: float | None = None
    error: str | None = None
    may_resume: bool = False
    position: int | None = None
    started_at: float | None = None
    finished_at: float | None = None
    version: int = 0

    @property
    def final(self) -> bool:
        return self.state in FINAL

    @property
    def moving(self) -> bool:
        return self.state in MOVING


def restored(record: DownloadRecord) -> Download:
    """A stored download as it goes on: what was under way waits for its turn again."""
    unfinished = record.state in ("queued", "downloading", "verifying")
    return Download(
        id=record.id,
        source=record.source,
        model=record.model,
        state="queued" if unfinished else record.state,
        requested_by=record.requested_by,
        created_at=record.created_at,
        message="Waiting for its turn" if unfinished else record.message,
        percent=record.percent,
        completed_bytes=record.completed_bytes,
        total_bytes=record.total_bytes,
        error=record.error,
        may_resume=record.may_resume,
        started_at=record.started_at,
        finished_at=record.finished_at,
    )


def record_of(view: Download) -> DownloadRecord:
    return DownloadRecord(
        id=view.id,
        source=view.source,
        model=view.model,
        state=view.state,
        requested_by=view.requested_by,
        message=view.message,
        percent=view.percent,
        completed_bytes=view.completed_bytes,
        total_bytes=view.total_bytes,
        error=view.error,
        may_resume=view.may_resume,
        created_at=view.created_at,
        started_at=view.started_at,
        finished_at=view.finished_at,
    )
