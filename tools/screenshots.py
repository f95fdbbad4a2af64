"""Take the README's screenshots of a real Switchyard, in light and dark: `.venv/bin/python -m tools.screenshots`.

The conversation is with the demo models on the embedded engine. They are too fast to show an answer half written and a
switch half done; for these two the app is started again on the same state with the slow fake engine of the browser
tests.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from tests.browser.conftest import ARGUMENTS, MARKDOWN_SERVER, NAMES
from tests.browser.steps import MINI, SMALL, answers, banner, expect_active, say
from tests.support.console import Console, fake_model

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
SIZE = {"width": 1280, "height": 800}
DEMO_BUDGET_GB, BUDGET_GB = 0.2, 4
QUESTIONS = ("What is Switchyard?", "What can you do?")
LAST_QUESTION = "How can a script see what is loaded?"
ANSWER = """\
Ask for the status. It names every model, its state and what it holds:

```sh
curl -s localhost:8787/v1/models/status
```

| status | what it means |
|---|---|
| running | answers now |
| loading | on its way, with percent and time left |
| unloading | making room |
| failed | could not be loaded, with the cause |

A model that is simply not loaded says `stopped` there, and nothing at all on the pages.
"""
ENOUGH = "making room"
"""Text that the answer contains when its screenshot is taken: about half of it."""
TALKER = "a-larger-model"
"""A fictitious model that gives this answer: the demo models don't know it, and must not appear to."""
LARGE, LARGE_BYTES, LOAD_SECONDS = "the-largest-model", 2_100_000_000, 16
FROM_PERCENT = 60


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        path = next(filter(None, map(shutil.which, NAMES)))
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        pages = {
            scheme: browser.new_context(viewport=SIZE, color_scheme=scheme, reduced_motion="reduce").new_page()  # type: ignore[arg-type]
            for scheme in ("light", "dark")
        }
        address = _with_the_demo_models(Console(folder, memory_budget_gb=DEMO_BUDGET_GB), pages)
        _with_the_fake_engine(_slow_console(folder), pages, address)
        browser.close()


def _with_the_demo_models(console: Console, pages: dict[str, Page]) -> str:
    """Take an idle conversation, and the Models page with both models loaded; return the conversation's path."""
    console.start()
    try:
        page = pages["light"]
        for number, (model, question) in enumerate(
            zip(("switchyard-mini", "switchyard-small"), QUESTIONS, strict=True)
        ):
            console.switch(model)
            console.post("/models/dismiss")
            page.goto(console.url if number else f"{console.url}/chats/new")
            expect_active(page, model)
            say(page, question)
            expect(page.locator(".message.complete")).to_have_count(number + 1)
        path = page.url.removeprefix(console.url)
        _shoot("chat-idle", pages, console.url + path, lambda page: expect(banner(page)).to_be_hidden())
        _shoot("models", pages, f"{console.url}/models", lambda page: expect(banner(page)).to_be_hidden())
        return path
    finally:
        console.close()


def _with_the_fake_engine(console: Console, pages: dict[str, Page], path: str) -> None:
    """Take an answer half written, and a switch half done."""
    console.start()
    try:
        console.switch(TALKER)
        console.post("/models/dismiss")
        for page in pages.values():
            page.goto(console.url + path)
            expect_active(page, TALKER)
        say(pages["light"], LAST_QUESTION)
        _shoot("chat-answering", pages, None, lambda page: expect(answers(page).last).to_contain_text(ENOUGH))
        expect(pages["light"].locator(".message.complete")).to_have_count(len(QUESTIONS) + 1, timeout=30_000)
        console.post("/v1/models/switch", {"target_model": LARGE, "confirm": True})
        console.wait_for(lambda s: (s["switch"] or {}).get("progress", 0) >= FROM_PERCENT, "half of the switch")
        _shoot("chat-switching", pages, console.url + path, lambda page: expect(banner(page)).to_contain_text("left"))
    finally:
        console.close()


def _slow_console(folder: Path) -> Console:
    large, answer = folder / f"{LARGE}.gguf", folder / "answer.md"
    shutil.copy(SMALL, large)
    with large.open("r+b") as file:
        file.truncate(LARGE_BYTES)
    answer.write_text(ANSWER, encoding="utf-8")
    toml = fake_model("switchyard-mini", source=str(MINI))
    toml += fake_model(TALKER, "slow_tokens:0.08", f"text:{answer}", source=str(SMALL), required_gb=1)
    toml += fake_model(LARGE, f"slow_load:{LOAD_SECONDS}", source=str(large), required_gb=BUDGET_GB - 0.8)
    return Console(folder, toml=toml, memory_budget_gb=BUDGET_GB, llamacpp_server=MARKDOWN_SERVER)


def _shoot(name: str, pages: dict[str, Page], url: str | None, ready: object) -> None:
    """Take a screenshot of each page once it is `ready`."""
    for scheme, page in pages.items():
        if url is not None:
            page.goto(url)
        ready(page)  # type: ignore[operator]
        page.mouse.move(0, 0)
        page.screenshot(path=IMAGES / f"{name}-{scheme}.png")


if __name__ == "__main__":
    main()
