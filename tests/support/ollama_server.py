"""An Ollama to test against: the fake, or a real one if OLLAMA_TEST_BINARY names its program.

Both are used in the same way, so that a test that passes with the fake is valid for the real one. OLLAMA_TEST_MODEL
names a small model that the real one can pull, such as 127.0.0.1:5005/library/tiny-b from a local registry.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from services.engines.ollama.names import full_name
from tests.support.console import DEMO_MODELS, free_port, wait_until
from tests.support.ollama import FakeOllama

BINARY = os.environ.get("OLLAMA_TEST_BINARY")
MODEL = os.environ.get("OLLAMA_TEST_MODEL", "tiny-a")
OTHER = "other:latest"


@dataclass(frozen=True)
class OllamaServer:
    """A running server. `model` was pulled from a registry, `other` was added; both can be loaded at once."""

    url: str
    binary: str
    pid: int
    model: str
    other: str = OTHER

    def ps(self) -> list[str]:
        return [m["name"] for m in _ask("GET", f"{self.url}/api/ps")["models"]]

    def tags(self) -> list[str]:
        return [m["name"] for m in _ask("GET", f"{self.url}/api/tags")["models"]]

    def unload(self, name: str) -> None:
        """Unload a model as another client would, and wait until it is gone."""
        _ask("POST", f"{self.url}/api/generate", {"model": name, "keep_alive": 0})
        wait_until(lambda: name not in self.ps(), f"{name} to be unloaded")

    def empty(self) -> None:
        for name in self.ps():
            self.unload(name)


@contextmanager
def ollama_server(folder: Path) -> Iterator[OllamaServer]:
    """This run's server, with both models installed."""
    with _real(folder, BINARY) if BINARY else _fake(folder) as server:
        yield server


@contextmanager
def _fake(folder: Path) -> Iterator[OllamaServer]:
    models = {OTHER: {"size": 46_236_961, "hold_mb": 30}}
    with FakeOllama(folder / "ollama", models, {full_name(MODEL): {"size": 7_411_936}}) as fake:
        _run(fake.binary, fake.environment, "pull", MODEL)
        yield OllamaServer(fake.url, fake.binary, fake.servers()[0].pid, full_name(MODEL))


@contextmanager
def _real(folder: Path, binary: str) -> Iterator[OllamaServer]:
    port = free_port()
    environment = {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(folder / "models")}
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [binary, "serve"], env=os.environ | environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _answers(url), "the real Ollama to answer")
        _run(binary, environment, "pull", "--insecure", MODEL)
        recipe = folder / "Modelfile"
        recipe.write_text(f"FROM {_other_weights(url)}\n", encoding="utf-8")
        _run(binary, environment, "create", OTHER, "-f", str(recipe))
        yield OllamaServer(url, binary, process.pid, full_name(MODEL))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _other_weights(url: str) -> Path:
    """A demo model other than the pulled one: for equal weights Ollama would run one runner with two names."""
    pulled = _ask("GET", f"{url}/api/tags")["models"][0]["size"]
    return next(f for f in sorted(DEMO_MODELS.glob("*.gguf")) if abs(f.stat().st_size - pulled) > 100_000)


def _run(binary: str, environment: dict[str, str], *arguments: str) -> None:
    subprocess.run(
        [binary, *arguments],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=300,
        check=True,
    )


def _answers(url: str) -> bool:
    try:
        return bool(_ask("GET", f"{url}/api/version"))
    except requests.ConnectionError:
        return False


def _ask(method: str, url: str, body: object = None) -> dict:  # type: ignore[type-arg]
    with requests.Session() as http:
        http.trust_env = False
        return http.request(method, url, json=body, timeout=30).json()
