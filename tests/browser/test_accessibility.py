"""Accessibility of every page and state: axe rules, narrow windows and the keyboard."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect

from services.store.database import open_store
from services.store.records import Conversation, Message, new_id
from services.store.repository import ConversationRepository
from tests.browser.conftest import OpenPage, StartShared
from tests.browser.ollama_steps import (
    SIZE,
    Workbench,
    card,
    download,
    field,
    job,
    listed,
    wait_for_download,
)
from tests.browser.steps import (
    MINI,
    answers,
    banner,
    choice,
    choose,
    composer,
    dialog,
    expect_active,
    menu,
    row,
    say,
    visit,
)
from tests.support.console import Console, fake_model, wait_until
from tests.support.talk import put_conversations

LONG = "a-model-whose-name-has-as-many-as-sixty-letters-and-hyphens-"[:59] + "x"
FORTY = "".join(fake_model(f"family-{n // 10}/model-{n:02d}-plain", source=str(MINI)) for n in range(40))
LONG_NAME = "a-model-whose-name-has-as-many-as-sixty-letters-in-it-all:7b"
WIDTHS = (1280, 390)
OF_COLOUR = {"runOnly": {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}}
"""All of axe's rules that a colour scheme decides; the others hold or fail in both alike."""


@pytest.fixture(scope="module")
def shared(start_shared: StartShared, big_model: Path) -> Console:
    """Forty models and one with a long name; one that is slow to load, one that fails, one that can't fit."""
    more = [
        fake_model(LONG, "slow_tokens:0.01", description="A name that needs room", source=str(MINI)),
        fake_model("talkative", "slow_tokens:1", source=str(MINI)),
        fake_model("slow", "slow_load:60", source=str(big_model)),
        fake_model("bad", "crash_loading", source=str(MINI)),
        fake_model("huge", required_gb=9000, source=str(MINI)),
    ]
    return start_shared(FORTY + "".join(more))


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """A console with a download in each state, a model to update and one that another program unloaded."""
    names = ["quick:latest", "held:latest", "waits:latest", LONG_NAME]
    bench = Workbench(
        tmp_path_factory.mktemp("busy"),
        models={"tiny-a:latest": {}, "evicted:latest": {}},
        registry={name: {"size": SIZE} for name in names},
    )
    try:
        bench.registry.publish("tiny-a:latest", version=2)
        bench.ollama.start()
        console = bench.start(downloads_at_once=1)
        console.switch("evicted:latest")
        bench.ollama.unload("evicted:latest")
        console.switch("tiny-a:latest")
        console.post("/api/providers/models/updates")
        for name, state in (("quick:latest", "complete"), ("nope:latest", "failed")):
            _request(console, name)
            wait_for_download(console, name, state)
        bench.ollama.set_fault("pull_stuck_at", 50)
        _request(console, "held:latest")
        wait_until(lambda: listed(console)["held:latest"]["completed_bytes"], "bytes to arrive")
        console.post(f"/api/providers/models/downloads/{listed(console)['held:latest']['id']}/pause")
        wait_for_download(console, "held:latest", "paused")
        _request(console, LONG_NAME)
        _request(console, "waits:latest")
        wait_until(lambda: listed(console)[LONG_NAME]["bytes_per_second"] == 0, "the download to stand still")
        yield console
    finally:
        bench.close()


def _request(console: Console, model: str) -> None:
    answer = console.post("/api/providers/models/download", {"model": model}, headers={"Accept": "application/json"})
    assert answer.status_code == 202, answer.text


@dataclass
class Windows:
    """One page in wide and narrow windows, each in light and dark."""

    pages: list[Page]

    def check(self, prepare: Callable[[Page], object]) -> None:
        """Bring every window into a state, and check it for accessibility."""
        for page in self.pages:
            page.emulate_media(color_scheme="light")
            prepare(page)
            self._hold_against_axe(page, {})
            width, inner = page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
            assert width <= inner, f"{page.url} scrolls sideways: {width} of {inner}"
            page.emulate_media(color_scheme="dark")
            self._hold_against_axe(page, OF_COLOUR)

    def _hold_against_axe(self, page: Page, options: dict[str, object]) -> None:
        found = Axe().run(page, options={"resultTypes": ["violations"], **options})
        assert found.violations_count == 0, found.generate_report()


