"""Scans of the models folder run in a thread, with bounds; the last listing is served meanwhile."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from services.engines.llamacpp import folder as folder_module
from services.engines.llamacpp.engine import LlamaCpp
from services.engines.llamacpp.folder import ModelFolder
from services.engines.port import Model
from services.engines.processes import ProcessRegistry
from tests.support.console import DEMO_MODELS, wait_until

MINI = DEMO_MODELS / "switchyard-mini.gguf"
WAIT = 0.05


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    (folder / "sub").mkdir(parents=True)
    for name in ("b.gguf", "a.gguf", "sub/c.gguf"):
        shutil.copy(MINI, folder / name)
    return folder


@contextmanager
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Listing a folder blocks."""
    go_on = threading.Event()
    scandir = os.scandir

    def slow(path: str) -> object:
        assert go_on.wait(60)
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", slow)
        yield
        go_on.set()


def names(folder: ModelFolder) -> list[str]:
    return [str(file.path.relative_to(folder.path)) for file in folder.found()]


def test_every_gguf_file_below_it_is_found(models: Path) -> None:
    """In order, whatever else is there: circular and broken links, pipes, folders named like models."""
    (models / "circle.gguf").symlink_to("circle.gguf")
    (models / "nowhere.gguf").symlink_to("gone.gguf")
    (models / "up").symlink_to("..")
    os.mkfifo(models / "pipe.gguf")
    (models / "folder.gguf").mkdir()
    (models / "notes.txt").touch()
    folder = ModelFolder(models)
    folder.refresh()
    assert names(folder) == ["a.gguf", "b.gguf", "sub/c.gguf"]
    assert folder.notice is None


def test_a_missing_folder_is_empty(tmp_path: Path) -> None:
    """It is not reported as a problem: the first download creates the folder."""
    folder = ModelFolder(tmp_path / "none")
    folder.refresh()
    assert (names(folder), folder.notice) == ([], None)


