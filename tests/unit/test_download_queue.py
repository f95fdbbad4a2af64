"""The download queue: order, limits, retries; each job ends as the last accepted command says, under concurrency."""

from __future__ import annotations

import queue
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from services.cancellation import Cancelled, CancelToken
from services.downloads.disk import DiskCheck
from services.downloads.download import Download, DownloadNotFound
from services.downloads.fetcher import DownloadError, Fetcher, FileProgress, Report, Source, TransferUpdate
from services.downloads.queue import FINISHED_KEPT, DownloadQueue
from services.store.records import DownloadRecord
from services.store.repository import DownloadRepository, open_store
from tests.support.console import wait_until

TIMEOUT = 10.0
BROKEN = DownloadError("interrupted", "The connection broke.", may_resume=True)


class Call:
    """One `fetch` call, controlled by the test."""

    def __init__(self, model: str, report: Report, token: CancelToken) -> None:
        self.model = model
        self.over = threading.Event()
        self._report = report
        self._token = token
        self._orders: queue.Queue[Callable[[], None] | Exception | None] = queue.Queue()

    def report(self, completed: int, total: int, phase: Any = "downloading") -> None:
        """Report these figures, and wait until the queue has processed them."""
        done = threading.Event()

        def report() -> None:
            try:
                self._report(TransferUpdate(phase, {"layer": FileProgress(completed, total)}))
            finally:
                done.set()

        self._orders.put(report)
        assert done.wait(TIMEOUT)

    def end(self, error: Exception | None = None) -> None:
        """End the transfer, with `error` if given."""
        self._orders.put(error)

    def run(self) -> None:
        self._token.on_cancel(lambda: self._orders.put(Cancelled()))
        while (order := self._orders.get(timeout=TIMEOUT)) is not None:
            if isinstance(order, Exception):
                raise order
            order()


class ScriptedSource:
    """A source whose transfers the test controls. `discard` blocks until `tidy` is set."""

    source: Source = "ollama"

    def __init__(self) -> None:
        self.discarded: list[str] = []
        self.tidy = threading.Event()
        self.tidy.set()
        self._calls: queue.Queue[Call] = queue.Queue()

    def check_name(self, name: str) -> str:
        if " " in name:
            raise DownloadError("invalid_name", f"{name!r} is not the name of a model.")
        return name.lower()

    def fetch(self, name: str, report: Report, token: CancelToken) -> None:
        call = Call(name, report, token)
        self._calls.put(call)
        try:
            call.run()
        finally:
            call.over.set()

    def discard(self, name: str) -> None:
        assert self.tidy.wait(TIMEOUT)
        self.discarded.append(name)

    def next(self, model: str) -> Call:
        """The next transfer to begin, which must be that of `model`."""
        call = self._calls.get(timeout=TIMEOUT)
        assert call.model == model
        return call

    @property
    def idle(self) -> bool:
        """Whether no transfer has begun that the test hasn't taken with `next`."""
        return self._calls.empty()


class FakeStore:
    """An in-memory store. `broken` makes writes fail; writes block while `ready` is not set."""

    def __init__(self) -> None:
        self.rows: dict[str, DownloadRecord] = {}
        self.written: list[DownloadRecord] = []
        self.broken = False
        self.ready = threading.Event()
        self.ready.set()

    def save(self, record: DownloadRecord) -> None:
        assert self.ready.wait(TIMEOUT)
        if self.broken:
            raise OSError("No space left on device")
        self.rows[record.id] = record
        self.written.append(record)

    def newest_first(self) -> list[DownloadRecord]:
        return sorted(self.rows.values(), key=lambda r: r.created_at, reverse=True)

    def delete(self, download_id: str) -> bool:
        if self.broken:
            raise OSError("No space left on device")
        return self.rows.pop(download_id, None) is not None


