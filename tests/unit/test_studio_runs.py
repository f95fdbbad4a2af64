"""The Studio's runs in a real database: one at a time, kept, followed, opened after a restart, continued, deleted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.providers.ports import JobProviders, ProviderError
from services.store.database import open_store
from services.store.deferred import DeferredWrites
from services.store.repository import Store, StudioRepository
from services.studio.pictures import Pictures
from services.studio.request import InvalidRequest
from services.studio.studio import FINISHED_IN_MEMORY, Asked, RunNotFound, Studio, StudioError
from tests.heart.virtual import VirtualScheduler
from tests.support.faults import locked_database
from tests.support.studio_providers import FakeImages, FakeText, FakeVision, fake_providers, refusing

ASKED = Asked("a fox", 2, 1, 3, seed=7)
LONG = 1e5


class Desk:
    """A Studio on a virtual clock; `restart` makes the next one on the same folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options: dict = {"seconds": 1.0}
        self.given: Any = None
        self.start()

    def start(self) -> None:
        self.clock = VirtualScheduler()
        self.store: Store = open_store(self.folder / "switchyard.db", lock_timeout=0.05)
        self.repository = StudioRepository(self.store)
        self.writes = DeferredWrites(self.clock)
        self.pictures = Pictures(self.folder / "pictures", 1_000_000)
        self.studio = Studio(
            self.repository, self.pictures, self.providers, self.writes, at_once=4, scheduler=self.clock
        )

    def providers(self) -> JobProviders:
        self.given = fake_providers(self.clock, **self.options)
        return self.given

    def stop(self) -> None:
        self.studio.close()
        self.writes.close()
        assert self.clock.failures == []
        self.store.close()

    def crash(self) -> None:
        self.clock.kill()
        self.store.close()

    def run(self, asked: Asked = ASKED) -> str:
        """Make a whole run; return its id."""
        run_id = self.studio.start(asked).run.id
        self.wait(run_id)
        return run_id

    def wait(self, run_id: str) -> None:
        assert self.clock.run_until(lambda: self.studio.get(run_id).run.final, LONG)
        self.clock.settle()

    def part(self, seconds: float) -> None:
        self.clock.run_until(lambda: False, seconds)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.stop()


def test_a_run_is_found_again_after_a_restart(desk: Desk):
    """With its candidates, scores, ranks, pictures and what it cost."""
    run_id = desk.run()
    before = desk.studio.get(run_id)
    desk.stop()
    desk.start()
    after = desk.studio.get(run_id)
    assert (after.run, after.candidates, after.ranking) == (before.run, before.candidates, before.ranking)
    assert after.run.state == "complete"
    assert all(desk.pictures.has(c.picture) for c in after.candidates)


@pytest.mark.parametrize("end", ["crash", "stop"])
def test_a_run_that_a_restart_cut_off_is_marked_and_keeps_what_was_made(desk: Desk, end: str):
    run_id = desk.studio.start(ASKED).run.id
    desk.part(2.5)
    getattr(desk, end)()
    desk.start()
    view = desk.studio.get(run_id)
    assert view.run.state == "interrupted"
    assert view.run.finished_at is not None
    assert [c.state for c in view.candidates] == ["drawn"] * 3
    assert desk.studio.under_way is None
    desk.run()


def test_a_close_ends_every_call_upstream(desk: Desk):
    desk.studio.start(ASKED)
    desk.part(1.5)
    assert desk.given.image.running == 3
    desk.studio.close()
    desk.clock.settle()
    assert desk.given.image.running == 0
    with pytest.raises(StudioError) as refused:
        desk.studio.start(ASKED)
    assert refused.value.code == "stopping"


def test_a_run_whose_providers_are_checked_while_the_app_stops_does_not_begin(desk: Desk, monkeypatch):
    """The check takes seconds; a run begun after it would have nobody to cancel it."""
    checked = desk.providers

    def stopped_meanwhile() -> JobProviders:
        desk.studio.close()
        return checked()

    monkeypatch.setattr(desk.studio, "_providers", stopped_meanwhile)
    with pytest.raises(StudioError) as refused:
        desk.studio.start(ASKED)
    assert refused.value.code == "stopping"
    assert desk.studio.listed(10) == []


