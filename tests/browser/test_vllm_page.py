"""Sleeping vLLM models and Docker's status on the pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.browser.conftest import StartShared
from tests.browser.steps import choice, choose, expect_active, menu, row, visit
from tests.support.console import Console
from tests.support.docker import DockerEngine
from tests.support.vllm import gpu_entry, on_gpu

FIRST, SECOND = "Qwen/Qwen2.5-Coder-32B-Instruct-GPTQ-Int4-with-a-long-name-1", "openai/gpt-oss-20b"


@pytest.fixture(scope="module")
def shared(
    gpu_docker: DockerEngine, start_shared: StartShared, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Console]:
    """A console that has seen both models wake."""
    toml, folder = gpu_entry(FIRST) + gpu_entry(SECOND), tmp_path_factory.mktemp("vllm")
    console = start_shared(toml, **on_gpu(gpu_docker, folder, FIRST, SECOND))
    for model in (FIRST, SECOND, FIRST):
        console.switch(model)
    yield console
    gpu_docker.remove_containers()


@pytest.fixture
def console(shared: Console) -> Console:
    """The first model asleep, the second one answering, after both have been woken once."""
    shared.switch(FIRST)
    shared.switch(SECOND)
    shared.post("/models/dismiss")
    return shared


def test_choosing_a_sleeping_model_wakes_it(console: Console, page: Page) -> None:
    """The menu shows the state and the time to wake; the plan says which model goes to sleep instead."""
    visit(page, console)
    page.locator("#model-button").click()
    expect(choice(page, FIRST).locator(".word")).to_have_text("Asleep")
    expect(choice(page, FIRST)).to_contain_text("to wake")
    assert Axe().run(page).response["violations"] == []
    page.keyboard.press("Escape")
    expect(menu(page)).to_be_hidden()
    visit(page, console, f"/models/plan?target={FIRST}")
    expect(page.get_by_role("main")).to_contain_text(f"To wake {FIRST}")
    expect(page.get_by_role("main")).to_contain_text(f"put {SECOND} to sleep")
    visit(page, console)
    choose(page, FIRST)
    expect_active(page, FIRST)


def test_the_docker_card_shows_version_and_socket(console: Console, gpu_docker: DockerEngine, page: Page) -> None:
    """The status at the top of the page links to the card."""
    visit(page, console, "/models")
    page.get_by_role("navigation", name="On this page").get_by_role("link", name="Docker").click()
    card = page.locator("#docker-card")
    expect(card.locator(".word")).to_have_text("Running")
    expect(card).to_contain_text(str(gpu_docker.client.version()["Version"]))
    expect(card).to_contain_text(gpu_docker.host.removeprefix("unix://"))


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_a_sleeping_model_shows_its_memory_and_can_be_unloaded(console, open_page, scheme, width) -> None:
    """Shape and word show the state, the bar its memory; Unload frees it; axe finds no violation."""
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    visit(page, console, "/models")
    sleeper = row(page, FIRST)
    expect(sleeper.locator(".word")).to_have_text("Asleep")
    expect(sleeper).to_contain_text("1.5 GB")
    expect(sleeper).to_contain_text("to wake")
    assert Axe().run(page).response["violations"] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sleeper.get_by_role("button", name=f"Unload {FIRST}").click()
    expect(sleeper.locator(".word")).to_have_count(0)
    assert console.states()[FIRST] == "stopped"
