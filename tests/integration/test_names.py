"""Models with names in other scripts are listed, switched to, answer, and can be managed."""

from __future__ import annotations

import html
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.browser.steps import MINI
from tests.support.console import Console

NAMES = ("модель", "हिन्दी", "模型/小-Q4")


@pytest.fixture(scope="module")
def shared(start_shared, tmp_path_factory: pytest.TempPathFactory) -> Console:
    folder: Path = tmp_path_factory.mktemp("models")
    (folder / "模型").mkdir()
    for name in NAMES:
        shutil.copy(MINI, folder / f"{name}.gguf")
    return start_shared(models_dir=folder)


def test_a_model_has_its_name_in_its_own_script(console: Console) -> None:
    """In the API and on the pages."""
    assert sorted(console.status()["models"]) == sorted(NAMES)
    for path in ("/models", "/chats/new"):
        page = html.unescape(console.get(path).text)
        assert all(name in page for name in NAMES)


def test_a_model_can_be_used_by_its_name_in_another_script(console: Console) -> None:
    """Switching, answering, restarting and unloading accept the name in a body and in a path."""
    for name in NAMES:
        console.switch(name)
        answer = console.ask("Hello", model=name, max_tokens=4)
        assert answer.json()["model"] == name
        assert console.status()["active_model"] == name
        assert console.post(f"/v1/models/{quote(name)}/restart", {"wait": True}).status_code == 200
        assert console.post(f"/models/{quote(name)}/unload", allow_redirects=False).status_code == 303
        console.wait_for(lambda s, name=name: s["models"][name]["status"] == "stopped", "the model to be unloaded")
