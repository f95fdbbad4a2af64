"""Consoles with a fake Ollama, and locators for what they show of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page

from tests.support.console import Console, wait_until
from tests.support.ollama import FakeOllama, FakeRegistry

SIZE = 20_000_000
RECOMMENDED = """
[[recommended]]
model = "llama3.2"
description = "General purpose"
size_gb = 2.0
recommended = true

[[recommended]]
model = "mistral"
description = "Balanced speed and quality"
"""


class Workbench:
    """An Ollama, a registry that has what it can pull, and the consoles that know both."""

    def __init__(self, folder: Path, **ollama: Any) -> None:
        self.ollama = FakeOllama(folder / "ollama", **ollama)
        self.registry = FakeRegistry(ollama.get("registry") or {})
        self._folder = folder
        self._consoles: list[Console] = []

    def start(self, **settings: object) -> Console:
        """Start a console; it begins without a model of its own."""
        folder = self._folder / f"console-{len(self._consoles)}"
        (folder / "models").mkdir(parents=True)
        told: dict[str, object] = {
            "models_dir": folder / "models",
            "toml": RECOMMENDED,
            "ollama_base_url": self.ollama.url,
            "ollama_binary": self.ollama.binary,
            "ollama_registry_url": self.registry.url,
            "update_check_hours": 0,
            "disk_margin_gb": 0,
        }
        console = Console(folder, **{**told, **settings})  # type: ignore[arg-type]
        console.environment |= self.ollama.environment
        self._consoles.append(console)
        return console.start()

    def reset(self, console: Console) -> Console:
        """For the next test: Ollama as it began and running, the registry too, and a console that has seen both."""
        self.ollama.clear_faults()
        console.reset().cancel_downloads()
        self.registry.reset()
        self.ollama.reset()
        self.await_ollama(console, "running")
        return console

    def end_ollama(self, console: Console) -> Console:
        """For the next test: Ollama as it began but not running, which a console knows and finds no failure."""
        self.reset(console)
        self.ollama.end()
        self.await_ollama(console, "stopped", "failed")
        console.post("/services/ollama/dismiss")
        self.await_ollama(console, "stopped")
        return console

    def await_ollama(self, console: Console, *states: str) -> None:
        """Wait until a console reports this state of Ollama, and lists its models if it runs."""

        def seen() -> bool:
            service = console.get("/api/providers/services/status").json()["services"]["ollama"]
            models = console.get("/v1/models/status").json()["models"]
            found = {name for name, model in models.items() if model["engine"] == "ollama"}
            return service["state"] in states and (service["state"] != "running" or found == set(self.ollama.tags()))

        wait_until(seen, f"Ollama to be {' or '.join(states)}")

    def close(self) -> None:
        for console in self._consoles:
            console.close()
        self.ollama.close()
        self.registry.close()


def job(page: Page, model: str) -> Locator:
    """A download's entry in the list."""
    return page.locator(".job").filter(has=page.get_by_text(model, exact=True))


def offer(page: Page, model: str) -> Locator:
    """A recommended model's entry."""
    return page.locator(".offer").filter(has=page.get_by_text(model, exact=True))


def field(page: Page) -> Locator:
    """Where the name of a model to download is typed."""
    return page.get_by_label("Download a model")


def download(page: Page, model: str) -> None:
    """Type a name and press Enter."""
    field(page).fill(model)
    field(page).press("Enter")


def card(page: Page) -> Locator:
    """The Ollama card."""
    return page.locator("#ollama-card")


def listed(console: Console) -> dict[str, dict[str, Any]]:
    """Downloads as the API reports them, by model."""
    answer = console.get("/api/providers/models/downloads")
    assert answer.status_code == 200, answer.text
    return {job["model"]: job for job in answer.json()["downloads"]}


def wait_for_download(console: Console, model: str, state: str) -> None:
    wait_until(lambda: listed(console).get(model, {}).get("state") == state, f"the download of {model} to be {state}")
