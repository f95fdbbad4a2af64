"""Switching in the pages: banner, plan, cancelling, failing, and the same state in every tab."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import OpenPage, StartShared
from tests.browser.steps import MINI, banner, choice, choose, composer, dialog, expect_active, note, say, visit
from tests.conftest import StartConsole
from tests.support.console import FAKE_LLAMA_SERVER, Console, fake_model
from tests.support.stopwatch import Stopwatch

TIGHT_GB = 0.65
"""A budget in which a model that needs 0.6 GB has to displace one that holds 80 MB."""


@pytest.fixture(scope="module")
def shared(start_shared: StartShared, big_model: Path) -> Console:
    mini, big = str(MINI), str(big_model)
    models = [
        fake_model("good-plain", "hold:80", required_gb=0.6, source=mini),
        fake_model("other-plain", "hold:80", required_gb=0.6, source=mini),
        fake_model("bad", "crash_loading", required_gb=0.6, source=mini),
        fake_model("slow", "slow_load:60", required_gb=0.6, source=big),
        fake_model("steady", "slow_load:3", required_gb=0.1, source=big),
        fake_model("huge", required_gb=900, source=mini),
        fake_model("fragile", "crash_answering", required_gb=0.01, source=mini),
    ]
    return start_shared("".join(models), memory_budget_gb=TIGHT_GB)


@pytest.fixture
def with_good(page: Page, console: Console) -> Page:
    """A new conversation while good-plain answers."""
    console.switch("good-plain")
    console.post("/models/dismiss")
    visit(page, console)
    return page


def test_the_banner_shows_target_progress_and_cancel(page: Page, console: Console) -> None:
    """The composer says why and until when it is locked; the banner then says ready and disappears."""
    visit(page, console)
    choose(page, "steady")
    expect(banner(page)).to_be_visible()
    expect(banner(page).locator(".what")).to_have_text(re.compile("Loading steady"))
    expect(banner(page).locator(".banner-where")).to_contain_text("Reading the weights")
    expect(banner(page).get_by_role("progressbar", name="Progress of the switch to steady")).to_be_visible()
    expect(banner(page).locator(".percent")).to_have_text(re.compile(r"\d+ %"))
    expect(banner(page).get_by_role("button", name="Cancel")).to_be_enabled()
    expect(note(page)).to_contain_text("Switching to steady")
    expect(composer(page)).not_to_be_editable()
    expect(page.locator("#send")).to_be_disabled()
    expect(page.locator("#model-button .word")).to_contain_text("Loading")
    expect(banner(page)).to_contain_text("steady is ready")
    expect_active(page, "steady")
    expect(banner(page)).to_be_hidden()


def test_every_place_shows_the_same_percentage(page: Page, console: Console) -> None:
    """The banner, the header and the menu's button show one snapshot of the state."""
    console.post("/v1/models/switch", {"target_model": "slow"})
    visit(page, console)
    percent = banner(page).locator(".percent").inner_text()
    expect(page.locator("#top-status")).to_contain_text(f"loading {percent}")
    expect(page.locator("#model-button")).to_contain_text(f"Loading {percent}")


def test_two_tabs_show_the_same_switch(page: Page, console: Console) -> None:
    """A switch started or cancelled in one tab is shown in the other within one poll."""
    other = page.context.new_page()
    visit(other, console, "/models")
    visit(page, console)
    choose(page, "slow")
    watch = Stopwatch()
    for tab in (page, other):
        expect(banner(tab)).to_contain_text("Loading slow")
    assert watch.waited < 2.5
    banner(other).get_by_role("button", name="Cancel").click()
    watch = Stopwatch()
    for tab in (page, other):
        expect(banner(tab)).to_contain_text("The switch to slow was cancelled")
    assert watch.waited < 2.5


def test_a_switch_by_another_client_appears(page: Page, console: Console) -> None:
    """An idle page shows a switch by another client within its poll of 5 s."""
    visit(page, console)
    watch = Stopwatch()
    console.post("/v1/models/switch", {"target_model": "slow"})
    expect(banner(page)).to_contain_text("Loading slow")
    assert watch.waited < 6.5
    expect(note(page)).to_contain_text("Switching to slow")


def test_draft_and_focus_survive_polls_and_a_switch(with_good: Page, console: Console) -> None:
    """Polls, a locked composer and a switch leave the draft and the caret unchanged."""
    page = with_good
    composer(page).press_sequentially("Half a thought")
    composer(page).press("ArrowLeft")
    with page.expect_response(re.compile("/fragments/chat-status")):
        page.evaluate("htmx.trigger('#poll', 'refresh')")
    console.post("/v1/models/switch", {"target_model": "steady", "confirm": True})
    page.evaluate("htmx.trigger('#poll', 'refresh')")
    expect(note(page)).to_contain_text("Switching to steady")
    expect(composer(page)).to_have_value("Half a thought")
    expect(composer(page)).to_be_focused()
    expect_active(page, "steady")
    expect(composer(page)).to_be_focused()
    page.keyboard.type("!")
    expect(composer(page)).to_have_value("Half a though!t")


def test_one_click_switches_and_the_banner_names_unloaded_models(with_good: Page, console: Console) -> None:
    """The switch starts without a confirmation."""
    page = with_good
    choose(page, "slow")
    expect(banner(page)).to_contain_text("good-plain is unloaded for it: to make room for slow")
    expect(dialog(page)).to_be_hidden()
    console.wait_for(lambda status: status["models"]["good-plain"]["status"] == "stopped", "it to be unloaded")