@pytest.fixture(scope="module")
def windows(chromium: Browser) -> Iterator[Windows]:
    """Windows with reduced motion, so that axe sees no colour in transition."""
    contexts: list[BrowserContext] = [
        chromium.new_context(
            viewport={"width": width, "height": 800},
            reduced_motion="reduce",
        )
        for width in WIDTHS
    ]
    yield Windows([context.new_page() for context in contexts])
    for context in contexts:
        context.close()


def test_an_empty_chat_is_accessible(windows: Windows, console: Console) -> None:
    """Check the chat page with no model loaded and no message."""
    windows.check(lambda page: visit(page, console))


def test_a_conversation_is_accessible(windows: Windows, console: Console, page: Page) -> None:
    """Check a conversation with code, a table, a list and a long model name, and its open model menu."""
    console.switch(LONG)
    visit(page, console)
    say(page, "Show me everything, in a question that is long enough to be cut in the list of conversations")
    expect(page.locator(".message.complete")).to_have_count(1)

    def look(window: Page) -> None:
        window.goto(page.url)
        expect(window.locator(".message.complete")).to_have_count(1)

    def open_menu(window: Page) -> None:
        look(window)
        window.locator("#model-button").click()
        expect(window.get_by_label("Find a model")).to_be_visible()

    windows.check(look)
    windows.check(open_menu)


WIDE = "w" * 300
EVERYTHING = f"""\
{WIDE} and **{WIDE}**, `{WIDE}`, [{WIDE}](https://example.org/{WIDE}), \\({WIDE}\\)

# {WIDE}

- {WIDE}
- שלום עולם

> {WIDE}

$${WIDE}$$

```{WIDE[:40]}:{WIDE}
{WIDE}
```

| {WIDE} | b |
|---|--:|
| 1 | 2 |

مرحبا بالعالم, हिन्दी, 日本語
"""


def test_wide_content_does_not_overflow(windows: Windows, shared: Console) -> None:
    """Words, names and addresses of 300 letters, formulas, tables and right-to-left scripts fit the window."""
    with closing(open_store(shared.folder / "state" / "switchyard.db")) as store:
        talk = put_conversations(store, 1, [WIDE, EVERYTHING, "שלום", EVERYTHING] * 12, title=WIDE, model=WIDE)[-1]

    def look(window: Page) -> None:
        visit(window, shared, f"/chats/{talk}")
        expect(window.locator(".message.complete").last).to_be_visible()
        for inside in ("#messages", ".chat-bar", "#composer", "main"):
            width, inner = window.locator(inside).evaluate("e => [e.scrollWidth, e.clientWidth]")
            assert width <= inner, f"{inside} scrolls sideways: {width} of {inner}"

    windows.check(look)


def test_thoughts_versions_and_a_cut_context_are_accessible(windows: Windows, console: Console) -> None:
    """Check unfolded thoughts, the line about left-out messages, and a refused message in the composer."""
    console.switch(LONG)
    with closing(open_store(console.folder / "state" / "switchyard.db")) as store:
        talk, chats = new_id(), ConversationRepository(store)
        plain = Message("", talk, "user", "One", LONG, "complete", None, 1.0, 2.0, None, None)
        said = [replace(plain, id=new_id(), role=("user", "assistant")[n % 2]) for n in range(4)]
        chats.add(Conversation(talk, "Thoughts", 1.0, 1.0, tuple(said)))
        thought = replace(said[3], thinking=f"Hm, {WIDE}", thinking_seconds=2.5, context_full=True)
        chats.add_version(replace(thought, id=new_id(), told_from=said[2].id), said[3].id)

    def look(window: Page) -> None:
        visit(window, console, f"/chats/{talk}")
        window.get_by_text("Thought for 2.5 s").click()
        expect(window.get_by_role("group", name="Answers to this message")).to_be_visible()
        expect(window.locator(".left-out")).to_be_visible()
        composer(window).evaluate("e => { e.value = 'x'.repeat(32_001); }")
        composer(window).press("Enter")
        expect(window.get_by_role("alert").filter(has_text="Not sent.")).to_be_visible()

    windows.check(look)


