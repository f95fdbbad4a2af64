"""The short script endpoints: state of the active model and the switch, and the note of Ollama switches."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

import pytest

from services.switching.events import Failure, LoadView
from services.switching.jobs import Job, Outcome, Request, SwitchOptions
from tests.support.in_process import InProcess, in_process

MINI, SMALL = "switchyard-mini", "switchyard-small"
A, B, C = "tiny-a:latest", "tiny-b:latest", "tiny-c:latest"
DONE = "Model physically unloaded and reloaded in Ollama."
SEED = f"{DONE} No server restart needed."


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    models = [{"id": name, "engine": "ollama", "source": name} for name in (A, B, C)]
    with in_process(tmp_path_factory.mktemp("app"), models=models) as console:
        yield console


def state(console: InProcess) -> dict[str, object]:
    return console.client.get("/api/model-loading-status").get_json()


def failed(console: InProcess, model: str, cause: str) -> None:
    console.services.board.publish(failures=MappingProxyType({model: Failure(cause, "", 0.0)}))


def test_nothing_loaded_is_idle(console):
    """A cancelled switch leaves it idle."""
    assert state(console)["status"] == "idle"
    console.show_switch(MINI, over=True, stage="cancelled", error="cancelled", message="It was cancelled.")
    assert state(console)["status"] == "idle"


def test_another_programs_failed_request_is_no_error_while_a_model_is_active(console):
    """A script that waits for its model stopped because another program had requested a broken one."""
    console.show(MINI)
    failed(console, SMALL, "It crashed.")
    console.show_switch(SMALL, over=True, requested_by="request", stage="failed", error="load_failed", message="No.")
    told = state(console)
    assert (told["status"], told["model_loaded"], told["current_model"]) == ("ready", True, MINI)
    assert (told["progress"], told["message"]) == (100, "llamacpp is ready")


def test_another_programs_failed_request_is_no_error_when_idle(console):
    """The program that requested it got the error; it is not the active model's."""
    failed(console, SMALL, "It crashed.")
    console.show_switch(SMALL, over=True, requested_by="request", stage="failed", error="load_failed", message="No.")
    assert state(console)["status"] == "idle"


@pytest.mark.parametrize("who", ["page", "api", "preload"])
def test_a_failed_switch_is_an_error_when_nothing_is_loaded(console, who):
    """A polling script learns the cause and can stop."""
    console.show_switch(MINI, over=True, requested_by=who, stage="failed", error="load_failed", message="It crashed.")
    told = state(console)
    assert (told["status"], told["model_loaded"], told["message"]) == ("error", False, "It crashed.")


def test_a_failed_switch_is_reported_beside_the_restored_model(console):
    """The state is that of the active model, which answers; the message says why the other one failed."""
    console.show(MINI)
    console.show_switch(SMALL, over=True, stage="rolled_back", error="load_failed", message="It crashed.")
    told = state(console)
    assert (told["status"], told["current_model"]) == ("ready", MINI)
    assert "switchyard-small failed: It crashed." in str(told["message"])


def test_a_crash_of_the_active_model_is_an_error(console):
    """Whoever loaded it: nothing answers any more, and the cause is reported."""
    failed(console, MINI, "It ended by itself.")
    console.show_switch(MINI, over=True, requested_by="request", stage="ready", percent=100)
    told = state(console)
    assert (told["status"], told["message"]) == ("error", "It ended by itself.")


def test_a_switch_under_way_is_reported_after_earlier_failures(console):
    """The switch under way has priority."""
    console.show(MINI)
    console.show_switch(SMALL, over=True, stage="failed", error="load_failed", message="It crashed.")
    console.show_switch(SMALL, stage="unloading", percent=30)
    told = state(console)
    assert (told["status"], told["progress"], told["stage"]) == ("starting", 30, "unloading")
    assert told["message"] == "Switching to switchyard-small"