def test_with_confirmation_the_plan_is_shown_first(open_page: OpenPage, start_console: StartConsole) -> None:
    """With `confirm_before_unload`, the plan shows what is unloaded, freed and kept; Cancel changes nothing."""
    mini = str(MINI)
    models = [fake_model(name, "hold:80", required_gb=0.6, source=mini) for name in ("good-plain", "other-plain")]
    console = start_console(
        toml="".join(models),
        llamacpp_server=FAKE_LLAMA_SERVER,
        memory_budget_gb=TIGHT_GB,
        confirm_before_unload="true",
    )
    console.switch("good-plain")
    page = open_page()
    visit(page, console)
    choose(page, "other-plain")
    expect(dialog(page)).to_contain_text("Switch to other-plain?")
    expect(dialog(page)).to_contain_text("needs 600 MB, declared) Switchyard will unload good-plain")
    expect(dialog(page)).to_contain_text("stays free")
    assert console.states()["good-plain"] == "running"
    dialog(page).get_by_role("button", name="Cancel").click()
    expect(dialog(page)).to_be_hidden()
    assert console.states()["other-plain"] == "stopped"

    choose(page, "other-plain")
    dialog(page).get_by_role("button", name="Use").click()
    expect(dialog(page)).to_be_hidden()
    expect_active(page, "other-plain")
    assert console.states()["good-plain"] == "stopped"


def test_a_cancelled_switch_restores_the_unloaded_model(with_good: Page) -> None:
    """The banner says what is unloaded and why; after Cancel the earlier model answers again."""
    page = with_good
    choose(page, "slow")
    expect(banner(page)).to_contain_text("Switching from good-plain to slow")
    expect(banner(page)).to_contain_text("good-plain is unloaded for it: to make room for slow")
    banner(page).get_by_role("button", name="Cancel").click()
    expect(banner(page)).to_contain_text("The switch to slow was cancelled. good-plain is running again.")
    expect_active(page, "good-plain")


def test_replacing_a_switch_more_than_half_done_needs_confirmation(with_good: Page, console: Console) -> None:
    """The dialog shows its progress; one button keeps that switch, the other replaces it."""
    page = with_good
    choose(page, "slow")
    console.wait_for(lambda s: s["switch"] and s["switch"]["progress"] > 50, "the switch to be more than half done")
    choose(page, "other-plain")
    expect(dialog(page)).to_contain_text(re.compile(r"The switch to slow is \d+ % done"))
    dialog(page).get_by_role("button", name="Cancel").click()
    expect(banner(page)).to_contain_text("to slow")
    choose(page, "other-plain")
    dialog(page).get_by_role("button", name="Use").click()
    expect_active(page, "other-plain")
    assert console.states()["slow"] == "stopped"


def test_a_failure_says_why_what_runs_now_and_what_to_do(with_good: Page) -> None:
    """The banner shows the first cause, the restored model and the folded log until it is dismissed."""
    page = with_good
    choose(page, "bad")
    expect(banner(page)).to_contain_text("bad could not be loaded")
    expect(banner(page).locator(".cause")).to_contain_text("the fake was told to crash")
    expect(banner(page).locator(".now-and-next")).to_have_text(
        "good-plain is running again. Try again, or choose another model."
    )
    log = banner(page).locator("pre")
    expect(log).to_be_hidden()
    banner(page).get_by_text("Last lines of the engine's log").click()
    expect(log).to_contain_text("told to crash")
    with page.expect_response(re.compile("/fragments/chat-status")):
        page.evaluate("htmx.trigger('#poll', 'refresh')")
    expect(log).to_be_visible()
    expect_active(page, "good-plain")
    page.locator("#model-button").click()
    expect(choice(page, "bad")).to_contain_text("Failed")
    page.keyboard.press("Escape")
    banner(page).get_by_role("button", name="Dismiss").click()
    expect(banner(page)).to_be_hidden()
    page.reload()
    expect(banner(page)).to_be_hidden()


def test_a_failed_switch_can_be_retried(page: Page, console: Console) -> None:
    """The banner says that no model is loaded; Try again starts the switch again."""
    visit(page, console)
    choose(page, "bad")
    expect(banner(page)).to_contain_text("No model is loaded now.")
    log = banner(page).locator("details")
    first = log.get_attribute("id")
    banner(page).get_by_role("button", name="Try again").click()
    expect(log).not_to_have_attribute("id", first or "")
    expect(banner(page)).to_contain_text("the fake was told to crash")


def test_a_model_that_does_not_fit_is_explained(with_good: Page, console: Console) -> None:
    """The dialog shows the memory needed and present, and links the plans of the largest models that fit."""
    page = with_good
    choose(page, "huge")
    expect(dialog(page)).to_contain_text("huge does not fit")
    expect(dialog(page)).to_contain_text("It needs 900.0 GB (declared).")
    expect(dialog(page)).to_contain_text("of 650 MB is free, and unloading would free")
    dialog(page).get_by_role("link", name="other-plain").click()
    expect(dialog(page)).to_contain_text("Switch to other-plain?")
    page.keyboard.press("Escape")
    expect(dialog(page)).to_be_hidden()
    assert console.status()["active_model"] == "good-plain"


def test_a_crash_during_an_answer_is_shown_with_its_cause(with_good: Page) -> None:
    """The page shows which model ended, why, and which one answers now, until it is dismissed."""
    page = with_good
    choose(page, "fragile")
    expect_active(page, "fragile")
    say(page, "Hello")
    expect(banner(page)).to_contain_text("fragile ended by itself")
    expect(banner(page).locator(".cause")).to_contain_text("Its process ended with exit code")
    expect(banner(page).locator(".now-and-next")).to_have_text("good-plain answers now.")
    expect_active(page, "good-plain")
    expect(page.locator(".message.failed .trouble")).to_be_visible()
    banner(page).get_by_role("button", name="Dismiss").click()
    expect(banner(page)).to_be_hidden()
