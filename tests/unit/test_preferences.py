"""Preferences: what wins, what is kept, and that a change is whole or nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.config import Preferences, Settings
from services.preferences import NOTE, PreferenceStore
from services.store.errors import StoreLocked
from tests.support.in_process import InProcess


class Notes(dict[str, str]):
    """Notes in memory; `error` is raised by the next put."""

    error: Exception | None = None

    def put(self, key: str, value: str) -> None:
        if self.error is not None:
            raise self.error
        self[key] = value


def store(notes: Notes | None = None, **settings: object) -> PreferenceStore:
    return PreferenceStore(Settings.model_validate(settings).preferences, notes if notes is not None else Notes())


def test_a_change_wins_over_the_settings_and_outlasts_a_restart() -> None:
    notes = Notes()
    store(notes, strategy="oldest_first").update({"strategy": "cheapest_reload"})
    again = store(notes, strategy="oldest_first")
    assert again.current.strategy == "cheapest_reload"
    assert set(again.changed) == {"strategy"}


def test_what_was_not_changed_follows_the_settings() -> None:
    notes = Notes()
    store(notes).update({"strategy": "cheapest_reload"})
    assert not store(notes, auto_unload=False).current.auto_unload


def test_the_default_of_a_preference_is_no_change() -> None:
    """Otherwise a form that sends every field back would take all of them away from the settings file."""
    preferences = store()
    preferences.update({"strategy": "oldest_first"})
    preferences.update(preferences.defaults.model_dump())
    assert not preferences.changed


def test_one_or_all_can_be_reset() -> None:
    preferences = store()
    preferences.update({"strategy": "oldest_first", "auto_unload": False, "preload": ["a"]})
    preferences.reset({"auto_unload"})
    assert set(preferences.changed) == {"strategy", "preload"}
    preferences.reset()
    assert preferences.current == preferences.defaults


def test_a_change_that_can_not_be_kept_does_not_happen() -> None:
    notes = Notes()
    preferences = store(notes)
    notes.error = StoreLocked("The database is locked.")
    with pytest.raises(StoreLocked):
        preferences.update({"auto_unload": False})
    assert preferences.current.auto_unload


def test_an_invalid_change_changes_nothing() -> None:
    preferences = store()
    with pytest.raises(ValidationError):
        preferences.update({"auto_unload": False, "idle_unload_seconds": -1})
    assert preferences.current == preferences.defaults


@pytest.mark.parametrize("kept", ["", "nonsense", "[1]", '{"gone": 1, "strategy": "biggest", "auto_unload": false}'])
def test_what_was_kept_by_another_version_is_used_as_far_as_it_is_valid(kept: str) -> None:
    preferences = store(Notes({NOTE: kept}))
    assert preferences.current.strategy == "largest_first"
    assert preferences.current.auto_unload is (not kept.startswith("{"))


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "strategy": st.sampled_from(["largest_first", "oldest_first"]),
            "auto_unload": st.booleans(),
            "preload": st.lists(st.sampled_from(["a", "b"]), max_size=2),
            "idle_unload_models": st.dictionaries(st.sampled_from(["a", "b"]), st.floats(0, 100), max_size=2),
            "home_model": st.none() | st.just("a"),
        },
    )
)
def test_what_is_kept_gives_the_same_preferences_again(changes: dict[str, object]) -> None:
    notes = Notes()
    changed = store(notes).update(changes)
    assert store(notes).current == changed
    assert json.loads(notes[NOTE]).keys() <= changes.keys()


def test_preferences_can_be_read_changed_sent_back_and_reset(console: InProcess) -> None:
    client = console.client
    before = client.get("/v1/preferences").json
    assert before["changed"] == []
    changed = client.put("/v1/preferences", json={"confirm_before_unload": True}).json
    assert (changed["confirm_before_unload"], changed["changed"]) == (True, ["confirm_before_unload"])
    assert client.put("/v1/preferences", json=changed).json == changed
    assert client.delete("/v1/preferences/confirm_before_unload").json == before
    assert before.keys() == {*Preferences.model_fields, "changed", "defaults"}


def test_bad_preferences_are_refused_by_name(console: InProcess) -> None:
    for body, param in (({"strategy": "biggest"}, "strategy"), ({"no_such": 1}, "no_such")):
        refused = console.client.put("/v1/preferences", json=body)
        assert refused.status_code == 422, refused.text
        assert refused.json["error"]["param"] == param
    missing = console.client.delete("/v1/preferences/no_such")
    assert missing.status_code == 404
    assert "auto_unload" in missing.text
