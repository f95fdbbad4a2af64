"""Fixtures: Chromium and consoles. A test fails if its page logs an error or a request of it fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

from tests.browser.steps import MINI
from tests.support.console import Console

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
"""The shell has Chromium's pages without its windows, which took most of the time: 64 s of processor instead of 23."""
ARGUMENTS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 30_000
"""It only ends a hang; what has to be prompt is held against a Stopwatch."""
MARKDOWN_SERVER = Path(__file__).parent / "markdown_server.py"
"""A fake llama-server that answers in Markdown."""

OpenPage = Callable[..., Page]
StartShared = Callable[..., Console]


class Complaints:
    """Errors of a context's pages: console messages, uncaught errors, failed requests and requests to other hosts."""

    def __init__(self, context: BrowserContext, tolerated: tuple[str, ...]) -> None:
        self.heard: list[str] = []
        self._tolerated = tolerated
        context.on("console", self._console)
        context.on("weberror", lambda error: self._hear(f"uncaught: {error.error}"))
        context.on("request", self._request)
        context.on("requestfailed", self._failed)

    def _hear(self, words: str) -> None:
        if not any(part in words for part in self._tolerated):
            self.heard.append(words)

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self._hear(f"console {message.type}: {message.text}")

    def _request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            self._hear(f"asked another host: {request.url}")

    def _failed(self, request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the page was left while its stream was open
            self._hear(f"in vain: {request.url} {request.failure}")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    assert path, "The browser tests need Chromium: tools/ensure_chromium.sh installs it."
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser, request: pytest.FixtureRequest) -> Iterator[OpenPage]:
    """Opens pages as separate visitors. `tolerate` names complaints that a test provokes; the rest are options.

    They close before the consoles that they look at: those of the test itself are asked for first.
    """
    request.getfixturevalue("start_console")
    contexts: list[tuple[BrowserContext, Complaints]] = []

    def open_one(*, tolerate: tuple[str, ...] = (), **options: object) -> Page:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})  # type: ignore[arg-type]
        context.set_default_timeout(TIMEOUT_MS)
        contexts.append((context, Complaints(context, tolerate)))
        return context.new_page()

    yield open_one
    heard = []
    for context, complaints in contexts:
        context.close()
        heard += complaints.heard
    assert heard == []


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    """One visitor with a window of 1280 by 800."""
    return open_page()


@pytest.fixture(scope="module")
def start_shared(start_shared: StartShared, tmp_path_factory: pytest.TempPathFactory) -> StartShared:
    """Starts consoles that the tests of a module share, on fakes that answer in Markdown."""

    def start(toml: str, **settings: object) -> Console:
        told = {"llamacpp_server": MARKDOWN_SERVER, "models_dir": tmp_path_factory.mktemp("no-models")}
        return start_shared(toml=toml, **{**told, **settings})

    return start


@pytest.fixture(scope="session")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file large enough for reading it to be seen: a demo model with 200 MB of nothing behind it."""
    path = tmp_path_factory.mktemp("big") / "big.gguf"
    shutil.copy(MINI, path)
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    return path
