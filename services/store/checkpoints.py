"""Moves what was written from SQLite's `-wal` file into the database, beside the event loop: it waits for the disk.

SQLite would do it within whichever commit comes then, and that commit's greenlet would stop all others until the disk
has everything: 25 ms were seen on a fast one.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import structlog

from services.offhub import off_hub
from services.scheduling import Threads

log = structlog.get_logger(__name__)

DUE_BYTES = 4_000_000
"""How long the `-wal` file may grow, more or less: it goes on growing while it is moved."""
PRAGMAS = ("wal_autocheckpoint=0", f"journal_size_limit={DUE_BYTES // 4}")
"""For every connection. With the second, a file that was moved becomes short again at the next write."""


class Checkpoints:
    """Has one database's `-wal` file moved whenever it has grown long."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wal = f"{path}-wal"
        self._under_way = False

    def consider(self) -> None:
        """After each write. Returns at once."""
        if self._under_way or not self._is_due():
            return
        self._under_way = True
        Threads().spawn("checkpoint", self._run)

    def _is_due(self) -> bool:
        try:
            return os.stat(self._wal).st_size > DUE_BYTES
        except OSError:
            return False

    def _run(self) -> None:
        try:
            off_hub(_checkpoint, self._path)
        except (OSError, sqlite3.Error) as error:  # the next write tries again
            log.warning("what was written can't be moved into the database", error=str(error))
        finally:
            self._under_way = False


def _checkpoint(path: Path) -> None:
    """As far as nobody who reads is in the way; waits for no lock."""
    where = f"{path.absolute().as_uri()}?mode=rw"
    with closing(sqlite3.connect(where, uri=True, timeout=0, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
