"""The Chat page's forms: a refused message is returned with the reason, and nothing is stored twice."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import unescape

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from services.answers import Prompt
from services.cancellation import CancelToken
from services.chats import Chats
from services.store.errors import StoreLocked
from services.store.records import Conversation, new_id
from services.store.repository import ConversationRepository

PAGE = {"Accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"}
HTMX = {"HX-Request": "true", "Accept": "*/*"}
TYPED = "My <b>words</b>\nand more"
TOO_LONG = "x" * 32_001
ID = "0123456789abcdef" * 2


class Waiting:
    """A generator whose answers last until they are stopped."""

    model = "tiny"
    told_from = 0
    context_full = False

    @contextmanager
    def stream_chat(self, _model: str | None, _prompt: Prompt, token: CancelToken) -> Iterator[Waiting]:
        self._over = threading.Event()
        token.on_cancel(self._over.set)
        yield self

    def __iter__(self) -> Iterator[str]:
        self._over.wait(30)
        return iter(())


@pytest.fixture(autouse=True)
def chats(app: Flask, monkeypatch: pytest.MonkeyPatch) -> Chats:
    chats: Chats = app.extensions["switchyard"].chats
    monkeypatch.setattr(chats, "_generator", Waiting())
    return chats


@pytest.fixture
def conversation(app: Flask) -> str:
    begun = Conversation(new_id(), "A talk", 1.0, 1.0)
    ConversationRepository(app.extensions["switchyard"].store).add(begun)
    return begun.id


def typed(answer: TestResponse) -> str:
    """The text in a page's composer."""
    found = re.search(r'<textarea id="text"[^>]*>\n?(.*?)</textarea>', answer.text, re.DOTALL)
    assert found, answer.text
    return unescape(found[1])


def alert(answer: TestResponse) -> str:
    """The message beside the composer."""
    found = re.search(r'<div id="composer-error"[^>]*role="alert"[^>]*>(.*?)</div>', answer.text, re.DOTALL)
    assert found, answer.text
    return unescape(re.sub(r"<[^>]+>", "", found[1])).strip()


def action(answer: TestResponse) -> str:
    """The composer's form action."""
    found = re.search(r'<form id="composer-form"[^>]* action="([^"]+)"', answer.text)
    assert found, answer.text
    return found[1]


@pytest.mark.parametrize("new", [True, False])
def test_a_refused_message_comes_back_in_the_composer(client: FlaskClient, conversation: str, new: bool) -> None:
    """Without JavaScript the form is shown again with the text and the reason beside it; it can be sent again."""
    path = "/chats" if new else f"/chats/{conversation}/messages"
    answer = client.post(path, data={"text": TOO_LONG}, headers=PAGE)
    assert answer.status_code == 422
    assert answer.mimetype == "text/html"
    assert typed(answer) == TOO_LONG
    assert "32,001 characters; 32,000 is the limit" in alert(answer)
    assert action(answer) == path
    assert 'http-equiv="refresh"' not in answer.text


def test_a_message_sent_during_an_answer_is_returned(client: FlaskClient, chats: Chats, conversation: str) -> None:
    """A second tab may not know of the answer under way. The page stays unchanged until the text is sent again."""
    sent = chats.send(conversation, "First")
    answer = client.post(f"/chats/{conversation}/messages", data={"text": TYPED}, headers=PAGE)
    assert answer.status_code == 409
    assert typed(answer) == TYPED
    assert "An answer is being written in this conversation" in alert(answer)
    assert 'http-equiv="refresh"' not in answer.text
    assert re.search(r'<button id="send"(?![^>]*disabled)', answer.text)
    chats.stop(sent.id)


def test_with_script_the_reason_is_said_beside_the_composer(client: FlaskClient, conversation: str) -> None:
    """The text stays in the composer; a header marks the response as ours, not a proxy's."""
    for path in ("/chats", f"/chats/{conversation}/messages"):
        answer = client.post(path, data={"text": TOO_LONG}, headers=HTMX)
        assert answer.status_code == 422
        assert answer.headers["HX-Retarget"] == "#composer-error"
        assert answer.headers["Switchyard-Error"] == "invalid_value"
        assert "32,000 is the limit" in answer.text
        assert "<textarea" not in answer.text


