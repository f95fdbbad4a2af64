"""Each state has one name in all parts of a page: banner, header, composer, menu and row."""

from __future__ import annotations

import re
from dataclasses import replace
from types import MappingProxyType

import pytest

from blueprints.filters import dom_id
from services.switching.events import InstanceState, LoadView, Loss, Unloading
from tests.support.in_process import InProcess

MINI, SMALL = "switchyard-mini", "switchyard-small"
NOW = 1_800_000_000.0


@pytest.fixture
def console(console: InProcess, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    monkeypatch.setattr("blueprints.pages.time.time", lambda: NOW)
    return console


class PageTexts:
    """The texts of a page, by element."""

    def __init__(self, console: InProcess, path: str) -> None:
        self.page = console.client.get(path, headers={"Accept": "text/html"}).get_data(as_text=True)

    def __getitem__(self, part: str) -> str:
        """The text of the element with this id."""
        found = re.search(rf'<(\w+)[^>]* id="{part}".*', self.page, re.DOTALL)
        assert found is not None, f"{part} is missing"
        depth, end = 0, 0
        for tag in re.finditer(rf"<(/?){found[1]}\b[^>]*>", found[0]):
            depth += -1 if tag[1] else 1
            if depth == 0:
                end = tag.end()
                break
        return " ".join(re.sub(r"<[^>]+>", " ", found[0][:end]).split())


def row(model: str) -> str:
    """The element id of a model's row."""
    return f"row-{dom_id(model)}"


@pytest.mark.parametrize("state", ["loading", "unloading"])
def test_a_cancelled_switch(console: InProcess, state: InstanceState) -> None:
    """It has one name and one mark from the click until the load is undone, whatever the engine does."""
    console.show(MINI, state, load=LoadView(43, "loading_weights"))
    console.show_switch(MINI, stage="cancelling", percent=43)
    chat, models = PageTexts(console, "/chats/new"), PageTexts(console, "/models")
    for page in (chat, models):
        assert page["banner"].startswith(f"Cancelling the switch to {MINI}")
        assert page["top-status"].startswith("Cancelling")
        assert "Loading" not in page["banner"] + page["top-status"]
    assert chat["composer-note"] == f"Cancelling the switch to {MINI}"
    assert chat["model-button"].endswith("Cancelling")
    assert f"Cancelling the switch to {MINI}" in chat["messages"]
    assert "Cancelling" in models[row(MINI)]
    assert not re.search("Loading|Unloading", models[row(MINI)])
    for page in (chat.page, models.page):
        marks = set(re.findall(r'<svg class="mark ([a-z]+)"', page))
        assert marks - {"stopped"} == {"unloading"}, "header, banner, menu and row agree"
    assert not re.search(r">\s*Cancel\s*<", models.page), "there is nothing left to cancel"


def test_a_rollback(console: InProcess) -> None:
    console.show(SMALL, "loading", load=LoadView(43, "loading_weights"))
    unloads = (Unloading(SMALL, f"to make room for {MINI}"),)
    console.show_switch(MINI, stage="rolling_back", detail=SMALL, percent=90, basis="measured", unloads=unloads)
    for path in ("/chats/new", "/models"):
        page = PageTexts(console, path)
        assert page["banner"].startswith("Restoring previous models")
        assert f"Loading {SMALL}" in page["banner"]
        assert page["top-status"].startswith("Restoring previous models")
        assert "43 %" in page["banner"], "the percentage of the restored model, as in its row"
        assert "90 %" not in page.page
        assert f"{SMALL} was unloaded for it" in page["banner"]
    assert PageTexts(console, "/chats/new")["composer-note"] == "Restoring previous models"


def drain(console: InProcess, model: str) -> None:
    """A busy model that is to be unloaded."""
    view = console.show(model)
    view.traffic.enter()
    instances = {**console.services.board.current.instances, model: replace(view, drain_until=NOW + 23.5)}
    console.services.board.publish(instances=MappingProxyType(instances))


def test_a_busy_model_that_is_being_unloaded(console: InProcess) -> None:
    """It shows what it waits for, how long at most, and a button to unload now; it doesn't claim to take messages."""
    drain(console, MINI)
    models = PageTexts(console, "/models")
    assert "answers now" not in models[row(MINI)]
    assert "Finishing 1 answer, at most 24 s more" in models[row(MINI)]
    assert "Unload now" in models[row(MINI)]
    assert "finishing" in models["top-status"]
    assert PageTexts(console, "/chats/new")["composer-note"] == f"{MINI} is being unloaded"


def test_a_switch_that_waits_for_a_busy_model(console: InProcess) -> None:
    drain(console, MINI)
    console.show_switch(SMALL, stage="draining", detail=MINI)
    for path in ("/chats/new", "/models"):
        page = PageTexts(console, path)
        assert f"Finishing 1 answer of {MINI}, at most 24 s more" in page["banner"]
        assert "Unload it now" in page["banner"]
        assert "24 s" not in re.findall(r'data-announce="([^"]*)"', page.page)[0], "seconds are not announced"


def test_a_crash(console: InProcess) -> None:
    """On Chat too: what happened, why, and which model answers now."""
    console.show(SMALL)
    console.services.board.publish(loss=Loss(MINI, "It was killed by signal 9.", "its last words", NOW - 60))
    for path in ("/chats/new", "/models"):
        banner = PageTexts(console, path)["banner"]
        assert banner.startswith(f"{MINI} ended by itself")
        for words in ("It was killed by signal 9.", f"{SMALL} answers now.", "its last words", "Use it again"):
            assert words in banner


def test_names_in_the_banner_link_to_the_models(console: InProcess) -> None:
    console.show_switch(MINI, stage="failed", over=True, finished_at=NOW, message="It broke.")
    page = PageTexts(console, "/chats/new").page
    assert f'href="/models#{row(MINI)}"' in page
    assert re.search(r'<a class="button small" href="/models">Models</a>', page)


def test_unload_now_applies_only_to_a_draining_model(console: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The "now" form is a different request from the one that unloads."""
    asked: list[tuple[str, str]] = []
    switcher = console.services.switcher
    monkeypatch.setattr(switcher, "unload_now", lambda model: asked.append(("now", model)))
    monkeypatch.setattr(switcher, "stop", lambda model, **_: asked.append(("stop", model)))
    for form in ({"now": "yes"}, {}):
        console.client.post(f"/models/{MINI}/unload", data=form, headers={"HX-Request": "true"})
    assert asked == [("now", MINI), ("stop", MINI)]
