"""Opens the database: SQLite in the state folder, or another one by its URL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from services.state_folder import private_opener

HEAD = "0004"
"""The newest revision in `migrations/`. A database that is there already needs no Alembic, whose import takes 0.2 s."""

MIGRATIONS = Path(__file__).with_name("migrations")
PRAGMAS = ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=5000")


class StoreError(Exception):
    """The database can't be used. The text is for people."""


class Store:
    """A database that is up to date. One short session per piece of work: SQL inside it, no other I/O."""

    def __init__(self, engine: sa.Engine) -> None:
        self._readers = engine
        self._writers = engine.execution_options(writes=True)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session whose queries see one state of the database."""
        with Session(self._readers) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that alone may write, committed at the end, undone when it raises."""
        with Session(self._writers) as session, session.begin():
            yield session

    def close(self) -> None:
        self._readers.dispose()


def open_store(url_or_path: str | Path) -> Store:
    """Open a database by URL (`postgresql://…`) or an SQLite file by path, creating or upgrading its tables.

    Raises StoreError when it can't be read or comes from a newer version.
    """
    text = str(url_or_path)
    url = sa.make_url(text) if "://" in text else sa.URL.create("sqlite", database=text)
    engine = sa.create_engine(url)
    if engine.dialect.name == "sqlite":
        if url.database:
            _create_private(Path(url.database))
        _tune_sqlite(engine)
    try:
        revision = _revision(engine)
        if revision != HEAD:
            _migrate(engine, revision)
    except DatabaseError as error:
        raise StoreError(f"The database {url.render_as_string()} can't be used: {error.orig}.") from error
    return Store(engine)


def _create_private(path: Path) -> None:
    """SQLite gives the files beside a database the permissions of the database itself."""
    try:
        open(path, "ab", opener=private_opener).close()
    except OSError as error:
        raise StoreError(f"The database {path} can't be used: {error.strerror or error}.") from None


def _tune_sqlite(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # transactions begin where `begin` below says, not at the first write
        for pragma in PRAGMAS:
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
