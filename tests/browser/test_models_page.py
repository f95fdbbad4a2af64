"""The Models page: each model with its actions, and the use of memory."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import StartShared
from tests.browser.steps import MINI, banner, dialog, row, visit
from tests.support.console import Console, fake_model, wait_until

MODELS = "".join(
    [
        fake_model("first-plain", "hold:150", required_gb=0.3, description="Holds 150 MB", source=str(MINI)),
        fake_model("second-plain", "hold:80", required_gb=0.3, source=str(MINI)),
        fake_model("greedy", required_gb=0.9, source=str(MINI)),
        fake_model("slow", "slow_load:60", required_gb=0.2, source=str(MINI)),
        fake_model("talks-plain", "slow_tokens:30", required_gb=0.1, source=str(MINI)),
    ]
)


@pytest.fixture(scope="module")
def shared(start_shared: StartShared) -> Console:
    return start_shared(
        MODELS, memory_budget_gb=1, strategy="preserve_favorites", preserve_models="first-plain,second-plain"
    )


@pytest.fixture
def models(page: Page, console: Console) -> Page:
    visit(page, console, "/models")
    return page


def test_a_model_is_loaded_restarted_and_unloaded(models: Page, console: Console) -> None:
    """Each button does what its label says, and the row shows the result; an unloaded model shows no state."""
    first = row(models, "first-plain")
    expect(first).to_contain_text("Holds 150 MB")
    expect(first.locator(".word")).to_have_count(0)
    first.get_by_role("button", name="Use first-plain").click()
    expect(first.locator(".word")).to_have_text("Ready")
    expect(first).to_contain_text("answers now")
    (before,) = [engine.pid for engine in console.engines()]
    first.get_by_role("button", name="Restart first-plain").click()
    wait_until(lambda: not psutil.pid_exists(before), "the old process to end")
    console.wait_for(lambda s: s["models"]["first-plain"]["status"] == "running", "the restart")
    expect(first.locator(".word")).to_have_text("Ready")
    first.get_by_role("button", name="Unload first-plain").click()
    expect(first.locator(".word")).to_have_count(0)
    assert console.engines() == []


def test_a_second_model_is_loaded_beside_or_switched_to(models: Page, console: Console) -> None:
    """The text "Keep loaded too" leaves the active model active; Use makes the other model active."""
    console.switch("first-plain")
    models.reload()
    second = row(models, "second-plain")
    second.get_by_role("button", name="Keep loaded too: second-plain").click()
    expect(second.locator(".word")).to_have_text("Ready")
    expect(row(models, "first-plain")).to_contain_text("answers now")
    second.get_by_role("button", name="Use second-plain").click()
    expect(second).to_contain_text("answers now")
    expect(row(models, "first-plain")).not_to_contain_text("answers now")


def test_the_memory_bar_names_every_segment(models: Page, console: Console) -> None:
    """Each holder of memory has a segment and a table row, named in the segment or on hover; the rest is free."""
    console.switch("first-plain")
    console.switch("second-plain", strategy="preserve_favorites")
    models.reload()
    segments = models.locator(".membar .segment")
    labels = [segment.get_attribute("aria-label") for segment in segments.all()]
    assert [label.split(":")[0] for label in labels if label] == ["first-plain", "second-plain", "Free"]
    table = models.get_by_role("table", name=re.compile("Memory of System memory"))
    expect(table.get_by_role("rowheader")).to_have_text(
        ["first-plain", "second-plain", "Reserved by a load under way", "Other programs", "Free"]
    )
    expect(models.locator(".membar text").first).to_have_text("first-plain")
    widths = [float(segment.locator("rect").get_attribute("width").rstrip("%")) for segment in segments.all()]
    assert sum(widths) == pytest.approx(100, abs=0.1)
    segments.first.hover()
    expect(models.locator("#tip")).to_have_text(re.compile(r"first-plain · \d+ MB"))
    models.mouse.move(0, 0)
    expect(models.locator("#tip")).to_be_hidden()
    segments.nth(1).focus()
    expect(models.locator("#tip")).to_contain_text("second-plain")


def test_a_load_in_progress_reserves_its_memory(models: Page) -> None:
    """A hatched segment shows the memory it will take; the model's row says that it loads and can cancel it."""
    row(models, "slow").get_by_role("button", name="Use slow").click()
    expect(models.locator(".membar .segment.reserved")).to_be_visible()
    slow = row(models, "slow")
    expect(slow.locator(".word")).to_contain_text("Loading")
    expect(banner(models)).to_contain_text("Loading slow")
    slow.get_by_role("button", name="Cancel slow").click()
    expect(slow.locator(".word")).to_have_count(0)
    expect(models.locator(".membar .segment.reserved")).to_have_count(0)


