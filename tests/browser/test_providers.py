"""The providers: the dialog over every page, by mouse, by keyboard and without script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.ollama_steps import SIZE, Workbench
from tests.browser.steps import visit
from tests.support.console import Console, free_port
from tests.support.health_servers import hanging_url, json_server

StartConsole = Callable[..., Console]
LONG_NAME = "a-model-whose-name-has-as-many-as-sixty-letters-in-it-all:7b"
FAKE_SERVERS = Path(__file__).parents[1] / "fakes" / "local_servers"
REFUSED = "the server responded with a status of 503"
KEY = "sk-test-abcdefghijkl"
SAYS = {"error": {"message": f"Incorrect API key provided: {KEY}. You can find yours at https://platform.openai.com."}}
TWICE = "() => [...document.querySelectorAll('[id]')].map(e => e.id).filter((id, at, all) => all.indexOf(id) !== at)"
INSIDE = (
    "() => document.activeElement.closest('#providers-dialog') !== null || document.activeElement === document.body"
)
SIDEWAYS = "() => document.documentElement.scrollWidth > innerWidth"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """An Ollama with a model that has a long name, and a registry."""
    bench = Workbench(
        tmp_path_factory.mktemp("bench"),
        models={LONG_NAME: {}},
        registry={"llama3.2:latest": {"size": SIZE}},
    )
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def shared(bench: Workbench) -> Iterator[Console]:
    """Flux answers, the vision service hangs, and OpenAI refuses the key."""
    with (
        json_server({"status": "ready", "model": "flux-schnell"}) as flux,
        hanging_url() as vision,
        json_server(SAYS, 401) as openai,
    ):
        yield bench.start(
            flux_api_url=flux.url,
            local_vision_api_url=vision,
            openai_base_url=openai.url,
            openai_api_key=KEY,
            llm_provider="llamacpp",
            image_provider="openai",
            vision_provider="openai",
        )


@pytest.fixture
def console(bench: Workbench, shared: Console) -> Console:
    """Ollama runs; the embedded engine writes text, which needs no check, and the rest is OpenAI's."""
    bench.reset(shared)
    return shared


def button(page: Page) -> Locator:
    return page.locator("#providers-button")


def dialog(page: Page) -> Locator:
    return page.locator("#providers-dialog")


def service(page: Page, name: str) -> Locator:
    return page.locator(f"#providers-service-{name}")


def opened(page: Page) -> Locator:
    """Open the dialog."""
    button(page).click()
    expect(dialog(page)).to_be_visible()
    return dialog(page)


def assert_accessible(page: Page) -> None:
    found = Axe().run(page, options={"resultTypes": ["violations"]})
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate(TWICE) == []
    assert not page.evaluate(SIDEWAYS)


@pytest.mark.parametrize("path", ["/chats/new", "/models", "/docs", "/no-such-page"])
def test_the_dialog_opens_over_every_page_by_keyboard(open_page: OpenPage, console: Console, path: str) -> None:
    """Enter opens it, Tab stays in it, Esc closes it, and the focus is where it was; closed, it polls no more."""
    page = open_page(tolerate=("status of 404",))
    visit(page, console, path)
    button(page).focus()
    page.keyboard.press("Enter")
    expect(dialog(page).get_by_role("button", name="Close")).to_be_focused()
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        assert page.evaluate(INSIDE)
        seen.add(page.evaluate("() => document.activeElement.id"))
    assert {"providers-llm", "providers-image", "providers-vision", "providers-apply"} <= seen
    page.keyboard.press("Escape")
    expect(dialog(page)).to_be_hidden()
    expect(button(page)).to_be_focused()
    expect(dialog(page)).to_be_empty()


def test_what_answers_is_shown_while_something_hangs(page: Page, console: Console) -> None:
    """Each service with a word, its figures and its error; Ollama with its models."""
    visit(page, console, "/models")
    opened(page)
    expect(service(page, "ollama")).to_contain_text("Running")
    expect(service(page, "ollama")).to_contain_text(LONG_NAME)
    expect(service(page, "ollama")).to_contain_text("answers in")
    expect(service(page, "flux")).to_contain_text("flux-schnell")
    expect(service(page, "vision")).to_contain_text("hangs")
    expect(dialog(page).locator("#providers-key")).to_contain_text("Key set")
    dialog(page).get_by_role("button", name="Check the key for OpenAI").click()
    expect(dialog(page).locator("#providers-key")).to_contain_text("Incorrect API key provided: …")
    expect(dialog(page)).to_be_visible()


