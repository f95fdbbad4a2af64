"""The download queue: which downloads run, wait, and are shown and stored. Independent of any client.

One lock guards all jobs. A transfer runs in a thread of its own and is cancelled through its `CancelToken`; whoever
cancels it sets the job's next state before the thread has noticed. So a job may be paused, cancelled or even removed
while its thread still runs, and no other transfer of the same model starts until that has ended. The store is written
without the lock, because it may wait for the disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import structlog

from services.cancellation import Cancelled, CancelToken
from services.downloads.disk import DiskCheck
from services.downloads.download import WAITING, Download, DownloadNotFound, record_of, restored
from services.downloads.fetcher import DownloadError, Fetcher, Phase, Source
from services.downloads.progress import Figures
from services.downloads.transfer import TransferObserver
from services.store.records import DownloadRecord, DownloadState, new_id

log = structlog.get_logger(__name__)

RETRYABLE = frozenset({"interrupted", "registry_unreachable", "hub_unreachable", "stalled", "ollama_unreachable"})
"""Error codes after which a transfer is retried automatically."""
RETRY_PAUSES = (2.0, 8.0)
"""Seconds before the first and second automatic retry."""
STORE_SECONDS = 2.0
PUBLISH_SECONDS = 0.1
CLOSE_SECONDS = 5.0
FINISHED_KEPT = 50
LISTING_SECONDS = 5.0
"""How long a complete model may take to be listed by its engine."""
LISTING_PAUSE = 0.1
LISTING = "Adding it to the models"

_WORDS: Mapping[Phase, str] = {
    "resolving": "Looking up what there is",
    "downloading": "Downloading",
    "verifying": "Verifying",
    "writing": "Putting the files in their place",
}


class DownloadStore(Protocol):
    """Persistent store of downloads."""

    def save(self, record: DownloadRecord) -> None: ...

    def newest_first(self) -> list[DownloadRecord]: ...

    def delete(self, download_id: str) -> bool: ...


@dataclass(eq=False)
class _Job:
    """A download and its current transfer. Accessed with the queue's lock held."""

    view: Download
    token: CancelToken | None = None
    """Cancels the current transfer."""
    stored_at: float = 0.0

    @property
    def key(self) -> tuple[Source, str]:
        return self.view.source, self.view.model


