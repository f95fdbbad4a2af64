"""The pages and the API with a database that was damaged, or is locked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from services.store.database import Store, open_store
from tests.support.console import put_empty_database
from tests.support.faults import corrupt_database, locked_database

TOLD = "The database was damaged."


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state folder of `make_app`."""
    return tmp_path / "app-state"


@pytest.fixture
def damaged(state: Path, make_app: Callable[..., Flask]) -> FlaskClient:
    """The app after a start with a damaged database."""
    put_empty_database(state)
    corrupt_database(state / "switchyard.db")
    return make_app().test_client()


@pytest.mark.parametrize("page", ["/", "/models", "/docs"])
def test_every_page_says_that_the_database_was_damaged(damaged: FlaskClient, state: Path, page: str) -> None:
    """With the new path of the damaged database."""
    (aside,) = state.glob("switchyard-damaged-*.db")
    answer = damaged.get(page)
    assert answer.status_code == 200
    assert TOLD in answer.text
    assert str(aside) in answer.text


@pytest.mark.parametrize("headers", [{}, {"HX-Request": "true"}])
def test_the_notice_is_shown_until_dismissed(
    damaged: FlaskClient, make_app: Callable[..., Flask], headers: dict[str, str]
) -> None:
    """With and without JavaScript; before the dismissal a restart shows it again."""
    assert TOLD in make_app().test_client().get("/").text
    answer = damaged.post("/database/dismiss", headers=headers, data={"back": "/models"})
    assert (answer.status_code, answer.text) == (200, "") if headers else answer.headers["Location"] == "/models"
    assert TOLD not in damaged.get("/").text
    damaged.application.extensions["switchyard"].writes.close()
    assert TOLD not in make_app().test_client().get("/").text


def test_an_intact_database_shows_no_notice(client: FlaskClient) -> None:
    assert TOLD not in client.get("/").text
    assert client.post("/database/dismiss").status_code == 303


def test_a_locked_database_is_reported_in_the_contracts_shape(
    app: Flask, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503 with Retry-After, for programs and people; requests that write nothing work."""
    store: Store = app.extensions["switchyard"].store
    monkeypatch.setattr(store, "_lock_timeout", 0.1)
    client = app.test_client()
    with locked_database(state / "switchyard.db"):
        answer = client.post("/chats", data={"text": "Hello"}, headers={"Accept": "application/json"})
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "5"
        assert answer.json is not None
        assert (answer.json["status"], answer.json["error"]) == ("error", "database_locked")
        assert "locked by another program" in answer.json["message"]
        page = client.post("/chats", data={"text": "Hello"}, headers={"Accept": "text/html"})
        assert page.status_code == 503
        assert "locked by another program" in page.text
        for path in ("/", "/models", "/v1/models/status", "/fragments/chat-status", "/v1/models"):
            assert client.get(path).status_code == 200
    assert client.post("/chats", data={"text": "Hello"}).status_code == 303


def test_the_app_starts_with_a_locked_database(
    state: Path, make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes are postponed until the lock is gone."""
    put_empty_database(state)
    monkeypatch.setattr("services.container.open_store", partial(open_store, lock_timeout=0.1))
    with locked_database(state / "switchyard.db"):
        client = make_app().test_client()
        assert client.get("/").status_code == 200