def test_one_run_at_a_time(desk: Desk):
    """A second one is refused before a provider is asked for; it can be started when the first is over."""
    first = desk.studio.start(ASKED).run.id
    with pytest.raises(StudioError) as refused:
        desk.studio.start(ASKED)
    assert refused.value.code == "run_in_progress"
    assert desk.studio.under_way.run.id == first
    desk.wait(first)
    assert desk.run() != first


def test_an_unavailable_provider_refuses_the_start_and_the_next_start_may_succeed(desk: Desk):
    def unavailable():
        raise ProviderError("provider_unavailable", "Start it first.")

    desk.studio._providers = unavailable
    with pytest.raises(ProviderError):
        desk.studio.start(ASKED)
    assert desk.studio.listed(10) == []
    desk.studio._providers = desk.providers
    desk.run()


def test_a_switch_of_providers_applies_to_the_next_run_never_to_the_one_under_way(desk: Desk):
    """The choice is changed while the first runs: it goes on with its own, the second reports the new ones."""
    first = desk.studio.start(ASKED).run.id
    desk.part(0.5)
    other = JobProviders(
        *(kind(name, scheduler=desk.clock) for kind, name in ((FakeText, "w2"), (FakeImages, "b2"), (FakeVision, "e2")))
    )
    desk.studio._providers = lambda: other
    desk.wait(first)
    second = desk.run()
    assert desk.studio.get(first).run.providers["image"] == {"provider": "brush", "model": "brush-model"}
    assert desk.studio.get(second).run.providers["image"] == {"provider": "b2", "model": "b2-model"}


@pytest.mark.parametrize(
    "asked",
    [
        Asked("", 1, 1, 1),
        Asked("x" * 2001, 1, 1, 1),
        Asked("p", 2, 1, 1),
        Asked("p", 1, 99, 1),
        Asked("p", 1, 1, 1, -1),
    ],
)
def test_an_invalid_request_is_refused_before_anything_is_spent(desk: Desk, asked: Asked):
    with pytest.raises(InvalidRequest):
        desk.studio.start(asked)
    assert desk.given is None


def test_without_a_seed_one_is_drawn_and_told(desk: Desk):
    seeds = {desk.studio.get(desk.run(Asked("p", 1, 1, 1))).run.seed for _ in range(3)}
    assert len(seeds) == 3


def test_the_same_seed_gives_the_same_ranking_and_shares_the_pictures(desk: Desk):
    first, second = (desk.studio.get(desk.run()) for _ in range(2))
    assert [(c.number, c.picture, c.total) for c in first.ranking] == [
        (c.number, c.picture, c.total) for c in second.ranking
    ]
    desk.studio.delete(first.run.id)
    assert all(desk.pictures.has(c.picture) for c in second.candidates)
    desk.studio.delete(second.run.id)
    assert not any(desk.pictures.has(c.picture) for c in second.candidates)


def test_a_deleted_run_is_gone_for_good(desk: Desk):
    """Also when it was not saved yet; one under way is not deleted."""
    run_id = desk.studio.start(ASKED).run.id
    with pytest.raises(StudioError) as refused:
        desk.studio.delete(run_id)
    assert refused.value.code == "not_possible"
    desk.part(2.5)
    view = desk.studio.cancel(run_id)
    assert all(desk.pictures.has(c.picture) for c in view.candidates)
    desk.studio.delete(run_id)
    assert not any(desk.pictures.has(c.picture) for c in view.candidates)
    desk.part(10)
    for call in (desk.studio.get, desk.studio.delete, desk.studio.cancel, desk.studio.follow):
        with pytest.raises(RunNotFound):
            call(run_id)
    assert desk.repository.newest_first() == []


