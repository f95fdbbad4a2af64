"""User actions and locators shared by the browser tests."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

from tests.support.console import DEMO_MODELS, Console

MINI = DEMO_MODELS / "switchyard-mini.gguf"
SMALL = DEMO_MODELS / "switchyard-small.gguf"


def visit(page: Page, console: Console, path: str = "/chats/new") -> None:
    page.goto(console.url + path)


def menu(page: Page) -> Locator:
    return page.locator("#model-menu")


def choice(page: Page, model: str) -> Locator:
    """A model's button in the menu."""
    return menu(page).locator(f'button[value="{model}"]')


def choose(page: Page, model: str) -> None:
    """Open the menu and click a model."""
    page.locator("#model-button").click()
    choice(page, model).click()


def composer(page: Page) -> Locator:
    return page.get_by_label("Message", exact=True)


def note(page: Page) -> Locator:
    """The line under the composer that says what it is waiting for."""
    return page.locator("#composer-note")


def say(page: Page, text: str) -> None:
    """Type a message and press Enter, once the page takes one."""
    expect(page.locator("#send")).to_be_enabled()
    composer(page).fill(text)
    composer(page).press("Enter")


def messages(page: Page) -> Locator:
    return page.locator(".message")


def answers(page: Page) -> Locator:
    return page.locator(".message.assistant")


def banner(page: Page) -> Locator:
    return page.locator("#banner")


def dialog(page: Page) -> Locator:
    return page.locator("#dialog")


def row(page: Page, model: str) -> Locator:
    """A model's row on the Models page."""
    return page.locator(".model-table").get_by_role("row").filter(has=page.get_by_text(model, exact=True))


def expect_active(page: Page, model: str) -> None:
    """The menu's button names the model as ready, and the composer takes messages."""
    expect(page.locator("#model-button")).to_contain_text(model)
    expect(page.locator("#model-button .word")).to_have_text("Ready")
    expect(composer(page)).to_be_editable()
