"""The download queue: who runs, who waits, and that a job ends as the last accepted wish says, whoever asks at once."""

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

from services.abort import Abort, Aborted
from services.downloads.disk import DiskCheck
from services.downloads.download import Download, DownloadNotFound
from services.downloads.fetcher import DownloadError, Fetcher, Part, Report, Seen, Source
from services.downloads.queue import FINISHED_KEPT, DownloadQueue
from services.store.records import DownloadRecord
from services.store.repository import DownloadRepository, open_store
from tests.support.console import wait_until

TIMEOUT = 10.0
BROKEN = DownloadError("interrupted", "The connection broke.", may_resume=True)


class Call:
    """One `fetch` under way, told by the test what happens in it."""

    def __init__(self, model: str, report: Report, abort: Abort) -> None:
        self.model = model
        self.over = threading.Event()
        self._report = report
        self._abort = abort
        self._orders: queue.Queue[Callable[[], None] | Exception | None] = queue.Queue()

    def sees(self, completed: int, total: int, phase: Any = "downloading") -> None:
        """Have it report, and wait until that was taken in."""
        done = threading.Event()

        def report() -> None:
            try:
                self._report(Seen(phase, {"layer": Part(completed, total)}))
            finally:
                done.set()

        self._orders.put(report)
        assert done.wait(TIMEOUT)

    def ends(self, error: Exception | None = None) -> None:
        """The transfer is done, or fails with `error`."""
        self._orders.put(error)

    def run(self) -> None:
        self._abort.applies_to(lambda: self._orders.put(Aborted()))
        while (order := self._orders.get(timeout=TIMEOUT)) is not None:
            if isinstance(order, Exception):
                raise order
            order()


class Scripted:
    """A source whose transfers do what the test says. `tidy` holds up what is discarded until it is set."""

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

    def fetch(self, name: str, report: Report, abort: Abort) -> None:
        call = Call(name, report, abort)
        self._calls.put(call)
        try:
            call.run()
        finally:
            call.over.set()

    def discard(self, name: str) -> None:
        assert self.tidy.wait(TIMEOUT)
        self.discarded.append(name)

    def next(self, model: str) -> Call:
        """The transfer that begins next, which has to be that of `model`."""
        call = self._calls.get(timeout=TIMEOUT)
        assert call.model == model
        return call

    @property
    def idle(self) -> bool:
        """Whether no transfer has begun that the test hasn't asked for."""
        return self._calls.empty()


class Kept:
    """A store in memory; `broken` makes it refuse to write, and it waits while `ready` is not set."""

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
    """A queue with everything around it in the test's hands."""

    def __init__(self) -> None:
        self.fetcher = Scripted()
        self.store = Kept()
        self.completed: list[Download] = []
        self.free = 10**12
        self.now = 1000.0
        self._queues: list[DownloadQueue] = []

    def queue(self, fetcher: Fetcher | None = None, **options: Any) -> DownloadQueue:
        """A queue that works, on the same store as the ones before."""
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


def reaches(downloads: DownloadQueue, download: Download, state: str) -> Download:
    """The download once it is in `state`."""
    wait_until(lambda: downloads.get(download.id).state == state, f"{download.model} to be {state}", TIMEOUT)
    return downloads.get(download.id)


def test_a_download_goes_through_its_stages_and_is_announced_once(rig: Rig, downloads: DownloadQueue) -> None:
    """From the request to the end, with figures; the store holds how it ended."""
    asked = ask(downloads, "Tiny")
    assert (asked.model, asked.state, asked.requested_by, asked.percent) == ("tiny", "downloading", "somebody", 0)
    call = rig.fetcher.next("tiny")
    call.sees(30, 100)
    seen = downloads.get(asked.id)
    assert (seen.percent, seen.completed_bytes, seen.total_bytes, seen.message) == (30, 30, 100, "Downloading")
    call.sees(100, 100, "verifying")
    assert (downloads.get(asked.id).state, downloads.get(asked.id).percent) == ("verifying", 99)
    call.ends()
    ended = reaches(downloads, asked, "complete")
    assert (ended.percent, ended.completed_bytes, ended.final, ended.eta_seconds) == (100, 100, True, None)
    assert ended.finished_at is not None
    assert [d.id for d in rig.completed] == [asked.id]
    assert rig.store.rows[asked.id].state == "complete"


