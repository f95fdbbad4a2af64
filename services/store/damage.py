"""Detects a damaged database at the start and sets it aside, whole, under a dated name. Nothing is deleted.

Imports only the standard library, because gunicorn's master runs this before it forks a worker: a database that can't
be used then stops the start with one clear sentence.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

from services.notes import Notes
from services.store.errors import StoreError, is_damage, store_error

START_LOCK_TIMEOUT = 20.0
"""Seconds that a start waits for another program's lock; less than gunicorn gives a worker to boot."""
BESIDE = ("-wal", "-shm", "-journal")
"""Suffixes of the files that SQLite keeps beside a database. They are renamed first, so that they never meet a new one.
"""

DISMISSED = "damage_dismissed"
"""Key of the note that holds the name of the damaged file that was dismissed."""


def check(path: Path, lock_timeout: float = START_LOCK_TIMEOUT) -> Path | None:
    """Check a database, and set it aside if it is damaged; return its new path then, else None.

    Blocks while another program has locked it, at most `lock_timeout` seconds. Raises StoreError if it can't be read
    for another reason, or can't be renamed.
    """
    try:
        if not path.exists() or path.stat().st_size == 0 or _is_sound(path, lock_timeout):
            return None
        return _set_aside(path)
    except OSError as error:
        raise StoreError(f"The database {path} can't be used: {error.strerror or error}.") from None


def latest(path: Path) -> Path | None:
    """Return the database set aside last, None if there is none."""
    aside = path.parent.glob(f"{path.stem}-damaged-*{path.suffix}")
    return max(aside, key=lambda found: found.name, default=None)


class Damaged:
    """The database set aside last, until somebody dismisses the message about it."""

    def __init__(self, path: Path, notes: Notes) -> None:
        found = latest(path)
        self._notes = notes
        self._current = None if found is None or found.name == notes.get(DISMISSED) else found

    @property
    def current(self) -> Path | None:
        """Path of that database, None if there is nothing to show."""
        return self._current

    def dismiss(self) -> None:
        """Don't show it any more, also after a restart. The file stays."""
        if self._current is not None:
            self._notes.put(DISMISSED, self._current.name)
            self._current = None


def _is_sound(path: Path, lock_timeout: float, mode: str = "ro") -> bool:
    """Run `quick_check`, read-only.

    Closing a writable connection would checkpoint the `-wal` file into a damaged database.
    """
    where = f"{path.absolute().as_uri()}?mode={mode}"
    try:
        with closing(sqlite3.connect(where, uri=True, timeout=lock_timeout, isolation_level=None)) as connection:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            return False
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY_ROLLBACK and mode == "ro":
            return _is_sound(path, lock_timeout, "rw")  # a migration that was cut off has to be undone first
        raise store_error(error, path) or StoreError(f"The database {path} can't be used: {error}.") from None


def _set_aside(path: Path) -> Path:
    """Rename a database and the files beside it; add seconds to the dated name until it is free."""
    moment = time.time()
    while (aside := path.with_name(_name(path, moment))).exists():
        moment += 1
    for suffix in (*BESIDE, ""):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    return aside


def _name(path: Path, moment: float) -> str:
    return f"{path.stem}-damaged-{time.strftime('%Y-%m-%d-%H%M%S', time.localtime(moment))}{path.suffix}"
