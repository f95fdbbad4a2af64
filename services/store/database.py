"""Opens the database: SQLite in the state folder, or another one by URL."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from services.state_folder import private_opener
from services.store import checkpoints, damage
from services.store.errors import StoreError, is_locked, locked, store_error

HEAD = "0005"
"""The newest revision in `migrations/`. A database at this revision needs no Alembic, whose import takes 0.2 s."""

MIGRATIONS = Path(__file__).with_name("migrations")
PRAGMAS = ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", *checkpoints.PRAGMAS)
LOCK_TIMEOUT = 5.0
"""Seconds that a write waits for another program's lock."""
RETRY_SECONDS = 0.02
LOCK_GAP_SECONDS = 1.0
"""A lock met again after a longer gap counts as a new one."""


class Store:
    """An open database with current tables. Transactions are short: SQL inside them, no other I/O.

    No call waits inside SQLite, which would block every greenlet. A write that meets another program's lock retries
    after a pause until the lock has lasted `lock_timeout` seconds, counted from the first write that met it. `writing`
    then raises StoreLocked; both raise StoreError if the database can't be read or written.
    """

    def __init__(self, engine: sa.Engine, lock_timeout: float = LOCK_TIMEOUT) -> None:
        self._readers = engine
        self._writers = engine.execution_options(writes=True)
        self._write_lock = threading.Lock()  # only its holder polls for SQLite's lock
        self._lock_timeout = lock_timeout
        file = _file(engine.url)
        self._checkpoints = None if file is None else checkpoints.Checkpoints(file)
        self._locked_since: float | None = None
        self._last_met_at = 0.0

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """Return a connection to read with; its queries see one state of the database."""
        with self._translate_errors(), self._readers.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Return a connection that holds the write lock. Commits at the end, rolls back on an exception."""
        with self._translate_errors(), self._hold_write_lock(), self._begin_immediate() as connection:
            yield connection
            connection.commit()
        if self._checkpoints is not None:
            self._checkpoints.maybe_start()

    def close(self) -> None:
        self._readers.dispose()

    @contextmanager
    def _hold_write_lock(self) -> Iterator[None]:
        if not self._write_lock.acquire(timeout=self._lock_timeout):
            raise locked(_name(self._readers))
        try:
            yield
        finally:
            self._write_lock.release()

    def _begin_immediate(self) -> sa.Connection:
        """Return a connection whose transaction has begun, and with it SQLite's lock."""
        while True:
            try:
                connection = _begun(self._writers)
            except DBAPIError as error:
                if not is_locked(error.orig) or self._is_lock_expired():
                    raise
                time.sleep(RETRY_SECONDS)
            else:
                self._locked_since = None
                return connection

    def _is_lock_expired(self) -> bool:
        """Return whether another program's lock has lasted `lock_timeout` seconds."""
        now = time.monotonic()
        if self._locked_since is None or now - self._last_met_at > LOCK_GAP_SECONDS:
            self._locked_since = now
        self._last_met_at = now
        return now - self._locked_since >= self._lock_timeout

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            translated = store_error(error.orig, _name(self._readers))
            if translated is None:
                raise
            raise translated from error


def open_store(url_or_path: str | Path, lock_timeout: float = LOCK_TIMEOUT) -> Store:
    """Open a database by URL (`postgresql://…`) or an SQLite file by path; create or upgrade its tables.

    A damaged SQLite file is set aside first (`damage.check`). Blocks while another program has locked it, at most
    START_LOCK_TIMEOUT seconds. Raises StoreError if it can't be used or comes from a newer version.
    """
    text = str(url_or_path)
    url = sa.make_url(text) if "://" in text else sa.URL.create("sqlite", database=text)
    file = _file(url)
    if file is not None:
        damage.check(file)
        _create_private(file)
    opening = _engine(url, lock_seconds=damage.START_LOCK_TIMEOUT)
    try:
        revision = _revision(opening)
        if revision != HEAD:
            _migrate(opening, revision)
    except (DBAPIError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        translated = store_error(cause, _name(opening))
        raise translated or StoreError(f"The database {_name(opening)} can't be used: {cause}.") from error
    finally:
        opening.dispose()
    return Store(_engine(url, lock_seconds=0), lock_timeout)


def _file(url: sa.URL) -> Path | None:
    """Return the path of an SQLite file; None for a database in memory or on a server."""
    return (
        Path(url.database)
        if url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
        else None
    )


def _create_private(path: Path) -> None:
    """Create the file readable by this user only; SQLite gives the files beside it the same permissions."""
    try:
        open(path, "ab", opener=private_opener).close()
    except OSError as error:
        raise StoreError(f"The database {path} can't be used: {error.strerror or error}.") from None


def _engine(url: sa.URL, lock_seconds: float) -> sa.Engine:
    """Return an engine whose connections wait `lock_seconds` inside SQLite, where they block all greenlets."""
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        _tune_sqlite(engine, lock_seconds)
    return engine


def _begun(engine: sa.Engine) -> sa.Connection:
    """Return a connection whose transaction has begun."""
    connection = engine.connect()
    try:
        connection.begin()
    except BaseException:
        connection.close()
        raise
    return connection


def _name(engine: sa.Engine) -> str:
    """Return a database's name for messages: the path of a file, else the URL without its password."""
    return str(_file(engine.url) or engine.url.render_as_string())


def _tune_sqlite(engine: sa.Engine, lock_seconds: float) -> None:
    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # transactions begin in `begin` below, not at the first write
        for pragma in (f"busy_timeout={lock_seconds * 1000:.0f}", *PRAGMAS):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A transaction that begins as a reader fails at its first write if another one wrote since. IMMEDIATE waits.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _revision(engine: sa.Engine) -> str | None:
    """Return the database's revision, None if it is new."""
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        revision: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
        return revision


def _migrate(engine: sa.Engine, revision: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    try:
        with engine.execution_options(writes=True).begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except CommandError as error:
        raise StoreError(f"The database is at revision {revision}, which this version doesn't know: {error}") from error
