"""Texts on the pages about models, switches and downloads: equal statuses give equal texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from blueprints.live import Live
from services.downloads.download import Download
from services.engines.supervisor import ServiceStatus
from services.status import ModelStatus, Status
from services.switching.events import LoadView, Loss, SwitchView

NOW = 1_800_000_000.0
MODEL = ModelStatus(
    id="small",
    engine="llamacpp",
    state="stopped",
    active=False,
    description="",
    tags=(),
    size_bytes=1,
    used_bytes=None,
    required_bytes=None,
    memory_basis=None,
    estimated_load_seconds=None,
    load=None,
    device=None,
    in_flight=0,
    last_used=None,
    error=None,
    warning=None,
    log_tail="",
)
RUNNING = replace(MODEL, id="large", state="running", active=True)


def live(**status: Any) -> Live:
    empty = Status(
        version=1,
        models=(MODEL,),
        devices=(),
        active_model=None,
        switch=None,
        last_switch=None,
        queued=(),
    )
    return Live(replace(empty, **status), NOW)


def switch(**changes: Any) -> SwitchView:
    plain = SwitchView(id="1", to_model="small", from_model=None, requested_by="test", started_at=NOW - 9)
    return replace(plain, **changes)


def download(**changes: Any) -> Download:
    plain = Download(
        id="1",
        source="ollama",
        model="llama3.2:latest",
        state="downloading",
        percent=45,
        completed_bytes=45,
        total_bytes=100,
        bytes_per_second=None,
        eta_seconds=None,
        message="",
        requested_by="test",
        created_at=NOW - 900,
        started_at=NOW - 900,
        finished_at=None,
        version=1,
    )
    return replace(plain, **changes)


def with_downloads(*downloads: Download, **more: Any) -> Live:
    return replace(live(), downloads=downloads, **more)


def test_the_composer_says_why_it_is_locked_and_until_when() -> None:
    assert live().lock == "Choose a model to start"
    assert live(models=()).lock == "Add a model to start"
    assert live(switch=switch(eta_seconds=45)).lock == "Switching to small, about 45 s"
    assert live(switch=switch()).lock == "Switching to small"
    assert live(models=(RUNNING, MODEL), active_model="large").lock is None
    arriving = switch(stage="downloading", eta_seconds=3600)
    assert live(models=(RUNNING, MODEL), active_model="large", switch=arriving).lock is None
    assert live(switch=arriving).lock is not None


@pytest.mark.parametrize(
    ("age", "tone"),
    [(1, "ready"), (3.9, "ready"), (4.1, None)],
)
def test_a_success_is_shown_for_four_seconds(age: float, tone: str | None) -> None:
    banner = live(last_switch=switch(stage="ready", finished_at=NOW - age)).banner
    assert (banner.tone if banner else None) == tone


@pytest.mark.parametrize("stage", ["failed", "rolled_back", "refused"])
def test_a_failure_stays_until_it_is_dismissed(stage: str) -> None:
    told = live(last_switch=switch(stage=stage, finished_at=NOW - 86400, message="No room."))
    assert told.banner is not None
    assert told.banner.tone == "failed"
    assert told.cause == "No room."
    assert told.running_now == "No model is loaded now."


def test_what_is_running_is_shown_once() -> None:
    last = switch(stage="rolled_back", message="Out of memory.", restored=("large",))
    told = live(models=(RUNNING, MODEL), active_model="large", last_switch=last)
    assert told.cause == "Out of memory."
    assert told.running_now == "large is running again."


def test_all_restored_models_are_listed_as_running_again() -> None:
    last = switch(stage="rolled_back", message="Out of memory.", restored=("large", "other", "third"))
    running = (RUNNING, replace(RUNNING, id="other", active=False), replace(RUNNING, id="third", active=False))
    assert live(models=running, active_model="large", last_switch=last).running_now == (
        "large, other and third are running again."
    )
    assert live(models=running[:2], active_model="large", last_switch=last).running_now == (
        "large and other are running again."
    ), "one of them was unloaded since"
    cancelled = replace(last, stage="cancelled", restored=("other",))
    assert live(models=running, active_model="large", last_switch=cancelled).running_now == (
        "other is running again. large is still running."
    )


def test_a_rollback_has_the_same_name_everywhere() -> None:
    """In the banner, in the header, under the composer and for screen readers."""
    told = live(switch=switch(stage="rolling_back", eta_seconds=12), models=(replace(MODEL, state="loading"),))
    assert told.restoring
    assert told.stage == "Restoring previous models"
    assert told.lock == "Restoring previous models, about 12 s"
    assert told.announcement == "Restoring previous models."


def test_a_switch_shows_the_progress_of_its_load() -> None:
    loading = replace(MODEL, state="loading", load=LoadView(43, "loading_weights"))
    assert live(models=(loading,), switch=switch(stage="loading")).stage == "Reading the weights"
    assert live(switch=switch(stage="waiting_for_memory")).stage == "Waiting until the memory is free"


def test_pages_poll_often_only_while_something_changes() -> None:
    assert live().poll_seconds == 5
    assert live(switch=switch()).poll_seconds == 2
    assert live(last_switch=switch(stage="ready", finished_at=NOW)).poll_seconds == 1


@pytest.mark.parametrize("state", ["queued", "downloading", "verifying"])
def test_pages_poll_often_during_a_download(state: str) -> None:
    assert with_downloads(download(state=state)).poll_seconds == 2
    assert not with_downloads(download(state=state)).moving, (
        "a page without JavaScript must not reload itself for hours"
    )


@pytest.mark.parametrize("state", ["paused", "complete", "failed", "cancelled"])
def test_pages_poll_rarely_for_a_download_that_does_not_run(state: str) -> None:
    assert with_downloads(download(state=state, finished_at=NOW)).poll_seconds == 5


@pytest.mark.parametrize(("state", "seconds"), [("starting", 2), ("stopping", 2), ("running", 5), ("unreachable", 5)])
def test_pages_poll_often_while_ollama_starts_or_stops(state: Any, seconds: int) -> None:
    told = replace(live(), service=ServiceStatus(state=state, local=True, port=11434))
    assert told.poll_seconds == seconds
    assert told.moving == (seconds == 2)


def test_unfinished_downloads_come_first_then_the_latest_ended_ones() -> None:
    ended = [download(id=f"e{n}", state="complete", finished_at=NOW - n) for n in (30, 10, 20, 40, 60, 50)]
    jobs = with_downloads(
        *ended, download(id="a"), download(id="b", state="paused"), download(id="c", state="cancelled", finished_at=NOW)
    ).jobs
    assert [job.id for job in jobs] == ["a", "b", "e10", "e20", "e30", "e40", "e50"]


def test_a_models_download_is_found_while_it_is_unfinished() -> None:
    assert with_downloads(download()).download("llama3.2:latest") == download()
    assert with_downloads(download(state="complete", finished_at=NOW)).download("llama3.2:latest") is None


def test_cancelling_most_of_a_switch_needs_confirmation() -> None:
    assert live(switch=switch(percent=63)).asks_first("large") is not None
    assert live(switch=switch(percent=50)).asks_first("large") is None
    assert live(switch=switch(percent=63)).asks_first("small") is None


def test_announcements_name_stages_without_percent() -> None:
    said = live(switch=switch(stage="checking_memory", percent=7)).announcement
    assert said == "Switching to small: Checking memory."
    assert live().announcement == "No model is loaded."


def test_the_end_of_a_download_is_announced_for_a_while() -> None:
    failed = {"state": "failed", "error": "registry_unreachable", "message": "The registry can't be reached."}
    told = with_downloads(
        download(),
        download(id="2", model="mistral:latest", finished_at=NOW - 5, **failed),
        download(id="3", model="old"),
    )
    assert told.announcement.split("\n")[1:] == [
        "llama3.2:latest is being downloaded.",
        "mistral:latest could not be downloaded. The registry can't be reached.",
        "old is being downloaded.",
    ]
    assert "45" not in told.announcement
    later = replace(told, now=NOW + 600)
    assert "mistral" not in later.announcement


def test_announcements_include_ollamas_state() -> None:
    failed = ServiceStatus(state="failed", local=True, port=11434, error="Its port is taken.")
    assert with_downloads(service=failed).announcement.split("\n")[1:] == ["Ollama has failed. Its port is taken."]


def test_without_a_forecast_or_a_count_no_percent_is_shown() -> None:
    """The start of a stage would be a guess shown as a reading; the elapsed time is true."""
    assert live(switch=switch(percent=80, eta_seconds=None, basis=None)).switch_percent is None
    assert live(switch=switch(percent=80, eta_seconds=None, basis="measured")).switch_percent == 80
    assert live(switch=switch(percent=80, eta_seconds=9.0, basis=None)).switch_percent == 80


def test_a_draining_model_shows_how_many_answers_and_how_long() -> None:
    """Seconds are rounded up, so that it never shows 0 s while it is not finished."""
    busy = replace(RUNNING, in_flight=1, drain_until=NOW + 23.2)
    told = live(models=(busy,), active_model="large")
    assert told.word(busy) == "Finishing 1 answer, at most 24 s more"
    assert told.word(replace(busy, in_flight=2, drain_until=NOW - 1)) == "Finishing 2 answers"
    assert told.word(replace(busy, in_flight=0)) == "Unloading"
    assert told.lock == "large is being unloaded"
    drains = switch(stage="draining", detail="large", eta_seconds=40)
    assert live(models=(busy, MODEL), active_model="large", switch=drains).stage == (
        "Finishing 1 answer of large, at most 24 s more"
    )
    assert live(models=(replace(busy, in_flight=0), MODEL), switch=drains).stage == "Unloading large"


@pytest.mark.parametrize(
    ("state", "word"),
    [("running", "Ready"), ("unloading", "Unloading"), ("asleep", "Asleep"), ("failed", "Failed"), ("stopped", "")],
)
def test_each_state_has_a_text(state: Any, word: str) -> None:
    assert live().word(replace(MODEL, state=state)) == word


def test_a_loading_model_shows_its_progress() -> None:
    loading = replace(MODEL, state="loading", load=LoadView(43, "loading_weights"))
    assert live(models=(loading,)).word(loading) == "Loading 43 %"
    assert live(models=(loading,)).word(replace(loading, load=None)) == "Loading"


def test_after_a_cancel_every_part_shows_it() -> None:
    """Banner, header, composer, row and menu: none still shows a load."""
    loading = replace(MODEL, state="loading", load=LoadView(43, "loading_weights"))
    told = live(models=(loading,), switch=switch(stage="cancelling", percent=43))
    assert told.stage == told.headline == told.word(loading) == "Cancelling"
    assert told.lock == "Cancelling the switch to small"
    assert told.announcement == "Cancelling the switch to small."
    assert told.percent(loading) is None
    assert told.switch_percent is None


def test_a_model_that_exited_is_shown_until_dismissed_or_outdated() -> None:
    loss = Loss("small", "It was killed by signal 9.", "the log", NOW - 3600)
    told = live(loss=loss, models=(RUNNING, MODEL), active_model="large")
    assert told.banner is not None
    assert told.banner.tone == "lost"
    assert told.running_now == "large answers now."
    assert told.announcement == "small ended by itself. It was killed by signal 9. large answers now."
    assert live(loss=loss).running_now == "No model is loaded now."
    before = switch(stage="failed", finished_at=NOW - 7200)
    assert live(loss=loss, last_switch=before).banner == told.banner
    after = replace(before, finished_at=NOW - 60)
    banner = live(loss=loss, last_switch=after).banner
    assert banner is not None
    assert banner.tone == "failed"
    assert live(loss=loss, last_switch=replace(after, stage="ready")).banner is None


def test_loading_an_image_model_leaves_the_chat_as_it_is():
    """The composer goes on with the active model, and neither names the other one nor offers it."""
    painter = replace(MODEL, id="painter", kind="image", state="loading")
    page = live(models=(RUNNING, painter), active_model="large", switch=switch(to_model="painter", stage="loading"))
    assert (page.lock, page.subject, page.text_models) == (None, RUNNING, (RUNNING,))
    alone = live(models=(MODEL, painter), switch=switch(to_model="painter", stage="loading"))
    assert (alone.lock, alone.subject) == ("Choose a model to start", None), "waiting for it would be in vain"
    assert live(models=(painter,)).lock == "Add a model to start"
