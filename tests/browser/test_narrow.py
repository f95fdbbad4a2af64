"""Long unbreakable names on a phone: no page scrolls sideways, and no element overflows the window."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from playwright.sync_api import Browser, Page, expect

from services.store.repository import open_store
from tests.browser.conftest import StartShared
from tests.browser.steps import MINI, banner, choose, dialog, say, visit
from tests.fakes.hub import FakeHub
from tests.support.console import Console, fake_model
from tests.support.hub import hub_environment
from tests.support.talk import put_conversations

WIDTH = 390
WORD = "W" * 120
"""As wide as text gets, without a place to break it."""
LOADED, OTHER, BAD, HUGE, GONE, FRAGILE = (f"{start}{WORD}" for start in ("A", "B", "C", "D", "E", "fragile"))
REPOSITORY = f"{'o' * 90}/{'r' * 90}"
ANSWER = f"""\
# {WORD}

{WORD} [{WORD}](https://example.org/{WORD}) `{WORD}` $\\frac{{{WORD}}}{{2}}$

- {WORD}

> {WORD}

| {WORD} | size |
|---|---:|
| {WORD} | 1 |

```{WORD}
{WORD}
```
"""
STICKS_OUT = """() => {
  const clips = (e) => getComputedStyle(e).overflowX !== "visible" && e !== document.body;
  const clipped = (e) => e && e !== document.documentElement && (clips(e) || clipped(e.parentElement));
  return [...document.body.querySelectorAll("*")]
    .filter((e) => e.checkVisibility() && !e.closest(".unseen, svg"))
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !clipped(e.parentElement))
    .map((e) => e.outerHTML.slice(0, 120));
}"""
"""The elements that reach beyond the window, but for those in something that scrolls or clips by itself."""
SQUEEZED = """() => [...document.querySelectorAll(".banner > *, .panel > *, .plan > *")]
  .filter((e) => e.checkVisibility() && getComputedStyle(e).overflowY === "visible")
  .filter((e) => getComputedStyle(e).display !== "inline" && e.scrollHeight > e.clientHeight + 4)
  .map((e) => e.outerHTML.slice(0, 120))"""
"""The elements whose text is taller than they are, so that it is drawn over the next one."""


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    """An empty fake hub."""
    with FakeHub({}) as hub:
        yield hub


@pytest.fixture(scope="module")
def console(start_shared: StartShared, hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Console:
    """Everything that has a name has a long one: models, files, folders, downloads, conversations, Docker's socket."""
    folder = tmp_path_factory.mktemp("narrow")
    answer = folder / "answer.md"
    answer.write_text(ANSWER, encoding="utf-8")
    models = [
        fake_model(LOADED, f"text:{answer}", required_gb=0.3, description=WORD, source=str(MINI), load_time_seconds=9),
        fake_model(OTHER, "slow_load:60", required_gb=0.8, description=WORD, source=str(MINI)),
        fake_model(BAD, "crash_loading", required_gb=0.3, source=str(MINI)),
        fake_model(HUGE, required_gb=900, source=str(MINI)),
        fake_model(GONE, source=f"{folder}/{WORD}/{WORD}.gguf"),
        fake_model(FRAGILE, "crash_answering", required_gb=0.1, source=str(MINI)),
        f'[[models]]\nid = "v{WORD}"\nengine = "vllm"\nsource = "{REPOSITORY}"\n',
        f'[[recommended]]\nmodel = "{REPOSITORY}"\nsource = "huggingface"\ndescription = "{WORD}"\n',
    ]
    return start_shared(
        "".join(models),
        memory_budget_gb=1,
        preserve_models=LOADED,
        docker_host=f"unix:///{WORD}/docker.sock",
        ollama_binary=f"/{WORD}/ollama",
        environment=hub_environment(hub, folder / "home"),
    )


@pytest.fixture(scope="module")
def talk(console: Console) -> str:
    """A conversation of long words; its path."""
    store = open_store(console.state / "switchyard.db")
    (conversation,) = put_conversations(store, 1, [WORD, ANSWER], title=WORD, model=LOADED)
    store.close()
    return f"/chats/{conversation}"


