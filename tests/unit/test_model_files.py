"""Files of models on a disk that may be slow or hang: asked beside the event loop, remembered between two looks."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from services.engines.llamacpp import model_files
from services.engines.llamacpp.engine import LlamaCpp
from services.engines.llamacpp.model_files import ModelFiles
from services.engines.processes import ProcessRegistry
from tests.support.console import DEMO_MODELS, PATIENCE

MINI = DEMO_MODELS / "switchyard-mini.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def test_a_folder_that_hangs_takes_nothing_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there is still listed. One look hangs, and no other is begun until it is over."""
    shutil.copy(MINI, folder)
    files = ModelFiles(folder)
    before = files.look()
    assert [path.name for path in before] == ["switchyard-mini.gguf"]
    answers, calls, look = threading.Event(), [], model_files._look

    def hang(*asked: object) -> object:
        calls.append(asked)
        answers.wait(PATIENCE)
        return look(*asked)  # type: ignore[arg-type]

    monkeypatch.setattr(model_files, "_look", hang)
    monkeypatch.setattr(model_files, "LOOK_SECONDS", 0.05)
    shutil.copy(MINI, folder / "new.gguf")
    assert [files.look(), files.look(), files.look()] == [before] * 3
    assert len(calls) == 1
    answers.set()
    monkeypatch.setattr(model_files, "LOOK_SECONDS", PATIENCE)
    assert [path.name for path in files.look()] == ["new.gguf", "switchyard-mini.gguf"]


def test_plans_and_pages_ask_no_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model needs, and under which settings, is known from the latest look; each status asks for it."""
    shutil.copy(MINI, folder)
    engine = LlamaCpp(folder, ProcessRegistry(tmp_path), context_length=512, parallel=1, standby=False)
    (model,) = engine.discover()
    need, key = engine.estimate(model), engine.settings_key(model)
    assert need.bytes > 0

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("the disk was asked")

    for name in ("stat", "open", "exists", "is_file"):
        monkeypatch.setattr(Path, name, refuse)
    assert (engine.estimate(model), engine.settings_key(model)) == (need, key)
    assert engine.describe(model) == model


def test_a_file_elsewhere_is_looked_at_with_the_folder(folder: Path, tmp_path: Path) -> None:
    """One that the settings list: what becomes of it is seen at the next look."""
    files = ModelFiles(folder)
    elsewhere = tmp_path / "elsewhere.gguf"
    assert files.read(files.path_of(str(elsewhere))).fault == "The file elsewhere.gguf is not there."
    shutil.copy(MINI, elsewhere)
    files.look()
    assert files.read(files.path_of(str(elsewhere))).header is not None
    elsewhere.write_bytes(b"no model any more")
    files.look()
    assert files.read(elsewhere).fault is not None


def test_a_relative_source_is_below_the_folder_unless_it_is_here(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ModelFiles(folder)
    assert files.path_of("sub/a.gguf") == folder / "sub/a.gguf"
    shutil.copy(MINI, tmp_path / "a.gguf")
    assert files.path_of("a.gguf") == Path("a.gguf")


def test_a_folder_that_can_not_be_read_is_said_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each look, every two seconds, would bury everything else in the log."""

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "rglob", refuse)
    files = ModelFiles(folder)
    with capture_logs() as said:
        assert [files.look(), files.look()] == [(), ()]
    assert len(said) == 1
    assert "Input/output error" in said[0]["error"]
