"""The state folder: private to its user, and clear errors if it can't be used."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask import Flask

from services.state_folder import owner, prepare
from tests.support.console import TIMEOUT, Console
from tests.support.faults import NOBODY, as_nobody, full_disk, modes, read_only_disk, readable_by_nobody, small_disk

MINI = "switchyard-mini"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user of this machine can read; pytest's own folders are private."""
    with tempfile.TemporaryDirectory(prefix="switchyard-state-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_another_user_can_read_nothing(open_folder: Path) -> None:
    """Chats were readable by every local user. Old files are corrected too; a lax umask changes nothing."""
    state = open_folder / "state"
    (state / "logs").mkdir(parents=True)
    (state / "logs" / "left-by-an-earlier-version.log").write_text("a secret")
    left = state / "switchyard.db-wal"
    left.touch(mode=0o666)
    console = Console(open_folder, models_dir=Path("models").resolve(), standby="false")
    before = os.umask(0)
    try:
        console.start()
        console.post("/chats", data={"text": "This is between us."})
        console.switch(MINI)
        kept = modes(state)
        assert {"switchyard.db", "switchyard.db-wal", "switchyard.db-shm", "lock", "processes"} <= set(kept)
        assert any(name.endswith(".log") for name in kept)
        assert any(name.endswith(".json") for name in kept)
        assert readable_by_nobody(state) == []
        open_to_others = {name: oct(mode) for name, mode in kept.items() if mode & 0o077}
        assert open_to_others == {}
    finally:
        os.umask(before)
        console.close()


def error_of_start(folder: Path, **settings: object) -> str:
    """The message of a start that fails."""
    console = Console(folder, **settings)  # type: ignore[arg-type]
    try:
        assert console.launch().wait(TIMEOUT) != 0
    finally:
        console.close()
    return console.output()


def assert_one_sentence(said: str, *parts: str) -> None:
    assert "Traceback" not in said
    assert len(said.strip().splitlines()) == 1, said
    for part in parts:
        assert part in said


def test_a_file_in_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("I was here first")
    said = error_of_start(tmp_path)
    assert_one_sentence(said, str(tmp_path / "state"), "is a file", "SWITCHYARD_STATE_DIR")


def test_a_folder_shared_by_all_users_is_refused(tmp_path: Path) -> None:
    """Making `/tmp` private would break the machine."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o1777)
    (tmp_path / "state" / "of-somebody-else").touch()
    said = error_of_start(tmp_path)
    assert_one_sentence(said, str(tmp_path / "state"), "shared by all")
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o1777


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of the test's own with an empty state folder."""
    with small_disk(tmp_path / "disk", 4_000_000) as mounted:
        (mounted / "state").mkdir()
        yield mounted


def test_a_read_only_disk_is_an_error(disk: Path, tmp_path: Path) -> None:
    with read_only_disk(disk):
        said = error_of_start(tmp_path, state_dir=disk / "state")
    assert_one_sentence(said, str(disk / "state"), "can't be written", "Read-only file system")


def test_a_full_disk_is_an_error(disk: Path, tmp_path: Path) -> None:
    with full_disk(disk):
        said = error_of_start(tmp_path, state_dir=disk / "state")
    assert_one_sentence(said, str(disk / "state"), "can't be written", "No space left")


def test_a_restart_is_refused_on_a_full_disk(disk: Path, make_app: Callable[..., Flask]) -> None:
    """The next run could not start on a full disk, and the loaded models would be lost with the app."""
    app = make_app(state_dir=disk / "state")
    app.extensions["switchyard"].restart.possible = True
    with full_disk(disk):
        answer = app.test_client().post("/api/restart-api")
    assert answer.status_code == 503
    assert "Retry-After" in answer.headers
    assert answer.json is not None
    assert answer.json["error"] == "state_unwritable"
    assert "goes on as it is" in answer.json["message"]


def test_a_database_that_can_not_be_opened_is_an_error(tmp_path: Path) -> None:
    """It isn't treated as damaged: it may be intact."""
    (tmp_path / "state" / "switchyard.db").mkdir(parents=True)
    said = error_of_start(tmp_path)
    assert_one_sentence(said, str(tmp_path / "state" / "switchyard.db"), "can't be used")
    assert [path.name for path in (tmp_path / "state").glob("*damaged*")] == []


def test_a_new_file_system_can_be_used(tmp_path: Path) -> None:
    """Its root folder is open to all users like `/tmp`, but holds no other user's files."""
    with small_disk(tmp_path / "state", 4_000_000) as state:
        prepare(state)
        assert modes(state) == {".": 0o700}


def test_the_owner_id_outlives_the_database(tmp_path: Path) -> None:
    """With a new owner id the containers would belong to another Switchyard, and keep their memory for ever."""
    assert owner(tmp_path, lambda: "abc123") == "abc123"
    assert owner(tmp_path, lambda: pytest.fail("it has a name")) == "abc123"
    assert modes(tmp_path)["owner"] == 0o600


def test_a_folder_of_another_user_is_an_error() -> None:
    """A folder that can't be made private isn't used; the message names both users."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        words = as_nobody(lambda: prepare(Path(folder)))
    assert "StateError" in words
    assert f"{folder} belongs to user 0, and Switchyard runs as user {NOBODY}" in words


def test_a_folder_that_can_not_be_created_is_an_error(open_folder: Path) -> None:
    """Its parent folder belongs to another user."""
    words = as_nobody(lambda: prepare(open_folder / "state"))
    assert f"The state folder {open_folder / 'state'} can't be written: Permission denied" in words
