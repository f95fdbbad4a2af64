"""Polls answered without Flask: the answers are the app's own, and where they can't be, Flask is left to answer."""

from __future__ import annotations

import gzip
import html
import re
import time
from collections.abc import Iterator
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest
from werkzeug.test import TestResponse

from blueprints.polls import STATUS, PollAnswer, Polls
from blueprints.web import SECURITY_HEADERS
from services.store.records import Conversation, Message, new_id
from tests.support.in_process import InProcess

MINI, SMALL = "switchyard-mini", "switchyard-small"
PAGES = ["/chats/new", "/models"]
MARK = re.compile(r'<input type="hidden" class="shown"[^>]* name="(\w+)" value="([^"]*)"')


class Tab:
    """An open page, and what the app and the fast way answer to its polls."""

    def __init__(self, console: InProcess, page: str) -> None:
        self._client = console.client
        self._polls = Polls(console.app)
        opened = self._client.get(page).text
        address = re.search(r'id="poll"\s+hx-get="([^"]+)"', opened)
        assert address is not None
        self.path, _, query = html.unescape(address[1]).partition("?")
        marks = urlencode(MARK.findall(opened))
        self.query = f"{query}&{marks}" if query else marks

    def ask_app(self, encoding: str = "") -> TestResponse:
        headers = {"HX-Request": "true", "Accept-Encoding": encoding}
        return self._client.get(f"{self.path}?{self.query}", headers=headers)

    def ask(self, encoding: str = "") -> PollAnswer | None:
        return self._polls.answer(self.path, self.query, encoding)


@pytest.fixture
def console(console: InProcess, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """The app at one moment, at which what it has drawn stays drawn."""
    now = time.time()
    monkeypatch.setattr("blueprints.pages.time", SimpleNamespace(time=lambda: now))
    monkeypatch.setattr(console.services.status, "_clock", lambda: 0.0)
    return console


@pytest.fixture
def conversation(console: InProcess) -> Iterator[Conversation]:
    """A question and its answer."""
    chat, now = new_id(), time.time()

    def message(role: str, text: str) -> Message:
        return Message(new_id(), chat, role, text, None, "complete", None, now, now, None, None)  # type: ignore[arg-type]

    stored = Conversation(chat, "A title", now, now, (message("user", "Hello"), message("assistant", "Hi")))
    console.services.chats._repository.add(stored)
    yield stored
    console.services.chats.delete(chat)


def same(answer: PollAnswer | None, response: TestResponse) -> bool:
    """Whether an answer is the app's; blank lines around the pieces of a page don't count."""
    assert answer is not None
    added = {"Content-Length", *dict(SECURITY_HEADERS)}
    headers = [(name, value) for name, value in response.headers if name not in added]
    given = [(name.decode(), value.decode()) for name, value in answer.fields if name != b"Content-Length"]
    length = dict(answer.fields).get(b"Content-Length")
    assert (length is None) == (answer.status == 204)
    assert length is None or int(length) == len(answer.body)
    return (answer.status, sorted(given)) == (response.status_code, sorted(headers)) and text(
        answer.body, dict(given)
    ) == text(response.data, dict(headers))


def text(body: bytes, headers: dict[str, str]) -> bytes:
    return (gzip.decompress(body) if headers.get("Content-Encoding") == "gzip" else body).strip()


def test_the_status_document_is_the_apps(console: InProcess):
    console.show(MINI)
    assert same(Polls(console.app).answer(STATUS, "", "gzip"), console.client.get(STATUS))


@pytest.mark.parametrize("encoding", ["", "gzip, br"])
def test_a_page_that_lacks_nothing_gets_the_apps_answer(console: InProcess, conversation: Conversation, encoding: str):
    for page in (*PAGES, f"/chats/{conversation.id}"):
        tab = Tab(console, page)
        assert same(tab.ask(encoding), tab.ask_app(encoding))
        assert tab.ask_app(encoding).status_code == 204


@pytest.mark.parametrize("encoding", ["", "gzip, br"])
def test_news_drawn_for_another_page_are_the_apps(console: InProcess, conversation: Conversation, encoding: str):
    """Nobody has drawn them at first: that takes a request."""
    for page in ("/models", f"/chats/{conversation.id}"):
        console.reset()
        console.show(MINI)
        tab = Tab(console, page)
        console.show(SMALL)  # another model can be chosen; the composer is not about it
        assert tab.ask(encoding) is None
        drawn = tab.ask_app(encoding)
        assert drawn.status_code == 200
        assert same(tab.ask(encoding), drawn)


def test_what_only_one_page_shows_is_left_to_flask(console: InProcess, conversation: Conversation):
    """Its messages, its composer, and a conversation that is gone."""
    chats, tab = console.services.chats, Tab(console, f"/chats/{conversation.id}")
    assert tab.ask() is not None
    chats.rename(conversation.id, "Another title")
    assert tab.ask() is None

    tab = Tab(console, f"/chats/{conversation.id}")
    console.show(MINI)
    tab.ask_app()
    assert tab.ask() is None  # it can send messages now

    gone = conversation.id[::-1]
    tab.query = tab.query.replace(conversation.id, gone)
    assert tab.ask() is None
    assert tab.ask_app().status_code == 200


@pytest.mark.parametrize("page", PAGES)
def test_marks_of_another_run_are_answered_as_the_app_does(console: InProcess, page: str):
    """Whatever a page sends, the fast way answers as the app, or not at all."""
    tab = Tab(console, page)
    for query in (
        "",
        "since",
        "since=",
        "since=x-1",
        f"{tab.query}&since=later",
        f"since=earlier&{tab.query}",
        "%ff=%",
    ):
        tab.query = query
        answer = tab.ask()
        assert answer is None or same(answer, tab.ask_app())


def test_the_answer_is_made_anew_when_something_has_changed(console: InProcess):
    tab = Tab(console, "/models")
    assert tab.ask() is not None
    console.show(MINI)
    assert tab.ask() is None