class Rig:
    """A queue with a scripted source and store."""

    def __init__(self) -> None:
        self.fetcher = ScriptedSource()
        self.store = FakeStore()
        self.completed: list[Download] = []
        self.free = 10**12
        self.now = 1000.0
        self._queues: list[DownloadQueue] = []

    def queue(self, fetcher: Fetcher | None = None, **options: Any) -> DownloadQueue:
        """A running queue on the store of the earlier ones."""
        settings: dict[str, Any] = {"at_once": 2, "retry_pauses": (0.0, 0.0), "on_complete": self.completed.append}
        made = DownloadQueue(
            {"ollama": fetcher or self.fetcher},
            self.store,
            disk=DiskCheck({"ollama": lambda: Path("/")}, margin_bytes=10**9, free_bytes=lambda _: self.free),
            clock=lambda: self.now,
            **(settings | options),
        )
        self._queues.append(made)
        made.start()
        return made

    def close(self) -> None:
        self.fetcher.tidy.set()
        for made in self._queues:
            made.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def downloads(rig: Rig) -> DownloadQueue:
    return rig.queue()


def ask(downloads: DownloadQueue, model: str) -> Download:
    return downloads.request(model, "ollama", "somebody")


def wait_for_state(downloads: DownloadQueue, download: Download, state: str) -> Download:
    """The download once it is in `state`."""
    wait_until(lambda: downloads.get(download.id).state == state, f"{download.model} to be {state}", TIMEOUT)
    return downloads.get(download.id)


def test_a_download_goes_through_its_stages_and_completes_once(rig: Rig, downloads: DownloadQueue) -> None:
    """From the request to the end, with figures; the final state is stored, and the listener is called once."""
    asked = ask(downloads, "Tiny")
    assert (asked.model, asked.state, asked.requested_by, asked.percent) == ("tiny", "downloading", "somebody", 0)
    call = rig.fetcher.next("tiny")
    call.report(30, 100)
    seen = downloads.get(asked.id)
    assert (seen.percent, seen.completed_bytes, seen.total_bytes, seen.message) == (30, 30, 100, "Downloading")
    call.report(100, 100, "verifying")
    assert (downloads.get(asked.id).state, downloads.get(asked.id).percent) == ("verifying", 99)
    call.end()
    ended = wait_for_state(downloads, asked, "complete")
    assert (ended.percent, ended.completed_bytes, ended.final, ended.eta_seconds) == (100, 100, True, None)
    assert ended.finished_at is not None
    assert [d.id for d in rig.completed] == [asked.id]
    assert rig.store.rows[asked.id].state == "complete"


def test_downloads_are_limited_and_the_others_have_a_position(rig: Rig, downloads: DownloadQueue) -> None:
    """Two run, the others wait in order and move up."""
    a, b, c, d = (ask(downloads, name) for name in "abcd")
    first = rig.fetcher.next("a")
    rig.fetcher.next("b")
    assert [(x.state, x.position) for x in downloads.all()] == [
        ("downloading", None),
        ("downloading", None),
        ("queued", 1),
        ("queued", 2),
    ]
    first.end()
    rig.fetcher.next("c")
    assert downloads.get(d.id).position == 1
    assert [x.id for x in downloads.all()] == [b.id, c.id, d.id, a.id], "unfinished ones first"


def test_a_model_is_never_downloaded_twice_at_once(rig: Rig, downloads: DownloadQueue) -> None:
    """A second request joins a running or waiting download, and resumes a paused or failed one."""
    running = ask(downloads, "a")
    assert ask(downloads, "A").id == running.id
    downloads.pause(running.id)
    rig.fetcher.next("a").over.wait(TIMEOUT)
    assert ask(downloads, "a").id == running.id
    rig.fetcher.next("a").end(DownloadError("unknown_model", "There is no such model."))
    wait_for_state(downloads, running, "failed")
    assert ask(downloads, "a").id == running.id
    rig.fetcher.next("a").end()
    wait_for_state(downloads, running, "complete")
    assert ask(downloads, "a").id != running.id, "a complete model can be downloaded again, for a newer version"
    assert rig.fetcher.next("a") is not None


