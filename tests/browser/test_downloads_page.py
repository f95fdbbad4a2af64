"""Downloads on the Models page: start, watch, pause, cancel; and updating and deleting models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import APIResponse, Page, Route, expect

from tests.browser.conftest import OpenPage
from tests.browser.ollama_steps import SIZE, Workbench, card, download, field, job, listed, offer, wait_for_download
from tests.browser.steps import MINI, dialog, row, visit
from tests.support.console import Console, wait_until

REGISTRY = {"llama3.2:latest": {"size": SIZE}, "mistral:latest": {"size": SIZE}}
UNKNOWN_NAME = ("status of 422",)
"""Console message of the browser for a response that refuses the input."""


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    bench = Workbench(tmp_path_factory.mktemp("bench"), models={"tiny-a:latest": {}}, registry=REGISTRY)
    bench.ollama.start()
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def shared(shared_bench: Workbench) -> Console:
    return shared_bench.start()


@pytest.fixture
def console(shared_bench: Workbench, shared: Console) -> Console:
    """A console that lists the one model of Ollama's, and no download."""
    return shared_bench.reset(shared)


@pytest.fixture
def bench(shared_bench: Workbench, console: Console) -> Workbench:  # noqa: ARG001 — at rest first
    """An Ollama that runs and holds one model, and can pull two others."""
    return shared_bench


@pytest.fixture
def own_bench(tmp_path: Path) -> Iterator[Workbench]:
    """One of the test's own: what a console has heard of newer versions it doesn't forget."""
    bench = Workbench(tmp_path, models={"tiny-a:latest": {}}, registry=REGISTRY)
    bench.ollama.start()
    yield bench
    bench.close()


def test_a_download_shows_the_same_in_two_tabs_and_goes_on_without_them(
    bench: Workbench, console: Console, open_page: OpenPage
) -> None:
    """Both tabs show bytes, speed, time left and "stalled"; the download completes with no page open."""
    bench.ollama.set_fault("pull_slow", SIZE / 20)
    first, second = open_page(), open_page()
    for page in (first, second):
        visit(page, console, "/models")
    download(first, "llama3.2")
    expect(field(first)).to_have_value("")
    for page in (first, second):
        it = job(page, "llama3.2:latest")
        expect(it.locator(".word")).to_have_text(re.compile(r"Downloading \d+ %"))
        expect(it.get_by_role("progressbar", name="Download of llama3.2:latest")).to_be_visible()
        expect(it.locator(".job-figures")).to_have_text(
            re.compile(r"Ollama\s+[\d.]+ of 20 MB\s+[\d.]+ [kM]B/s\s+about \d+ s left")
        )
    bench.ollama.set_fault("pull_stuck_at", 60)
    bench.ollama.set_fault("pull_slow", None)
    for page in (first, second):
        it = job(page, "llama3.2:latest")
        expect(it.locator(".job-figures")).to_contain_text("stalled")
        expect(it.locator(".word")).to_have_text(re.compile(r"Downloading (59|60) %"))
        expect(it.locator(".job-figures")).to_contain_text("12 of 20 MB")
    first.context.close()
    second.goto("about:blank")
    bench.ollama.set_fault("pull_stuck_at", None)
    wait_for_download(console, "llama3.2:latest", "complete")
    visit(second, console, "/models")
    expect(job(second, "llama3.2:latest")).to_contain_text("Complete")
    expect(row(second, "llama3.2:latest")).to_contain_text("20 MB")


def test_a_download_is_paused_resumed_and_cancelled(bench: Workbench, console: Console, page: Page) -> None:
    """The focus stays on the pause and resume button; a cancelled download leaves the list."""
    bench.ollama.set_fault("pull_stuck_at", 50)
    visit(page, console, "/models")
    download(page, "llama3.2")
    it = job(page, "llama3.2:latest")
    expect(it.locator(".job-figures")).to_contain_text("10 of 20 MB")
    it.get_by_role("button", name="Pause llama3.2:latest").press("Enter")
    expect(it.locator(".word")).to_have_text(re.compile(r"Paused at (49|50) %"))
    expect(it.get_by_role("button", name="Resume llama3.2:latest")).to_be_focused()
    page.keyboard.press("Enter")
    expect(it.locator(".word")).to_have_text(re.compile(r"Downloading (49|50) %"))
    it.get_by_role("button", name="Cancel llama3.2:latest").press("Enter")
    expect(it).to_have_count(0)
    expect(page.get_by_text("Downloads will be listed here")).to_be_visible()
    expect(page.locator("#downloads")).to_be_focused()
    expect(page.locator("#announcer")).to_contain_text("The download of llama3.2:latest was cancelled.")