def test_a_model_that_does_not_fit_names_what_blocks_it(models: Page, console: Console) -> None:
    """Preserved models stay loaded: the dialog names each with the reason, and nothing is unloaded."""
    console.switch("first-plain")
    console.switch("second-plain")
    models.reload()
    row(models, "greedy").get_by_role("button", name="Use greedy").click()
    expect(dialog(models)).to_contain_text("greedy does not fit")
    expect(
        dialog(models).get_by_role("listitem").filter(has_text="first-plain: it is one of preserve_models")
    ).to_be_visible()
    dialog(models).get_by_role("button", name="Close").click()
    expect(dialog(models)).to_be_hidden()
    assert console.states()["first-plain"] == "running"


def test_a_plan_has_an_address_of_its_own(models: Page, console: Console) -> None:
    """The plan's own page shows the steps, a button that performs them and a link back."""
    visit(models, console, "/models/plan?target=slow")
    expect(models.get_by_role("heading", name="Switch to slow?")).to_be_visible()
    models.get_by_role("link", name="Cancel").click()
    expect(models).to_have_url(f"{console.url}/models")


def names(page: Page) -> list[str]:
    """The models in the table, from the top."""
    return page.locator(".model-table tbody .model-name > .name").all_inner_texts()


@pytest.mark.parametrize("hold", ["pointer", "focus"])
def test_rows_keep_their_place_while_the_user_is_at_one(models: Page, console: Console, hold: str) -> None:
    """A loaded model moves to the top only when neither the pointer nor the focus is in a row."""
    before = names(models)
    assert before == ["first-plain", "greedy", "second-plain", "slow", "talks-plain"]
    button = row(models, "slow").get_by_role("button", name="Use slow")
    if hold == "pointer":
        button.hover()
    else:
        button.focus()
    console.switch("second-plain")
    expect(row(models, "second-plain").locator(".word")).to_have_text("Ready")
    assert names(models) == before
    if hold == "pointer":
        models.mouse.move(0, 0)
    else:
        models.keyboard.press("Shift+Tab")
        expect(button).not_to_be_focused()
        assert names(models) == before, "the focus is still on one of the rows"
        models.locator(".brand").focus()
    expect(models.locator(".model-table tbody tr").first).to_contain_text("second-plain")
    assert names(models) == ["second-plain", "first-plain", "greedy", "slow", "talks-plain"]


def test_models_come_and_go_one_row_at_a_time(models: Page, console: Console) -> None:
    """A new file in the folder gets a row in its place with working buttons; the other rows are not replaced."""
    models.evaluate("document.querySelectorAll('.model-table tr').forEach((row) => { row.untouched = true; })")
    path = Path(console.environment["SWITCHYARD_MODELS_DIR"]) / "fresh.gguf"
    path.write_bytes(MINI.read_bytes())
    fresh = row(models, "fresh")
    expect(fresh).to_be_visible()
    assert names(models) == ["first-plain", "fresh", "greedy", "second-plain", "slow", "talks-plain"]
    fresh.get_by_role("button", name="Use fresh").click()
    expect(fresh.locator(".word")).to_have_text("Ready")
    console.post("/v1/models/fresh/stop")
    path.unlink()
    expect(fresh).to_have_count(0)
    rows = models.locator(".model-table tbody tr")
    assert rows.evaluate_all("rows => rows.map((row) => row.untouched)") == [True] * 5


def test_a_busy_model_finishes_its_answers_unless_unloaded_now(models: Page, console: Console) -> None:
    """The row says what the unload waits for and its time limit; "now" aborts the answer."""
    console.switch("talks-plain")
    busy = row(models, "talks-plain")
    with console.post(
        "/v1/chat/completions", {"messages": [{"role": "user", "content": "Go on"}], "stream": True}, stream=True
    ):
        expect(busy.locator(".tag", has_text="1 in progress")).to_be_visible()
        busy.get_by_role("button", name="Unload talks-plain").click()
        expect(busy.locator(".word")).to_have_text(re.compile(r"Finishing 1 answer, at most \d\d s more"))
        busy.get_by_role("button", name="Unload now: talks-plain").click()
        expect(busy.locator(".word")).to_have_count(0)
    assert console.engines() == []