def test_a_refused_choice_succeeds_by_the_same_click_after_the_start(
    open_page: OpenPage, bench: Workbench, console: Console
) -> None:
    """With Ollama down: the message, the button that starts it, and Apply again; the header follows."""
    bench.end_ollama(console)
    page = open_page(tolerate=(REFUSED,))
    visit(page, console, "/docs")
    opened(page)
    page.get_by_label("Text", exact=True).select_option("ollama")
    page.locator("#providers-apply").click()
    alert = dialog(page).get_by_role("alert")
    expect(alert).to_contain_text("Ollama service not available. Start Ollama service before switching.")
    expect(page.get_by_label("Text", exact=True)).to_have_value("ollama")
    assert console.get("/api/providers/status").json()["current"]["llm"] != "ollama"
    alert.get_by_role("button", name="Start Ollama").click()
    expect(dialog(page).get_by_role("status")).to_contain_text("Ollama is running. Apply the choice now.")
    expect(page.locator("#providers-apply")).to_be_focused()
    expect(service(page, "ollama")).to_contain_text("Running")
    page.locator("#providers-apply").click()
    expect(dialog(page).get_by_role("status")).to_contain_text("Applied")
    expect(page.locator("#providers-now")).to_contain_text("Text: Ollama")
    expect(page.locator("#providers-apply")).to_be_focused()
    assert console.get("/api/providers/status").json()["current"]["llm"] == "ollama"
    page.keyboard.press("Escape")
    expect(button(page)).to_have_accessible_name("Providers: Partly local")
    service_stop(console)


def service_stop(console: Console) -> None:
    console.post("/api/providers/services/stop", {"service": "ollama"})


def test_a_service_is_started_and_stopped_in_the_dialog(page: Page, bench: Workbench, console: Console) -> None:
    """The dialog stays open, and shows the state and the end of the log."""
    bench.end_ollama(console)
    visit(page, console, "/models")
    opened(page)
    expect(service(page, "ollama")).to_contain_text("Not running")
    service(page, "ollama").get_by_role("button", name="Start Ollama").click()
    expect(service(page, "ollama").locator(".word")).to_have_text("Running")
    service(page, "ollama").get_by_text("Last lines of its log").click()
    expect(service(page, "ollama").locator(".log")).to_be_visible()
    service(page, "ollama").get_by_role("button", name="Stop Ollama").click()
    expect(service(page, "ollama").locator(".word")).to_have_text("Not running")
    expect(dialog(page)).to_be_visible()


def test_a_choice_that_needs_a_model_succeeds_after_its_load(open_page: OpenPage, start_console: StartConsole) -> None:
    """The vision service is started by a switch to its model, which does not become the active one."""
    console = start_console(
        local_vision_api_url=f"http://127.0.0.1:{free_port()}",
        local_servers_dir=FAKE_SERVERS,
    )
    page = open_page(tolerate=(REFUSED,))
    visit(page, console, "/docs")
    opened(page)
    page.get_by_label("Vision", exact=True).select_option("local")
    page.locator("#providers-apply").click()
    dialog(page).get_by_role("alert").get_by_role("button", name="Start Local vision").click()
    expect(dialog(page).get_by_role("status")).to_contain_text("Apply the choice")
    expect(service(page, "vision").locator(".word")).to_have_text("Running")
    page.locator("#providers-apply").click()
    expect(dialog(page).get_by_role("status")).to_contain_text("Applied")
    assert console.status()["active_model"] is None
    service(page, "vision").get_by_role("button", name="Stop Local vision").click()
    expect(service(page, "vision").locator(".word")).to_have_text("Not running")


def test_an_error_is_shown_in_the_dialog(open_page: OpenPage, console: Console) -> None:
    """The strip of the page is covered; dismissed, it is gone."""
    page = open_page(tolerate=("status of 409",))
    page.route(
        "**/providers/check-key",
        lambda route: route.fulfill(
            status=409,
            headers={"Switchyard-Error": "conflict"},
            body='<div class="strip failed"><p>Not now.</p><button data-clear>Dismiss</button></div>',
        ),
    )
    visit(page, console, "/models")
    opened(page)
    dialog(page).get_by_role("button", name="Check the key for OpenAI").click()
    expect(dialog(page).locator("#providers-notice")).to_contain_text("Not now.")
    dialog(page).get_by_role("button", name="Dismiss").click()
    expect(dialog(page).locator("#providers-notice")).to_be_empty()
    expect(page.locator("#notice")).to_be_empty()