def test_a_pause_keeps_what_has_arrived(rig: Rig, downloads: DownloadQueue) -> None:
    """The transfer stops, the next download runs, and figures never fall after a resume."""
    a, b, c = (ask(downloads, name) for name in "abc")
    call = rig.fetcher.next("a")
    rig.fetcher.next("b")
    call.report(60, 100)
    paused = downloads.pause(a.id)
    assert (paused.state, paused.percent, paused.completed_bytes, paused.position) == ("paused", 60, 60, None)
    assert call.over.wait(TIMEOUT)
    rig.fetcher.next("c").end()
    wait_for_state(downloads, c, "complete")
    assert rig.fetcher.discarded == []
    downloads.resume(a.id)
    again = rig.fetcher.next("a")
    again.report(0, 100, "resolving")
    again.report(50, 100)
    assert downloads.get(a.id).percent == 60
    assert not downloads.get(b.id).final


def test_a_waiting_download_that_is_paused_has_no_place_in_the_queue(rig: Rig) -> None:
    """The ones behind it move up."""
    downloads = rig.queue(at_once=1)
    _, b, c = (ask(downloads, name) for name in "abc")
    assert downloads.pause(b.id).position is None
    assert downloads.get(c.id).position == 1
    assert downloads.resume(b.id).position == 2, "it queues up again"


def test_cancelling_stops_the_transfer_then_deletes_its_data(rig: Rig, downloads: DownloadQueue) -> None:
    """In this order; the same model can't start again while its partial data is being deleted."""
    rig.fetcher.tidy.clear()
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    assert downloads.cancel(a.id).state == "cancelled"
    assert call.over.wait(TIMEOUT)
    downloads.remove(a.id)  # not even when it has left the list already
    again = ask(downloads, "a")
    assert (again.id != a.id, again.state) == (True, "queued")
    assert rig.fetcher.idle
    rig.fetcher.tidy.set()
    rig.fetcher.next("a")
    assert rig.fetcher.discarded == ["a"]


def test_cancelling_a_paused_download_deletes_its_data(rig: Rig, downloads: DownloadQueue) -> None:
    """Once: cancelling again, while a newer download of the same model has partial data, leaves that alone."""
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    downloads.pause(a.id)
    assert call.over.wait(TIMEOUT)
    downloads.cancel(a.id)
    wait_until(lambda: rig.fetcher.discarded == ["a"], "the partial data to be deleted")
    ask(downloads, "a")
    rig.fetcher.next("a")
    assert downloads.cancel(a.id).state == "cancelled"
    downloads.close()
    assert rig.fetcher.discarded == ["a"]


def test_a_job_paused_and_resumed_quickly_continues(rig: Rig, downloads: DownloadQueue) -> None:
    """The old transfer ends first, which isn't a failure; then the new one begins."""
    a = ask(downloads, "a")
    old = rig.fetcher.next("a")
    downloads.pause(a.id)
    downloads.resume(a.id)
    new = rig.fetcher.next("a")
    assert old.over.is_set()
    new.end()
    wait_for_state(downloads, a, "complete")


def test_a_pause_holds_even_when_the_transfer_was_just_done(rig: Rig, downloads: DownloadQueue) -> None:
    """An accepted pause stays true for the person who got the answer."""
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    call.end()
    expected = "complete"
    with suppress(DownloadError):  # if the transfer ended first
        expected = downloads.pause(a.id).state
    assert call.over.wait(TIMEOUT)
    downloads.close()
    assert downloads.get(a.id).state == expected


@pytest.mark.parametrize(
    ("state", "refused"),
    [
        ("complete", ("pause", "resume", "cancel")),
        ("failed", ("pause",)),
        ("cancelled", ("pause", "resume")),
        ("downloading", ("remove",)),
        ("paused", ("remove",)),
    ],
)
def test_commands_that_do_not_fit_the_state_are_refused(
    rig: Rig, downloads: DownloadQueue, state: str, refused: tuple[str, ...]
) -> None:
    """The error names the download's state, which doesn't change."""
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    match state:
        case "complete":
            call.end()
        case "failed":
            call.end(DownloadError("unknown_model", "There is no such model."))
        case "cancelled":
            downloads.cancel(a.id)
        case "paused":
            downloads.pause(a.id)
    wait_for_state(downloads, a, state)
    for command in refused:
        with pytest.raises(DownloadError, match=r"The download of a is .*, so it can't be") as error:
            getattr(downloads, command)(a.id)
        assert error.value.code == "not_possible"
    assert downloads.get(a.id).state == state


