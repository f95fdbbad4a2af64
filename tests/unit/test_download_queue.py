"""The download queue, with a fetcher that does what a test says."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from services.downloads.disk import DiskCheck
from services.downloads.fetcher import Abort, Aborted, DownloadError, Part, Report, Seen
from services.downloads.queue import Download, DownloadNotFound, DownloadQueue
from services.store.repository import DownloadRepository, open_store
from tests.support.console import wait_until

MB = 1_000_000


class Script:
    """A fetcher whose transfers wait for orders, one transfer per model at a time."""

    source = "ollama"

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: dict[str, Transfer] = {}
        self.most = 0
        self.starts: dict[str, int] = defaultdict(int)
        self.discarded: list[str] = []
        self.violations: list[str] = []

    def check_name(self, name: str) -> str:
        if " " in name:
            raise DownloadError("invalid_name", f"{name!r} is not a name.")
        return name.lower()

    def fetch(self, name: str, report: Report, abort: Abort) -> None:
        transfer = Transfer(report, abort)
        with self.lock:
            if name in self.running:
                self.violations.append(f"two transfers of {name}")
            self.running[name] = transfer
            self.most = max(self.most, len(self.running))
            self.starts[name] += 1
        try:
            transfer.run()
        finally:
            with self.lock:
                del self.running[name]

    def discard(self, name: str) -> None:
        with self.lock:
            if name in self.running:
                self.violations.append(f"{name} discarded while it runs")
        self.discarded.append(name)


class Transfer:
    """One run: `see` and `end` are orders to it."""

    def __init__(self, report: Report, abort: Abort) -> None:
        self.report = report
        self.abort = abort
        self.orders: list[Callable[[], bool]] = []
        self.ordered = threading.Condition()
        abort.applies_to(self._wake)

    def see(self, completed: int, total: int, phase: str = "downloading") -> None:
        self._order(lambda: bool(self.report(Seen(phase, {"layer": Part(completed, total)}))))  # type: ignore[arg-type]

    def end(self, error: Exception | None = None) -> None:
        def act() -> bool:
            if error is not None:
                raise error
            return True

        self._order(act)

    def run(self) -> None:
        while True:
            with self.ordered:
                self.ordered.wait_for(lambda: self.orders or self.abort.requested)
                if self.abort.requested:
                    raise Aborted
                order = self.orders.pop(0)
            if order():
                return

    def _order(self, act: Callable[[], bool]) -> None:
        with self.ordered:
            self.orders.append(act)
            self.ordered.notify_all()

    def _wake(self) -> None:
        with self.ordered:
            self.ordered.notify_all()


class Desk:
    """A queue on a real database, and what a test needs around it."""

    def __init__(self, folder: Path) -> None:
        self.store = open_store(folder / "test.db")
        self.script = Script()
        self.free = 10**12
        self.completed: list[str] = []
        self.queues: list[DownloadQueue] = []

    def open(self, *, start: bool = True, **options: object) -> DownloadQueue:
        disk = DiskCheck({"ollama": lambda: Path("/")}, margin_bytes=0, free_bytes=lambda _: self.free)
        options = {"at_once": 2, "retry_pauses": (0.01, 0.01), **options}
        queue = DownloadQueue(
            {"ollama": self.script},  # type: ignore[dict-item]
            DownloadRepository(self.store),
            disk=disk,
            on_complete=lambda download: self.completed.append(download.model),
            **options,  # type: ignore[arg-type]
        )
        self.queues.append(queue)
        if start:
            queue.start()
        return queue

    def transfer(self, model: str) -> Transfer:
        wait_until(lambda: model in self.script.running, f"the transfer of {model}")
        return self.script.running[model]

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
        self.store.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.close()


def reaches(queue: DownloadQueue, job: Download, state: str) -> Download:
    wait_until(lambda: queue.get(job.id).state == state, f"{job.model} to be {state}")
    return queue.get(job.id)


def test_a_download_runs_to_its_end(desk):
    """Queued, downloading with figures, verifying, complete; then whoever has to know is told, once."""
    queue = desk.open()
    job = queue.request("llama", "ollama", "test")
    transfer = desk.transfer("llama")
    transfer.see(30 * MB, 100 * MB)
    wait_until(lambda: queue.get(job.id).percent == 30, "30 percent")
    assert (queue.get(job.id).completed_bytes, queue.get(job.id).total_bytes) == (30 * MB, 100 * MB)
    transfer.see(100 * MB, 100 * MB, "verifying")
    assert reaches(queue, job, "verifying").message == "Verifying"
    transfer.end()
    done = reaches(queue, job, "complete")
    assert (done.percent, done.bytes_per_second, done.error) == (100, None, None)
    wait_until(lambda: desk.completed == ["llama"], "the news")


def test_only_so_many_run_at_once_and_the_rest_knows_its_place(desk):
    """Two run, the others are numbered; when one ends the next starts."""
    queue = desk.open()
    jobs = [queue.request(name, "ollama", "test") for name in ("a", "b", "c", "d")]
    desk.transfer("a")
    desk.transfer("b")
    assert [queue.get(j.id).position for j in jobs] == [None, None, 1, 2]
    desk.transfer("a").end()
    desk.transfer("c")
    wait_until(lambda: queue.get(jobs[3].id).position == 1, "the last one to move up")
    assert desk.script.most == 2


def test_asking_twice_is_one_download(desk):
    """Also under another spelling of the same name; a paused one goes on, a complete one is fetched anew."""
    queue = desk.open()
    first = queue.request("llama", "ollama", "test")
    assert queue.request("LLAMA", "ollama", "test").id == first.id
    desk.transfer("llama")
    queue.pause(first.id)
    wait_until(lambda: not desk.script.running, "the transfer to end")
    assert queue.request("llama", "ollama", "test").id == first.id
    desk.transfer("llama").end()
    reaches(queue, first, "complete")
    assert queue.request("llama", "ollama", "test").id != first.id
    assert desk.script.violations == []


def test_a_name_that_is_none_is_refused_before_anything_is_stored(desk):
    """The fetcher's words pass through."""
    queue = desk.open()
    with pytest.raises(DownloadError, match="not a name"):
        queue.request("no name", "ollama", "test")
    assert queue.all() == ()