def test_the_last_listing_is_served_while_the_folder_hangs(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller returns in time, the problem is reported, and the listing is updated once the folder answers."""
    told: list[str | None] = []
    folder = ModelFolder(models, lambda: told.append(folder.notice), wait_seconds=WAIT)
    folder.refresh()
    with hanging(monkeypatch):
        (models / "a.gguf").unlink()
        for _ in range(3):
            folder.refresh()
        assert names(folder) == ["a.gguf", "b.gguf", "sub/c.gguf"]
        assert folder.notice == (
            f"The models folder {models} does not answer. Its models are listed as they were last seen, new ones once "
            "it answers again."
        )

    def looked() -> bool:
        folder.refresh()
        return names(folder) == ["b.gguf", "sub/c.gguf"] and folder.notice is None

    wait_until(looked, "the folder to answer")
    assert told == [told[0], None], "each change is reported once"


def test_a_first_scan_that_hangs_lists_nothing_and_is_reported(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listed model is shown, with the reason why it can't be loaded yet."""
    folder = ModelFolder(models, wait_seconds=WAIT)
    with hanging(monkeypatch):
        folder.refresh()
        assert (names(folder), folder.notice) == (
            [],
            f"The models folder {models} does not answer. Its models will be listed once it answers.",
        )
        file = folder.file("a.gguf")
        assert (file.path, file.fault) == (
            models / "a.gguf",
            "The file a.gguf could not be read yet: its folder is slow.",
        )

    def known() -> bool:
        folder.refresh()
        return folder.file("a.gguf").fault is None

    wait_until(known, "the folder to answer")


def test_only_one_scan_hangs_at_a_time(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other scan starts before it ends: a share that hangs for hours occupies one thread."""
    folder = ModelFolder(models, wait_seconds=WAIT)
    before = threading.active_count()
    with hanging(monkeypatch):
        for _ in range(5):
            folder.refresh()
        assert threading.active_count() == before + 1


def test_files_of_listed_models_are_scanned_too(models: Path, tmp_path: Path) -> None:
    """Wherever it is, the next scan notices its changes."""
    folder, elsewhere = ModelFolder(models), tmp_path / "elsewhere.gguf"
    assert folder.file(str(elsewhere)).fault == "The file elsewhere.gguf is not there."
    shutil.copy(MINI, elsewhere)
    folder.refresh()
    assert folder.file(str(elsewhere)).header is not None
    elsewhere.write_bytes(b"no model any more")
    folder.refresh()
    assert folder.file(str(elsewhere)).fault is not None


def test_a_relative_source_is_below_the_folder_unless_it_exists_here(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = ModelFolder(models)
    assert folder.file("sub/c.gguf").path == models / "sub/c.gguf"
    shutil.copy(MINI, tmp_path / "here.gguf")
    assert folder.file("here.gguf").path == Path("here.gguf")


def test_a_problem_is_logged_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line per scan, every two seconds, would bury the rest of the log."""

    def refused(_path: str) -> object:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "scandir", refused)
    folder = ModelFolder(models)
    with capture_logs() as said:
        folder.refresh()
        folder.refresh()
    assert len(said) == 1
    assert "Input/output error" in said[0]["notice"]


def test_a_slow_scan_is_used_and_reported(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its result is used although it came after the timeout."""
    monkeypatch.setattr(folder_module, "SLOW_SECONDS", (60, 0))
    folder = ModelFolder(models)
    folder.refresh()
    assert names(folder) == ["a.gguf", "b.gguf", "sub/c.gguf"]
    assert folder.notice == (
        f"The models folder {models} is slow: a look through it takes more than 0 s. New and changed files are noticed "
        "late."
    )


def test_headers_beyond_the_time_limit_are_read_by_the_next_scan(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file is listed once its header was read; a changed one keeps its old entry until then."""
    folder = ModelFolder(models)
    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "READ_SECONDS", -1.0)
        folder.refresh()
        assert names(folder) == []
        assert folder.file("b.gguf").fault is not None
    folder.refresh()
    assert names(folder) == ["a.gguf", "b.gguf", "sub/c.gguf"]
    with monkeypatch.context() as patched:
        patched.setattr(folder_module, "READ_SECONDS", -1.0)
        (models / "a.gguf").write_bytes(b"")
        folder.refresh()
        assert folder.file(str(models / "a.gguf")).fault is None
    folder.refresh()
    assert folder.file(str(models / "a.gguf")).fault == "a.gguf is empty: the copy may be incomplete."


def test_an_unreadable_folder_keeps_its_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share that is unavailable for a moment removes no model."""
    folder = ModelFolder(models)
    folder.refresh()

    def refused(_path: str) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refused)
    folder.refresh()
    assert names(folder) == ["a.gguf", "b.gguf", "sub/c.gguf"]
    assert folder.notice == (
        f"The models folder {models} can't be read: Permission denied. Its models are listed as they were last seen."
    )


def test_a_scan_of_a_whole_disk_is_limited(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of entries is limited, and exceeding it is reported."""
    monkeypatch.setattr(folder_module, "MAX_ENTRIES", 2)
    folder = ModelFolder(models)
    folder.refresh()
    assert len(names(folder)) <= 2
    assert folder.notice == f"The models folder {models} holds more than 2 files: not all of it is looked through."


def test_queries_about_models_do_not_access_the_folder(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two scans the status, plans and loads use the last listing."""
    engine = LlamaCpp(
        ModelFolder(models), ProcessRegistry(tmp_path / "state"), context_length=512, parallel=1, standby=False
    )
    found = engine.discover()
    listed = engine.describe(Model("mine", "llamacpp", "sub/c.gguf"))

    def touched(*_: object, **__: object) -> object:
        raise AssertionError("the folder was touched")

    for name in ("stat", "lstat", "scandir", "listdir", "open"):
        monkeypatch.setattr(os, name, touched)
    for model in (*found, listed, Model("mine", "llamacpp", "sub/c.gguf")):
        assert engine.describe(model).fault is None
        assert engine.estimate(model).bytes > 0
        assert engine.settings_key(model)
    assert engine.loaded([*found, listed]) == []
    monkeypatch.undo()
    engine.close()