@pytest.fixture(scope="module")
def phone(chromium: Browser) -> Iterator[Page]:
    context = chromium.new_context(viewport={"width": WIDTH, "height": 800}, reduced_motion="reduce")
    yield context.new_page()
    context.close()


def assert_fits(page: Page) -> None:
    """Nothing is wider than the window, but for what scrolls by itself, nor taller than the place it has."""
    assert page.evaluate(STICKS_OUT) == [], page.url
    assert page.evaluate(SQUEEZED) == [], page.url
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTH, page.url


def test_models_and_the_pages_of_one_fit(console: Console, phone: Page) -> None:
    """The Models page, a plan, a deletion, the API's page and the not-found page fit a phone."""
    for path in (
        "/models",
        f"/models/plan?target={OTHER}",
        f"/models/plan?target={HUGE}",
        f"/models/delete?model={LOADED}",
        "/docs",
        "/preferences",
        f"/chats/{WORD}",
        f"/models/plan?target=unknown-{WORD}",
    ):
        visit(phone, console, path)
        assert_fits(phone)


def test_a_chat_and_its_menus_fit(console: Console, phone: Page, talk: str) -> None:
    """The conversation, the list of conversations, the model menu and the confirmations fit a phone."""
    console.switch(LOADED)
    visit(phone, console, talk)
    expect(phone.locator(".message.assistant")).to_contain_text(WORD)
    assert_fits(phone)
    for opener in ("Conversations", "Rename this conversation", "Delete this conversation"):
        phone.get_by_role("button", name=opener).click()
        assert_fits(phone)
        phone.keyboard.press("Escape")
    phone.locator("#model-button").click()
    assert_fits(phone)
    phone.keyboard.press("Escape")


def test_a_long_title_leaves_room_for_the_models_name(console: Console, chromium: Browser, talk: str) -> None:
    """On a wide page too, the button that says which model answers is not squeezed by the conversation's title."""
    console.switch(LOADED)
    with closing(chromium.new_context(viewport={"width": 1200, "height": 800})) as context:
        page = context.new_page()
        visit(page, console, talk)
        name = page.locator("#model-button .name")
        expect(name).to_have_text(LOADED)
        assert name.evaluate("e => e.clientWidth") > 200


def test_a_switch_in_progress_and_a_failed_one_fit(console: Console, phone: Page, talk: str) -> None:
    """Both fit a phone on Chat and on Models, with the log open."""
    for path in (talk, "/models"):
        console.post("/v1/models/switch", {"target_model": OTHER, "confirm": True})
        visit(phone, console, path)
        expect(banner(phone)).to_contain_text(OTHER)
        assert_fits(phone)
        console.http.delete(f"{console.url}/v1/models/switch")
        console.post("/v1/models/switch", {"target_model": BAD, "wait": True})
        expect(banner(phone)).to_contain_text("could not be loaded")
        banner(phone).locator("summary").click()
        assert_fits(phone)


def test_a_crashed_model_fits(console: Console, phone: Page, talk: str) -> None:
    """The banner, the interrupted answer and the model's row fit a phone."""
    console.switch(FRAGILE)
    visit(phone, console, talk)
    say(phone, WORD)
    expect(banner(phone)).to_contain_text("ended by itself")
    assert_fits(phone)
    visit(phone, console, "/models")
    assert_fits(phone)


def test_dialogs_and_refusals_fit(console: Console, phone: Page) -> None:
    """The dialogs of a model that doesn't fit and of a deletion, and refused and failed downloads, fit a phone."""
    console.switch(LOADED)
    visit(phone, console)
    choose(phone, HUGE)
    expect(dialog(phone)).to_contain_text("does not fit")
    assert_fits(phone)
    visit(phone, console, "/models")
    phone.get_by_role("button", name=f"Delete {LOADED}").click()
    expect(dialog(phone)).to_contain_text("Delete")
    assert_fits(phone)
    phone.keyboard.press("Escape")
    form = phone.get_by_label("Download a model")
    form.fill(f"{WORD}/{WORD}/{WORD}/{WORD}")
    form.press("Enter")
    expect(phone.locator("#downloads [role=alert], #notice [role=alert]").first).to_be_visible()
    assert_fits(phone)
    form.fill(REPOSITORY)
    form.press("Enter")
    expect(phone.locator(".job.failed")).to_be_visible()
    assert_fits(phone)