def test_pausing_stops_the_transfer_and_resuming_goes_on(desk):
    """The slot is free at once for the next one; what has arrived is still shown."""
    queue = desk.open(at_once=1)
    first, second = (queue.request(name, "ollama", "test") for name in ("a", "b"))
    desk.transfer("a").see(30 * MB, 100 * MB)
    wait_until(lambda: queue.get(first.id).percent == 30, "30 percent")
    paused = queue.pause(first.id)
    assert (paused.state, paused.completed_bytes, paused.bytes_per_second) == ("paused", 30 * MB, None)
    desk.transfer("b").end()
    reaches(queue, second, "complete")
    queue.resume(first.id)
    desk.transfer("a").end()
    assert reaches(queue, first, "complete").percent == 100
    assert desk.script.discarded == []


def test_cancelling_stops_the_transfer_and_gives_up_what_arrived(desk):
    """Only after the transfer has ended; one that never ran is given up as well."""
    queue = desk.open(at_once=1)
    first, second = (queue.request(name, "ollama", "test") for name in ("a", "b"))
    desk.transfer("a")
    assert queue.cancel(second.id).state == "cancelled"
    assert queue.cancel(first.id).state == "cancelled"
    wait_until(lambda: sorted(desk.script.discarded) == ["a", "b"], "both to be given up")
    assert desk.script.violations == []
    assert desk.completed == []


def test_a_failure_says_why_and_can_be_tried_again(desk):
    """The cause and its code; trying again clears them."""
    queue = desk.open()
    job = queue.request("a", "ollama", "test")
    desk.transfer("a").end(DownloadError("unknown_model", "There is no model a."))
    failed = reaches(queue, job, "failed")
    assert (failed.error, failed.message) == ("unknown_model", "There is no model a.")
    queue.resume(job.id)
    desk.transfer("a").end()
    assert reaches(queue, job, "complete").error is None


def test_trouble_on_the_way_is_tried_again_by_itself_but_not_for_ever(desk):
    """Three tries without a new byte, then it has failed; a try that brought some starts the count anew."""
    queue = desk.open()
    job = queue.request("a", "ollama", "test")
    for number, completed in enumerate([1, 2, 2, 2], start=1):
        wait_until(lambda n=number: desk.script.starts["a"] == n and "a" in desk.script.running, "the next try")
        desk.transfer("a").see(completed * MB, 100 * MB)
        desk.transfer("a").end(DownloadError("interrupted", "It broke off.", may_resume=True))
    failed = reaches(queue, job, "failed")
    assert (failed.error, failed.may_resume) == ("interrupted", True)
    assert desk.script.starts["a"] == 4


def test_a_fetcher_that_breaks_fails_its_download_alone(desk):
    """Whatever it raised; the queue lives on."""
    queue = desk.open()
    job = queue.request("a", "ollama", "test")
    desk.transfer("a").end(ZeroDivisionError("a bug"))
    assert reaches(queue, job, "failed").error == "internal_error"
    other = queue.request("b", "ollama", "test")
    desk.transfer("b").end()
    reaches(queue, other, "complete")