def test_no_more_run_than_may_and_the_others_know_their_place(rig: Rig, downloads: DownloadQueue) -> None:
    """Two run, the rest waits in the order of asking and moves up."""
    a, b, c, d = (ask(downloads, name) for name in "abcd")
    first = rig.fetcher.next("a")
    rig.fetcher.next("b")
    assert [(x.state, x.position) for x in downloads.all()] == [
        ("downloading", None),
        ("downloading", None),
        ("queued", 1),
        ("queued", 2),
    ]
    first.ends()
    rig.fetcher.next("c")
    assert downloads.get(d.id).position == 1
    assert [x.id for x in downloads.all()] == [b.id, c.id, d.id, a.id], "unfinished ones first"


def test_a_model_is_never_downloaded_twice_at_once(rig: Rig, downloads: DownloadQueue) -> None:
    """Asking again joins what is under way or waits, and sets going what is paused or failed."""
    running = ask(downloads, "a")
    assert ask(downloads, "A").id == running.id
    downloads.pause(running.id)
    rig.fetcher.next("a").over.wait(TIMEOUT)
    assert ask(downloads, "a").id == running.id
    rig.fetcher.next("a").ends(DownloadError("unknown_model", "There is no such model."))
    reaches(downloads, running, "failed")
    assert ask(downloads, "a").id == running.id
    rig.fetcher.next("a").ends()
    reaches(downloads, running, "complete")
    assert ask(downloads, "a").id != running.id, "what is complete can be asked for again: there may be a newer version"
    assert rig.fetcher.next("a") is not None


def test_a_pause_keeps_what_has_arrived(rig: Rig, downloads: DownloadQueue) -> None:
    """The transfer stops, its place goes to the next, and figures never fall when it goes on."""
    a, b, c = (ask(downloads, name) for name in "abc")
    call = rig.fetcher.next("a")
    rig.fetcher.next("b")
    call.sees(60, 100)
    paused = downloads.pause(a.id)
    assert (paused.state, paused.percent, paused.completed_bytes, paused.position) == ("paused", 60, 60, None)
    assert call.over.wait(TIMEOUT)
    rig.fetcher.next("c").ends()
    reaches(downloads, c, "complete")
    assert rig.fetcher.discarded == []
    downloads.resume(a.id)
    again = rig.fetcher.next("a")
    again.sees(0, 100, "resolving")
    again.sees(50, 100)
    assert downloads.get(a.id).percent == 60
    assert not downloads.get(b.id).final


def test_a_waiting_download_that_is_paused_has_no_place_in_the_queue(rig: Rig) -> None:
    """And those behind it move up."""
    downloads = rig.queue(at_once=1)
    _, b, c = (ask(downloads, name) for name in "abc")
    assert downloads.pause(b.id).position is None
    assert downloads.get(c.id).position == 1
    assert downloads.resume(b.id).position == 2, "it queues up again"


def test_cancelling_stops_the_transfer_then_gives_up_what_arrived(rig: Rig, downloads: DownloadQueue) -> None:
    """In this order, and the same model doesn't start anew while its pieces are being removed."""
    rig.fetcher.tidy.clear()
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    assert downloads.cancel(a.id).state == "cancelled"
    assert call.over.wait(TIMEOUT)
    downloads.remove(a.id)  # not even when it is off the list already
    again = ask(downloads, "a")
    assert (again.id != a.id, again.state) == (True, "queued")
    assert rig.fetcher.idle
    rig.fetcher.tidy.set()
    rig.fetcher.next("a")
    assert rig.fetcher.discarded == ["a"]


def test_what_a_paused_download_left_is_given_up_when_it_is_cancelled(rig: Rig, downloads: DownloadQueue) -> None:
    """Once: cancelling again, when a newer download has pieces of the same model, leaves those alone."""
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    downloads.pause(a.id)
    assert call.over.wait(TIMEOUT)
    downloads.cancel(a.id)
    wait_until(lambda: rig.fetcher.discarded == ["a"], "the pieces to go")
    ask(downloads, "a")
    rig.fetcher.next("a")
    assert downloads.cancel(a.id).state == "cancelled"
    downloads.close()
    assert rig.fetcher.discarded == ["a"]


def test_a_job_paused_and_resumed_before_its_thread_noticed_goes_on(rig: Rig, downloads: DownloadQueue) -> None:
    """The old transfer ends first; its end is no failure, and the new one begins."""
    a = ask(downloads, "a")
    old = rig.fetcher.next("a")
    downloads.pause(a.id)
    downloads.resume(a.id)
    new = rig.fetcher.next("a")
    assert old.over.is_set()
    new.ends()
    reaches(downloads, a, "complete")


