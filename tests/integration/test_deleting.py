"""Deleting models whose GGUF file others use, and unusable files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.console import DEMO_MODELS, Console

MINI = DEMO_MODELS / "switchyard-mini.gguf"
BASE = "/api/providers/models"
LISTED = "".join(f'[[models]]\nid = "{name}"\nsource = "shared.gguf"\n' for name in ("poet", "cook"))
USELESS = ("empty", "cut", "parts-00001-of-00003")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(MINI, folder / "shared.gguf")
    return folder


@pytest.fixture(scope="module")
def shared(start_shared: Callable[..., Console], models: Path) -> Console:
    return start_shared(models_dir=models, toml=LISTED)


def dialog_text(console: Console, model: str) -> str:
    """The text of the confirmation dialog."""
    html = console.get(f"/models/delete?model={model}", headers={"HX-Request": "true"}).text
    return " ".join(html.replace("<b>", "").replace("</b>", "").split())


def test_a_file_is_deleted_with_its_last_user(console: Console, models: Path) -> None:
    """The other model, named in the dialog, keeps answering; a restart lists nothing again, a new file does."""
    console.switch("poet")
    assert "stays, because poet (running) uses it too. No space is freed." in dialog_text(console, "cook")
    assert "shared.gguf" in dialog_text(console, "cook")
    gone = console.delete(f"{BASE}/cook").json()
    assert (gone["freed_bytes"], gone["shared_with"]) == (0, ["poet"])
    assert console.states() == {"poet": "running"}
    assert (models / "shared.gguf").exists()
    assert console.ask("Hello").status_code == 200
    assert console.get("/v1/models/cook").status_code == 404

    console.stop()
    console.start()
    assert set(console.states()) == {"poet"}
    assert "and frees 1.1 MB" in dialog_text(console, "poet")
    assert console.delete(f"{BASE}/poet").json()["freed_bytes"] == MINI.stat().st_size
    assert not (models / "shared.gguf").exists()
    assert console.states() == {}

    shutil.copy(MINI, models / "shared.gguf")
    console.wait_for(lambda s: set(s["models"]) == {"poet", "cook"}, "both to be listed with their file")


@pytest.mark.parametrize("name", USELESS)
def test_an_unusable_file_can_be_deleted(console: Console, models: Path, name: str) -> None:
    """An empty file, a truncated one, and one part of three each have a delete button."""
    file = models / f"{name}.gguf"
    file.write_bytes(b"" if name == "empty" else MINI.read_bytes()[:200_000])
    model = name.partition("-")[0]
    console.wait_for(lambda s: model in s["models"], "the file to be listed")
    assert console.states()[model] == "failed"
    assert f'aria-label="Delete {model}"' in console.get("/models").text
    assert "This removes its file <b" in console.get(f"/models/delete?model={model}").text
    assert console.delete(f"{BASE}/{model}").status_code == 200
    assert not file.exists()
    assert model not in console.states()