def test_an_interrupted_transfer_is_retried_automatically(bench: Workbench, console: Console, page: Page) -> None:
    """The wait before the next try is shown in place of the speed and the time left."""
    bench.ollama.set_fault("pull_error_at", {"percent": 40, "error": "unexpected EOF"})
    visit(page, console, "/models")
    download(page, "llama3.2")
    it = job(page, "llama3.2:latest")
    expect(it.locator(".job-figures")).to_contain_text(re.compile(r"\d of 20 MB\s+.+ Trying again in \d s\."))
    bench.ollama.clear_faults()
    expect(it.locator(".word")).to_have_text("Complete")


def test_a_failed_download_says_why_and_can_be_retried(bench: Workbench, console: Console, page: Page) -> None:
    """The list shows the cause, announced once; the retry succeeds; Remove keeps the model."""
    bench.ollama.set_fault("disk_full_at", 40)
    visit(page, console, "/models")
    download(page, "llama3.2")
    it = job(page, "llama3.2:latest")
    expect(it.locator(".word")).to_have_text("Failed")
    expect(it.locator(".job-error")).to_contain_text("disk")
    expect(page.locator("#announcer")).to_contain_text("llama3.2:latest could not be downloaded.")
    bench.ollama.clear_faults()
    it.get_by_role("button", name="Try again llama3.2:latest").click()
    expect(it.locator(".word")).to_have_text("Complete")
    expect(it).to_contain_text("20 MB")
    expect(page.locator("#announcer")).to_have_text("llama3.2:latest is downloaded.")
    it.get_by_role("button", name="Remove llama3.2:latest").click()
    expect(it).to_have_count(0)
    expect(row(page, "llama3.2:latest")).to_be_visible()


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("Ollama", "not a name", "'not a name' is not the name of an Ollama model."),
        ("Hugging Face", "llama3.2", "Write owner/repo"),
    ],
)
def test_an_invalid_name_shows_its_error_at_the_field(
    console: Console, open_page: OpenPage, source: str, name: str, words: str
) -> None:
    """The field keeps its text and the focus and shows the error; a valid name clears the error."""
    page = open_page(tolerate=UNKNOWN_NAME)
    visit(page, console, "/models")
    page.get_by_label("From").select_option(source)
    download(page, name)
    error = page.locator("#download-error")
    expect(error).to_contain_text(words)
    expect(field(page)).to_have_value(name)
    expect(field(page)).to_be_focused()
    expect(field(page)).to_have_attribute("aria-invalid", "true")
    expect(page.get_by_label("From")).to_have_value("ollama" if source == "Ollama" else "huggingface")
    expect(page.locator("#notice")).to_be_empty()
    page.get_by_label("From").select_option("Ollama")
    download(page, "mistral")
    expect(job(page, "mistral:latest")).to_be_visible()
    expect(error).to_have_count(0)
    expect(field(page)).to_have_value("")


def test_polls_keep_the_typed_name_and_the_source(console: Console, page: Page) -> None:
    """Polls that arrive while a user types change neither the name nor the source."""
    visit(page, console, "/models")
    page.get_by_label("From").select_option("Hugging Face")
    field(page).press_sequentially("owner/rep")
    for _ in range(3):
        with page.expect_response(re.compile("/fragments/models")):
            page.evaluate("htmx.trigger('#poll', 'refresh')")
    field(page).press_sequentially("ository")
    expect(field(page)).to_have_value("owner/repository")
    expect(page.get_by_label("From")).to_have_value("huggingface")