def test_a_pause_holds_even_when_the_transfer_was_just_done(rig: Rig, downloads: DownloadQueue) -> None:
    """What was answered to the person who asked stays true."""
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    call.ends()
    expected = "complete"
    with suppress(DownloadError):  # where the end came first
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
def test_what_makes_no_sense_is_refused_in_words(
    rig: Rig, downloads: DownloadQueue, state: str, refused: tuple[str, ...]
) -> None:
    """With the state it is in, which stays."""
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    match state:
        case "complete":
            call.ends()
        case "failed":
            call.ends(DownloadError("unknown_model", "There is no such model."))
        case "cancelled":
            downloads.cancel(a.id)
        case "paused":
            downloads.pause(a.id)
    reaches(downloads, a, state)
    for command in refused:
        with pytest.raises(DownloadError, match=r"The download of a is .*, so it can't be") as error:
            getattr(downloads, command)(a.id)
        assert error.value.code == "not_possible"
    assert downloads.get(a.id).state == state


def test_asking_for_the_same_again_changes_nothing(rig: Rig, downloads: DownloadQueue) -> None:
    """A second click is no error."""
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


def test_what_broke_off_is_tried_again_by_itself(rig: Rig, downloads: DownloadQueue) -> None:
    """Twice, saying so; the third time it has failed, with the source's words."""
    a = ask(downloads, "a")
    for _ in range(2):
        rig.fetcher.next("a").ends(BROKEN)
    last = rig.fetcher.next("a")
    assert downloads.get(a.id).message == "The connection broke. Trying again in 0 s."
    assert downloads.get(a.id).state == "downloading"
    last.ends(BROKEN)
    failed = reaches(downloads, a, "failed")
    assert (failed.error, failed.message, failed.may_resume) == ("interrupted", "The connection broke.", True)
    downloads.resume(a.id)
    rig.fetcher.next("a").ends()
    assert reaches(downloads, a, "complete").error is None


@pytest.mark.parametrize(
    "error",
    [
        DownloadError("unknown_model", "There is no such model."),
        DownloadError("interrupted", "It can't go on.", may_resume=False),
        DownloadError("digest_mismatch", "It is damaged.", may_resume=True),
    ],
)
def test_what_another_try_would_not_mend_is_not_tried_again(
    rig: Rig, downloads: DownloadQueue, error: DownloadError
) -> None:
    a = ask(downloads, "a")
    rig.fetcher.next("a").ends(error)
    assert reaches(downloads, a, "failed").error == error.code
    assert rig.fetcher.idle


@pytest.mark.parametrize("command", ["pause", "cancel"])
def test_a_pause_between_two_tries_can_be_cut_short(rig: Rig, command: str) -> None:
    """However long it would have been."""
    downloads = rig.queue(at_once=1, retry_pauses=(3600.0,))
    a = ask(downloads, "a")
    rig.fetcher.next("a").ends(BROKEN)
    wait_until(lambda: "Trying again in 3600 s" in downloads.get(a.id).message, "the pause")
    getattr(downloads, command)(a.id)
    ask(downloads, "b")
    rig.fetcher.next("b")


@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), Aborted()])
def test_a_fetcher_that_fails_in_a_way_nobody_foresaw_costs_its_own_download_only(rig: Rig, error: Exception) -> None:
    """An end without a reason as well: no job stays under way with nobody at work."""
    downloads = rig.queue(at_once=1)
    a = ask(downloads, "a")
    rig.fetcher.next("a").ends(error)
    failed = reaches(downloads, a, "failed")
    assert (failed.error, failed.may_resume) == ("internal_error", True)
    ask(downloads, "b")
    rig.fetcher.next("b")


def test_a_disk_that_fills_up_stops_the_download(rig: Rig, downloads: DownloadQueue) -> None:
    """As soon as the rest doesn't fit, looking at most once a second."""
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    call.sees(0, 50 * 10**9)
    rig.free = 2 * 10**9
    call.sees(10**9, 50 * 10**9)
    assert downloads.get(a.id).state == "downloading", "not looked at again within a second"
    rig.now += 1.0
    call.sees(2 * 10**9, 50 * 10**9)
    failed = reaches(downloads, a, "failed")
    assert (failed.error, failed.may_resume, failed.completed_bytes) == ("disk_full", True, 2 * 10**9)
    assert "48.0 GB" in failed.message


