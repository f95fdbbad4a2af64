"""A damaged database is found at the start and set aside, whole, under a name with the date. Nothing is deleted.

Only the standard library: gunicorn's master looks before there is a worker, so that what can't be helped is one clear
sentence and no broken worker.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Protocol

from services.store.errors import StoreError, is_damage, store_error

START_PATIENCE = 20.0
"""Seconds that a start waits for another program's lock: less than gunicorn gives a worker to be there."""
BESIDE = ("-wal", "-shm", "-journal")
"""What SQLite keeps beside a database. It goes first: on its own it must never meet a new database."""

DISMISSED = "damage_dismissed"
"""The note that holds the name of the file that people know of."""


def check(path: Path, patience: float = START_PATIENCE) -> Path | None:
    """Look through a database, and set it aside when it is damaged: where it lies then, else None.

    Blocks while another program has locked it, at most `patience` seconds. Raises StoreError when it can't be read for
    another reason, or not be set aside.
    """
    try:
        if not path.exists() or path.stat().st_size == 0 or _is_sound(path, patience):
            return None
        return _set_aside(path)
    except OSError as error:
        raise StoreError(f"The database {path} can't be used: {error.strerror or error}.") from None


def latest(path: Path) -> Path | None:
    """The damaged database that was set aside last; None when there is none."""
    aside = path.parent.glob(f"{path.stem}-damaged-*{path.suffix}")
    return max(aside, key=lambda found: found.name, default=None)


class Notes(Protocol):
    """Where it is kept what people know already."""

    def get(self, key: str) -> str | None: ...

    def put(self, key: str, value: str) -> None: ...


class Damaged:
    """The database that was set aside last, until somebody has taken note of it."""

    def __init__(self, path: Path, notes: Notes) -> None:
        found = latest(path)
        self._notes = notes
        self._current = None if found is None or found.name == notes.get(DISMISSED) else found

    @property
    def current(self) -> Path | None:
        """Where it lies; None when there is nothing to tell."""
        return self._current

    def dismiss(self) -> None:
        """Tell of it no more, after a restart neither. The file stays."""
        if self._current is not None:
            self._notes.put(DISMISSED, self._current.name)
            self._current = None


def _is_sound(path: Path, patience: float, mode: str = "ro") -> bool:
    """Reading only, or closing it would move what is in the `-wal` file into a damaged database."""
    where = f"{path.absolute().as_uri()}?mode={mode}"
    try:
        with closing(sqlite3.connect(where, uri=True, timeout=patience, isolation_level=None)) as connection:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError as error:
        if is_damage(error):
            return False
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_READONLY_ROLLBACK and mode == "ro":
            return _is_sound(path, patience, "rw")  # a migration that was cut off has to be undone first
        raise store_error(error, path) or StoreError(f"The database {path} can't be used: {error}.") from None


def _set_aside(path: Path) -> Path:
    """Rename it and what is beside it. On the first free second: a name is never taken twice."""
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
