"""What the pages say about models and switches: the same status always gives the same words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from blueprints.live import Live
from services.status import ModelStatus, Status
from services.switching.events import LoadView, SwitchView

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


def test_the_composer_says_why_it_is_locked_and_until_when() -> None:
    assert live().lock == "Choose a model to start"
    assert live(models=()).lock == "Add a model to start"
    assert live(switch=switch(eta_seconds=45)).lock == "Switching to small, about 45 s"
    assert live(switch=switch()).lock == "Switching to small"
    assert live(models=(RUNNING, MODEL), active_model="large").lock is None


@pytest.mark.parametrize(
    ("age", "tone"),
    [(1, "ready"), (3.9, "ready"), (4.1, None)],
)
def test_good_news_goes_after_four_seconds(age: float, tone: str | None) -> None:
    banner = live(last_switch=switch(stage="ready", finished_at=NOW - age)).banner
    assert (banner.tone if banner else None) == tone


@pytest.mark.parametrize("stage", ["failed", "rolled_back", "refused"])
def test_a_failure_stays_until_it_is_dismissed(stage: str) -> None:
    told = live(last_switch=switch(stage=stage, finished_at=NOW - 86400, message="No room."))
    assert told.banner is not None
    assert told.banner.tone == "failed"
    assert told.cause == "No room."
    assert told.running_now == "No model is loaded now."


def test_what_is_running_is_said_once() -> None:
    last = switch(stage="rolled_back", message="Out of memory.")
    told = live(models=(RUNNING, MODEL), active_model="large", last_switch=last)
    assert told.cause == "Out of memory."
    assert told.running_now == "large is running again."


def test_a_switch_under_way_is_told_in_the_words_of_its_load() -> None:
    loading = replace(MODEL, state="loading", load=LoadView(43, "loading_weights"))
    assert live(models=(loading,), switch=switch(stage="loading")).stage == "Reading the weights"
    assert live(switch=switch(stage="waiting_for_memory")).stage == "Waiting until the memory is free"


def test_pages_look_often_only_while_something_moves() -> None:
    assert live().poll_seconds == 5
    assert live(switch=switch()).poll_seconds == 2
    assert live(last_switch=switch(stage="ready", finished_at=NOW)).poll_seconds == 1


def test_most_of_a_switch_is_not_thrown_away_unasked() -> None:
    assert live(switch=switch(percent=63)).asks_first("large") is not None
    assert live(switch=switch(percent=50)).asks_first("large") is None
    assert live(switch=switch(percent=63)).asks_first("small") is None


def test_announcements_name_steps_and_never_percents() -> None:
    said = live(switch=switch(stage="checking_memory", percent=7)).announcement
    assert said == "Switching to small: Checking memory."
    assert live().announcement == "No model is loaded."