def test_repeated_commands_change_nothing(rig: Rig, downloads: DownloadQueue) -> None:
    """A second click is not an error."""
    a = ask(downloads, "a")
    rig.fetcher.next("a")
    assert downloads.resume(a.id) == downloads.get(a.id)
    assert downloads.pause(a.id) == downloads.pause(a.id)
    assert downloads.cancel(a.id) == downloads.cancel(a.id)


def test_unknown_downloads_and_names_are_refused(downloads: DownloadQueue) -> None:
    with pytest.raises(DownloadError, match="not the name") as error:
        ask(downloads, "no name")
    assert error.value.code == "invalid_name"
    commands = (
        downloads.get,
        downloads.pause,
        downloads.resume,
        downloads.cancel,
        downloads.remove,
        downloads.follow,
    )
    for command in commands:
        with pytest.raises(DownloadNotFound, match="no download 'nope'"):
            command("nope")
    assert downloads.all() == ()


def test_an_interrupted_download_is_retried(rig: Rig, downloads: DownloadQueue) -> None:
    """It is retried twice, and says so; after that it has failed, with the source's message."""
    a = ask(downloads, "a")
    for _ in range(2):
        rig.fetcher.next("a").end(BROKEN)
    last = rig.fetcher.next("a")
    assert downloads.get(a.id).message == "The connection broke. Trying again in 0 s."
    assert downloads.get(a.id).state == "downloading"
    last.end(BROKEN)
    failed = wait_for_state(downloads, a, "failed")
    assert (failed.error, failed.message, failed.may_resume) == ("interrupted", "The connection broke.", True)
    downloads.resume(a.id)
    rig.fetcher.next("a").end()
    assert wait_for_state(downloads, a, "complete").error is None


@pytest.mark.parametrize(
    "error",
    [
        DownloadError("unknown_model", "There is no such model."),
        DownloadError("interrupted", "It can't go on.", may_resume=False),
        DownloadError("digest_mismatch", "It is damaged.", may_resume=True),
    ],
)
def test_permanent_errors_are_not_retried(rig: Rig, downloads: DownloadQueue, error: DownloadError) -> None:
    a = ask(downloads, "a")
    rig.fetcher.next("a").end(error)
    assert wait_for_state(downloads, a, "failed").error == error.code
    assert rig.fetcher.idle


@pytest.mark.parametrize("command", ["pause", "cancel"])
def test_the_wait_before_a_retry_can_be_ended(rig: Rig, command: str) -> None:
    """Whatever its length."""
    downloads = rig.queue(at_once=1, retry_pauses=(3600.0,))
    a = ask(downloads, "a")
    rig.fetcher.next("a").end(BROKEN)
    wait_until(lambda: "Trying again in 3600 s" in downloads.get(a.id).message, "the pause before a retry")
    getattr(downloads, command)(a.id)
    ask(downloads, "b")
    rig.fetcher.next("b")


@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), Cancelled()])
def test_an_unexpected_exception_fails_only_its_own_download(rig: Rig, error: Exception) -> None:
    """Even if it ends without a reason: no job stays running without a transfer."""
    downloads = rig.queue(at_once=1)
    a = ask(downloads, "a")
    rig.fetcher.next("a").end(error)
    failed = wait_for_state(downloads, a, "failed")
    assert (failed.error, failed.may_resume) == ("internal_error", True)
    ask(downloads, "b")
    rig.fetcher.next("b")


def test_a_disk_that_fills_up_stops_the_download(rig: Rig, downloads: DownloadQueue) -> None:
    """As soon as the rest doesn't fit; free space is checked at most once a second."""
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    call.report(0, 50 * 10**9)
    rig.free = 2 * 10**9
    call.report(10**9, 50 * 10**9)
    assert downloads.get(a.id).state == "downloading", "not checked again within a second"
    rig.now += 1.0
    call.report(2 * 10**9, 50 * 10**9)
    failed = wait_for_state(downloads, a, "failed")
    assert (failed.error, failed.may_resume, failed.completed_bytes) == ("disk_full", True, 2 * 10**9)
    assert "48.0 GB" in failed.message