def test_a_model_that_does_not_fit_is_explained_above_the_dialog(page: Page, start_console: StartConsole) -> None:
    """A start of Flux is a switch: its plan opens above the dialog, which is still there afterwards."""
    console = start_console(
        flux_api_url=f"http://127.0.0.1:{free_port()}",
        local_servers_dir=FAKE_SERVERS,
        memory_budget_gb=4,
    )
    visit(page, console, "/docs")
    opened(page)
    start = service(page, "flux").get_by_role("button", name="Start Flux")
    start.click()
    expect(page.locator("#dialog")).to_contain_text("does not fit")
    assert page.evaluate(TWICE) == []
    page.keyboard.press("Escape")
    expect(page.locator("#dialog")).to_be_hidden()
    expect(dialog(page)).to_be_visible()
    expect(start).to_be_focused()


def test_a_choice_that_is_not_applied_survives_polls(page: Page, console: Console) -> None:
    """A switch by a script in between shows what is in use now, and leaves the fields alone."""
    visit(page, console, "/models")
    opened(page)
    page.get_by_label("Vision", exact=True).select_option("local")
    answer = console.post("/api/providers/switch", {"image": "flux"})
    assert answer.status_code == 200
    expect(page.locator("#providers-now")).to_contain_text("images: Flux")
    expect(page.get_by_label("Vision", exact=True)).to_have_value("local")
    expect(page.get_by_label("Images", exact=True)).to_have_value("openai")


def test_a_recommended_model_is_downloaded_in_the_dialog(page: Page, console: Console) -> None:
    """With one click, above the Models page, which has the same list."""
    visit(page, console, "/models")
    opened(page)
    dialog(page).get_by_role("button", name="Download llama3.2").click()
    expect(dialog(page).locator(".job")).to_contain_text("Complete")
    expect(dialog(page).locator(".offer").first).to_contain_text("Installed")
    page.get_by_text("Installed (2)").click()
    expect(dialog(page).get_by_role("link", name="llama3.2:latest")).to_be_visible()
    expect(dialog(page)).to_be_visible()
    assert page.evaluate(TWICE) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_dialog_and_page_are_accessible(open_page: OpenPage, console: Console, scheme: str, width: int) -> None:
    """Also refused and unfolded, in a narrow window and in the dark."""
    page = open_page(
        tolerate=(REFUSED,),
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        reduced_motion="reduce",
    )
    for path in ("/models", "/providers"):
        visit(page, console, path)
        if path == "/models":
            opened(page)
        page.get_by_label("Vision", exact=True).select_option("local")
        page.locator("#providers-apply").click()
        expect(page.get_by_role("alert").filter(has_text="Local vision service not available")).to_be_visible()
        for summary in page.locator(":is(#providers-dialog, .providers-page) summary").all():
            summary.click()
        assert_accessible(page)


def test_the_button_leads_nowhere_on_the_page_of_the_providers(page: Page, console: Console) -> None:
    """A dialog above it would have the same ids."""
    visit(page, console, "/providers")
    button(page).click()
    expect(page.locator("#main")).to_be_focused()
    expect(dialog(page)).to_be_hidden()


def test_everything_works_without_script(open_page: OpenPage, bench: Workbench, console: Console) -> None:
    """The button leads to the page; a refused choice stays in the form, and succeeds after the start."""
    bench.end_ollama(console)
    console.post("/api/providers/switch", {"llm": "local"})
    page = open_page(java_script_enabled=False, tolerate=(REFUSED,))
    visit(page, console, "/docs")
    button(page).click()
    expect(page.get_by_role("heading", name="Providers", exact=True)).to_be_visible()
    page.get_by_label("Text", exact=True).select_option("ollama")
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_role("alert")).to_contain_text("Ollama service not available")
    expect(page.get_by_label("Text", exact=True)).to_have_value("ollama")
    page.get_by_role("alert").get_by_role("button", name="Start Ollama").click()
    expect(page.get_by_text("Ollama is running. Apply the choice now.")).to_be_visible()
    page.get_by_role("button", name="Apply").click()
    expect(page.get_by_text("Applied. The next job uses these providers.")).to_be_visible()
    expect(page.locator("#providers-now")).to_contain_text("Text: Ollama")
    page.get_by_role("button", name="Stop Ollama").click()
    expect(service(page, "ollama").locator(".word")).to_have_text("Not running")


def test_the_choice_survives_a_server_that_is_gone(open_page: OpenPage, start_console: StartConsole) -> None:
    """The page says that nothing answers; what was chosen stays in the fields."""
    console = start_console(flux_api_url=f"http://127.0.0.1:{free_port()}")
    page = open_page(tolerate=("ERR_CONNECTION_REFUSED", "htmx:"))
    visit(page, console, "/docs")
    opened(page)
    page.get_by_label("Text", exact=True).select_option("local")
    console.kill()
    page.locator("#providers-apply").click()
    expect(page.locator("#offline")).to_be_visible()
    expect(page.get_by_label("Text", exact=True)).to_have_value("local")
