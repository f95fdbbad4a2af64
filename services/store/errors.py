"""Translates SQLite's errors to messages for people. Standard library only, because gunicorn's master uses it too."""

from __future__ import annotations

import sqlite3

_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_UNUSABLE = (
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
)


class StoreError(Exception):
    """The database can't be used. The text is for people."""


class StoreLocked(StoreError):
    """Another program has locked the database."""


def store_error(error: BaseException | None, database: object) -> StoreError | None:
    """Translate SQLite's error to a StoreError; None if it is a bug of ours."""
    if is_locked(error):
        return locked(database)
    if is_damage(error):
        return StoreError(
            f"The database {database} is damaged ({error}). Start Switchyard again: it sets the database aside, "
            "deletes nothing, and begins a new one."
        )
    if _code(error) in _UNUSABLE:
        return StoreError(f"The database {database} can't be used: {error}.")
    return None


def locked(database: object) -> StoreLocked:
    return StoreLocked(
        f"The database {database} is locked by another program. Nothing was changed; try again in a moment."
    )


def is_locked(error: BaseException | None) -> bool:
    return _code(error) in _LOCKED


def is_damage(error: BaseException | None) -> bool:
    return _code(error) in _DAMAGED


def _code(error: BaseException | None) -> int | None:
    """Return SQLite's primary result code, None for errors of the Python module itself."""
    extended: int | None = getattr(error, "sqlite_errorcode", None)
    return None if extended is None else extended & 0xFF
