"""One download, as shown to clients and as stored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

from services.downloads.fetcher import Source
from services.store.records import DownloadRecord, DownloadState

FINAL: frozenset[DownloadState] = frozenset({"complete", "failed", "cancelled"})
WAITING = "Waiting for its turn"
MOVING: frozenset[DownloadState] = frozenset({"downloading", "verifying"})


class DownloadNotFound(Exception):
    """There is no such download. The text is for people."""

    def __init__(self, download_id: str) -> None:
        super().__init__(f"There is no download {download_id[:64]!r}. It may have been taken off the list.")


@dataclass(frozen=True, slots=True)
class Download:
    """One download as shown to clients. Sizes are bytes, times Unix seconds, unknown is None.

    `message` says what it does, or what failed and what to do; `error` is the code of a failure. `position` counts from
    1 among waiting downloads. `version` grows with each change.
    """

    id: str
    source: Source
    model: str
    state: DownloadState
    requested_by: str
    created_at: float
    message: str = WAITING
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
    """Return a stored download after a restart: an unfinished one is queued again."""
    view = Download(**asdict(record))
    return replace(view, state="queued", message=WAITING) if view.moving else view


def record_of(view: Download) -> DownloadRecord:
    """Return a download's database record."""
    return DownloadRecord(**{field.name: getattr(view, field.name) for field in fields(DownloadRecord)})