class DownloadQueue:
    """Runs at most `at_once` transfers in parallel. Thread-safe.

    `on_complete` is called with a download whose files are complete, before that is published. While it returns False,
    the model can't be loaded yet; it is called again for at most `listing_seconds`.
    """

    def __init__(
        self,
        fetchers: Mapping[Source, Fetcher],
        store: DownloadStore,
        *,
        at_once: int,
        disk: DiskCheck,
        on_complete: Callable[[Download], object] = lambda _download: None,
        retry_pauses: tuple[float, ...] = RETRY_PAUSES,
        listing_seconds: float = LISTING_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetchers = fetchers
        self._store = store
        self._at_once = at_once
        self._disk = disk
        self._on_complete = on_complete
        self._retry_pauses = retry_pauses
        self._listing_seconds = listing_seconds
        self._clock = clock
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}
        self._busy: dict[_Job, threading.Thread] = {}
        """Jobs whose thread has not ended, also removed ones."""
        self._unsaved: dict[str, Download | None] = {}
        """Changes not yet stored; None marks a deletion."""
        self._saving = threading.Lock()
        self._version = 0
        self._started = False
        self._closing = False

    @property
    def version(self) -> int:
        """Grows with every change of any download."""
        return self._version

    def start(self) -> None:
        """Continue what an earlier run left unfinished, in the same order; paused downloads stay paused."""
        records = self._store.newest_first()
        with self._changed:
            for record in reversed(records):
                view = restored(record)
                self._jobs[view.id] = _Job(view)
            self._started = True
            self._schedule()

    def close(self) -> None:
        """Cancel every transfer; the next start continues them."""
        with self._changed:
            self._closing = True
            busy = dict(self._busy)
            for job in busy:
                if job.view.moving:
                    self._unsaved[job.view.id] = job.view  # store its latest figures
            self._changed.notify_all()
        for job in busy:
            _stop(job.token)
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in busy.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        self._save()

    def request(self, model: str, source: Source, requested_by: str) -> Download:
        """Request a download; return the existing one if there is one. A paused or failed one is resumed.

        Raises DownloadError `invalid_name`, and `stopping` as the other commands.
        """
        name = self._fetchers[source].check_name(model)
        with self._command():
            for job in self._jobs.values():
                if job.key == (source, name) and job.view.state not in ("complete", "cancelled"):
                    if job.view.state in ("paused", "failed"):
                        self._queue_again(job)
                    return job.view
            view = Download(new_id(), source, name, "queued", requested_by, time.time())
            self._jobs[view.id] = job = _Job(view)
            self._change(job)
            self._schedule()
            return job.view

    def get(self, download_id: str) -> Download:
        """Return a download. Raises DownloadNotFound."""
        with self._changed:
            return self._find(download_id).view

    def all(self) -> tuple[Download, ...]:
        """Return the unfinished downloads in order, then the finished ones, the latest first."""
        with self._changed:
            views = [job.view for job in self._jobs.values()]
        finished = sorted((v for v in views if v.final), key=lambda v: v.finished_at or 0.0, reverse=True)
        return (*(v for v in views if not v.final), *finished)

    def pause(self, download_id: str) -> Download:
        """Cancel the transfer and keep partial files. Raises DownloadNotFound, and DownloadError `not_possible`."""
        with self._stopping(download_id) as job:
            if job.view.final:
                raise _not_possible("paused", job.view)
            if job.view.state != "paused":
                self._change(
                    job, state="paused", message="Paused", position=None, bytes_per_second=None, eta_seconds=None
                )
            return job.view

    def resume(self, download_id: str) -> Download:
        """Continue from the partial files; also retries a failed download.

        Raises DownloadNotFound, and DownloadError `not_possible`.
        """
        with self._command():
            job = self._find(download_id)
            if job.view.state in ("complete", "cancelled"):
                raise _not_possible("resumed", job.view)
            if job.view.state in ("paused", "failed"):
                self._queue_again(job)
            return job.view

    def cancel(self, download_id: str) -> Download:
        """Cancel a download. Its transfer ends and its partial files are deleted in the background.

        Raises DownloadNotFound, DownloadError `not_possible`.
        """
        with self._stopping(download_id) as job:
            if job.view.state == "complete":
                raise _not_possible("cancelled", job.view)
            if job.view.state != "cancelled":
                self._finish(job, "cancelled", message="Cancelled", error=None)
                if job.key not in {busy.key for busy in self._busy}:
                    self._start_thread(job, self._discard)  # otherwise the thread of the model's transfer does it
            return job.view

    def remove(self, download_id: str) -> None:
        """Remove a finished download from the list. Raises DownloadNotFound, DownloadError `not_possible`."""
        with self._command():
            job = self._find(download_id)
            if not job.view.final:
                raise _not_possible("taken off the list", job.view)
            self._drop(job)

    def follow(self, download_id: str, heartbeat: float = 10.0) -> Iterator[Download | None]:
        """Yield each newer state, at most ten a second, until it ends or pauses.

        Yields None after `heartbeat` seconds without a change. Raises DownloadNotFound at once, not when iterated.
        """
        return self._follow(self.get(download_id), heartbeat)

    def wait_newer(self, version: int, timeout: float) -> int:
        """Return the version once it exceeds `version`, or after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._version > version or self._closing, timeout)
            return self._version

    def _follow(self, view: Download, heartbeat: float) -> Iterator[Download | None]:
        yield view
        while not view.final and view.state != "paused":
            time.sleep(PUBLISH_SECONDS)
            newer = self._await_change(view, heartbeat)
            if newer is None:
                return
            yield newer if newer is not view else None
            view = newer

    def _await_change(self, view: Download, timeout: float) -> Download | None:
        """Return the newer state, or `view` on timeout; None if the download was removed or the app shuts down."""

        def current() -> Download | None:
            job = self._jobs.get(view.id)
            return job.view if job is not None and not self._closing else None

        with self._changed:
            self._changed.wait_for(lambda: current() is not view, timeout)
            return current()

    @contextmanager
    def _command(self) -> Iterator[None]:
        """Hold the lock for a client's command. Raises DownloadError `stopping` during shutdown."""
        with self._changing():
            self._check_open()
            yield

    @contextmanager
    def _stopping(self, download_id: str) -> Iterator[_Job]:
        """Hold the lock for stopping a job, and cancel its transfer on leaving.

        The transfer is cancelled before the store is written, which may be slow. Raises DownloadNotFound, DownloadError
        `stopping`.
        """
        with self._changed:
            self._check_open()
            job = self._find(download_id)
            yield job
            token = job.token
            self._schedule()
        _stop(token)
        self._save()

    def _check_open(self) -> None:
        if self._closing:
            raise DownloadError("stopping", "Switchyard is stopping. Downloads can be changed once it runs again.")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; store the changes on leaving."""
        with self._changed:
            yield
        self._save()

    def _find(self, download_id: str) -> _Job:
        try:
            return self._jobs[download_id]
        except KeyError:
            raise DownloadNotFound(download_id) from None

    def _queue_again(self, job: _Job) -> None:
        del self._jobs[job.view.id]  # to the end of the queue
        self._jobs[job.view.id] = job
        self._change(job, state="queued", message=WAITING, error=None, finished_at=None)
        self._schedule()

    def _schedule(self) -> None:
        """Start queued jobs while there is capacity, and number the waiting ones."""
        if not self._started or self._closing:
            return
        taken = {job.key for job in self._busy}
        free = self._at_once - len(self._busy)
        position = 0
        for job in list(self._jobs.values()):
            if job.view.state != "queued":
                continue
            if free > 0 and job.key not in taken:
                free -= 1
                taken.add(job.key)
                self._launch(job)
                continue
            position += 1
            if job.view.position != position:
                self._change(job, store=False, position=position)

    def _launch(self, job: _Job) -> None:
        job.token = token = CancelToken()
        self._change(
            job,
            state="downloading",
            message=_WORDS["resolving"],
            position=None,
            started_at=job.view.started_at or time.time(),
        )
        self._start_thread(job, self._run, token)

    def _start_thread(self, job: _Job, work: Callable[..., None], *arguments: object) -> None:
        """Start a job's thread, which ends with `_release`."""
        self._busy[job] = thread = threading.Thread(target=work, args=(job, *arguments), name="download", daemon=True)
        thread.start()

    def _release(self, job: _Job) -> None:
        """Note that a job's thread has ended: other transfers of the model may start."""
        del self._busy[job]
        self._schedule()

    def _run(self, job: _Job, token: CancelToken) -> None:
        """Run one transfer to its end. The thread's function."""
        error = self._outcome(job, token)
        if error is None:
            self._await_listing(job, token)
        with self._changing():
            job.token = None
            cancelled = job.view.state == "cancelled"
            if error is None and job.view.moving and not token.cancelled:
                total = job.view.total_bytes or job.view.completed_bytes
                self._finish(job, "complete", message="Complete", percent=100, completed_bytes=total)
            elif error is not None and job.view.moving and not self._closing:
                log.warning("a download failed", model=job.view.model, code=error.code)
                self._finish(job, "failed", message=error.message, error=error.code, may_resume=error.may_resume)
            if not cancelled:
                self._release(job)
        if cancelled:
            self._discard(job)

    def _await_listing(self, job: _Job, token: CancelToken) -> None:
        """Wait until the model can be loaded; only then its download is complete.

        After `listing_seconds` it is complete nevertheless: its files are here, and its engine reports what is wrong.
        """
        deadline = time.monotonic() + self._listing_seconds
        self._update(
            job,
            token,
            state="verifying",
            message="Looking for it in its place",
            bytes_per_second=None,
            eta_seconds=None,
        )
        with suppress(Cancelled):
            token.check()
            while not self._listed(job.view):
                if time.monotonic() >= deadline:
                    log.warning("a downloaded model is not in the catalogue", model=job.view.model)
                    return
                token.wait(LISTING_PAUSE)

    def _listed(self, view: Download) -> bool:
        try:
            return self._on_complete(view) is not False
        except Exception as error:  # retried
            log.warning("the catalogue can't be refreshed for a download", model=view.model, error=str(error))
            return False

    def _outcome(self, job: _Job, token: CancelToken) -> DownloadError | None:
        """Run the transfer; return its error.

        None if it succeeded or was cancelled; then the canceller has set the state.
        """
        try:
            self._transfer(job, token)
        except DownloadError as error:
            return error
        except Exception as error:
            if not (isinstance(error, Cancelled) and token.cancelled):
                log.exception("a download failed with an unexpected error", model=job.view.model)
                words = "Switchyard failed to carry this out; its log has the details. Try again."
                return DownloadError("internal_error", words, may_resume=True)
        return None

    def _discard(self, job: _Job) -> None:
        """Delete the partial files of a cancelled download, while no other transfer of the model runs."""
        try:
            self._fetchers[job.view.source].discard(job.view.model)
        except Exception:
            log.exception("partial files of a download could not be deleted", model=job.view.model)
        with self._changing():
            self._release(job)

    def _transfer(self, job: _Job, token: CancelToken) -> None:
        """Fetch the model, with automatic retries. Raises DownloadError and Cancelled."""
        fetcher = self._fetchers[job.view.source]
        observer = TransferObserver(
            self._disk, job.view.source, self._clock, lambda figures: self._publish(job, token, figures)
        )
        pauses = list(self._retry_pauses)
        while True:
            arrived = job.view.completed_bytes
            try:
                fetcher.fetch(job.view.model, observer.observe, token)
                return
            except DownloadError as error:
                if job.view.completed_bytes > arrived:
                    pauses = list(self._retry_pauses)
                if error.code not in RETRYABLE or not error.may_resume or not pauses:
                    raise
                pause = pauses.pop(0)
                words = f"{error.message} Trying again in {pause:.0f} s."
                self._update(job, token, message=words, bytes_per_second=None, eta_seconds=None)
                token.wait(pause)

    def _publish(self, job: _Job, token: CancelToken, figures: Figures) -> None:
        self._update(
            job,
            token,
            state="verifying" if figures.phase in ("verifying", "writing") else "downloading",
            message=_WORDS[figures.phase],
            percent=max(job.view.percent, figures.percent),
            completed_bytes=figures.completed_bytes or job.view.completed_bytes,
            total_bytes=figures.total_bytes or job.view.total_bytes,
            bytes_per_second=figures.bytes_per_second,
            eta_seconds=figures.eta_seconds,
        )

    def _update(self, job: _Job, token: CancelToken, **changes: Any) -> None:
        """Change the job from its transfer, unless the transfer was cancelled: then the job's state is another's."""
        with self._changed:
            if job.token is not token or token.cancelled or not job.view.moving:
                return
            same = job.view.state == changes.get("state", job.view.state)
            store = not same or self._clock() - job.stored_at >= STORE_SECONDS
            self._change(job, store=store, **changes)
        if store:
            self._save()

    def _finish(self, job: _Job, state: DownloadState, **changes: Any) -> None:
        over: dict[str, Any] = {
            "finished_at": time.time(),
            "position": None,
            "bytes_per_second": None,
            "eta_seconds": None,
        }
        self._change(job, state=state, **over, **changes)
        finished = sorted((j for j in self._jobs.values() if j.view.final), key=lambda j: j.view.finished_at or 0.0)
        for old in finished[:-FINISHED_KEPT]:
            self._drop(old)

    def _change(self, job: _Job, *, store: bool = True, **changes: Any) -> None:
        self._version += 1
        job.view = replace(job.view, version=self._version, **changes)
        if store:
            job.stored_at = self._clock()
            self._unsaved[job.view.id] = job.view
        self._changed.notify_all()

    def _drop(self, job: _Job) -> None:
        del self._jobs[job.view.id]
        self._unsaved[job.view.id] = None
        self._version += 1
        self._changed.notify_all()

    def _save(self) -> None:
        """Store every change made so far; on return, this thread or another has done so.

        What can't be stored (a full disk) is retried with the next change: downloads don't depend on it.
        """
        with self._saving:
            with self._changed:
                unsaved, self._unsaved = self._unsaved, {}
            for download_id, view in unsaved.items():
                try:
                    if view is None:
                        self._store.delete(download_id)
                    else:
                        self._store.save(record_of(view))
                except Exception:
                    log.exception("a download's state could not be stored", download=download_id)
                    with self._changed:
                        self._unsaved.setdefault(download_id, view)


def _stop(token: CancelToken | None) -> None:
    """Cancel a transfer. An error, because its process or connection is gone already, is only logged."""
    if token is None:
        return
    try:
        token.cancel()
    except Exception:
        log.exception("a transfer could not be stopped at once")


Verb = Literal["paused", "resumed", "cancelled", "taken off the list"]


def _not_possible(verb: Verb, view: Download) -> DownloadError:
    state = {"queued": "waiting", "downloading": "under way", "verifying": "under way"}.get(view.state, view.state)
    return DownloadError("not_possible", f"The download of {view.model} is {state}, so it can't be {verb}.")