def test_following_shows_every_step_to_the_end(rig: Rig, downloads: DownloadQueue) -> None:
    """The view at hand first, None while nothing happens, the end last."""
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    views = downloads.follow(a.id, heartbeat=0.01)
    assert next(views) == downloads.get(a.id)
    assert next(views) is None
    call.sees(40, 100)
    moved = next(views)
    assert moved is not None
    assert moved.percent == 40
    call.ends()
    rest = [view for view in views if view is not None]
    assert [view.state for view in rest] == ["complete"]
    assert rest[0].version > moved.version


@pytest.mark.parametrize(("command", "state"), [("pause", "paused"), ("cancel", "cancelled")])
def test_following_ends_when_nothing_more_will_happen(
    rig: Rig, downloads: DownloadQueue, command: str, state: str
) -> None:
    a = ask(downloads, "a")
    rig.fetcher.next("a")
    views = downloads.follow(a.id)
    next(views)
    getattr(downloads, command)(a.id)
    assert [view.state for view in views if view is not None] == [state]


def test_following_ends_when_the_download_leaves_the_list_or_the_app_stops(downloads: DownloadQueue) -> None:
    """At once, not with the next heartbeat."""
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


def test_waiting_for_news(rig: Rig, downloads: DownloadQueue) -> None:
    """The version grows with every change; without one the wait ends in time."""
    before = downloads.version
    assert downloads.wait_newer(before, timeout=0.01) == before
    threading.Thread(target=ask, args=(downloads, "a"), daemon=True).start()
    assert downloads.wait_newer(before, timeout=TIMEOUT) > before
    rig.fetcher.next("a")


def test_a_restart_goes_on_where_it_was(rig: Rig, tmp_path: Path) -> None:
    """In the old order and with the old figures; what was paused stays so, what had ended is still listed."""
    store = open_store(tmp_path / "switchyard.db")
    rig.store = DownloadRepository(store)  # type: ignore[assignment]
    first = rig.queue(at_once=1)
    done = ask(first, "done")
    rig.fetcher.next("done").ends()
    reaches(first, done, "complete")
    running, held, waiting = (ask(first, name) for name in ("running", "held", "waiting"))
    call = rig.fetcher.next("running")
    call.sees(70, 100)
    first.pause(held.id)
    first.close()
    assert call.over.is_set(), "no transfer survives"
    assert first.get(running.id).state == "downloading", "stopping is no failure"

    second = rig.queue(at_once=1)
    assert [(d.id, d.state) for d in second.all()] == [
        (running.id, "downloading"),
        (held.id, "paused"),
        (waiting.id, "queued"),
        (done.id, "complete"),
    ]
    again = second.get(running.id)
    assert (again.percent, again.completed_bytes, again.total_bytes) == (70, 70, 100)
    rig.fetcher.next("running").ends()
    rig.fetcher.next("waiting").ends()
    reaches(second, waiting, "complete")
    second.close()
    store.close()


def test_nothing_is_accepted_that_would_be_lost(rig: Rig, downloads: DownloadQueue) -> None:
    """Once the app stops, commands are refused instead of forgotten."""
    a = ask(downloads, "a")
    downloads.close()
    for command in (lambda: ask(downloads, "b"), lambda: downloads.pause(a.id), lambda: downloads.cancel(a.id)):
        with pytest.raises(DownloadError, match="Switchyard is stopping") as error:
            command()
        assert error.value.code == "stopping"
    assert {row.state for row in rig.store.rows.values()} == {"downloading"}


def test_figures_are_stored_now_and_then_and_states_at_once(rig: Rig, downloads: DownloadQueue) -> None:
    """A hundred reports in two seconds are no hundred writes."""
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    before = len(rig.store.written)
    for n in range(100):
        call.sees(n, 100)
    assert len(rig.store.written) == before
    rig.now += 2.0
    call.sees(99, 100)
    assert rig.store.rows[a.id].completed_bytes == 99
    downloads.pause(a.id)
    assert rig.store.rows[a.id].state == "paused"


def test_a_store_that_fails_stops_no_download(rig: Rig) -> None:
    """A full disk costs the last states only as long as it is full."""
    downloads = rig.queue(at_once=1)
    a = ask(downloads, "a")
    call = rig.fetcher.next("a")
    rig.store.broken = True
    call.ends(DownloadError("disk_full", "The disk is full.", may_resume=True))
    reaches(downloads, a, "failed")
    ask(downloads, "b")
    rig.fetcher.next("b")
    rig.store.broken = False
    ask(downloads, "c")
    assert {row.model: row.state for row in rig.store.rows.values()} == {
        "a": "failed",
        "b": "downloading",
        "c": "queued",
    }


