"""Runs SQLite's WAL checkpoints in a native thread, because they wait for the disk.

SQLite would run a checkpoint within some commit, and that greenlet would block all others until the disk is done: 25 ms
were measured on a fast one.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import structlog

from services.native_threads import run_in_thread
from services.scheduling import ThreadScheduler

log = structlog.get_logger(__name__)

CHECKPOINT_BYTES = 4_000_000
"""Size of the `-wal` file from which a checkpoint starts. The file goes on growing meanwhile."""
PRAGMAS = ("wal_autocheckpoint=0", f"journal_size_limit={CHECKPOINT_BYTES // 4}")
"""For every connection. The second one truncates the `-wal` file at the first write after a checkpoint."""


class Checkpoints:
    """Checkpoints one database when its `-wal` file has grown to CHECKPOINT_BYTES."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._wal = f"{path}-wal"
        self._running = False

    def maybe_start(self) -> None:
        """Start a checkpoint if one is due; call after each write. Never blocks."""
        if self._running or not self._is_due():
            return
        self._running = True
        ThreadScheduler().spawn("checkpoint", self._run)

    def _is_due(self) -> bool:
        try:
            return os.stat(self._wal).st_size > CHECKPOINT_BYTES
        except OSError:
            return False

    def _run(self) -> None:
        try:
            run_in_thread(_checkpoint, self._path)
        except (OSError, sqlite3.Error) as error:  # the next write tries again
            log.warning("the database can't be checkpointed", error=str(error))
        finally:
            self._running = False


def _checkpoint(path: Path) -> None:
    """Checkpoint as far as readers permit; waits for no lock."""
    where = f"{path.absolute().as_uri()}?mode=rw"
    with closing(sqlite3.connect(where, uri=True, timeout=0, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
