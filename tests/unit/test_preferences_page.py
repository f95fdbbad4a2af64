"""The Preferences page: what is typed is stored whole, shown again when it is refused, and can be reset."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.support.in_process import InProcess

MINI, SMALL = "switchyard-mini", "switchyard-small"


@pytest.fixture(autouse=True)
def _defaults(console: InProcess) -> Iterator[None]:
    yield
    console.services.preferences.reset()


def fields(page: str) -> dict[str, str]:
    """The fields that the page's form would send as it is."""
    form = page.partition('class="preferences-form"')[2].partition("</form>")[0]
    sent = {}
    for tag in re.findall(r"<input [^>]*>", form):
        name, value = re.search(r'name="([^"]*)"', tag)[1], re.search(r'value="([^"]*)"', tag)
        if 'type="checkbox"' not in tag or " checked" in tag:
            sent[name] = value[1] if value else "on"
    for name, options in re.findall(r'<select [^>]*name="([^"]*)"[^>]*>(.*?)</select>', form, re.S):
        chosen = re.search(r'<option(?: value="([^"]*)")? selected>([^<]*)', options)
        sent[name] = (chosen[1] if chosen[1] is not None else chosen[2]) if chosen else ""
    return sent


def test_saving_the_form_as_it_is_changes_nothing(console: InProcess) -> None:
    console.services.preferences.update({"home_model": MINI, "idle_unload_models": {SMALL: 5}, "preload": [MINI]})
    before = console.services.preferences.current
    sent = fields(console.client.get("/preferences").text)
    assert console.client.post("/preferences", data=sent).status_code == 303
    assert console.services.preferences.current == before


def test_every_field_is_stored(console: InProcess) -> None:
    typed = {
        "confirm_before_unload": "on",
        "strategy": "oldest_first",
        "idle_unload_seconds": "90",
        "home_model": MINI,
        "home_after_seconds": "60",
        f"favorites:{MINI}": "on",
        f"preserve_models:{SMALL}": "on",
        f"preload:{MINI}": "on",
        f"idle of {MINI}": "30",
        f"idle of {SMALL}": "",
    }
    assert console.client.post("/preferences", data=typed).status_code == 303
    now = console.services.preferences.current
    assert (now.confirm_before_unload, now.auto_unload, now.switch_on_request) == (True, False, False)
    assert (now.strategy, now.home_model) == ("oldest_first", MINI)
    assert (now.idle_unload_seconds, now.home_after_seconds, now.idle_unload_models) == (90, 60, {MINI: 30})
    assert (now.favorites, now.preserve_models, now.preload) == ((MINI,), (SMALL,), (MINI,))


def test_a_refused_form_is_shown_as_it_was_typed_with_the_reason_at_the_field(console: InProcess) -> None:
    sent = fields(console.client.get("/preferences").text)
    refused = console.client.post(
        "/preferences", data={**sent, "idle_unload_seconds": "soon", f"idle of {MINI}": "-1", "home_after_seconds": "7"}
    )
    assert refused.status_code == 422
    assert fields(refused.text).items() >= {"idle_unload_seconds": "soon", "home_after_seconds": "7"}.items()
    assert 'id="idle_unload_seconds-error"' in refused.text
    assert 'id="limit-error-1"' in refused.text
    assert not console.services.preferences.changed


def test_a_reset_keeps_what_was_typed_elsewhere(console: InProcess) -> None:
    console.services.preferences.update({"strategy": "oldest_first", "auto_unload": False})
    page = console.client.get("/preferences").text
    assert page.count(">Reset</button>") == 2
    data = {**fields(page), "idle_unload_seconds": "90", "name": "strategy"}
    again = console.client.post("/preferences/reset", data=data).text
    assert set(console.services.preferences.changed) == {"auto_unload"}
    assert fields(again).items() >= {"strategy": "largest_first", "idle_unload_seconds": "90"}.items()
    assert "auto_unload" not in fields(again)


def test_all_can_be_reset_at_once(console: InProcess) -> None:
    console.services.preferences.update({"strategy": "oldest_first", "auto_unload": False})
    assert console.client.post("/preferences/reset").status_code == 303
    assert not console.services.preferences.changed


def test_a_model_that_is_gone_keeps_its_row_and_its_preferences(console: InProcess) -> None:
    """Ollama may be down; saving the page must not drop what was said of its models."""
    console.services.preferences.update({"preserve_models": ["gone:7b"]})
    sent = fields(console.client.get("/preferences").text)
    console.client.post("/preferences", data=sent)
    assert console.services.preferences.current.preserve_models == ("gone:7b",)


def test_a_favourite_comes_first_in_menu_and_table_and_says_so(console: InProcess) -> None:
    console.services.preferences.update({"favorites": [SMALL]})
    assert [model.id for model in console.services.status.current().models] == [SMALL, MINI]
    for path in ("/", "/models"):
        page = console.client.get(path).text
        assert page.index(f">{SMALL}<span") < page.index(f">{MINI}<"), path
        assert ", favourite" in page, path
    assert console.client.get("/v1/models/status").json["models"][SMALL]["favorite"] is True
