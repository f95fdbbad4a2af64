"""A conversation that exceeds its model's context, with the real llama.cpp and a demo model."""

from __future__ import annotations

import re

from tests.support.console import Console, wait_until

MINI = "switchyard-mini"
QUESTION = "What is the capital of France, and what else do you know about it? "


def last_answer(console: Console, page: str) -> str:
    """The last message on a conversation's page, once it is complete."""
    pages: list[str] = []

    def done() -> bool:
        pages.append(console.get(page, headers={"Accept": "text/html"}).text)
        return "message assistant streaming" not in pages[-1]

    wait_until(done, "the answer")
    return pages[-1]


def test_the_conversation_continues_and_the_page_shows_what_is_dropped(start_console) -> None:
    """Dropped turns are not sent, and a line marks them; a single message that is too long is explained."""
    console = start_console(context_length=256, parallel_requests=1)
    console.switch(MINI)
    page = console.post("/chats", data={"text": QUESTION * 4}).url.removeprefix(console.url)
    for _ in range(3):
        last_answer(console, page)
        console.post(f"{page}/messages", data={"text": QUESTION * 4})
    shown = last_answer(console, page)
    assert shown.count("message assistant complete") == 4
    before, line, after = shown.partition('<li class="left-out">')
    assert line
    assert f"The context of {MINI} is full." in after
    assert "message user" in before
    assert "message user" in after
    console.post(f"{page}/messages", data={"text": QUESTION * 40})
    told = last_answer(console, page)
    assert '<li class="left-out">' in told
    assert re.search(rf"This message is too long: the context of {MINI} holds 256 tokens, and it needs \d", told)
    console.post(f"{page}/messages", data={"text": "Hello"})
    assert last_answer(console, page).count("message assistant complete") == 5