def test_a_streaming_answer_is_accessible(windows: Windows, console: Console, page: Page) -> None:
    """Check the page while an answer streams in."""
    console.switch("talkative")
    visit(page, console)
    say(page, "Hello")
    expect(answers(page).locator("p").first).not_to_be_empty()

    def look(window: Page) -> None:
        window.goto(page.url)
        expect(window.locator(".message.streaming")).to_be_visible()

    windows.check(look)
    page.keyboard.press("Escape")


def test_a_switch_in_progress_is_accessible(windows: Windows, console: Console) -> None:
    """Check the banner, the locked composer, the hatched memory segment and the row of the loading model."""
    console.post("/v1/models/switch", {"target_model": "slow"})
    console.wait_for(lambda s: (s["switch"] or {}).get("stage") == "loading", "the load to begin")
    for path in ("/chats/new", "/models"):

        def look(window: Page, path: str = path) -> None:
            visit(window, console, path)
            expect(banner(window)).to_contain_text("Loading slow")

        windows.check(look)


def test_a_failed_switch_is_accessible(windows: Windows, console: Console) -> None:
    """Check the failure with its log unfolded, on both pages."""
    console.post("/v1/models/switch", {"target_model": "bad", "wait": True})
    for path in ("/chats/new", "/models"):

        def look(window: Page, path: str = path) -> None:
            visit(window, console, path)
            banner(window).locator("summary").click()
            expect(banner(window).locator("pre")).to_be_visible()

        windows.check(look)


def test_the_models_page_is_accessible(windows: Windows, console: Console) -> None:
    """Check the Models page with forty models, as table rows and as cards."""
    console.switch(LONG)
    console.post("/models/dismiss")
    windows.check(lambda page: visit(page, console, "/models"))


def test_plans_are_accessible(windows: Windows, console: Console) -> None:
    """Check a plan as a page and as a dialog."""

    def ask(window: Page) -> None:
        visit(window, console, "/models")
        window.get_by_role("button", name="Use huge").click()
        expect(dialog(window)).to_be_visible()

    windows.check(lambda page: visit(page, console, f"/models/plan?target={LONG}"))
    windows.check(lambda page: visit(page, console, "/models/plan?target=huge"))
    windows.check(ask)


def test_downloads_and_ollama_are_accessible(windows: Windows, busy: Console) -> None:
    """Check a download in each state, a caution, an update and Ollama's unfolded log."""

    def look(window: Page) -> None:
        visit(window, busy, "/models")
        for name, word in (
            ("quick:latest", "Complete"),
            ("nope:latest", "Failed"),
            ("held:latest", "Paused"),
            ("waits:latest", "Waiting"),
            (LONG_NAME, "stalled"),
        ):
            expect(job(window, name)).to_contain_text(word)
        expect(row(window, "tiny-a:latest")).to_contain_text("Update available")
        expect(row(window, "evicted:latest").locator(".model-warning")).to_be_visible()
        expect(card(window)).to_contain_text("Running")

    windows.check(look)


def test_the_confirmation_of_a_deletion_is_accessible(windows: Windows, busy: Console) -> None:
    """Check the confirmation as a dialog and as a page."""

    def ask(window: Page) -> None:
        visit(window, busy, "/models")
        window.get_by_role("button", name="Delete tiny-a:latest").click()
        expect(dialog(window)).to_contain_text("It is loaded and will be unloaded first.")

    windows.check(ask)
    windows.check(lambda page: visit(page, busy, "/models/delete?model=tiny-a:latest"))


def test_an_invalid_download_name_is_accessible(windows: Windows, busy: Console) -> None:
    """Check the download field with its error."""

    def look(window: Page) -> None:
        visit(window, busy, "/models")
        download(window, "not a name")
        expect(field(window)).to_have_attribute("aria-invalid", "true")

    windows.check(look)