def test_only_the_latest_that_ended_are_kept(rig: Rig, downloads: DownloadQueue) -> None:
    """Here and in the store; what is unfinished always is."""
    ids = []
    for n in range(FINISHED_KEPT + 5):
        asked = ask(downloads, f"m{n}")
        rig.fetcher.next(f"m{n}").ends()
        reaches(downloads, asked, "complete")
        ids.append(asked.id)
    unfinished = ask(downloads, "last")
    assert [d.id for d in downloads.all()] == [unfinished.id, *reversed(ids[5:])]
    assert set(rig.store.rows) == {unfinished.id, *ids[5:]}
    downloads.remove(ids[-1])
    assert ids[-1] not in rig.store.rows


def test_a_listener_that_fails_harms_nobody(rig: Rig) -> None:
    """The files are here whatever the look for them says, so the download is complete, and the next one runs."""

    def fail(_: Download) -> None:
        raise ZeroDivisionError

    downloads = rig.queue(at_once=1, on_complete=fail, listing_seconds=0.2)
    a = ask(downloads, "a")
    rig.fetcher.next("a").ends()
    reaches(downloads, a, "complete")
    ask(downloads, "b")
    rig.fetcher.next("b")


def test_who_hears_that_it_is_complete_finds_the_model(rig: Rig) -> None:
    """The listener, which has the catalogue look again, is through before anybody is told."""
    stages: list[str] = []
    downloads = rig.queue(on_complete=lambda download: stages.append(downloads.get(download.id).state))
    a = ask(downloads, "a")
    views = downloads.follow(a.id)
    rig.fetcher.next("a").ends()
    assert [view.state for view in views if view is not None][-1] == "complete"
    assert stages == ["verifying"]


class Busy:
    """A source whose transfers end by themselves, well or not, and which notes what goes on side by side."""

    source: Source = "ollama"

    def __init__(self, seed: int) -> None:
        self._lock = threading.Lock()
        self._chance = random.Random(seed)
        self._working: Counter[str] = Counter()
        self.most_at_once = 0
        self.same_at_once: set[str] = set()

    def check_name(self, name: str) -> str:
        return name

    def fetch(self, name: str, report: Report, abort: Abort) -> None:
        with self._lock:
            self._working[name] += 1
            self.most_at_once = max(self.most_at_once, self._working.total())
            self._note(name)
            fate = self._chance.random()
        try:
            for n in range(3):
                report(Seen("downloading", {"layer": Part(n, 3)}))
                abort.wait(0.001)
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
def test_nothing_is_lost_when_many_hands_pull_at_once(rig: Rig, seed: int) -> None:
    """Four threads ask, pause, resume, cancel and remove at random.

    Never more at work than may be, never two on the same model, and each job ends as the last accepted command says.
    """
    busy = Busy(seed)
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


def test_complete_is_said_once_the_model_can_be_switched_to(rig: Rig) -> None:
    """An engine may list a new model a second late, and a look may fail: nobody hears of the end before it is found."""
    looks = iter([False, False, ConnectionError("Ollama is busy"), False, True])
    seen: list[str] = []

    def look(download: Download) -> bool:
        seen.append(downloads.get(download.id).state)
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        return found

    downloads = rig.queue(on_complete=look)
    a = ask(downloads, "a")
    views = downloads.follow(a.id)
    rig.fetcher.next("a").ends()
    assert [view.state for view in views if view is not None][-1] == "complete"
    assert seen == ["verifying"] * 5


@pytest.mark.parametrize(("command", "state"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_download_can_be_stopped_while_its_model_is_looked_for(rig: Rig, command: str, state: str) -> None:
    """What was answered stays, and the place is free for the next one at once, not when the look gives up."""
    looked = threading.Event()

    def look(_: Download) -> bool:
        looked.set()
        return False

    downloads = rig.queue(at_once=1, on_complete=look, listing_seconds=3600.0)
    a, _ = ask(downloads, "a"), ask(downloads, "b")
    rig.fetcher.next("a").ends()
    assert looked.wait(TIMEOUT)
    assert getattr(downloads, command)(a.id).state == state
    rig.fetcher.next("b")
    assert downloads.get(a.id).state == state


@pytest.mark.parametrize(("command", "state"), [("cancel", "cancelled"), ("pause", "paused")])
def test_stopping_waits_for_no_disk(rig: Rig, command: str, state: str) -> None:
    """The transfer is stopped and the list says so before the store, which may take its time, has heard of it."""
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
    wait_until(lambda: rig.store.rows[a.id].state == state, "the store to hear of it")
