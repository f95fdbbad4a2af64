"""The downloads: who runs, who waits, what is told and what is kept. Owned by the server, whoever watches.

One lock guards every job. A transfer runs in a thread of its own and is stopped through its `Abort`; what a job is to
be after that is decided by whoever stopped it, before the thread has noticed. So a job may be paused while its thread
still winds down (`busy`), and nothing of the same model is started until it has.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import structlog

from services.downloads.disk import DiskCheck
from services.downloads.fetcher import Abort, Aborted, DownloadError, Fetcher, Phase, Seen, Source
from services.downloads.progress import Figures, TransferProgress
from services.store.records import DownloadRecord, DownloadState, new_id

log = structlog.get_logger(__name__)

FINAL: frozenset[DownloadState] = frozenset({"complete", "failed", "cancelled"})
MOVING: frozenset[DownloadState] = frozenset({"downloading", "verifying"})
WORTH_ANOTHER_TRY = frozenset(
    {"interrupted", "registry_unreachable", "hub_unreachable", "stalled", "ollama_unreachable"}
)
RETRY_PAUSES = (2.0, 8.0)
"""Seconds before the first and the second try that nobody has to ask for."""
STORE_SECONDS = 2.0
DISK_SECONDS = 1.0
TELL_SECONDS = 0.1
CLOSE_SECONDS = 5.0
FINISHED_KEPT = 50

_WORDS: Mapping[Phase, str] = {
    "resolving": "Looking up what there is",
    "downloading": "Downloading",
    "verifying": "Verifying",
    "writing": "Putting the files in their place",
}


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


class DownloadStore(Protocol):
    """Where downloads are kept over a restart."""

    def save(self, record: DownloadRecord) -> None: ...

    def newest_first(self) -> list[DownloadRecord]: ...

    def delete(self, download_id: str) -> bool: ...


@dataclass(eq=False)
class _Job:
    """A download and the thread that carries it out. Touched with the queue's lock held."""

    view: Download
    abort: Abort | None = None
    stored_at: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether its thread has yet to end."""
        return self.abort is not None


class DownloadQueue:
    """Runs at most `at_once` transfers side by side. Every public method may be called from any thread."""

    def __init__(
        self,
        fetchers: Mapping[Source, Fetcher],
        store: DownloadStore,
        *,
        at_once: int,
        disk: DiskCheck,
        on_complete: Callable[[Download], object] = lambda _download: None,
        retry_pauses: tuple[float, ...] = RETRY_PAUSES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetchers = fetchers
        self._store = store
        self._at_once = at_once
        self._disk = disk
        self._on_complete = on_complete
        self._retry_pauses = retry_pauses
        self._clock = clock
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}
        self._threads: set[threading.Thread] = set()
        self._version = 0
        self._started = False
        self._closing = False

    @property
    def version(self) -> int:
        """Grows with every change of any download."""
        return self._version

    def start(self) -> None:
        """Go on with what an earlier run left unfinished, in its old order; what was paused stays so."""
        records = self._store.newest_first()
        with self._changed:
            for record in reversed(records):
                view = _restored(record)
                self._jobs[view.id] = _Job(view)
            self._started = True
            self._schedule()

    def close(self) -> None:
        """Stop every transfer and return; the next start goes on with them."""
        with self._changed:
            self._closing = True
            aborts = [job.abort for job in self._jobs.values() if job.abort is not None]
            threads = list(self._threads)
            self._changed.notify_all()
        for abort in aborts:
            abort()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def request(self, model: str, source: Source, requested_by: str) -> Download:
        """Have a model downloaded. One that is under way already is returned, a paused or failed one goes on.

        Raises DownloadError `invalid_name`.
        """
        name = self._fetchers[source].check_name(model)
        with self._changed:
            for job in self._jobs.values():
                if (job.view.source, job.view.model) == (source, name) and job.view.state not in (
                    "complete",
                    "cancelled",
                ):
                    if job.view.state in ("paused", "failed"):
                        self._queue_again(job)
                    return job.view
            view = Download(new_id(), source, name, "queued", requested_by, time.time())
            self._jobs[view.id] = job = _Job(view)
            self._change(job)
            self._schedule()
            return job.view

    def get(self, download_id: str) -> Download:
        """Raises DownloadNotFound."""
        with self._changed:
            return self._find(download_id).view

    def all(self) -> tuple[Download, ...]:
        """The unfinished ones in their order, then the finished ones, the last first."""
        with self._changed:
            views = [job.view for job in self._jobs.values()]
        finished = sorted((v for v in views if v.final), key=lambda v: v.finished_at or 0.0, reverse=True)
        return (*(v for v in views if not v.final), *finished)

    def pause(self, download_id: str) -> Download:
        """Stop its transfer and keep what has arrived. Raises DownloadNotFound, and DownloadError `not_possible`."""
        with self._changed:
            job = self._find(download_id)
            if job.view.final:
                raise _not_possible("paused", job.view)
            abort = job.abort
            if job.view.state != "paused":
                self._change(job, state="paused", message="Paused", bytes_per_second=None, eta_seconds=None)
                self._schedule()
            view = job.view
        if abort is not None:
            abort()
        return view

    def resume(self, download_id: str) -> Download:
        """Go on from what is here; a failed one is tried again.

        Raises DownloadNotFound, DownloadError `not_possible`.
        """
        with self._changed:
            job = self._find(download_id)
            if job.view.state in ("complete", "cancelled"):
                raise _not_possible("resumed", job.view)
            if job.view.state in ("paused", "failed"):
                self._queue_again(job)
            return job.view

    def cancel(self, download_id: str) -> Download:
        """Call it off: the transfer stops, what has arrived is given up.

        Raises DownloadNotFound, DownloadError `not_possible`.
        """
        with self._changed:
            job = self._find(download_id)
            if job.view.state == "complete":
                raise _not_possible("cancelled", job.view)
            abort = job.abort
            if job.view.state != "cancelled":
                self._finish(job, "cancelled", message="Cancelled", bytes_per_second=None, eta_seconds=None)
                if not self._is_busy(job.view):
                    self._spawn(job, self._give_up)  # else the thread that ends does it
                self._schedule()
            view = job.view
        if abort is not None:
            abort()
        return view

    def remove(self, download_id: str) -> None:
        """Take one that has ended off the list. Raises DownloadNotFound, DownloadError `not_possible`."""
        with self._changed:
            job = self._find(download_id)
            if not job.view.final:
                raise _not_possible("taken off the list", job.view)
            self._drop(job)

    def follow(self, download_id: str, heartbeat: float = 10.0) -> Iterator[Download | None]:
        """Each newer view of it, at most ten a second, until it ends or pauses; None when nothing happened for a while.

        Raises DownloadNotFound at once.
        """
        return self._follow(self.get(download_id), heartbeat)

    def wait_newer(self, version: int, timeout: float) -> int:
        """The current version, once it exceeds `version` or `timeout` seconds have passed."""
        with self._changed:
            self._changed.wait_for(lambda: self._version > version or self._closing, timeout)
            return self._version

    def _follow(self, view: Download, heartbeat: float) -> Iterator[Download | None]:
        while True:
            yield view
            if view.final or view.state == "paused" or self._closing:
                return
            time.sleep(TELL_SECONDS)
            newer: Download | None = None
            while newer is None:
                with self._changed:
                    seen = view.version
                    self._changed.wait_for(lambda: self._closing or self._newer(view.id, seen) is not None, heartbeat)  # noqa: B023
                    newer = self._newer(view.id, seen)
                if newer is None:
                    if self._closing or view.id not in self._jobs:
                        return
                    yield None
            view = newer

    def _newer(self, download_id: str, version: int) -> Download | None:
        job = self._jobs.get(download_id)
        return job.view if job is not None and job.view.version > version else None

    def _find(self, download_id: str) -> _Job:
        try:
            return self._jobs[download_id]
        except KeyError:
            raise DownloadNotFound(download_id) from None

    def _queue_again(self, job: _Job) -> None:
        del self._jobs[job.view.id]  # to the end of the queue
        self._jobs[job.view.id] = job
        self._change(job, state="queued", message="Waiting for its turn", error=None, finished_at=None)
        self._schedule()

    def _schedule(self) -> None:
        """Start what may run, and number what has to wait."""
        if not self._started or self._closing:
            return
        free = self._at_once - sum(job.busy for job in self._jobs.values())
        position = 0
        for job in list(self._jobs.values()):
            if job.view.state != "queued":
                continue
            if free > 0 and not self._is_busy(job.view):
                free -= 1
                self._launch(job)
                continue
            position += 1
            if job.view.position != position:
                self._change(job, position=position)

    def _launch(self, job: _Job) -> None:
        self._change(
            job,
            state="downloading",
            message=_WORDS["resolving"],
            position=None,
            started_at=job.view.started_at or time.time(),
        )
        self._spawn(job, self._carry_out)

    def _is_busy(self, view: Download) -> bool:
        """Whether a thread is at work on the files of this model, for this download or an earlier one."""
        same = (view.source, view.model)
        return any(job.busy and (job.view.source, job.view.model) == same for job in self._jobs.values())

    def _spawn(self, job: _Job, work: Callable[[_Job, Abort], None]) -> None:
        job.abort = abort = Abort()
        thread = threading.Thread(target=work, args=(job, abort), name="download", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _release(self, job: _Job) -> None:
        """The thread of a job is at its end. Called with the lock."""
        job.abort = None
        self._threads.discard(threading.current_thread())
        self._schedule()

    def _give_up(self, job: _Job, _abort: Abort) -> None:
        """The thread of a job that is called off while nothing runs for it."""
        self._discard(job.view)
        with self._changed:
            self._release(job)

    def _carry_out(self, job: _Job, abort: Abort) -> None:
        """The thread of one transfer, from its start to whatever end."""
        done = False
        try:
            self._transfer(job, abort)
            done = True
        except Aborted:
            pass  # whoever stopped it has said what the job is now
        except DownloadError as error:
            self._fail(job, error.code, error.message, may_resume=error.may_resume)
        except Exception:
            log.exception("a download ended in a way nobody foresaw", model=job.view.model)
            words = "Switchyard failed to carry this out; its log has the details. Try again."
            self._fail(job, "internal_error", words, may_resume=True)
        if job.view.state == "cancelled":
            self._discard(job.view)
        with self._changed:
            complete = done and job.view.state != "cancelled"
            if complete:
                total = job.view.total_bytes or job.view.completed_bytes
                self._finish(job, "complete", message="Complete", percent=100, completed_bytes=total)
            self._release(job)
        if complete:
            try:
                self._on_complete(job.view)
            except Exception:
                log.exception("nobody could be told of a complete download", model=job.view.model)

    def _transfer(self, job: _Job, abort: Abort) -> None:
        """Fetch it, trying again where that may help. Raises DownloadError and Aborted."""
        fetcher = self._fetchers[job.view.source]
        observer = _Observer(self._disk, job.view.source, self._clock, lambda figures: self._tell(job, abort, figures))
        pauses = list(self._retry_pauses)
        while True:
            arrived = job.view.completed_bytes
            try:
                fetcher.fetch(job.view.model, observer.see, abort)
                return
            except DownloadError as error:
                if job.view.completed_bytes > arrived:
                    pauses = list(self._retry_pauses)
                if error.code not in WORTH_ANOTHER_TRY or not error.may_resume or not pauses:
                    raise
                pause = pauses.pop(0)
                words = f"{error.message} Trying again in {pause:.0f} s."
                self._note(job, abort, message=words, bytes_per_second=None, eta_seconds=None)
                abort.wait(pause)

    def _tell(self, job: _Job, abort: Abort, figures: Figures) -> None:
        self._note(
            job,
            abort,
            state="verifying" if figures.phase in ("verifying", "writing") else "downloading",
            message=_WORDS[figures.phase],
            percent=max(job.view.percent, figures.percent),
            completed_bytes=figures.completed_bytes or job.view.completed_bytes,
            total_bytes=figures.total_bytes or job.view.total_bytes,
            bytes_per_second=figures.bytes_per_second,
            eta_seconds=figures.eta_seconds,
        )

    def _note(self, job: _Job, abort: Abort, **changes: Any) -> None:
        """What the transfer has to say, unless it was stopped meanwhile: then the job is something else already."""
        with self._changed:
            if not abort.requested and job.view.moving:
                same = job.view.state == changes.get("state", job.view.state)
                self._change(job, store=not same or time.monotonic() - job.stored_at > STORE_SECONDS, **changes)

    def _fail(self, job: _Job, code: str, message: str, *, may_resume: bool) -> None:
        log.warning("a download failed", model=job.view.model, code=code)
        with self._changed:
            if job.view.moving:
                figures = {"bytes_per_second": None, "eta_seconds": None}
                self._finish(job, "failed", message=message, error=code, may_resume=may_resume, **figures)

    def _finish(self, job: _Job, state: DownloadState, **changes: Any) -> None:
        self._change(job, state=state, finished_at=time.time(), position=None, **changes)
        finished = sorted((j for j in self._jobs.values() if j.view.final), key=lambda j: j.view.finished_at or 0.0)
        for old in finished[:-FINISHED_KEPT]:
            if not old.busy:
                self._drop(old)

    def _change(self, job: _Job, *, store: bool = True, **changes: Any) -> None:
        self._version += 1
        job.view = replace(job.view, version=self._version, **changes)
        if store and not self._closing:
            job.stored_at = time.monotonic()
            self._store.save(_record(job.view))
        self._changed.notify_all()

    def _drop(self, job: _Job) -> None:
        del self._jobs[job.view.id]
        self._store.delete(job.view.id)
        self._version += 1
        self._changed.notify_all()

    def _discard(self, view: Download) -> None:
        try:
            self._fetchers[view.source].discard(view.model)
        except Exception:
            log.exception("what a download left could not be removed", model=view.model)


class _Observer:
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


Verb = Literal["paused", "resumed", "cancelled", "taken off the list"]


def _not_possible(verb: Verb, view: Download) -> DownloadError:
    state = {"queued": "waiting", "downloading": "under way", "verifying": "under way"}.get(view.state, view.state)
    return DownloadError("not_possible", f"The download of {view.model} is {state}, so it can't be {verb}.")


def _restored(record: DownloadRecord) -> Download:
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


def _record(view: Download) -> DownloadRecord:
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
