"""Preferences changed while the app runs: the next decision follows them, and they outlast a restart."""

from __future__ import annotations

import pytest

from tests.support.console import Console

MINI, SMALL = "switchyard-mini", "switchyard-small"


@pytest.fixture(scope="module")
def shared(start_shared) -> Console:
    """A console with memory for one of the two demo models at a time."""
    return start_shared(memory_budget_gb=0.11)


def prefer(console: Console, **preferences: object) -> None:
    answer = console.put("/v1/preferences", preferences)
    assert answer.status_code == 200, answer.text


def test_a_chat_that_would_unload_a_model_is_refused_with_the_plan_where_that_has_to_be_confirmed(console):
    """In OpenAI's shape, with the plan beside the error; once it need not be confirmed, the same chat switches."""
    console.switch(MINI)
    prefer(console, confirm_before_unload=True)
    refused = console.ask("Hello", model=SMALL)
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "confirmation_required"
    assert [unload["model"] for unload in refused.json()["plan"]["unload"]] == [MINI]
    assert console.states()[MINI] == "running"
    prefer(console, confirm_before_unload=False)
    assert console.ask("Hello", model=SMALL).status_code == 200


def test_a_preserved_model_stays_from_the_next_switch_on(console):
    console.switch(MINI)
    prefer(console, preserve_models=[MINI])
    refused = console.post("/v1/models/switch", {"target_model": SMALL, "wait": True})
    assert (refused.status_code, refused.json()["error"]) == (409, "insufficient_memory")
    assert "preserve_models" in refused.json()["message"]


def test_a_request_switches_only_while_that_is_on(console):
    prefer(console, switch_on_request=False)
    assert console.ask("Hello", model=MINI).status_code == 409
    prefer(console, switch_on_request=True)
    assert console.ask("Hello", model=MINI).status_code == 200


def test_an_unused_model_is_unloaded(console):
    console.switch(MINI)
    prefer(console, idle_unload_seconds=1, keep_at_least_one=False)
    console.wait_for(lambda s: s["active_model"] is None, "it to be unloaded")


def test_the_last_active_model_is_loaded_at_the_next_start(console):
    console.switch(MINI)
    prefer(console, last_used=True)
    console.stop()
    console.start()
    console.wait_for(lambda s: s["active_model"] == MINI, "the last active model")