def test_following_shows_every_step_to_the_end(rig: Rig, downloads: DownloadQueue) -> None:
    """The current view first, None as a heartbeat, the end last."""
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    views = downloads.follow(a.id, heartbeat=0.01)
    assert next(views) == downloads.get(a.id)
    assert next(views) is None
    call.report(40, 100)
    moved = next(views)
    assert moved is not None
    assert moved.percent == 40
    call.end()
    rest = [view for view in views if view is not None]
    assert [view.state for view in rest] == ["complete"]
    assert rest[0].version > moved.version


@pytest.mark.parametrize(("command", "state"), [("pause", "paused"), ("cancel", "cancelled")])
def test_following_ends_when_the_download_is_final(
    rig: Rig, downloads: DownloadQueue, command: str, state: str
) -> None:
    a = ask(downloads, "a")
    rig.fetcher.next("a")
    views = downloads.follow(a.id)
    next(views)
    getattr(downloads, command)(a.id)
    assert [view.state for view in views if view is not None] == [state]


def test_following_ends_when_the_download_leaves_the_list_or_the_app_stops(downloads: DownloadQueue) -> None:
    """At once, not at the next heartbeat."""
    a, b = ask(downloads, "a"), ask(downloads, "b")
    ended: queue.Queue[str] = queue.Queue()

    def follow(download: Download) -> None:
        for _ in downloads.follow(download.id, heartbeat=60.0):
            pass
        ended.put(download.model)

    for download in (a, b):
        threading.Thread(target=follow, args=(download,), daemon=True).start()
    downloads.cancel(a.id)
    downloads.remove(a.id)
    assert ended.get(timeout=TIMEOUT) == "a"
    downloads.close()
    assert ended.get(timeout=TIMEOUT) == "b"


def test_waiting_for_a_newer_version(rig: Rig, downloads: DownloadQueue) -> None:
    """The version grows with every change; a wait without one times out."""
    before = downloads.version
    assert downloads.wait_newer(before, timeout=0.01) == before
    threading.Thread(target=ask, args=(downloads, "a"), daemon=True).start()
    assert downloads.wait_newer(before, timeout=TIMEOUT) > before
    rig.fetcher.next("a")


def test_a_restart_continues_where_it_was(rig: Rig, tmp_path: Path) -> None:
    """In the old order with the old figures; paused downloads stay paused, ended ones stay listed."""
    store = open_store(tmp_path / "switchyard.db")
    rig.store = DownloadRepository(store)  # type: ignore[assignment]
    first = rig.queue(at_once=1)
    done = ask(first, "done")
    rig.fetcher.next("done").end()
    wait_for_state(first, done, "complete")
    running, held, waiting = (ask(first, name) for name in ("running", "held", "waiting"))
    call = rig.fetcher.next("running")
    call.report(70, 100)
    first.pause(held.id)
    first.close()
    assert call.over.is_set(), "every transfer has ended"
    assert first.get(running.id).state == "downloading", "stopping the app is not a failure"

    second = rig.queue(at_once=1)
    assert [(d.id, d.state) for d in second.all()] == [
        (running.id, "downloading"),
        (held.id, "paused"),
        (waiting.id, "queued"),
        (done.id, "complete"),
    ]
    again = second.get(running.id)
    assert (again.percent, again.completed_bytes, again.total_bytes) == (70, 70, 100)
    rig.fetcher.next("running").end()
    rig.fetcher.next("waiting").end()
    wait_for_state(second, waiting, "complete")
    second.close()
    store.close()


def test_a_stopping_queue_refuses_commands(rig: Rig, downloads: DownloadQueue) -> None:
    """After the app has begun to stop, commands are refused."""
    a = ask(downloads, "a")
    downloads.close()
    for command in (lambda: ask(downloads, "b"), lambda: downloads.pause(a.id), lambda: downloads.cancel(a.id)):
        with pytest.raises(DownloadError, match="Switchyard is stopping") as error:
            command()
        assert error.value.code == "stopping"
    assert {row.state for row in rig.store.rows.values()} == {"downloading"}


