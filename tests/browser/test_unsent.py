"""A typed message is never lost, whatever the response to it."""

from __future__ import annotations

import pytest
from playwright.sync_api import Locator, Page, Route, expect

from tests.browser.conftest import OpenPage, StartShared
from tests.browser.steps import MINI, answers, composer, messages, say, visit
from tests.support.console import Console, fake_model

NGINX = "<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
PROXY = ("the server responded with a status", "ERR_FAILED", "htmx:", "[object Event]")
"""What Chromium and htmx say of a refusal, and of a network that is gone."""


@pytest.fixture(scope="module")
def shared(start_shared: StartShared) -> Console:
    return start_shared(
        fake_model("plain", source=str(MINI)) + fake_model("slow-plain", "slow_tokens:1", source=str(MINI))
    )


@pytest.fixture
def page(open_page: OpenPage, console: Console) -> Page:
    """A new chat with a model that is ready."""
    console.switch("plain")
    page = open_page(tolerate=PROXY)
    visit(page, console)
    return page


def unsent(page: Page) -> Locator:
    """The error beside the composer."""
    return page.locator("#composer-error")


def fail_posts(page: Page, how: dict[str, object]) -> None:
    """Answer every POST of the page with this response, or with a network error if it is empty."""

    def meet(route: Route) -> None:
        if route.request.method != "POST":
            route.continue_()
        elif how:
            route.fulfill(**how)  # type: ignore[arg-type]
        else:
            route.abort()

    page.route("**/*", meet)


FAULTS = {
    "a proxy's 502": ({"status": 502, "content_type": "text/html", "body": NGINX}, "answered in its place (502)"),
    "a proxy's 413": ({"status": 413, "content_type": "text/html", "body": NGINX}, "larger than something"),
    "an empty 200": ({"status": 200, "body": ""}, "answered in its place (200)"),
    "JSON": ({"status": 503, "json": {"error": "stopping"}}, "answered in its place (503)"),
    "no network": ({}, "could not be reached"),
}


@pytest.mark.parametrize("new", [True, False])
def test_an_undelivered_message_stays_in_the_composer(page: Page, new: bool) -> None:
    """Whatever the failure, the text, its draft and an error stay; the message is then sent once."""
    sent = 0
    if not new:
        say(page, "First")
        expect(page.locator(".message.complete")).to_have_count(1)
        sent = 2
    here = page.url
    for name, (how, words) in FAULTS.items():
        fail_posts(page, how)
        say(page, f"Through {name}")
        expect(page.get_by_role("alert").filter(has_text="Not sent.")).to_contain_text(words)
        expect(composer(page)).to_have_value(f"Through {name}")
        expect(page.get_by_text("502 Bad Gateway")).to_have_count(0)
        expect(messages(page)).to_have_count(sent)
        assert page.url == here
        page.reload()
        expect(composer(page)).to_have_value(f"Through {name}")
        page.unroute("**/*")
    composer(page).press("Enter")
    expect(page.locator(".message.user .said").last).to_have_text("Through no network")
    expect(composer(page)).to_have_value("")
    expect(unsent(page)).to_be_empty()
    page.reload()
    expect(composer(page)).to_have_value("")
    expect(messages(page)).to_have_count(sent + 2)


def test_a_message_whose_response_was_lost_is_stored_once(page: Page) -> None:
    """The message had arrived: sending it again leads to its conversation."""

    def lose(route: Route) -> None:
        if route.request.method == "POST":
            route.fetch(max_redirects=0)
            route.abort()
        else:
            route.continue_()

    page.route("**/*", lose)
    say(page, "Only once")
    expect(unsent(page)).to_contain_text("could not be reached")
    page.unroute("**/*")
    composer(page).press("Enter")
    expect(messages(page)).to_have_count(2)
    expect(page.locator("#conversation-list a").filter(has_text="Only once")).to_have_count(1)


def test_a_message_that_is_too_long_stays_in_the_composer(page: Page) -> None:
    """Also on a new chat: the API's error text is shown beside the composer."""
    say(page, "word " * 7000)
    expect(page.get_by_role("alert").filter(has_text="Not sent.")).to_contain_text("34,999 characters; 32,000 is the")
    assert len(composer(page).input_value()) == 35_000
    page.reload()
    assert len(composer(page).input_value()) == 35_000


def test_a_message_refused_in_a_second_tab_stays(page: Page, console: Console) -> None:
    """A tab that does not know yet of the other tab's message keeps its own, which can be sent afterwards."""
    say(page, "First")
    expect(page.locator(".message.complete")).to_have_count(1)
    other = page.context.new_page()
    other.goto(page.url)
    other.route("**/fragments/**", lambda route: route.abort())
    console.switch("slow-plain")
    say(page, "Second")
    expect(answers(page)).to_have_count(2)
    say(other, "Third")
    expect(unsent(other)).to_contain_text("An answer is being written in this conversation.")
    expect(composer(other)).to_have_value("Third")
    page.get_by_role("button", name="Stop").click()
    other.unroute("**/fragments/**")
    say(other, "Third")
    expect(answers(other)).to_have_count(3)
    expect(unsent(other)).to_be_empty()
    other.get_by_role("button", name="Stop").click()


def test_words_typed_while_a_message_is_sent_stay(page: Page) -> None:
    """Only the sent text is removed from the composer."""
    say(page, "First")
    expect(page.locator(".message.complete")).to_have_count(1)
    held: list[Route] = []
    page.route("**/messages", lambda route: held.append(route))
    with page.expect_request("**/messages"):
        say(page, "Sec")
    page.keyboard.type("ond thoughts")
    held[0].continue_()
    expect(page.locator(".message.user .said").last).to_have_text("Sec")
    expect(composer(page)).to_have_value("ond thoughts")


def test_a_conversation_deleted_elsewhere_keeps_its_draft(page: Page) -> None:
    """The page reports the deletion, stays over a reload, and sends the draft as a new chat."""
    say(page, "First")
    expect(page.locator(".message.complete")).to_have_count(1)
    here = page.url
    other = page.context.new_page()
    other.goto(here)
    composer(page).press_sequentially("Half a thought")
    other.get_by_role("button", name="Delete this conversation").click()
    other.get_by_role("button", name="Delete", exact=True).click()
    for _ in range(2):
        expect(page.get_by_role("heading", name="This conversation was deleted")).to_be_visible()
        expect(composer(page)).to_have_value("Half a thought")
        assert page.url == here
        expect(page.get_by_role("button", name="Delete this conversation")).to_be_hidden()
        page.reload()
    composer(page).press("Enter")
    expect(page.locator(".message.user .said")).to_have_text("Half a thought")
    assert page.url != here
    expect(composer(page)).to_have_value("")


def test_a_message_to_a_just_deleted_conversation_becomes_a_new_chat(page: Page, console: Console) -> None:
    """The page reports the deletion, and the next try sends the message as a new chat."""
    say(page, "First")
    expect(page.locator(".message.complete")).to_have_count(1)
    here = page.url
    page.route("**/fragments/**", lambda route: route.abort())
    console.post(here.removeprefix(console.url) + "/delete")
    say(page, "Too late")
    expect(unsent(page)).to_contain_text("This conversation was deleted.")
    expect(composer(page)).to_have_value("Too late")
    page.unroute("**/fragments/**")
    expect(page.get_by_role("heading", name="This conversation was deleted")).to_be_visible()
    composer(page).press("Enter")
    expect(page.locator(".message.user .said")).to_have_text("Too late")
    assert page.url != here
