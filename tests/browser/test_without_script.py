"""Without JavaScript, plain forms and links do everything."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenPage, StartShared
from tests.browser.steps import MINI, banner, choose, composer, row, visit
from tests.support.console import Console, fake_model

WHOLE = "I am a fake and answer in ten short words."


@pytest.fixture(scope="module")
def shared(start_shared: StartShared) -> Console:
    models = fake_model("quick-plain", "slow_tokens:0.1", "hold:80", required_gb=0.6, source=str(MINI))
    models += fake_model("other-plain", "hold:80", required_gb=0.6, source=str(MINI))
    return start_shared(models, memory_budget_gb=0.65, confirm_before_unload="true")


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    return open_page(java_script_enabled=False)


def test_a_conversation_works_without_script(page: Page, console: Console) -> None:
    """Choose a model, send, and get the whole answer: the page reloads itself while its state changes."""
    visit(page, console)
    choose(page, "quick-plain")
    expect(page.locator("#model-button .word")).to_have_text("Ready")
    composer(page).fill("Hello")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".message.user .said")).to_have_text("Hello")
    expect(composer(page)).to_be_hidden()
    expect(page.locator(".message.complete .prose")).to_have_text(WHOLE)
    composer(page).fill("Again")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".message.complete")).to_have_count(2)
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_text("2 of 2")).to_be_visible()
    page.get_by_role("button", name="Earlier answer").click()
    expect(page.get_by_text("1 of 2")).to_be_visible()


def test_a_refused_message_is_still_in_the_composer(open_page: OpenPage, console: Console) -> None:
    """Also on a new chat: the page returns with the message and the reason, and the corrected message can be sent."""
    page = open_page(java_script_enabled=False, tolerate=("the server responded with a status of 422",))
    console.switch("quick-plain")
    visit(page, console)
    composer(page).fill("x" * 32_001)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert")).to_contain_text("32,001 characters; 32,000 is the limit.")
    expect(composer(page)).to_have_value("x" * 32_001)
    composer(page).fill("x")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".message.complete .prose")).to_have_text(WHOLE)


def test_plans_and_model_actions_work_without_script(page: Page, console: Console) -> None:
    """A switch that needs confirmation asks on a page; unloading and dismissing are forms."""
    console.switch("quick-plain")
    visit(page, console, "/models")
    row(page, "other-plain").get_by_role("button", name="Use other-plain").click()
    expect(page.get_by_role("heading", name="Switch to other-plain?")).to_be_visible()
    page.get_by_role("button", name="Use", exact=True).click()
    expect(page).to_have_url(f"{console.url}/models")
    expect(row(page, "other-plain").locator(".word")).to_have_text("Ready")
    page.reload()
    row(page, "other-plain").get_by_role("button", name="Unload other-plain").click()
    expect(row(page, "other-plain").locator(".word")).to_have_count(0)
    expect(banner(page)).not_to_contain_text("could not be loaded")
