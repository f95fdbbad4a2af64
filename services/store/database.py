"""Opens the database: SQLite in the state folder, or another one by its URL."""

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
from sqlalchemy.orm import Session

from services.state_folder import private_opener
from services.store import checkpoints, damage
from services.store.errors import StoreError, is_locked, locked, store_error

HEAD = "0004"
"""The newest revision in `migrations/`. A database that is there already needs no Alembic, whose import takes 0.2 s."""

MIGRATIONS = Path(__file__).with_name("migrations")
PRAGMAS = ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", *checkpoints.PRAGMAS)
PATIENCE = 5.0
"""Seconds that a write waits for another program's lock."""
AGAIN_SECONDS = 0.02
FORGET_SECONDS = 1.0
"""A lock that nobody has met for so long counts as another one when it is met again."""


class Store:
    """A database that is up to date. One short session per piece of work: SQL inside it, no other I/O.

    No call waits inside SQLite, which would stop every greenlet: a write that meets another program's lock asks again
    after a pause, for `patience` seconds since anybody met it. The sessions raise StoreLocked then, and StoreError
    when the database can't be read or written.
    """

    def __init__(self, engine: sa.Engine, patience: float = PATIENCE) -> None:
        self._readers = engine
        self._writers = engine.execution_options(writes=True)
        self._turn = threading.Lock()  # one of us asks for the lock on behalf of all
        self._patience = patience
        file = _file(engine.url)
        self._checkpoints = None if file is None else checkpoints.Checkpoints(file)
        self._locked_since: float | None = None
        self._met_at = 0.0

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session whose queries see one state of the database."""
        with self._explained(), Session(self._readers) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that alone may write, committed at the end, undone when it raises."""
        with self._explained(), self._begun() as session:
            yield session
            session.commit()
        if self._checkpoints is not None:
            self._checkpoints.consider()

    def close(self) -> None:
        self._readers.dispose()

    @contextmanager
    def _begun(self) -> Iterator[Session]:
        """A session that holds the write lock."""
        if not self._turn.acquire(timeout=self._patience):
            raise locked(_name(self._readers))
        try:
            with self._begin() as session:
                yield session
        finally:
            self._turn.release()

    def _begin(self) -> Session:
        while True:
            session = Session(self._writers)
            try:
                session.connection()
            except DBAPIError as error:
                session.close()
                if not is_locked(error.orig) or self._is_hopeless():
                    raise
                time.sleep(AGAIN_SECONDS)
            else:
                self._locked_since = None
                return session

    def _is_hopeless(self) -> bool:
        """Whether the lock has been there for as long as anybody waits for it."""
        now = time.monotonic()
        if self._locked_since is None or now - self._met_at > FORGET_SECONDS:
            self._locked_since = now
        self._met_at = now
        return now - self._locked_since >= self._patience

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            told = store_error(error.orig, _name(self._readers))
            if told is None:
                raise
            raise told from error


def open_store(url_or_path: str | Path, patience: float = PATIENCE) -> Store:
    """Open a database by URL (`postgresql://…`) or an SQLite file by path, creating or upgrading its tables.

    A damaged SQLite file is set aside first (`damage.check`). Blocks while another program has locked it, for
    START_PATIENCE at most. Raises StoreError when it can't be used or comes from a newer version.
    """
    text = str(url_or_path)
    url = sa.make_url(text) if "://" in text else sa.URL.create("sqlite", database=text)
    file = _file(url)
    if file is not None:
        damage.check(file)
        _create_private(file)
    opening = _engine(url, lock_seconds=damage.START_PATIENCE)
    try:
        revision = _revision(opening)
        if revision != HEAD:
            _migrate(opening, revision)
    except (DBAPIError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        told = store_error(cause, _name(opening))
        raise told or StoreError(f"The database {_name(opening)} can't be used: {cause}.") from error
    finally:
        opening.dispose()
    return Store(_engine(url, lock_seconds=0), patience)


def _file(url: sa.URL) -> Path | None:
    """Where SQLite keeps the database; None for one that is kept by a server, or in memory."""
    return (
        Path(url.database)
        if url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
        else None
    )


def _create_private(path: Path) -> None:
    """SQLite gives the files beside a database the permissions of the database itself."""
    try:
        open(path, "ab", opener=private_opener).close()
    except OSError as error:
        raise StoreError(f"The database {path} can't be used: {error.strerror or error}.") from None


def _engine(url: sa.URL, lock_seconds: float) -> sa.Engine:
    """With connections that wait so long for a lock inside SQLite, where no other greenlet can run."""
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        _tune_sqlite(engine, lock_seconds)
    return engine


def _name(engine: sa.Engine) -> str:
    """A database as people know it: the path of a file, else the URL without its password."""
    return str(_file(engine.url) or engine.url.render_as_string())


def _tune_sqlite(engine: sa.Engine, lock_seconds: float) -> None:
    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # transactions begin where `begin` below says, not at the first write
        for pragma in (f"busy_timeout={lock_seconds * 1000:.0f}", *PRAGMAS):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A reader that turns writer fails at once if another wrote meanwhile; one that says so at first waits.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _revision(engine: sa.Engine) -> str | None:
    """The revision the database is at; None when it is new."""
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