def test_a_recommended_model_downloads_with_one_click(bench: Workbench, console: Console, page: Page) -> None:
    """Its entry shows the size and description, then the progress, then that it is installed."""
    bench.ollama.set_fault("pull_stuck_at", 50)
    visit(page, console, "/models")
    it = offer(page, "llama3.2")
    expect(it).to_contain_text("2.0 GB · General purpose")
    expect(it.locator(".tag")).to_have_text("Recommended")
    it.get_by_role("button", name="Download llama3.2").click()
    expect(it).to_contain_text(re.compile(r"Downloading (49|50) %"))
    expect(it.get_by_role("button")).to_have_count(0)
    bench.ollama.clear_faults()
    expect(it).to_contain_text("Installed")
    expect(row(page, "llama3.2:latest")).to_be_visible()
    expect(offer(page, "mistral").get_by_role("button")).to_be_enabled()


def test_a_newer_version_is_found_and_downloaded(own_bench: Workbench, page: Page) -> None:
    """Check for updates reports its result; Update downloads under the same name and removes the mark."""
    console = own_bench.start()
    own_bench.registry.publish("tiny-a:latest")
    visit(page, console, "/models")
    check = card(page).get_by_role("button", name="Check for updates")
    check.click()
    expect(page.locator("#notice")).to_contain_text("No newer versions.")
    own_bench.registry.publish("tiny-a:latest", version=2)
    own_bench.ollama.configure(registry={"tiny-a:latest": {"version": 2}})
    own_bench.ollama.set_fault("pull_stuck_at", 50)
    check.click()
    expect(page.locator("#notice")).to_contain_text("1 model has a newer version.")
    it = row(page, "tiny-a:latest")
    expect(it).to_contain_text("Update available")
    it.get_by_role("button", name="Update tiny-a:latest").click()
    expect(page.locator("#notice")).to_be_empty()
    expect(it.locator(".tag")).to_have_text(re.compile(r"Updating (49|50) %"))
    own_bench.ollama.clear_faults()
    expect(it.locator(".tag")).to_have_count(0)
    expect(it.get_by_role("button", name="Update tiny-a:latest")).to_have_count(0)


