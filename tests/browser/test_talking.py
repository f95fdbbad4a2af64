"""Chat: answers that stream, stop, are retried, and survive reloads and the end of the app."""

from __future__ import annotations

import re
import signal

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenPage, StartShared
from tests.browser.steps import MINI, answers, composer, messages, note, say, visit
from tests.support.console import Console, fake_model, wait_until

WHOLE = "I am a fake and answer in ten short words."
GONE = ("ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE")
OFFLINE = (*GONE, "htmx:", "[object Event]")
"""Errors that Chromium, htmx and its event stream log when the app is gone."""
MODELS = fake_model("markdown", source=str(MINI)) + fake_model("slow-plain", "slow_tokens:0.2", source=str(MINI))
MODELS += fake_model("slow-markdown", "slow_tokens:0.1", source=str(MINI))
MODELS += fake_model("thinker-plain", "thinks:0.3", "slow_tokens:0.1", source=str(MINI))
MODELS += fake_model("silent-plain", "silent", source=str(MINI))


@pytest.fixture(scope="module")
def shared(start_shared: StartShared) -> Console:
    return start_shared(MODELS)


@pytest.fixture
def slow(page: Page, console: Console) -> Page:
    """A new conversation with a model that takes 2 s for its ten words."""
    console.switch("slow-plain")
    visit(page, console)
    return page


def test_markdown_is_rendered_safely(page: Page, console: Console) -> None:
    """Bold, code, tables and lists become HTML; HTML and script links from a model stay text."""
    console.switch("markdown")
    visit(page, console)
    say(page, "Show me")
    answer = page.locator(".message.complete .prose")
    expect(answer.locator("strong")).to_have_text("bold")
    expect(answer.locator(".code pre")).to_have_text('def greet(name: str) -> str:\n    return f"Hello, {name}"\n')
    expect(answer.locator(".code-head span")).to_have_text("python")
    expect(answer.locator("td").nth(1)).to_have_css("text-align", "end")
    expect(answer.locator("script")).to_have_count(0)
    expect(answer).to_contain_text("<script>alert(1)</script>")
    expect(answer.locator("a")).to_have_count(1)
    expect(answer.locator("a")).to_have_attribute("rel", "noopener noreferrer")


def test_streamed_blocks_appear_once(page: Page, console: Console) -> None:
    """Each finished block is appended once while the answer still grows."""
    console.switch("slow-markdown")
    visit(page, console)
    say(page, "Show me")
    counts = page.wait_for_function("""() => {
        const count = (what) => document.querySelectorAll(`.message.streaming ${what}`).length;
        return count("ol") && [".grown", "strong", ".code", "table", "ol"].map(count);
    }""")
    assert counts.json_value() == [1, 1, 1, 1, 1]


def test_code_can_be_copied(open_page: OpenPage, console: Console) -> None:
    """The button copies only the code to the clipboard and confirms it."""
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    console.switch("markdown")
    visit(page, console)
    say(page, "Show me")
    expect(page.locator(".message.complete")).to_be_visible()
    page.evaluate(
        """() => { // it says so for a moment only, which a busy test could miss
            const button = document.querySelector("[data-copy]");
            window.said = new Promise((heard) => {
                new MutationObserver(() => heard(button.textContent)).observe(button, { childList: true });
            });
        }"""
    )
    page.locator(".message.complete").get_by_role("button", name="Copy").click()
    assert page.evaluate("window.said") == "Copied"
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == 'def greet(name: str) -> str:\n    return f"Hello, {name}"\n'


def test_an_answer_streams_in(slow: Page) -> None:
    """Words appear before the answer is complete, and the page names the model that answers."""
    say(slow, "Hello")
    expect(answers(slow).locator(".prose")).to_contain_text("I am")
    expect(answers(slow)).not_to_have_class(re.compile("complete"))
    expect(note(slow)).to_have_text("slow-plain is answering")
    expect(answers(slow).locator(".prose")).to_have_text(WHOLE)
    expect(answers(slow)).to_have_class(re.compile("complete"))
    expect(answers(slow).locator(".about")).to_contain_text(re.compile(r"slow-plain\W*[\d.]+ tokens/s\W*[\d.]+ s"))


