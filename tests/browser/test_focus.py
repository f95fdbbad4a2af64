"""Keyboard focus: changes to the page never lose it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import StartShared
from tests.browser.steps import MINI, banner, choice, dialog, row, visit
from tests.support.console import Console, fake_model

LOST = """() => {
    let had = false;
    const look = () => {
        const nowhere = document.activeElement === document.body || !document.activeElement?.checkVisibility();
        if (had && nowhere) window.lost = true;
        had ||= !nowhere;
        requestAnimationFrame(look);
    };
    look();
}"""
"""Script that records each drawn frame in which an earlier focus is lost."""


@pytest.fixture(scope="module")
def shared(start_shared: StartShared, big_model: Path) -> Console:
    models = [
        fake_model("first-plain", "hold:80", required_gb=0.3, source=str(MINI)),
        fake_model("second-plain", "hold:80", required_gb=0.3, source=str(MINI)),
        fake_model("bad", "crash_loading", required_gb=0.1, source=str(MINI)),
        fake_model("slow", "slow_load:60", required_gb=0.1, source=str(big_model)),
        fake_model("huge", required_gb=900, source=str(MINI)),
    ]
    return start_shared("".join(models), memory_budget_gb=1)


@pytest.fixture
def models(page: Page, console: Console) -> Iterator[Page]:
    """The Models page; checks at the end that the focus was never lost."""
    page.add_init_script(f"({LOST})()")
    visit(page, console, "/models")
    yield page
    assert page.evaluate("window.lost") is None
    assert page.evaluate("document.activeElement !== document.body")


def press(button: Locator) -> None:
    button.focus()
    button.press("Enter")


def test_a_row_whose_buttons_change_keeps_the_focus(models: Page) -> None:
    """Load, cancel and unload each replace the button that was pressed."""
    slow, first = row(models, "slow"), row(models, "first-plain")
    press(slow.get_by_role("button", name="Use slow"))
    press(slow.get_by_role("button", name="Cancel slow"))
    expect(slow.locator(".word")).to_have_count(0)
    assert within(slow)
    press(first.get_by_role("button", name="Use first-plain"))
    expect(first.locator(".word")).to_have_text("Ready")
    assert within(first)
    press(first.get_by_role("button", name="Unload first-plain"))
    expect(first.get_by_role("button", name="Use first-plain")).to_be_visible()
    assert within(first)


def test_a_banner_that_disappears_gives_the_focus_to_the_page(models: Page) -> None:
    """The banner disappears shortly after Cancel, and at once after Dismiss."""
    row(models, "slow").get_by_role("button", name="Use slow").click()
    press(banner(models).get_by_role("button", name="Cancel"))
    expect(banner(models)).to_contain_text("The switch to slow was cancelled")
    assert within(banner(models))
    expect(banner(models)).to_be_hidden()
    expect(models.locator("#main")).to_be_focused()
    row(models, "bad").get_by_role("button", name="Use bad").click()
    press(banner(models).get_by_role("button", name="Dismiss"))
    expect(banner(models)).to_be_hidden()
    expect(models.locator("#main")).to_be_focused()


def test_after_a_deletion_the_focus_is_in_the_next_row(models: Page, console: Console) -> None:
    folder = Path(console.environment["SWITCHYARD_MODELS_DIR"])
    for name in ("alpha", "beta"):
        (folder / f"{name}.gguf").write_bytes(MINI.read_bytes())
    press(row(models, "alpha").get_by_role("button", name="Delete alpha"))
    press(dialog(models).get_by_role("button", name="Delete"))
    expect(row(models, "alpha")).to_have_count(0)
    expect(dialog(models)).to_be_hidden()
    assert within(models.locator(".model-table tbody"))
    press(models.locator("#notice").get_by_role("button", name="Dismiss"))
    expect(models.locator("#notice")).to_be_empty()
    expect(models.locator("#main")).to_be_focused()
    (folder / "beta.gguf").unlink()


def test_a_dialog_whose_content_changes_keeps_the_focus(models: Page, console: Console) -> None:
    """A link from a plan that doesn't fit to one that does disappears when followed; the dialog then has the focus."""
    console.switch("first-plain")
    opener = row(models, "huge").get_by_role("button", name="Use huge")
    press(opener)
    press(dialog(models).get_by_role("link", name="second-plain"))
    expect(dialog(models)).to_contain_text("Switch to second-plain?")
    expect(dialog(models).get_by_role("button", name="Use")).to_be_focused()
    models.keyboard.press("Escape")
    expect(opener).to_be_focused()


def test_the_menu_returns_the_focus(page: Page, console: Console) -> None:
    page.add_init_script(f"({LOST})()")
    visit(page, console)
    press(page.locator("#model-button"))
    press(choice(page, "first-plain"))
    expect(page.locator("#model-button .word")).to_have_text("Ready")
    expect(page.locator("#model-button")).to_be_focused()
    assert page.evaluate("window.lost") is None


def within(part: Locator) -> bool:
    """Return whether the focus is in a part of the page."""
    return bool(part.evaluate("(it) => it.contains(document.activeElement)"))