def test_deleting_a_model_first_says_what_it_frees(bench: Workbench, console: Console, page: Page) -> None:
    """The dialog shows the size; Cancel changes nothing; Delete unloads and deletes it and reports the freed space."""
    console.switch("tiny-a:latest")
    visit(page, console, "/models")
    opener = row(page, "tiny-a:latest").get_by_role("button", name="Delete tiny-a:latest")
    opener.press("Enter")
    expect(dialog(page).get_by_role("heading")).to_have_text("Delete tiny-a:latest?")
    expect(dialog(page)).to_contain_text("This removes its files and frees 7.4 MB.")
    expect(dialog(page)).to_contain_text("It is loaded and will be unloaded first.")
    expect(dialog(page).get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Enter")
    expect(dialog(page)).to_be_hidden()
    expect(opener).to_be_focused()
    assert bench.ollama.tags() == ["tiny-a:latest"]
    opener.press("Enter")
    dialog(page).get_by_role("button", name="Delete").click()
    expect(page.locator("#notice")).to_contain_text("tiny-a:latest was deleted. 7.4 MB are free again.")
    expect(page.locator("#models")).to_contain_text("No models yet")
    expect(page.locator("#main")).to_be_focused()
    assert bench.ollama.tags() == []
    assert bench.ollama.ps() == []


def test_a_failed_deletion_says_why(bench: Workbench, open_page: OpenPage) -> None:
    """The reason is visible at any scroll position until it is dismissed."""
    elsewhere = bench.ollama.folder / "elsewhere.gguf"
    elsewhere.write_bytes(MINI.read_bytes())
    console = bench.start(toml=f'[[models]]\nid = "elsewhere"\nsource = "{elsewhere}"\n')
    page = open_page(tolerate=("status of 4", "status of 5"))
    visit(page, console, "/models")
    row(page, "elsewhere").get_by_role("button", name="Delete elsewhere").click()
    dialog(page).get_by_role("button", name="Delete").click()
    expect(page.get_by_role("alert")).to_contain_text("is not in the models folder")
    assert elsewhere.exists()
    page.mouse.wheel(0, 2000)
    expect(page.get_by_role("alert")).to_be_in_viewport()
    page.get_by_role("alert").get_by_role("button", name="Dismiss").click()
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_long_name_fits_a_narrow_window(bench: Workbench, console: Console, open_page: OpenPage) -> None:
    """A name of sixty characters, as a model and as a download, causes no horizontal scrolling."""
    name = "a-model-whose-name-has-as-many-as-sixty-letters-in-it-all:7b"
    assert len(name) == 60
    bench.registry.publish(name, size=SIZE)
    bench.ollama.configure(registry={name: {"size": SIZE}})
    bench.ollama.set_fault("pull_stuck_at", 50)
    page = open_page(viewport={"width": 390, "height": 800})
    visit(page, console, "/models")
    download(page, name)
    expect(job(page, name)).to_contain_text("10 of 20 MB")
    width, inner = page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
    assert width <= inner
    bench.ollama.clear_faults()
    expect(row(page, name)).to_be_visible()
    width, inner = page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
    assert width <= inner


def test_without_script_everything_is_a_form(bench: Workbench, console: Console, open_page: OpenPage) -> None:
    """Forms refuse an invalid name, start, pause and cancel a download, check for updates and delete a model."""
    page = open_page(java_script_enabled=False, tolerate=UNKNOWN_NAME)
    bench.ollama.set_fault("pull_stuck_at", 50)
    visit(page, console, "/models")
    download(page, "not a name")
    expect(page.locator("#download-error")).to_contain_text("is not the name of an Ollama model")
    expect(field(page)).to_have_value("not a name")
    download(page, "llama3.2")
    expect(page).to_have_url(f"{console.url}/models#downloads")
    it = job(page, "llama3.2:latest")
    expect(it).to_be_visible()
    _look_until(page, lambda: (listed(console)["llama3.2:latest"]["completed_bytes"] or 0) > 0)
    it.get_by_role("button", name="Pause llama3.2:latest").click()
    expect(it).to_contain_text("Paused")
    it.get_by_role("button", name="Cancel llama3.2:latest").click()
    expect(it).to_have_count(0)
    card(page).get_by_role("button", name="Check for updates").click()
    expect(page.get_by_text("No newer versions.")).to_be_visible()
    row(page, "tiny-a:latest").get_by_role("button", name="Delete tiny-a:latest").click()
    expect(page.get_by_role("heading", name="Delete tiny-a:latest?")).to_be_visible()
    page.get_by_role("link", name="Cancel").click()
    row(page, "tiny-a:latest").get_by_role("button", name="Delete tiny-a:latest").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page).to_have_url(f"{console.url}/models")
    expect(page.get_by_text("No models yet")).to_be_visible()
    assert bench.ollama.tags() == []


def test_the_focus_stays_in_the_page_if_a_poll_shows_a_deletion_first(
    bench: Workbench, console: Console, page: Page
) -> None:
    """A poll that arrives before the deletion's answer removes the button that had the focus; the page gets it."""
    held: list[tuple[Route, APIResponse]] = []
    page.route(re.compile("/models/.+/delete$"), lambda route: held.append((route, route.fetch())))
    visit(page, console, "/models")
    row(page, "tiny-a:latest").get_by_role("button", name="Delete tiny-a:latest").press("Enter")
    dialog(page).get_by_role("button", name="Delete").click()
    expect(row(page, "tiny-a:latest")).to_have_count(0)
    ((route, answer),) = held
    route.fulfill(response=answer)
    expect(dialog(page)).to_be_hidden()
    expect(page.locator("#main")).to_be_focused()
    assert bench.ollama.tags() == []


def _look_until(page: Page, condition: Callable[[], bool]) -> None:
    """Wait for something and see it: without script the page shows the latest figures when it is asked to."""
    wait_until(condition, "the figures to move")
    page.get_by_role("link", name="Show the latest figures").click()
    expect(page.locator(".job-figures").first).to_be_visible()
