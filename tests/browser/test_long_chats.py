"""Many and long conversations: more load by scrolling and by a link, without moving the view."""

from __future__ import annotations

import re
from contextlib import closing

import pytest
from playwright.sync_api import Page, expect

from blueprints.chat_extent import LISTED
from services.chats import PAGE_MESSAGES
from services.store.database import open_store
from tests.browser.conftest import OpenPage, StartShared
from tests.browser.steps import MINI, composer, messages, say
from tests.support.console import Console, fake_model
from tests.support.talk import put_conversations

CONVERSATIONS = 3 * LISTED
MESSAGES = 2 * PAGE_MESSAGES + 10


@pytest.fixture(scope="module")
def shared(start_shared: StartShared) -> Console:
    return start_shared(fake_model("quick-plain", source=str(MINI)))


@pytest.fixture(scope="module")
def talk(shared: Console) -> str:
    """The address of the newest of many conversations, which has many messages."""
    with closing(open_store(shared.folder / "state" / "switchyard.db")) as store:
        ids = put_conversations(store, CONVERSATIONS, (f"Message {number}.\n\nMore." for number in range(MESSAGES)))
    return f"{shared.url}/chats/{ids[-1]}"


def test_earlier_messages_load_above_without_moving_the_view(page: Page, talk: str) -> None:
    """A link loads them and keeps the focus; the message at the top of the view stays in place."""
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


def test_print_prints_the_conversation(page: Page, talk: str) -> None:
    """The printout has the title and all loaded messages, over several pages, and no controls."""
    page.goto(f"{talk}?from=0")
    page.emulate_media(media="print", color_scheme="dark")
    for shown in (page.locator("#chat-title"), messages(page).first, messages(page).last):
        expect(shown).to_be_visible()
    for hidden in ("header.top", "#conversations", "#composer", "#model-picker", ".message button"):
        expect(page.locator(hidden).first).to_be_hidden()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(20, 24, 31)"
    assert page.locator("#messages").evaluate("e => e.scrollHeight - e.clientHeight") == 0
    assert len(re.findall(rb"/Type /Page\b", page.pdf())) > 1
    first = page.locator(".about time").first
    printed = first.evaluate("e => [getComputedStyle(e).fontSize, getComputedStyle(e, '::before').content]")
    assert printed == ["0px", f'"{first.get_attribute("title")}"'], "on paper, 3 min ago is of no use"


def test_the_printout_says_how_many_messages_are_missing(page: Page, talk: str) -> None:
    """The printout of the latest messages says how many are missing and how to load them."""
    page.goto(talk)
    expect(page.locator("#earlier")).to_contain_text(f"Show all {MESSAGES}")
    page.emulate_media(media="print")
    expect(page.locator("#earlier")).to_contain_text(f"{MESSAGES - PAGE_MESSAGES} earlier messages are left out")


def test_forced_colours_show_the_current_page_and_conversation(page: Page, shared: Console, talk: str) -> None:
    """A line, not a background, marks the current page and conversation; the memory's legend keeps its colours."""
    page.emulate_media(forced_colors="active")

    def line(of: str, side: str) -> tuple[str, str]:
        color, width = page.locator(of).first.evaluate(
            f"e => [getComputedStyle(e).border{side}Color, getComputedStyle(e).border{side}Width]"
        )
        return color, width

    page.goto(f"{shared.url}/models")
    swatch, background = page.locator(".swatch.free").first, "e => getComputedStyle(e).boxShadow"
    assert swatch.evaluate(background) != "none", "the legend has the colours of the bar"
    page.goto(talk)
    for places, side in ((".pages a", "Bottom"), (".conversation-list a", "InlineStart")):
        assert line(f"{places}[aria-current]", side) != line(f"{places}:not([aria-current])", side)


def test_without_script_links_lead_to_older_content(open_page: OpenPage, talk: str) -> None:
    """A link to another page of the list shows older conversations, one to a longer page earlier messages."""
    page = open_page(java_script_enabled=False)
    page.goto(talk)
    expect(messages(page)).to_have_count(PAGE_MESSAGES)
    page.get_by_role("link", name="Earlier messages").click()
    expect(messages(page)).to_have_count(2 * PAGE_MESSAGES)
    page.get_by_role("link", name="Older conversations").click()
    expect(page.get_by_role("link", name="Newest conversations")).to_be_visible()
    expect(page.locator("#conversation-list .title").first).to_have_text(f"Talk {CONVERSATIONS - LISTED - 1}")


def test_loaded_messages_and_conversations_stay_after_an_answer(page: Page, console: Console, talk: str) -> None:
    """After a new answer, the earlier messages and the loaded part of the conversation list are still there."""
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
