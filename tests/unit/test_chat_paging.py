"""Paging of conversations and messages: a page shows a part, links to the rest, and keeps what was expanded."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient

from blueprints.chat_extent import LISTED, LISTED_MOST
from services.chats import PAGE_CHARACTERS, PAGE_MESSAGES, Chats
from tests.support.talk import put_conversations

HTMX = {"HX-Request": "true", "Accept": "*/*"}


@pytest.fixture
def chats(app: Flask) -> Chats:
    found: Chats = app.extensions["switchyard"].chats
    return found


@pytest.fixture
def fill(app: Flask) -> Callable[..., list[str]]:
    """Insert conversations, and messages into the newest; return their ids, the newest last."""

    def put(conversations: int, messages: int = 0, content: str = "Words of message {number}.") -> list[str]:
        said = [content.format(number=number) for number in range(messages)]
        return put_conversations(app.extensions["switchyard"].store, conversations, said)

    return put


def listed(page: str) -> list[str]:
    return re.findall(r'id="conversation-(\w{32})"', page)


def shown(page: str) -> list[int]:
    """The numbers of the messages on a page."""
    return [int(number, 16) for number in re.findall(r'<li id="message-(\w{31})m"', page)]


def link(page: str, of: str, attribute: str = "href") -> str | None:
    """The href of a link, by its id."""
    found = re.search(rf'<a id="{of}"[^>]*?\s{attribute}="([^"]*)"', page)
    return found and html.unescape(found[1])


def hidden_fields(page: str) -> dict[str, str]:
    """The hidden fields that a page sends with each poll and form."""
    return dict(re.findall(r'class="shown" name="(\w+)" value="([^"]*)"', page))


def test_a_page_lists_the_newest_conversations_and_links_to_all(client: FlaskClient, fill: Callable) -> None:
    """Following the links finds every conversation once, newest first."""
    ids = fill(3 * LISTED + 7)
    found, address = [], "/chats/new"
    while True:
        page = client.get(address).text
        assert len(listed(page)) <= LISTED
        found += listed(page)
        older = link(page, "older")
        if older is None:
            break
        address = f"/chats/new{older}"
    assert found == ids[::-1]


def test_scrolling_loads_more_into_the_same_list(client: FlaskClient, fill: Callable) -> None:
    """The number doubles each time up to a limit, then there are pages; an update keeps all of them shown."""
    ids = fill(2 * LISTED_MOST, messages=1)
    page, length = client.get(f"/chats/{ids[-1]}").text, LISTED
    while more := link(page, "older", "hx-get"):
        length *= 2
        page = client.get(more, headers=HTMX).text
        assert listed(page) == ids[: -length - 1 : -1]
        assert f'id="conversation-{ids[-1]}" href="/chats/{ids[-1]}" title="Talk {len(ids) - 1}" aria-current' in page
    assert length == LISTED_MOST
    assert link(page, "older") is not None
    look = client.get(
        "/fragments/chat-status", query_string={"conversation": ids[-1], **hidden_fields(page)}, headers=HTMX
    ).text
    assert len(listed(look)) == LISTED_MOST


def test_a_page_shows_the_latest_messages_and_links_to_all(client: FlaskClient, fill: Callable) -> None:
    """Earlier messages are added above the shown ones until all are there; expanded messages stay expanded."""
    conversation = fill(1, messages=2 * PAGE_MESSAGES + 5)[0]
    page, numbers = client.get(f"/chats/{conversation}").text, range(2 * PAGE_MESSAGES + 5)
    assert shown(page) == list(numbers[-PAGE_MESSAGES:])
    assert f"Show all {len(numbers)}" in page
    assert f"Its {len(numbers)} messages are gone" in page
    by_link = client.get(link(page, "earlier-messages")).text
    assert shown(by_link) == list(numbers[-2 * PAGE_MESSAGES :])
    while more := link(page, "earlier-messages", "hx-get"):
        page = client.get(more, headers=HTMX).text
    assert shown(page) == list(numbers)
    look = client.get(
        "/fragments/chat-status", query_string={"conversation": conversation, **hidden_fields(page)}, headers=HTMX
    )
    assert shown(look.text) == list(numbers)


def test_a_page_of_long_messages_holds_fewer_of_them(client: FlaskClient, fill: Callable) -> None:
    """A page has fewer messages when they are long together, but at least the last one."""
    conversation = fill(1, messages=12, content="x" * (PAGE_CHARACTERS // 4))[0]
    assert shown(client.get(f"/chats/{conversation}").text) == [8, 9, 10, 11]


def test_an_answer_longer_than_a_page_is_shown_with_its_question(client: FlaskClient, fill: Callable) -> None:
    conversation = fill(1, messages=4, content="x" * (PAGE_CHARACTERS + 1))[0]
    assert shown(client.get(f"/chats/{conversation}").text) == [2, 3]


def test_an_unchanged_poll_reads_no_message_and_no_list(
    client: FlaskClient, chats: Chats, fill: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 10,000 conversations each poll cost 127 ms, and it read 2,000 messages to see that none had changed."""
    conversation = fill(LISTED, messages=PAGE_MESSAGES + 10)[-1]
    page = client.get(f"/chats/{conversation}").text
    poll = re.search(r'id="poll" hx-get="([^"]+)"', page)
    assert poll is not None

    def read(*_: object) -> None:
        raise AssertionError("an unchanged look read what it didn't show")

    monkeypatch.setattr(chats._repository, "get", read)
    monkeypatch.setattr(chats._repository, "newest_first", read)
    look = client.get(html.unescape(poll[1]) + f"&from={hidden_fields(page)['from']}", headers=HTMX)
    assert look.status_code == 200
    assert "Words of message" not in look.text
    assert 'id="composer"' in look.text


def test_invalid_parameters_are_ignored(client: FlaskClient, fill: Callable) -> None:
    """An edited URL shows a page, not an error."""
    conversation = fill(2, messages=3)[-1]
    for query in ("from=-1", "from=x", "from=99999999999", "from=4", "listed=-5", "listed=x", "older=x", "older=nan-"):
        page = client.get(f"/chats/{conversation}?{query}")
        assert (query, page.status_code, shown(page.text)) == (query, 200, [0, 1, 2])