def test_figures_are_stored_occasionally_and_states_at_once(rig: Rig, downloads: DownloadQueue) -> None:
    """A hundred reports in two seconds cause only a few writes."""
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    before = len(rig.store.written)
    for n in range(100):
        call.report(n, 100)
    assert len(rig.store.written) == before
    rig.now += 2.0
    call.report(99, 100)
    assert rig.store.rows[a.id].completed_bytes == 99
    downloads.pause(a.id)
    assert rig.store.rows[a.id].state == "paused"


def test_a_store_that_fails_stops_no_download(rig: Rig) -> None:
    """States are lost only while the disk is full."""
    downloads = rig.queue(at_once=1)
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    rig.store.broken = True
    call.end(DownloadError("disk_full", "The disk is full.", may_resume=True))
    wait_for_state(downloads, a, "failed")
    ask(downloads, "b")
    rig.fetcher.next("b")
    rig.store.broken = False
    ask(downloads, "c")
    assert {row.model: row.state for row in rig.store.rows.values()} == {
        "a": "failed",
        "b": "downloading",
        "c": "queued",
    }


def test_only_the_latest_ended_downloads_are_kept(rig: Rig, downloads: DownloadQueue) -> None:
    """In memory and in the store; unfinished ones are always kept."""
    ids = []
    for n in range(FINISHED_KEPT + 5):
        asked = ask(downloads, f"m{n}")
        rig.fetcher.next(f"m{n}").end()
        wait_for_state(downloads, asked, "complete")
        ids.append(asked.id)
    unfinished = ask(downloads, "last")
    assert [d.id for d in downloads.all()] == [unfinished.id, *reversed(ids[5:])]
    assert set(rig.store.rows) == {unfinished.id, *ids[5:]}
    downloads.remove(ids[-1])
    assert ids[-1] not in rig.store.rows


def test_a_failing_listener_fails_no_download(rig: Rig) -> None:
    """The files are complete whatever the listener raises, so the download is complete, and the next one runs."""

    def fail(_: Download) -> None:
        raise ZeroDivisionError

    downloads = rig.queue(at_once=1, on_complete=fail, listing_seconds=0.2)
    a = ask(downloads, "a")
    rig.fetcher.next("a").end()
    wait_for_state(downloads, a, "complete")
    ask(downloads, "b")
    rig.fetcher.next("b")


def test_a_complete_model_is_in_the_catalogue(rig: Rig) -> None:
    """The listener, which rescans the catalogue, is called before `complete` is reported."""
    stages: list[str] = []
    made = rig.queue(on_complete=lambda download: stages.append(made.get(download.id).state))
    a = ask(made, "a")
    views = made.follow(a.id)
    rig.fetcher.next("a").end()
    assert [view.state for view in views if view is not None][-1] == "complete"
    assert stages == ["verifying"]


class RandomSource:
    """A source whose transfers end or fail by themselves, and which records what runs concurrently."""

    source: Source = "ollama"

    def __init__(self, seed: int) -> None:
        self._lock = threading.Lock()
        self._chance = random.Random(seed)
        self._working: Counter[str] = Counter()
        self.most_at_once = 0
        self.same_at_once: set[str] = set()

    def check_name(self, name: str) -> str:
        return name

    def fetch(self, name: str, report: Report, token: CancelToken) -> None:
        with self._lock:
            self._working[name] += 1
            self.most_at_once = max(self.most_at_once, self._working.total())
            self._note(name)
            fate = self._chance.random()
        try:
            for n in range(3):
                report(TransferUpdate("downloading", {"layer": FileProgress(n, 3)}))
                token.wait(0.001)
            if fate < 0.2:
                raise DownloadError("unknown_model", "There is no such model.")
            if fate < 0.4:
                raise BROKEN
        finally:
            with self._lock:
                self._working[name] -= 1

    def discard(self, name: str) -> None:
        with self._lock:
            self._working[name] += 1
            self._note(name)
            self._working[name] -= 1

    def _note(self, name: str) -> None:
        if self._working[name] > 1:
            self.same_at_once.add(name)