def test_a_reload_during_an_answer_loses_and_repeats_nothing(slow: Page) -> None:
    """The answer continues after the reload and is shown once and complete."""
    say(slow, "Hello")
    expect(answers(slow).locator(".prose")).to_contain_text("I am a")
    slow.reload()
    expect(answers(slow)).not_to_have_class(re.compile("complete"))
    expect(answers(slow).locator(".prose")).to_have_text(WHOLE)
    expect(answers(slow)).to_have_class(re.compile("complete"))
    expect(messages(slow)).to_have_count(2)


def test_an_answer_streams_in_every_tab(slow: Page) -> None:
    """A question asked in one tab is answered in both tabs of the conversation."""
    say(slow, "First")
    expect(slow.locator(".message.complete")).to_have_count(1)
    other = slow.context.new_page()
    other.goto(slow.url)
    say(slow, "Second")
    expect(other.locator(".message.user")).to_have_count(2)
    expect(other.locator(".message.complete .prose")).to_have_text([WHOLE, WHOLE])


def show(page: Page, shown: bool) -> None:
    """Bring a tab to the front, or another one in front of it."""
    page.evaluate(
        """(shown) => {
            Object.defineProperty(document, "hidden", { configurable: true, get: () => !shown });
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        shown,
    )


def test_a_hidden_tab_closes_its_stream(slow: Page) -> None:
    """Six hidden tabs would otherwise use all connections of the browser. Shown again, the tab has the whole answer."""
    asked: list[str] = []
    slow.on("request", lambda request: asked.append(request.url))
    with slow.expect_event("requestfailed", lambda request: request.url.endswith("/stream")):
        say(slow, "Hello")
        expect(answers(slow).locator(".prose")).to_contain_text("I")
        show(slow, False)
    expect(answers(slow)).not_to_have_class(re.compile("complete"))
    show(slow, True)
    expect(answers(slow).locator(".prose")).to_have_text(WHOLE)
    expect(answers(slow)).to_have_class(re.compile("complete"))
    assert len([url for url in asked if url.endswith("/stream")]) == 2


def test_a_late_poll_does_not_remove_streamed_words(slow: Page) -> None:
    """A poll's answer that is older than the latest streamed words removes none of them."""
    say(slow, "Hello")
    words = answers(slow).locator(".prose")
    expect(words).to_contain_text("I am")
    left = slow.evaluate(
        """() => {
            const now = document.querySelector("#messages");
            const before = now.cloneNode(true);
            before.querySelector(".growing").textContent = "I";
            Idiomorph.morph(now, before.outerHTML);
            return document.querySelector(".growing").textContent;
        }"""
    )
    assert "I am" in left
    expect(words).to_have_text(WHOLE)


def test_stop_keeps_the_partial_answer_and_retry_adds_a_version(slow: Page) -> None:
    """A stopped answer is marked; the retry gives a complete one, and the first can still be shown by keyboard."""
    say(slow, "Hello")
    expect(answers(slow).locator(".prose")).to_contain_text("I am")
    slow.get_by_role("button", name="Stop").click()
    expect(answers(slow)).to_contain_text("Stopped before it was complete.")
    half = answers(slow).locator(".prose").inner_text()
    assert half != WHOLE
    answers(slow).get_by_role("button", name="Retry").click()
    expect(slow.locator(".message.complete .prose")).to_have_text(WHOLE)
    expect(messages(slow)).to_have_count(2)
    earlier, later = (slow.get_by_role("button", name=f"{which} answer") for which in ("Earlier", "Later"))
    versions = slow.get_by_role("group", name="Answers to this message").get_by_role("status")
    expect(versions).to_have_text("Answer 2 of 2")
    earlier.focus()
    slow.keyboard.press("Enter")
    expect(versions).to_have_text("Answer 1 of 2")
    expect(answers(slow).locator(".prose")).to_have_text(half)
    expect(earlier).to_be_focused()
    expect(earlier).to_have_attribute("aria-disabled", "true")
    slow.reload()
    expect(answers(slow).locator(".prose")).to_have_text(half)
    later.click()
    expect(answers(slow).locator(".prose")).to_have_text(WHOLE)
    answers(slow).get_by_role("button", name="Retry").click()
    expect(versions).to_have_text("Answer 3 of 3")
    expect(answers(slow).locator(".prose")).to_have_text(WHOLE)


def test_thoughts_stream_folded(page: Page, console: Console) -> None:
    """Thoughts can be unfolded while they stream and stay unfolded; the answer stands below."""
    console.switch("thinker-plain")
    visit(page, console)
    say(page, "Hello")
    thought = answers(page).locator("details")
    expect(thought.locator("summary")).to_have_text("Thinking…")
    expect(thought.locator(".thoughts")).to_be_hidden()
    thought.locator("summary").click()
    expect(thought.locator(".thoughts")).to_contain_text("Let me see")
    expect(thought.locator(".thoughts")).to_have_text("Let me see what a fake says. ")
    expect(thought.locator("summary")).to_have_text(re.compile(r"Thought for \d\.\d s"))
    expect(page.locator(".message.complete > .prose")).to_have_text(WHOLE)
    expect(thought.locator(".thoughts")).to_be_visible()
    page.reload()
    expect(thought.locator("summary")).to_have_text(re.compile(r"Thought for \d\.\d s"))
    expect(thought.locator(".thoughts")).to_be_hidden()


def test_stop_ends_an_answer_before_its_first_word(page: Page, console: Console) -> None:
    """Reading a long prompt can take minutes: Stop ends the answer on the page and the engine's work at once."""
    console.switch("silent-plain")
    visit(page, console)
    say(page, "Hello")
    expect(answers(page)).to_contain_text("Waiting for the first words")
    wait_until(lambda: console.model("silent-plain")["in_flight"] == 1, "the engine to be asked")
    page.get_by_role("button", name="Stop").click()
    expect(answers(page)).to_contain_text("Stopped before it was complete.")
    wait_until(lambda: console.model("silent-plain")["in_flight"] == 0, "the engine to be left alone")


def test_the_composer_handles_enter_shift_enter_and_escape(slow: Page) -> None:
    """Shift+Enter breaks the line, Enter sends, Esc stops, and an empty message is not sent."""
    composer(slow).press("Enter")
    composer(slow).press_sequentially("one")
    composer(slow).press("Shift+Enter")
    composer(slow).press_sequentially("two")
    expect(composer(slow)).to_have_value("one\ntwo")
    expect(messages(slow)).to_have_count(0)
    composer(slow).press("Enter")
    expect(slow.locator(".message.user .said")).to_have_text("one\ntwo")
    expect(answers(slow).locator(".prose")).to_contain_text("I am")
    slow.keyboard.press("Escape")
    expect(answers(slow)).to_contain_text("Stopped before it was complete.")


def test_a_draft_survives_a_reload(slow: Page) -> None:
    """An unsent draft is restored after a reload; a sent one is not."""
    composer(slow).press_sequentially("Half a")
    slow.reload()
    expect(composer(slow)).to_have_value("Half a")
    say(slow, "Whole")
    expect(messages(slow)).to_have_count(2)
    slow.reload()
    expect(composer(slow)).to_have_value("")


def test_a_growing_answer_scrolls_only_a_view_at_the_end(slow: Page) -> None:
    """A view scrolled up stays in place while an answer grows; a view at the end follows it."""
    slow.set_viewport_size({"width": 1280, "height": 400})
    for number in (1, 2):
        say(slow, f"Question {number}")
        expect(slow.locator(".message.complete")).to_have_count(number)
    box = slow.locator("#messages")
    assert box.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 2
    say(slow, "Question 3")
    expect(answers(slow).nth(2).locator(".prose")).to_contain_text("I")
    box.evaluate("e => e.scrollTo(0, 0)")
    expect(slow.locator(".message.complete")).to_have_count(3)
    assert box.evaluate("e => e.scrollTop") == 0


def test_conversations_are_listed_renamed_and_deleted(slow: Page) -> None:
    """The first words name a conversation; a new name shows at once; deletion asks first."""
    say(slow, "A title of its own")
    listed = slow.locator("#conversation-list")
    expect(listed.get_by_text("A title of its own")).to_be_visible()
    slow.get_by_role("button", name="Rename this conversation").click()
    slow.get_by_label("Name of this conversation").fill("Renamed")
    slow.get_by_role("button", name="Rename", exact=True).click()
    expect(slow.get_by_role("heading", level=1)).to_have_text("Renamed")
    slow.get_by_role("button", name="Delete this conversation").click()
    expect(slow.get_by_text("gone for good")).to_be_visible()
    slow.get_by_role("button", name="Delete", exact=True).click()
    expect(listed.get_by_text("Renamed")).to_have_count(0)


def test_conversations_survive_a_restart(open_page: OpenPage, start_with_fakes) -> None:
    """The page waits for the app and reconnects; the conversation is there and can be continued."""
    console = start_with_fakes(fake_model("plain"))
    console.switch("plain")
    page = open_page(tolerate=OFFLINE)
    visit(page, console)
    say(page, "Hello")
    expect(page.locator(".message.complete .prose")).to_have_text(WHOLE)
    console.stop()
    expect(page.get_by_text("Switchyard does not answer.")).to_be_visible()
    console.start()
    expect(page.get_by_text("Switchyard does not answer.")).to_be_hidden()
    page.reload()
    expect(page.locator(".message.complete .prose")).to_have_text(WHOLE)
    console.switch("plain")
    say(page, "Again")
    expect(page.locator(".message.complete")).to_have_count(2)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (signal.SIGKILL, "Switchyard was stopped before the answer was complete."),
        (signal.SIGTERM, "Stopped before it was complete."),
    ],
)
def test_an_answer_cut_off_by_the_end_of_the_app_is_marked(
    open_page: OpenPage, start_with_fakes, end: signal.Signals, words: str
) -> None:
    """The open page keeps the partial answer without a reload, marks it as cut off and offers a retry."""
    console = start_with_fakes(fake_model("slow", "slow_tokens:0.3"))
    console.switch("slow")
    page = open_page(tolerate=OFFLINE)
    visit(page, console)
    say(page, "Hello")
    expect(answers(page).locator(".prose")).to_contain_text("I am a fake")
    console.kill() if end == signal.SIGKILL else console.stop()
    console.start()
    expect(answers(page)).to_contain_text(words)
    expect(answers(page).locator(".prose")).to_contain_text("I am")
    page.reload()
    expect(answers(page)).to_contain_text(words)
    console.switch("slow")
    answers(page).get_by_role("button", name="Retry").click()
    expect(page.locator(".message.complete .prose")).to_have_text(WHOLE)
    expect(messages(page)).to_have_count(2)


def test_ages_update_without_a_request(page: Page, console: Console) -> None:
    """An age of "just now" grows after five minutes although the page does not ask the server for it again."""
    page.clock.install()
    console.switch("markdown")
    visit(page, console)
    say(page, "Hello")
    written = page.locator(".message.complete time")
    listed = page.locator(".conversation-list [aria-current] time")
    expect(written).to_have_text("just now")
    expect(listed).to_have_text("just now")
    page.route(re.compile("/fragments/"), lambda route: route.fulfill(status=204))
    page.clock.fast_forward("05:20")
    expect(written).to_have_text("5 min ago")
    expect(listed).to_have_text("5 min ago")
    page.clock.fast_forward("49:00:00")
    expect(written).to_have_text("2 days ago")
