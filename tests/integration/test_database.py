"""The database under a running console: locked by another program, damaged, backed up and restored."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import requests

from tests.support.console import ROOT, TIMEOUT, Console
from tests.support.faults import locked_database, modes

MINI = "switchyard-mini"


@pytest.fixture(scope="module")
def shared(start_shared) -> Console:
    return start_shared(standby="false")


def database(console: Console) -> Path:
    return console.state / "switchyard.db"


def start_a_chat(console: Console, text: str) -> requests.Response:
    return requests.post(f"{console.url}/chats", data={"text": text}, allow_redirects=False, timeout=TIMEOUT)


def back_up(console: Console, copy: Path) -> subprocess.CompletedProcess[str]:
    """Run the backup command of docs/operations.md with the console's settings."""
    return subprocess.run(
        [sys.executable, "-m", "services.store.backup", str(copy)],
        cwd=ROOT,
        env={**os.environ, **console.environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def test_a_locked_database_delays_only_writes(console: Console) -> None:
    """A lock froze everything for its duration, 10 s. Now models load and answer; only requests that write fail."""
    console.switch(MINI)
    refused: list[requests.Response] = []
    with locked_database(database(console)):
        writer = threading.Thread(target=lambda: refused.append(start_a_chat(console, "Hello")), daemon=True)
        writer.start()
        answered = 0
        while writer.is_alive():
            assert console.status()["active_model"] == MINI
            answered += 1
        assert answered > 10, "the status waited for the database"
        assert (refused[0].status_code, refused[0].headers["Retry-After"]) == (503, "5")
        assert console.ask("Hello").status_code == 200
        assert console.get("/models").status_code == 200
        assert console.get("/").status_code == 200
    assert start_a_chat(console, "Hello again").status_code == 303


def test_a_backup_is_made_while_the_console_writes_and_restored(console: Console, tmp_path: Path) -> None:
    """As in docs/operations.md: one command; then stop, restore, start. The copy is complete and private."""
    start_a_chat(console, "Before the copy")
    copy = tmp_path / "switchyard-backup.db"
    over = threading.Event()

    def write() -> None:
        while not over.wait(0.05):
            start_a_chat(console, "Meanwhile")

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    made = back_up(console, copy)
    over.set()
    writer.join(TIMEOUT)
    assert made.returncode == 0, made.stderr
    assert "switchyard-backup.db is a copy of" in made.stdout
    assert modes(copy) == {".": 0o600}
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    start_a_chat(console, "After the copy")
    console.stop()
    for lost in database(console).parent.glob("switchyard.db*"):
        lost.unlink()
    shutil.copy(copy, database(console))
    console.start()
    page = console.get("/").text
    assert "Before the copy" in page
    assert "After the copy" not in page
    assert modes(database(console)) == {".": 0o600}


def test_a_backup_overwrites_no_file(console: Console, tmp_path: Path) -> None:
    """Yesterday's backup can't be overwritten by mistake; a failed backup leaves no file."""
    there = tmp_path / "there.db"
    there.write_text("yesterday's")
    made = back_up(console, there)
    assert (made.returncode, made.stdout) == (1, "")
    assert made.stderr == f"{there} can't be made: File exists.\n"
    assert there.read_text() == "yesterday's"
    console_without = Console(tmp_path)
    made = back_up(console_without, tmp_path / "none.db")
    assert made.returncode == 1
    assert "can't be copied" in made.stderr
    assert not (tmp_path / "none.db").exists()


def test_the_app_starts_with_a_damaged_database(start_console, tmp_path: Path) -> None:
    """It is set aside before the worker starts; the log and the page say where it is."""
    state = tmp_path / "state"
    state.mkdir()
    (state / "switchyard.db").write_bytes(b"no database" * 1000)
    console = start_console(state_dir=state, standby="false")
    (aside,) = state.glob("switchyard-damaged-*.db")
    assert aside.read_bytes() == b"no database" * 1000
    assert modes(aside) == {".": 0o600}
    assert "the database was damaged" in console.output()
    assert str(aside) in console.get("/").text