def test_a_disk_without_room_is_noticed_at_the_first_size(desk):
    """Before the bytes are moved, in words with figures; with room again it can be resumed."""
    desk.free = 50 * MB
    queue = desk.open()
    job = queue.request("a", "ollama", "test")
    desk.transfer("a").see(0, 100 * MB)
    failed = reaches(queue, job, "failed")
    assert failed.error == "disk_full"
    assert "100 MB more" in failed.message
    desk.free = 10**12
    queue.resume(job.id)
    desk.transfer("a").end()
    reaches(queue, job, "complete")


def test_a_restart_goes_on_with_what_was_under_way(desk):
    """In the old order; what was paused stays paused, what has ended stays on the list."""
    first = desk.open(at_once=1)
    done = first.request("done", "ollama", "test")
    desk.transfer("done").end()
    reaches(first, done, "complete")
    for name in ("a", "b", "c"):
        first.request(name, "ollama", "test")
    desk.transfer("a").see(40 * MB, 100 * MB)
    wait_until(lambda: first.all()[0].percent == 40, "40 percent")
    first.pause(first.all()[1].id)
    first.close()
    second = desk.open(at_once=1, start=False)
    second.start()
    assert [(d.model, d.state) for d in second.all()] == [
        ("a", "downloading"),
        ("b", "paused"),
        ("c", "queued"),
        ("done", "complete"),
    ]
    desk.transfer("a").end()
    reaches(second, second.all()[0], "complete")


@pytest.mark.parametrize("verb", ["pause", "cancel", "resume"])
def test_what_is_complete_can_not_be_changed(desk, verb):
    """It says so; taking it off the list is possible."""
    queue = desk.open()
    job = queue.request("a", "ollama", "test")
    with pytest.raises(DownloadError, match="under way"):
        queue.remove(job.id)
    desk.transfer("a").end()
    reaches(queue, job, "complete")
    with pytest.raises(DownloadError, match="complete"):
        getattr(queue, verb)(job.id)
    queue.remove(job.id)
    with pytest.raises(DownloadNotFound):
        queue.get(job.id)
    assert desk.open().all() == ()


def test_following_tells_every_news_until_the_end(desk):
    """The view as it is, then newer ones, the last of them final; two followers see the same."""
    queue = desk.open()
    job = queue.request("a", "ollama", "test")
    heard: list[list[Download]] = [[], []]

    def follow(into: list[Download]) -> None:
        into.extend(view for view in queue.follow(job.id, heartbeat=0.05) if view is not None)

    followers = [threading.Thread(target=follow, args=(into,)) for into in heard]
    for follower in followers:
        follower.start()
    transfer = desk.transfer("a")
    transfer.see(50 * MB, 100 * MB)
    wait_until(lambda: all(into and into[-1].percent == 50 for into in heard), "the followers to hear of it")
    transfer.end()
    for follower in followers:
        follower.join(10)
    for into in heard:
        assert into[-1].state == "complete"
        assert [view.version for view in into] == sorted({view.version for view in into})
        assert [view.percent for view in into] == sorted(view.percent for view in into)


def test_orders_from_many_threads_leave_no_job_in_two_minds(desk):
    """Whatever is asked at once: never more than two transfers, never two of one model, every job comes to its end."""
    queue = desk.open()
    names = [f"model-{n}" for n in range(4)]
    errors: list[Exception] = []

    def meddle(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            try:
                name = rng.choice(names)
                job = queue.request(name, "ollama", "test")
                verb = rng.choice([queue.pause, queue.resume, queue.cancel])
                verb(job.id)
                transfer = desk.script.running.get(name)
                if transfer is not None and rng.random() < 0.3:
                    transfer.end()
            except (DownloadError, DownloadNotFound):
                continue
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=meddle, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for job in [j for j in queue.all() if not j.final]:
        queue.cancel(job.id)
    wait_until(lambda: not desk.script.running, "every transfer to end")
    assert all(job.final for job in queue.all())
    assert desk.script.violations == []
    assert desk.script.most <= 2


def test_the_disk_rule_keeps_its_margin_and_finds_a_folder_that_is_not_there_yet(tmp_path):
    """What lies elsewhere or has no known size can't be checked, and passes."""
    asked: list[Path] = []

    def free(folder: Path) -> int:
        asked.append(folder)
        return 10 * MB

    check = DiskCheck({"ollama": lambda: tmp_path / "not" / "yet"}, margin_bytes=4 * MB, free_bytes=free)
    check.check("ollama", 6 * MB)
    with pytest.raises(DownloadError, match="disk_margin_gb"):
        check.check("ollama", 6 * MB + 1)
    assert set(asked) == {tmp_path}
    check.check("ollama", None)
    check.check("huggingface", 10**15)
    DiskCheck({"ollama": lambda: None}, margin_bytes=0).check("ollama", 10**15)


def test_views_are_values():
    """A view handed out never changes under its reader."""
    view = Download("1", "ollama", "a", "queued", "test", 0.0)
    assert replace(view, percent=3).percent == 3
    assert view.percent == 0