@pytest.mark.parametrize(
    ("stage", "load", "expected"),
    [
        ("checking_memory", None, "starting"),
        ("downloading", None, "loading"),
        ("unloading", None, "starting"),
        ("waiting_for_memory", None, "starting"),
        ("loading", None, "starting"),
        ("loading", LoadView(20, "loading_weights", "starting vLLM"), "starting"),
        ("loading", LoadView(45, "loading_weights", "starting vLLM", "learned", 40.0), "starting"),
        ("loading", LoadView(20, "loading_weights"), "loading"),
        ("loading", LoadView(65, "loading_weights", "3 of 4 shards", "measured"), "loading"),
        ("loading", LoadView(20, "loading_weights", "waking up"), "loading"),
        ("warming_up", LoadView(95, "warming_up"), "loading"),
    ],
)
def test_starting_covers_the_start_of_a_container(console, stage, load, expected):
    """Seed 000 distinguishes `starting` (the container starts) from `loading` (it reads the model)."""
    if load is not None:
        console.show(SMALL, "loading", load=load)
    console.show_switch(SMALL, stage=stage)
    assert state(console)["status"] == expected


def test_a_model_that_is_being_unloaded_is_not_ready(console):
    """It is not an error either."""
    console.show(MINI)
    console.show(MINI, "unloading")
    told = state(console)
    assert (told["status"], told["model_loaded"]) == ("idle", False)


def switch_in_ollama(
    console: InProcess, monkeypatch: pytest.MonkeyPatch, outcome: Outcome, unloaded: list[str], target: str = B
) -> tuple[dict[str, object], SwitchOptions]:
    """The response to a switch with this outcome, and the options that the switcher was called with."""
    asked: list[SwitchOptions] = []

    def switch(model_id: str, *, options: SwitchOptions, **_: object) -> Job:
        asked.append(options)
        job = Job(Request("switch", model_id, "api"))
        job.unloaded += unloaded
        job.load_seconds = 1.25 if outcome == "success" else None
        job.finish(outcome)
        return job

    monkeypatch.setattr(console.services.switcher, "switch", switch)
    response = console.client.post("/ollama/models/switch", json={"model": target})
    assert response.status_code == 200
    return response.get_json(), asked[0]


@pytest.mark.parametrize(
    ("loaded", "outcome", "unloaded", "note"),
    [
        ([A], "success", [A], SEED),
        ([A, C], "success", [A, C], f"{DONE} {C} was unloaded too, to make room. No server restart needed."),
        ([], "success", [], f"{B} was loaded in Ollama; nothing was unloaded. No server restart needed."),
        ([], "success", [C], f"{B} was loaded in Ollama; {C} was physically unloaded. No server restart needed."),
        ([B], "already_loaded", [], f"{B} was loaded already; nothing was unloaded. No server restart needed."),
        ([B, A], "success", [A], f"{B} was loaded already; {A} was physically unloaded. No server restart needed."),
        ([B, A], "already_loaded", [], f"{B} was loaded already; nothing was unloaded. No server restart needed."),
    ],
)
def test_the_note_reports_only_what_was_done(console, monkeypatch, loaded, outcome, unloaded, note):
    """It claimed "physically unloaded and reloaded" for a model that was loaded already, with nothing unloaded."""
    for model in loaded:
        console.show(model, engine="ollama")
    if A in loaded:
        console.services.board.publish(active_model=A)
    answer, _ = switch_in_ollama(console, monkeypatch, outcome, unloaded)
    assert answer["note"] == note
    assert (answer["status"], answer["new_model"]) == ("success", B)


def test_the_model_in_use_is_unloaded(console, monkeypatch):
    """Even if both fit, unless it is the requested model itself."""
    console.show(A, engine="ollama")
    _, asked = switch_in_ollama(console, monkeypatch, "success", [A])
    assert asked.instead_of == A
    answer, asked = switch_in_ollama(console, monkeypatch, "already_loaded", [], target=A)
    assert asked.instead_of is None
    assert (answer["old_model"], answer["new_model"], answer["load_seconds"]) == (A, A, 0.0)
