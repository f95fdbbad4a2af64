"""Hundreds of conversations, and long ones: more comes by scrolling and by a link, and nothing that is read moves."""

from __future__ import annotations

from contextlib import closing

import pytest
from playwright.sync_api import Page, expect

from blueprints.chat_extent import LISTED
from services.chats import PAGE_MESSAGES
from services.store.database import open_store
from tests.browser.conftest import OpenPage, StartShared
from tests.browser.steps import MINI, composer, messages, say
from tests.support.console import Console, stand_in
from tests.support.talk import put_conversations

CONVERSATIONS = 3 * LISTED
MESSAGES = 2 * PAGE_MESSAGES + 10


@pytest.fixture(scope="module")
def shared(start_shared: StartShared) -> Console:
    return start_shared(stand_in("quick-plain", source=str(MINI)))


@pytest.fixture(scope="module")
def talk(shared: Console) -> str:
    """The address of the newest of many conversations, which has many messages."""
    with closing(open_store(shared.folder / "state" / "switchyard.db")) as store:
        ids = put_conversations(store, CONVERSATIONS, (f"Message {number}.\n\nMore." for number in range(MESSAGES)))
    return f"{shared.url}/chats/{ids[-1]}"


def test_earlier_messages_come_in_above_what_is_read(page: Page, talk: str) -> None:
    """They are asked for by a link; the message that was on top stays where it was; the link keeps the focus."""
    page.goto(talk)
    expect(messages(page)).to_have_count(PAGE_MESSAGES)
    earlier = page.get_by_role("link", name="Earlier messages")
    first = messages(page).filter(has_text=f"Message {MESSAGES - PAGE_MESSAGES}.")
    earlier.focus()
    before = first.bounding_box()
    page.keyboard.press("Enter")
    expect(messages(page)).to_have_count(2 * PAGE_MESSAGES)
    after = first.bounding_box()
    assert before
    assert after
    assert abs(before["y"] - after["y"]) < 2
    expect(earlier).to_be_focused()
    page.keyboard.press("Enter")
    expect(messages(page)).to_have_count(MESSAGES)
    expect(earlier).to_have_count(0)
    expect(page.locator("#messages")).to_be_focused()


def test_without_script_links_lead_to_all_of_it(open_page: OpenPage, talk: str) -> None:
    """Older conversations are a page of the list, earlier messages a longer page."""
    page = open_page(java_script_enabled=False)
    page.goto(talk)
    expect(messages(page)).to_have_count(PAGE_MESSAGES)
    page.get_by_role("link", name="Earlier messages").click()
    expect(messages(page)).to_have_count(2 * PAGE_MESSAGES)
    page.get_by_role("link", name="Older conversations").click()
    expect(page.get_by_role("link", name="Newest conversations")).to_be_visible()
    expect(page.locator("#conversation-list .title").first).to_have_text(f"Talk {CONVERSATIONS - LISTED - 1}")


def test_what_was_unfolded_stays_when_something_changes(page: Page, console: Console, talk: str) -> None:
    """After a new answer the earlier messages are still there, and so is the list as far as it was scrolled."""
    console.switch("quick-plain")
    page.goto(talk)
    listed = page.locator("#conversation-list a[href^='/chats/']")
    expect(listed).to_have_count(LISTED)
    page.locator("#older").scroll_into_view_if_needed()
    expect(listed).to_have_count(2 * LISTED)
    page.get_by_role("link", name="Earlier messages").click()
    expect(messages(page)).to_have_count(2 * PAGE_MESSAGES)
    say(page, "Hello")
    expect(page.locator(".message.complete").last).to_contain_text("ten short words")
    expect(messages(page)).to_have_count(2 * PAGE_MESSAGES + 2)
    expect(listed).to_have_count(2 * LISTED)
    expect(composer(page)).to_be_focused()