def test_switching_too_often_loses_no_message(make_app: Callable[..., Flask]) -> None:
    """The rate limit applies before the form is read; the text is returned all the same."""
    app = make_app(switch_rate_limit="1/hour")
    client = app.test_client()
    model = next(iter(app.extensions["switchyard"].catalog.models))
    client.post("/models/switch", data={"model": "nothing"})
    app.extensions["switchyard"].board.publish(active_model=model)
    answer = client.post("/chats", data={"text": TYPED}, headers=PAGE)
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) > 0
    assert typed(answer) == TYPED
    assert "switched too often" in alert(answer)


def test_a_database_that_can_not_be_written_loses_no_message(
    client: FlaskClient, chats: Chats, conversation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading still works, so the page is shown with the text in its composer, which can be sent again."""

    def refuse(*_: object) -> bool:
        raise StoreLocked("The database is locked by another program.")

    monkeypatch.setattr(chats._repository, "append", refuse)
    path = f"/chats/{conversation}/messages"
    answer = client.post(path, data={"text": TYPED}, headers=PAGE)
    assert answer.status_code == 503
    assert typed(answer) == TYPED
    assert alert(answer) == "Not sent. The database is locked by another program."
    live = client.post(path, data={"text": TYPED}, headers=HTMX)
    assert live.headers["HX-Retarget"] == "#composer-error"
    monkeypatch.undo()


def test_a_stored_message_is_confirmed_by_an_event(client: FlaskClient, conversation: str) -> None:
    """A proxy may answer 200 with an empty body: only this event empties the composer."""
    answer = client.post(f"/chats/{conversation}/messages", data={"text": TYPED}, headers=HTMX)
    assert answer.status_code == 200
    assert answer.headers["HX-Trigger"] == "message-sent"
    begun = client.post("/chats", data={"text": TYPED}, headers=HTMX)
    assert begun.headers["HX-Trigger"] == "message-sent"
    assert re.fullmatch(r"/chats/[0-9a-f]{32}", begun.headers["HX-Redirect"])


def test_sending_again_sends_once(client: FlaskClient, chats: Chats, conversation: str) -> None:
    """If the response was lost, the repeated message is recognised by its id, whatever became of the first."""
    for path in ("/chats", f"/chats/{conversation}/messages"):
        before = len(chats.conversations())
        message = {"text": TYPED, "id": ID if path == "/chats" else ID[::-1]}
        first, second = (client.post(path, data=message, headers=PAGE) for _ in range(2))
        assert (first.status_code, second.status_code) == (303, 303)
        assert first.location == second.location
        assert len(chats.conversations()) - before == (1 if path == "/chats" else 0)
    assert [m.role for m in chats.get(conversation).messages] == ["user", "assistant"]


def test_an_invalid_message_id_is_ignored(client: FlaskClient, chats: Chats, conversation: str) -> None:
    """Each of these messages is a new one."""
    for text in ("../x", "", "A" * 32):
        client.post(f"/chats/{conversation}/messages", data={"text": "Hi", "id": text}, headers=PAGE)
        chats.stop(chats.get(conversation).messages[-1].id)
    assert len(chats.get(conversation).messages) == 6


def test_a_message_to_a_deleted_conversation_can_begin_a_new_one(
    client: FlaskClient, chats: Chats, conversation: str
) -> None:
    """The page says that it was deleted in another tab, keeps the text, and sends it to a new chat."""
    chats.delete(conversation)
    answer = client.post(f"/chats/{conversation}/messages", data={"text": TYPED}, headers=PAGE)
    assert answer.status_code == 404
    assert typed(answer) == TYPED
    assert "was deleted" in alert(answer)
    assert action(answer) == "/chats"
    live = client.post(f"/chats/{conversation}/messages", data={"text": TYPED}, headers=HTMX)
    assert live.status_code == 404
    assert "was deleted" in live.text
    assert live.headers["HX-Trigger"] == "refresh"


def test_the_page_of_a_deleted_conversation_says_so_and_stays(
    client: FlaskClient, chats: Chats, conversation: str
) -> None:
    """Polling does not redirect it, and its draft stays stored under the same key."""
    chats.delete(conversation)
    opened = client.get(f"/chats/{conversation}", headers=PAGE)
    assert opened.status_code == 404
    look = client.get(f"/fragments/chat-status?conversation={conversation}&seen=x", headers=HTMX)
    assert look.status_code == 200
    assert "HX-Redirect" not in look.headers
    for shown in (opened, look):
        assert "This conversation was deleted" in shown.text
        assert action(shown) == "/chats"
        assert f'data-draft="{conversation}"' in shown.text
    assert client.get(f"/chats/{conversation}", headers={"Accept": "application/json"}).json["error"] == "not_found"