@pytest.mark.parametrize("seed", range(6))
def test_concurrent_commands_lose_nothing(rig: Rig, seed: int) -> None:
    """Four threads request, pause, resume, cancel and remove at random.

    Never more transfers than allowed, never two of one model, and each job ends as the last accepted command says.
    """
    busy = RandomSource(seed)
    downloads = rig.queue(busy, at_once=2)
    accepted: list[Download] = []
    removed: set[str] = set()
    failures: list[Exception] = []

    def pull(hand: int) -> None:
        chance = random.Random(f"{seed}.{hand}")
        for _ in range(6):
            listed = downloads.all()
            command = chance.choice(["request", "pause", "resume", "cancel", "remove"])
            try:
                if command == "request" or not listed:
                    accepted.append(ask(downloads, chance.choice("abcde")))
                elif command == "remove":
                    chosen = chance.choice(listed).id
                    downloads.remove(chosen)
                    removed.add(chosen)
                else:
                    accepted.append(getattr(downloads, command)(chance.choice(listed).id))
            except (DownloadError, DownloadNotFound) as error:
                if getattr(error, "code", "not_possible") != "not_possible":
                    failures.append(error)
            except Exception as error:
                failures.append(error)

    hands = [threading.Thread(target=pull, args=(n,), daemon=True) for n in range(4)]
    for hand in hands:
        hand.start()
    for hand in hands:
        hand.join()
    assert failures == []
    wait_until(lambda: all(d.final or d.state == "paused" for d in downloads.all()), "every job to end", TIMEOUT)
    downloads.close()

    assert busy.most_at_once <= 2
    assert busy.same_at_once == set()
    last: dict[str, Download] = {}
    for view in sorted(accepted, key=lambda view: view.version):
        last[view.id] = view
    kept = {d.id: d for d in downloads.all()}
    for download_id, wish in last.items():
        if download_id not in kept:
            assert download_id in removed
        elif wish.state in ("paused", "cancelled"):
            assert kept[download_id].state == wish.state
        else:
            assert kept[download_id].state in ("complete", "failed")
    assert {row.id: row.state for row in rig.store.rows.values()} == {d.id: d.state for d in kept.values()}


def test_complete_is_reported_once_the_model_can_be_switched_to(rig: Rig) -> None:
    """An engine may list a new model a second late, and a check may fail: `complete` is reported once it is found."""
    looks = iter([False, False, ConnectionError("Ollama is busy"), False, True])
    seen: list[str] = []

    def look(download: Download) -> bool:
        seen.append(made.get(download.id).state)
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        return found

    made = rig.queue(on_complete=look)
    a = ask(made, "a")
    views = made.follow(a.id)
    rig.fetcher.next("a").end()
    assert [view.state for view in views if view is not None][-1] == "complete"
    assert seen == ["verifying"] * 5


@pytest.mark.parametrize(("command", "state"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_download_can_be_stopped_while_its_model_is_searched(rig: Rig, command: str, state: str) -> None:
    """The command's answer stays true, and the next download can run at once, not when the search times out."""
    looked = threading.Event()

    def look(_: Download) -> bool:
        looked.set()
        return False

    downloads = rig.queue(at_once=1, on_complete=look, listing_seconds=3600.0)
    a, _ = ask(downloads, "a"), ask(downloads, "b")
    rig.fetcher.next("a").end()
    assert looked.wait(TIMEOUT)
    assert getattr(downloads, command)(a.id).state == state
    rig.fetcher.next("b")
    assert downloads.get(a.id).state == state


@pytest.mark.parametrize(("command", "state"), [("cancel", "cancelled"), ("pause", "paused")])
def test_stopping_does_not_wait_for_the_store(rig: Rig, command: str, state: str) -> None:
    """The transfer is stopped and the list updated before the store, which may be slow, has written it."""
    downloads = rig.queue()
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    rig.store.ready.clear()
    stopping = threading.Thread(target=getattr(downloads, command), args=(a.id,))
    stopping.start()
    assert call.over.wait(TIMEOUT)
    assert downloads.get(a.id).state == state
    rig.store.ready.set()
    stopping.join(TIMEOUT)
    wait_until(lambda: rig.store.rows[a.id].state == state, "the store to be written")
