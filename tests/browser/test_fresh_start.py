"""The first minutes with the demo models on the embedded engine: look, switch, talk, switch, talk on."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.steps import (
    answers,
    banner,
    choice,
    choose,
    composer,
    expect_active,
    menu,
    messages,
    note,
    say,
    visit,
)
from tests.support.console import Console, wait_until

MINI, SMALL = "switchyard-mini", "switchyard-small"


@pytest.fixture
def console(own_console: Console) -> Console:
    return own_console


def test_both_models_are_listed_and_one_click_loads(page: Page, console: Console) -> None:
    """Each model is listed with its size and without a state; one click switches, also between two answers.

    The composer says why it is locked, the answer streams in, and each answer names the model that gave it.
    """
    visit(page, console, "/")
    expect(page.get_by_text("No model loaded")).to_be_visible()
    expect(note(page)).to_have_text("Choose a model to start")
    expect(page.locator("#send")).to_be_disabled()
    page.locator("#model-button").click()
    expect(menu(page).get_by_role("button")).to_have_count(2)
    for model in (MINI, SMALL):
        expect(choice(page, model)).to_have_text(re.compile(rf"^\s*{model}\s+[\d.]+ MB\s*$"))
    page.keyboard.press("Escape")

    page.locator("#messages").get_by_role("button", name=MINI).click()
    expect_active(page, MINI)
    say(page, "Hello")
    expect(composer(page)).to_have_value("")
    expect(page.locator(".message.user .said")).to_have_text("Hello")
    expect(answers(page).locator(".prose")).not_to_be_empty()
    expect(page.locator(".message.complete")).to_have_count(1)
    expect(answers(page).locator(".about .name")).to_have_text(MINI)
    expect(answers(page).locator(".about time")).to_be_visible()
    expect(page).to_have_title(re.compile("Hello"))

    choose(page, SMALL)
    expect_active(page, SMALL)
    expect(messages(page)).to_have_count(2)
    say(page, "And you?")
    expect(page.locator(".message.complete")).to_have_count(2)
    expect(answers(page).locator(".about .name")).to_have_text([MINI, SMALL])


def test_the_first_model_can_be_chosen_from_the_locked_composer(page: Page, console: Console) -> None:
    """The locked composer has a button that opens the menu; the end of the switch is announced."""
    visit(page, console, "/")
    note(page).get_by_role("button", name="Choose a model to start").click()
    choice(page, SMALL).click()
    expect(banner(page)).to_contain_text(f"{SMALL} is ready")
    expect_active(page, SMALL)


def test_a_model_put_in_the_folder_appears_by_itself(page: Page, start_console, tmp_path) -> None:
    """The empty page says where to put a model file; the file then appears without another step."""
    from tests.browser.steps import MINI as FILE

    console = start_console(models_dir=tmp_path)
    visit(page, console, "/")
    expect(page.locator("#messages")).to_contain_text("No models yet")
    (tmp_path / "dropped.gguf").write_bytes(FILE.read_bytes())
    wait_until(lambda: "dropped" in console.states(), "the catalogue to see the file")
    expect(page.locator("#messages").get_by_role("button", name="dropped")).to_be_visible()