def test_runs_come_newest_first_in_pages_with_their_best_candidate(desk: Desk):
    ids = []
    for _ in range(4):
        ids.append(desk.run())
        desk.part(1.0)
    listed = desk.studio.listed(3)
    assert [each.run.id for each in listed] == ids[:0:-1]
    assert all(each.best.rank == 1 for each in listed)
    last = listed[-1].run
    assert [each.run.id for each in desk.studio.listed(3, (last.created_at, last.id))] == [ids[0]]
    desk.options = {}
    unsaved = {desk.run(), desk.run()}
    first, second, *saved = (each.run for each in desk.studio.listed(9))
    assert {first.id, second.id} == unsaved
    assert [each.run for each in desk.studio.listed(9, (first.created_at, first.id))] == [second, *saved]


def test_a_run_deleted_at_once_leaves_no_picture_behind(desk: Desk):
    """It is deleted before anything of it was saved."""
    desk.options = {}
    run_id = desk.studio.start(ASKED).run.id
    assert desk.clock.run_until(lambda: desk.studio.get(run_id).run.final, LONG)
    view = desk.studio.get(run_id)
    assert view.candidates
    desk.studio.delete(run_id)
    assert not any(desk.pictures.has(c.picture) for c in view.candidates)


def test_a_locked_database_delays_nothing_and_loses_nothing(desk: Desk):
    with locked_database(desk.folder / "switchyard.db"):
        run_id = desk.studio.start(ASKED).run.id
        assert desk.clock.run_until(lambda: desk.studio.get(run_id).run.final, LONG)
        assert [each.run.id for each in desk.studio.listed(5)] == [run_id]
    desk.part(5)
    run, candidates = desk.repository.get(run_id)
    assert run.state == "complete"
    assert len(candidates) == 3


def test_events_are_replayed_from_the_database_and_their_ids_are_honoured(desk: Desk):
    """Ids of the live log mean nothing to the kept one: a follower from before gets everything again."""
    run_id = desk.run()
    live = [event for event in desk.studio.follow(run_id) if event]
    assert [event_id for event_id, _ in desk.studio.follow(run_id, live[3][0])] == [e for e, _ in live[4:]]
    desk.stop()
    desk.start()
    kept = list(desk.studio.follow(run_id))
    assert [event.name for _, event in kept] == ["providers", *["candidate"] * 3, "result"]
    assert list(desk.studio.follow(run_id, live[3][0])) == kept
    assert list(desk.studio.follow(run_id, kept[1][0])) == kept[2:]
    for odd in ("kept-", "kept--1", "kept-9999999999999", "x", "kept-²"):
        assert list(desk.studio.follow(run_id, odd)) == kept


def test_few_runs_that_are_over_stay_in_memory(desk: Desk):
    desk.options = {}
    ids = []
    for _ in range(FINISHED_IN_MEMORY + 3):
        ids.append(desk.run())
        desk.part(1.0)  # in which it is saved
    assert len(desk.studio._runs) <= FINISHED_IN_MEMORY + 1
    assert all(desk.studio.get(run_id).run.state == "complete" for run_id in ids)


def test_a_run_goes_on_from_a_candidate(desk: Desk):
    run_id = desk.run()
    best = desk.studio.get(run_id).ranking[0]
    more = desk.run(Asked("a fox", 1, 1, 2, 7, origin=(run_id, best.number)))
    assert (desk.studio.get(more).run.origin_run, desk.studio.get(more).run.origin_number) == (run_id, best.number)
    assert best.what in desk.given.llm.asked[0]
    with pytest.raises(InvalidRequest):
        desk.studio.start(Asked("p", 1, 1, 1, origin=(run_id, 99)))
    with pytest.raises(RunNotFound):
        desk.studio.start(Asked("p", 1, 1, 1, origin=("nobody", 1)))


def test_a_cancel_is_kept_with_what_was_made(desk: Desk):
    run_id = desk.studio.start(Asked("p", 1, 3, 2, 7)).run.id
    desk.part(3.5)
    view = desk.studio.cancel(run_id)
    assert view.run.state == "cancelled"
    assert [c.rank for c in view.ranking] == [1, 2]
    assert desk.studio.cancel(run_id).run == view.run


def test_a_failure_is_kept_in_the_providers_words(desk: Desk):
    desk.options = {"trouble": refusing("out_of_memory", "Needs 12 GB.")}
    run_id = desk.run()
    desk.stop()
    desk.start()
    assert desk.studio.get(run_id).run.message == "Needs 12 GB."