@pytest.mark.parametrize("path", ["/no-such-page", "/chats/no-such-conversation", "/docs", "/preferences"])
def test_other_pages_are_accessible(windows: Windows, console: Console, path: str) -> None:
    """Check the error pages and the description of the API."""

    def look(window: Page) -> None:
        visit(window, console, path)
        expect(window.get_by_role("heading", level=1)).to_be_visible()

    windows.check(look)


def test_the_keyboard_reaches_everything_in_order(page: Page, console: Console) -> None:
    """Tab goes from the header over the conversations and the menu to the composer; the focus is always visible."""
    console.switch(LONG)
    visit(page, console)
    composer(page).press_sequentially("Hello")
    page.locator("body").evaluate("() => document.activeElement.blur()")
    page.evaluate("() => getSelection().removeAllRanges()")
    page.locator(".skip").focus()
    passed = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate("document.activeElement.id || document.activeElement.innerText.trim()")
        passed.append(name)
        seen = page.evaluate(
            """() => {
                const it = document.activeElement, framed = it.closest("#composer-form") ?? it;
                const ring = (s) => s.outlineStyle !== "none" || s.boxShadow !== "none";
                return it.matches(":focus-visible") && [it, framed].some((e) => ring(getComputedStyle(e)));
            }"""
        )
        assert seen, f"no focus to be seen on {name!r}"
        if name == "send":
            break
    order = ["Chat", "Models", "New chat", "model-button", "messages", "text", "send"]
    assert [name for name in passed if name in order] == order


def test_a_switch_by_keyboard_is_announced(page: Page, console: Console) -> None:
    """Enter opens the menu, arrows move, Enter chooses; steps and results are announced, percentages are not."""
    visit(page, console)
    said = page.locator("#announcer")
    page.locator("#model-button").focus()
    page.keyboard.press("Enter")
    page.keyboard.type(LONG)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(said).to_have_text(f"{LONG} is ready.")
    expect_active(page, LONG)
    choose(page, "bad")
    expect(said).to_contain_text("bad could not be loaded.")
    expect(said).to_contain_text(f"{LONG} is still running.")
    choose(page, "slow")
    expect(said).to_have_text(re.compile("^Switching to slow: [A-Z][a-z ]+\\.$"))
    console.reset()


def test_typing_filters_the_model_menu(page: Page, console: Console) -> None:
    """Typing leaves the matching models, arrows move and Enter chooses; polls meanwhile change none of it."""
    visit(page, console)
    page.locator("#model-button").press("Enter")
    expect(page.get_by_label("Find a model")).to_be_focused()
    expect(menu(page).locator("li:visible")).to_have_count(45)
    page.keyboard.type("model-27")
    page.keyboard.press("ArrowDown")
    for _ in range(3):
        with page.expect_response(re.compile("/fragments/chat-status")):
            page.evaluate("htmx.trigger('#poll', 'refresh')")
    expect(menu(page).locator("li:visible")).to_have_count(1)
    expect(choice(page, "family-2/model-27-plain")).to_be_focused()
    page.keyboard.press("Enter")
    expect_active(page, "family-2/model-27-plain")


def test_reduced_motion_disables_animations(windows: Windows, console: Console) -> None:
    """With prefers-reduced-motion, no element has an animation or a transition."""
    page = windows.pages[0]
    visit(page, console)
    moving = page.evaluate(
        """() => [...document.querySelectorAll("*")].filter((e) => {
            const s = getComputedStyle(e);
            return s.animationName !== "none" || (s.transitionDuration !== "0s" && s.transitionProperty !== "none");
        }).length"""
    )
    assert moving == 0


def test_forced_colours_show_the_current_page(open_page: OpenPage, console: Console) -> None:
    """With forced colours, only the current page's link in the header has a visible border."""
    page = open_page(forced_colors="active")
    for path, current in (("/chats/new", "Chat"), ("/models", "Models")):
        visit(page, console, path)
        seen = page.evaluate(
            """() => {
                const ground = getComputedStyle(document.documentElement).backgroundColor;
                const links = [...document.querySelectorAll(".pages a")];
                return links.filter((a) => getComputedStyle(a).borderBottomColor !== ground).map((a) => a.innerText);
            }"""
        )
        assert seen == [current]
