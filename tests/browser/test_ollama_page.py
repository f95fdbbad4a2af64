"""The Ollama card on the Models page, and Ollama's models among the others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.ollama_steps import SIZE, Workbench, card, offer
from tests.browser.steps import choose, expect_active, row, visit
from tests.support.console import NO_OLLAMA, Console

MODELS = {"tiny-a:latest": {}}
REGISTRY = {"llama3.2:latest": {"size": SIZE}}


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    bench = Workbench(tmp_path_factory.mktemp("bench"), models=MODELS, registry=REGISTRY)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def shared(shared_bench: Workbench) -> Console:
    return shared_bench.start()


@pytest.fixture
def console(shared_bench: Workbench, shared: Console) -> Console:
    """A console that has seen Ollama before, which does not run now."""
    return shared_bench.end_ollama(shared)


@pytest.fixture
def bench(shared_bench: Workbench, console: Console) -> Workbench:  # noqa: ARG001 — at rest first
    """An Ollama with a model, not running, and the console that `console` is."""
    return shared_bench


@pytest.fixture
def own_bench(tmp_path: Path) -> Iterator[Workbench]:
    """An Ollama with a model, not running, that no console has seen yet."""
    bench = Workbench(tmp_path, models=MODELS, registry=REGISTRY)
    yield bench
    bench.close()


def test_ollama_is_started_and_stopped_from_the_page(own_bench: Workbench, page: Page) -> None:
    """Start shows the process, the version and the models; Stop ends it; both results are announced."""
    console = own_bench.start()
    visit(page, console, "/models")
    expect(card(page)).to_contain_text("Not running")
    expect(offer(page, "llama3.2").get_by_role("button")).to_be_disabled()
    expect(page.locator("#downloads")).to_contain_text("These come from Ollama, which is not running.")
    card(page).get_by_role("button", name="Start").click()
    expect(card(page)).to_contain_text("Running")
    (server,) = own_bench.ollama.servers()
    expect(card(page)).to_contain_text(re.compile(rf"Process\s*{server.pid}"))
    expect(card(page)).to_contain_text(re.compile(r"Version\s*0\.24\.0"))
    expect(card(page)).to_contain_text(re.compile(r"Running\s*for \d+ s"))
    expect(card(page)).to_contain_text(re.compile(r"Started\s*here"))
    expect(card(page)).to_contain_text(own_bench.ollama.url.removeprefix("http://"))
    expect(page.locator("#announcer")).to_contain_text("Ollama is running.")
    expect(row(page, "tiny-a:latest")).to_be_visible()
    expect(offer(page, "llama3.2").get_by_role("button")).to_be_enabled()
    card(page).get_by_text("Last lines of its log").click()
    expect(card(page).locator("pre")).to_contain_text("Listening on")
    card(page).get_by_role("button", name="Stop").click()
    expect(card(page)).to_contain_text("Not running")
    expect(page.locator("#announcer")).to_contain_text("Ollama is not running.")
    assert not psutil.pid_exists(server.pid)


def test_a_start_in_progress_is_shown_and_can_be_cancelled(
    bench: Workbench, console: Console, open_page: OpenPage
) -> None:
    """The page stays usable while Ollama starts, every tab shows it, and Stop ends the start."""
    bench.ollama.set_fault("hang")
    first, second = open_page(tolerate=("status of 409", "status of 502", "status of 504")), open_page()
    for page in (first, second):
        visit(page, console, "/models")
    card(first).get_by_role("button", name="Start").click()
    for page in (first, second):
        expect(card(page).locator(".word")).to_have_text("Starting")
        expect(card(page).get_by_role("button", name="Starting")).to_be_disabled()
    card(second).get_by_role("button", name="Stop").click()
    for page in (first, second):
        expect(card(page)).to_contain_text("Not running")
    assert bench.ollama.servers() == []


def test_a_failed_start_says_why(bench: Workbench, console: Console, page: Page) -> None:
    """The card shows the cause and the log until they are dismissed."""
    bench.ollama.set_fault("crash_on_start", "Error: no space for the cache")
    visit(page, console, "/models")
    card(page).get_by_role("button", name="Start").click()
    expect(card(page).locator(".word")).to_have_text("Failed")
    expect(card(page).locator(".service-error")).to_contain_text("no space for the cache")
    card(page).get_by_role("button", name="Dismiss").click()
    expect(card(page)).to_contain_text("Not running")


def test_an_ollama_started_elsewhere_cannot_be_stopped(bench: Workbench, console: Console, page: Page) -> None:
    """The card names the process, and shows the reason instead of a Stop button."""
    bench.ollama.start()
    visit(page, console, "/models")
    expect(card(page)).to_contain_text("Another program started it, so it is stopped there.")
    assert bench.ollama.process is not None
    expect(card(page)).to_contain_text(re.compile(rf"Process\s*{bench.ollama.process.pid}"))
    expect(card(page).get_by_role("button", name="Stop")).to_have_count(0)


def test_where_ollama_is_not_installed_the_card_is_small(own_bench: Workbench, page: Page) -> None:
    """The card says that Ollama is optional and links to it."""
    console = own_bench.start(ollama_binary="/no/such/ollama", ollama_base_url=NO_OLLAMA)
    visit(page, console, "/models")
    expect(card(page)).to_contain_text("Not installed")
    link = card(page).get_by_role("link", name="ollama.com/download")
    expect(link).to_have_attribute("href", "https://ollama.com/download")
    expect(link).to_have_attribute("rel", "noreferrer")
    expect(card(page).get_by_role("button")).to_have_count(0)
    expect(card(page).locator("dl")).to_have_count(0)
    expect(page.get_by_label("From")).to_have_value("huggingface")


def test_a_model_unloaded_by_another_program_is_no_failure(bench: Workbench, console: Console, page: Page) -> None:
    """Its row shows a caution that names the cause, and the model can be loaded again."""
    bench.ollama.start()
    bench.await_ollama(console, "running")
    console.switch("tiny-a:latest")
    visit(page, console, "/models")
    bench.ollama.unload("tiny-a:latest")
    it = row(page, "tiny-a:latest")
    expect(it.locator(".model-warning")).to_contain_text("another program")
    expect(it.locator(".model-error")).to_have_count(0)
    expect(it.locator(".word")).to_have_count(0)
    expect(it.get_by_role("button", name="Use tiny-a:latest")).to_be_visible()


def test_ollamas_models_are_chosen_like_any_other(bench: Workbench, console: Console, page: Page) -> None:
    """They are in the chat page's menu, and one click loads one."""
    bench.ollama.start()
    bench.await_ollama(console, "running")
    visit(page, console, "/")
    choose(page, "tiny-a:latest")
    expect_active(page, "tiny-a:latest")
    assert bench.ollama.ps() == ["tiny-a:latest"]


def test_without_script_ollama_is_started_and_stopped(bench: Workbench, console: Console, open_page: OpenPage) -> None:
    """Two forms start and stop Ollama, and both return to the card on the page."""
    page = open_page(java_script_enabled=False)
    visit(page, console, "/models")
    card(page).get_by_role("button", name="Start").click()
    expect(page).to_have_url(f"{console.url}/models#ollama")
    expect(card(page)).to_contain_text("Running")
    card(page).get_by_role("button", name="Stop").click()
    expect(card(page)).to_contain_text("Not running")
    assert bench.ollama.servers() == []
