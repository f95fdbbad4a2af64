"""The Studio in a browser: whole runs over the demo model and the fake image and vision servers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.conftest import OpenPage
from tests.browser.steps import visit
from tests.support.console import DEMO_MODELS, ROOT, Console, free_port, wait_until

SERVERS = """
[[models]]
id = "flux-schnell"
engine = "flux"
source = "flux-schnell"
required_gb = 0.05
[models.options.environment]
FAKE_FLUX_FAULT = "slow:1@linger,stuck@endless,oom@huge"

[[models]]
id = "clip-aesthetic"
engine = "vision"
source = "clip-aesthetic"
required_gb = 0.02
"""
PICTURES_SHOWN = """() => [...document.querySelectorAll(".studio-card img")].every((image) => {
    image.loading = "eager";
    return image.complete && image.naturalWidth > 0;
})"""
SIDEWAYS = "() => document.documentElement.scrollWidth > innerWidth"
LONG = "A fox, Reineke, " + "who is seen from afar between very many birches " * 30


@pytest.fixture(scope="module")
def shared(start_shared: Callable[..., Console]) -> Console:
    """The demo models and both servers, none of them loaded."""
    return start_shared(
        SERVERS,
        models_dir=DEMO_MODELS,
        llamacpp_server="",
        local_servers_dir=ROOT / "tests" / "fakes" / "local_servers",
        flux_api_url=f"http://127.0.0.1:{free_port()}",
        local_vision_api_url=f"http://127.0.0.1:{free_port()}",
        llm_provider="llamacpp",
        image_provider="flux",
        vision_provider="local",
    )


@pytest.fixture(autouse=True)
def no_run_left(console: Console) -> Iterator[None]:
    yield
    for run in console.get("/api/beam-search").json()["runs"]:
        console.delete(run["urls"]["self"])
        console.delete(run["urls"]["self"])


def cards(page: Page) -> Locator:
    return page.locator("#studio-cards > li")


def state(page: Page) -> Locator:
    return page.locator("#studio-now")


def start(
    page: Page, console: Console, prompt: str = "a fox in snow", candidates: int = 2, iterations: int = 1
) -> None:
    visit(page, console, "/studio")
    page.get_by_label("What the pictures are to show").fill(prompt)
    page.get_by_label("Candidates in each iteration").fill(str(candidates))
    page.get_by_label("Best ones kept").fill("1")
    page.get_by_label("Iterations", exact=True).fill(str(iterations))
    page.get_by_role("button", name="Start").click()
    expect(page).to_have_url(re.compile("/studio/runs/"))


def numbers(page: Page) -> list[str]:
    return page.locator("#studio-cards .job-figures > :first-child").all_inner_texts()


def test_a_whole_run_is_followed_to_its_ranking(page: Page, console: Console) -> None:
    """Candidates appear, pictures are shown, the ranking comes last; all without a reload."""
    visit(page, console, "/studio")
    page.get_by_label("Iterations", exact=True).fill("3")
    expect(page.locator("#studio-calls")).to_contain_text("at most 46 calls")
    start(page, console, iterations=2)
    page.evaluate("() => { window.same = true }")
    expect(state(page)).to_contain_text("Complete")
    expect(cards(page)).to_have_count(4)
    expect(page.locator("#studio-cards .tag").first).to_have_text("Rank 1")
    page.wait_for_function(PICTURES_SHOWN)
    assert page.evaluate("window.same")
    expect(state(page)).to_contain_text("written by rules")
    expect(state(page)).to_contain_text("flux-schnell")
    expect(page.locator("#announcer")).to_contain_text("4 pictures are ranked")
    ranked = numbers(page)
    page.reload()
    assert numbers(page) == ranked


def test_the_same_seed_is_offered_again_and_gives_the_same_ranking(page: Page, console: Console) -> None:
    start(page, console)
    expect(state(page)).to_contain_text("Complete")
    first = cards(page).all_inner_texts()
    page.get_by_role("link", name="Run it again").click()
    expect(page.get_by_label("What the pictures are to show")).to_have_value("a fox in snow")
    page.get_by_role("button", name="Start").click()
    expect(state(page)).to_contain_text("Complete")
    assert cards(page).all_inner_texts() == first


def test_a_second_click_on_start_sends_nothing(page: Page, console: Console) -> None:
    """The second start would be refused because of the first, and the page would show that in place of the run."""
    visit(page, console, "/studio")
    page.evaluate(
        """() => addEventListener("submit", (event) => {
            if (!event.defaultPrevented) document.body.dataset.sent = 1 + Number(document.body.dataset.sent || 0);
            event.preventDefault();  // the page stays, as it does until an answer comes
        })"""
    )
    page.get_by_label("What the pictures are to show").fill("linger")
    page.get_by_role("button", name="Start").dblclick()
    expect(page.locator("body")).to_have_attribute("data-sent", "1")


def test_a_cancel_in_the_middle_leaves_no_request_running_upstream(page: Page, console: Console) -> None:
    """The button is pressed by keyboard; what was written stays on the page."""
    flux = console.environment["SWITCHYARD_FLUX_API_URL"]

    def queue() -> dict[str, int]:
        found: dict[str, int] = requests.get(f"{flux}/health", timeout=10).json()["queue"]
        return found

    start(page, console, "linger")
    expect(state(page)).to_contain_text("drawing pictures with flux (flux-schnell)")
    wait_until(lambda: queue()["running"] == 1, "a picture to be begun")
    page.get_by_role("button", name="Cancel this run").press("Enter")
    expect(state(page)).to_contain_text("Cancelled")
    wait_until(lambda: queue()["running"] == queue()["waiting"] == 0, "the image server to be idle")
    expect(cards(page)).to_have_count(2)
    expect(cards(page).first).to_contain_text("Not drawn")


def test_a_failed_run_says_why_and_what_was_typed_is_never_lost(open_page: OpenPage, console: Console) -> None:
    """The prompt survives a reload before it is sent, a refusal, and is offered again after a failure."""
    page = open_page(tolerate=("the server responded with a status of 409",))
    visit(page, console, "/studio")
    page.get_by_label("What the pictures are to show").fill("half a thought")
    page.reload()
    expect(page.get_by_label("What the pictures are to show")).to_have_value("half a thought")
    start(page, console, "linger", candidates=1)
    other = open_page(tolerate=("the server responded with a status of 409",))
    visit(other, console, "/studio")
    other.get_by_label("What the pictures are to show").fill("the next one")
    other.get_by_role("button", name="Start").click()
    expect(other.get_by_role("alert")).to_contain_text("Another run is under way")
    expect(other.get_by_label("What the pictures are to show")).to_have_value("the next one")
    other.get_by_role("link", name="Open the run under way").click()
    expect(state(other)).to_contain_text("Running")
    page.get_by_role("button", name="Cancel this run").click()
    expect(state(other)).to_contain_text("Cancelled")
    visit(page, console, "/studio")
    expect(page.get_by_label("What the pictures are to show")).to_have_value("")  # it was sent
    start(page, console, "huge")
    expect(state(page)).to_contain_text("Failed")
    expect(state(page)).to_contain_text("flux-schnell failed at drawing")
    expect(state(page).get_by_role("alert")).to_contain_text("needs")


def test_runs_are_listed_continued_compared_and_deleted(page: Page, open_page: OpenPage, console: Console) -> None:
    """A tab that shows the deleted run says so, once."""
    start(page, console)
    expect(state(page)).to_contain_text("Complete")
    page.get_by_role("link", name=re.compile("Go on from this one, number")).first.click()
    expect(page.locator(".studio-origin")).to_contain_text("Goes on from")
    page.get_by_role("button", name="Start").click()
    expect(state(page)).to_contain_text("Complete")
    expect(state(page)).to_contain_text("Goes on from")
    visit(page, console, "/studio")
    for box in page.get_by_role("checkbox", name=re.compile("Compare")).all():
        box.check()
    page.get_by_role("button", name="Compare the two chosen").click()
    expect(page.locator(".studio-compare > section")).to_have_count(2)
    page.get_by_role("link", name="a fox in snow").first.click()
    other = open_page()
    other.goto(page.url)
    page.get_by_role("button", name="Delete this run").click()
    page.locator("#delete-run").get_by_role("button", name="Delete").click()
    expect(page.locator(".studio-row")).to_have_count(1)
    expect(other.locator("#notice")).to_contain_text("was deleted")


def test_it_works_without_script(open_page: OpenPage, console: Console) -> None:
    """Count the calls, start, follow by reloads, see the pictures, cancel."""
    page = open_page(java_script_enabled=False)
    visit(page, console, "/studio")
    page.get_by_label("What the pictures are to show").fill("a fox in snow")
    page.get_by_label("Iterations", exact=True).fill("3")
    page.get_by_role("button", name="Count the calls").click()
    expect(page.locator("#studio-calls")).to_contain_text("at most 46 calls")
    expect(page.get_by_label("What the pictures are to show")).to_have_value("a fox in snow")
    page.get_by_label("Iterations", exact=True).fill("1")
    page.get_by_role("button", name="Start").click()
    expect(state(page)).to_contain_text("Complete")
    expect(page.locator(".studio-card img")).to_have_count(4)
    visit(page, console, "/studio")
    page.get_by_label("What the pictures are to show").fill("linger")
    page.get_by_role("button", name="Start").click()
    page.get_by_role("button", name="Cancel this run").click()
    expect(state(page)).to_contain_text("Cancelled")


@pytest.fixture(scope="module")
def windows(chromium: Browser) -> Iterator[list[Page]]:
    contexts = [
        chromium.new_context(viewport={"width": width, "height": 800}, reduced_motion="reduce", color_scheme=scheme)
        for width, scheme in ((1280, "light"), (390, "dark"))
    ]
    yield [context.new_page() for context in contexts]
    for context in contexts:
        context.close()


def test_every_state_is_accessible_wide_and_narrow_light_and_dark(
    windows: list[Page], page: Page, console: Console
) -> None:
    """The form, a refusal, a complete run, a failed one, a run under way with a long prompt, two side by side."""
    start(page, console)
    expect(state(page)).to_contain_text("Complete")
    complete = page.url
    start(page, console, "huge")
    expect(state(page)).to_contain_text("Failed")
    failed = page.url
    start(page, console, LONG + "endless", candidates=4)
    under_way = page.url
    ids = [url.rsplit("/", 1)[1] for url in (complete, failed)]
    paths = ["/studio", f"/studio?continue={ids[0]}-1", f"/studio/compare?run={ids[0]}&run={ids[1]}", "/studio/compare"]
    for window in windows:
        for url in (complete, failed, under_way, *(console.url + path for path in paths)):
            window.goto(url)
            found = Axe().run(window, options={"resultTypes": ["violations"]})
            assert found.violations_count == 0, f"{url}: {found.generate_report()}"
            assert not window.evaluate(SIDEWAYS), url
        window.goto(console.url + "/studio")
        window.get_by_label("What the pictures are to show").fill("another")
        window.get_by_role("button", name="Start").click()
        expect(window.get_by_role("alert")).to_contain_text("Not started")
        assert Axe().run(window, options={"resultTypes": ["violations"]}).violations_count == 0
