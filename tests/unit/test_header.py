"""The header of every page shows the active model and the memory in use."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from services.memory.ledger import Account
from services.sizes import GB, MB
from tests.support.in_process import InProcess

MINI = "switchyard-mini"
FOR_PEOPLE = {"Accept": "text/html"}


def header(console: InProcess, path: str) -> str:
    """The text of the header's state."""
    page = console.client.get(path, headers=FOR_PEOPLE).get_data(as_text=True)
    found = re.search(r'<div id="top-status".*?</header>', page, re.DOTALL)
    assert found is not None, page
    return " ".join(re.sub(r"<[^>]+>", " ", found[0]).split())


@pytest.mark.parametrize("path", ["/", "/models", "/docs", "/no-such-page", "/chats/no-such-conversation"])
def test_every_page_has_the_state(console: InProcess, path: str) -> None:
    assert header(console, path).startswith("No model loaded")
    console.show(MINI)
    words = header(console, path)
    assert words.startswith(f"{MINI} ready")
    assert "Memory in use:" in words


def test_an_error_page_is_shown_without_the_state(console: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that the page reports may be the one that makes the state unavailable."""

    def fail() -> None:
        raise OSError("nobody knows")

    monkeypatch.setattr(console.services.status, "current", fail)
    answer = console.client.get("/models", headers=FOR_PEOPLE)
    assert answer.status_code == 500
    assert "Switchyard hit a problem" in answer.get_data(as_text=True)


def test_a_rollback_is_shown_as_restoring_previous_models(console: InProcess) -> None:
    console.show_switch(MINI, stage="rolling_back", detail="other")
    assert header(console, "/").startswith("Restoring previous models")


def test_the_meter_stays_as_it_is_while_the_memory_varies_less_than_it_shows(console: InProcess) -> None:
    """Each change of it is sent to every tab, and the memory in use varies by some MB with every reading."""
    account = Account("host", "RAM", "host", 64 * GB, (), 0, 32 * GB, 32 * GB, 64 * GB, 32 * GB)
    macro = "{% from 'macros/memory.html' import meter %}{{ meter(devices) }}"
    meters = {
        console.app.jinja_env.from_string(macro).render(devices=[replace(account, available_bytes=32 * GB - more * MB)])
        for more in range(0, 50, 7)
    }
    assert len(meters) == 1
