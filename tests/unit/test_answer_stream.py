"""The event stream of a growing answer: only what is new, and of a very long answer only its beginning."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from flask import Flask
from flask.testing import FlaskClient

from blueprints import answer_stream
from blueprints.markdown import FORMAT_LIMIT, PLAIN_EXCERPT, incremental
from services.chats import Conversation, Message, MessageNotFound
from services.container import Services
from services.store.records import new_id
from services.store.repository import ConversationRepository

PARAGRAPH = "Some **bold** words, and more of them, to make a paragraph.\n\n"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every state of the answer without a pause between updates."""
    monkeypatch.setattr(incremental.IncrementalHtml.__init__, "__defaults__", (0.0, 0.0))


def answer(content: str, **changes: object) -> Message:
    growing_one = Message(new_id(), "c" * 32, "assistant", content, "m", "streaming", None, 1.0, None, None, None)
    return replace(growing_one, **changes)  # type: ignore[arg-type]


class FakeChats:
    """A fake Chats service with one answer, in the given states."""

    def __init__(self, states: list[Message]) -> None:
        self.states = states
        self.now = states[0]

    def follow(self, _message_id: str) -> Iterator[Message]:
        for state in self.states:
            self.now = state
            yield state

    def message(self, _message_id: str) -> Message:
        if self.now.final:
            raise MessageNotFound("gone")
        return self.now


def watch(app: Flask, states: list[Message]) -> list[str]:
    """The events that a page receives."""
    with app.test_request_context():
        return [event.decode() for event in answer_stream.events(FakeChats(states), states[0].id)]  # type: ignore[arg-type]


def test_each_event_sends_only_what_is_new(app: Flask) -> None:
    """The finished paragraphs of a long answer are sent once: a hundred updates are little larger than the answer."""
    first = answer("")
    states = [replace(first, content=PARAGRAPH * number) for number in range(101)]
    events = watch(app, states)
    assert len(events) == 101
    assert sum(map(len, events)) < 10 * len(PARAGRAPH) * 100
    assert "".join(events).count("<strong>bold</strong>") < 2.2 * 100
    assert 'hx-swap-oob="morph"' in events[0]
    assert all('hx-swap-oob="beforeend"' in event for event in events[2:])


def test_a_late_reader_gets_the_whole_answer_once(app: Flask) -> None:
    """The first event of a connection holds the whole answer so far, so that a reconnect loses nothing."""
    late = answer(PARAGRAPH * 50)
    first = watch(app, [late])[0]
    assert first.count("<strong>bold</strong>") == 50
    assert 'hx-swap-oob="morph"' in first


def test_thoughts_are_sent_as_they_come_and_folded(app: Flask) -> None:
    """The first thought comes with its frame, later events add to it; when the answer begins, a duration is shown."""
    first = answer("")
    thinking = [replace(first, thinking="Let me <see> " * number, thinking_seconds=1.0 * number) for number in (1, 2)]
    said = [replace(thinking[-1], content=text) for text in ("It", "It is")]
    dots, began, more, answers, goes_on, end = watch(
        app, [first, *thinking, *said, replace(said[-1], state="complete")]
    )
    assert "<details" not in dots
    assert re.search(r"<summary[^>]*>Thinking…", began)
    assert "Let me &lt;see&gt;" in began
    assert more.count("&lt;see&gt;") == 1
    assert "<details" not in more
    assert "Thought for 2.0 s" in answers
    assert "Waiting for the first words" in more
    assert "Waiting for the first words" not in answers
    assert "see" not in answers + goes_on
    assert "Thought for" not in goes_on
    assert re.search(r"<details(?! open)[^>]*>\s*(data:\s*)?<summary[^>]*>Thought for 2.0 s", end)
    late, *_ = watch(app, [said[-1]])
    assert late.count("Let me &lt;see&gt;") == 2
    assert "Thought for 2.0 s" in late


def test_text_that_becomes_a_thought_is_removed_from_the_answer(app: Flask) -> None:
    """None of it stays on the page, or in the cached HTML of the answer."""
    first = answer(PARAGRAPH * 3)
    thought = replace(first, content="", thinking=PARAGRAPH * 3, thinking_seconds=1.0)
    said = replace(thought, content="It *is*.\n\nYes.")
    _, moved, after, end = watch(app, [first, thought, said, replace(said, state="complete")])
    for event in (moved, after, end):
        assert "<strong>bold</strong>" not in event
    assert 'class="grown" hx-swap-oob="morph"' in moved
    assert "<em>is</em>" in after
    assert "<em>is</em>" in end


def test_the_end_is_the_whole_message(app: Flask) -> None:
    """Links defined at the end work everywhere in it, and its row's state is sent with it."""
    first = answer("See [this].\n\n")
    text = first.content + "[this]: https://a.example/\n"
    *_, last = watch(app, [first, replace(first, content=text), replace(first, content=text, state="complete")])
    assert "event: final" in last
    assert '<a href="https://a.example/"' in last
    assert "message assistant complete" in last


def test_an_answer_too_long_to_format_is_sent_as_its_beginning(app: Flask) -> None:
    """Beyond the limit the plain beginning replaces the formatted text; after that only the length changes."""
    first = answer("words\n\nwords\n\n" + "word " * (FORMAT_LIMIT // 5 - 10))
    more = [replace(first, content=first.content + "x" * (100 * number)) for number in (1, 2)]
    before, crossed, later, end = watch(app, [first, *more, replace(more[-1], state="complete")])
    assert "<p dir" in before
    assert 'hx-swap-oob="morph"' in crossed
    assert '<pre class="excerpt"' in crossed
    assert len(later) < 1000
    assert f"{len(more[-1].content):,} characters so far" in later
    assert f"{len(more[-1].content):,} characters, too many" in end
    assert len(end) < 1.2 * PLAIN_EXCERPT


def test_a_slow_reader_gets_no_text_formatted_beyond_the_limit(app: Flask) -> None:
    """An answer that exceeded the limit since its reader's last update is formatted only up to the limit."""
    now = answer(PARAGRAPH)
    told = FakeChats([now])
    told.now = replace(now, content=PARAGRAPH * (2 * FORMAT_LIMIT // len(PARAGRAPH)))
    with app.test_request_context():
        look = answer_stream.answer_html(now, told)  # type: ignore[arg-type]
    assert len("".join(look.finished) + look.tail) < 2 * FORMAT_LIMIT


@pytest.fixture
def huge(app: Flask) -> Message:
    """A stored answer of 5 MB."""
    services: Services = app.extensions["switchyard"]
    repository: ConversationRepository = services.chats._repository
    conversation = Conversation(new_id(), "Huge", 1.0, 1.0)
    message = answer("*a* <b>\n" * 650_000, conversation_id=conversation.id, state="complete", finished_at=2.0)
    repository.add(replace(conversation, messages=(message,)))
    return message


def test_a_page_with_an_answer_of_five_megabytes_stays_small(client: FlaskClient, huge: Message) -> None:
    """It shows the beginning as plain text, says so, and links to the whole text."""
    page = client.get(f"/chats/{huge.conversation_id}").text
    assert len(page) < 3 * PLAIN_EXCERPT
    assert "5,200,000 characters, too many to be formatted" in page
    assert "*a* &lt;b&gt;" in page
    link = re.search(r'href="(/messages/\w+/text)"', page)
    assert link is not None
    whole = client.get(link[1])
    assert whole.content_type == "text/plain; charset=utf-8"
    assert whole.text == huge.content
