"""The end of a download as a client sees it: complete once the model can be switched to, cancelled at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.hub import FakeHub, Repo
from tests.support.console import DEMO_MODELS, Console, wait_until
from tests.support.hub import hub_environment
from tests.support.ollama import FakeOllama

BASE = "/api/providers/models"
GGUF = (DEMO_MODELS / "switchyard-mini.gguf").read_bytes()
OLLAMA = [f"llama3.{number}:latest" for number in range(2, 9)]


@pytest.fixture
def ollama(tmp_path: Path) -> Iterator[FakeOllama]:
    with FakeOllama(tmp_path / "ollama", registry={name: {"size": 4_000_000} for name in OLLAMA}) as fake:
        yield fake


@pytest.fixture
def console(start_console: Callable[..., Console], ollama: FakeOllama, tmp_path: Path) -> Iterator[Console]:
    """A console with both download sources and no model."""
    models = tmp_path / "models"
    models.mkdir()
    with FakeHub({"owner/tiny": Repo({"tiny-Q4_K_M.gguf": GGUF})}) as hub:
        yield start_console(
            models_dir=models,
            ollama_base_url=ollama.url,
            ollama_binary=ollama.binary,
            ollama_registry_url="http://127.0.0.1:9",
            environment=hub_environment(hub, tmp_path / "hub-home"),
            disk_margin_gb=0,
            standby="false",
        )


def test_a_model_can_be_switched_to_when_its_download_completes(console: Console) -> None:
    """It took up to a second, because Ollama's list of models is cached."""
    downloads = [(name, "ollama", name) for name in OLLAMA]
    for name, source, model_id in [*downloads, ("owner/tiny", "huggingface", "owner/tiny/tiny-Q4_K_M")]:
        with downloading(console, name, source) as events:
            last = list(events)[-1]
        models = console.status()["models"]
        assert last["status"] == "complete", last
        assert model_id in models
    console.switch(model_id)


def test_a_cancelled_download_is_cancelled_in_the_response(console: Console, ollama: FakeOllama) -> None:
    """In the response, the list and the stream; the pull ends afterwards, and the same model can be requested again."""
    ollama.set_fault("pull_slow", 200_000)
    with downloading(console, "llama3.2", "ollama") as events:
        first = next(event for event in events if event["completed_bytes"])
        assert console.delete(f"{BASE}/downloads/{first['id']}").json()["status"] == "cancelled"
        (listed,) = console.get(f"{BASE}/downloads").json()["downloads"]
        assert listed["state"] == "cancelled"
        assert list(events)[-1]["status"] == "cancelled"
    wait_until(lambda: not [p for p in ollama.processes() if "pull" in p.cmdline()], "the pull to end")
    ollama.clear_faults()
    with downloading(console, "llama3.2", "ollama") as events:
        assert list(events)[-1]["status"] == "complete"


@contextmanager
def downloading(console: Console, model: str, source: str) -> Iterator[Iterator[dict[str, Any]]]:
    """The events of a download."""
    body = {"model": model, "source": source}
    with closing(console.post(f"{BASE}/download", body, stream=True)) as answer:
        lines = answer.iter_lines(decode_unicode=True)
        yield (json.loads(line[6:]) for line in lines if line.startswith("data: "))
