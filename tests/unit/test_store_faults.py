"""A locked, damaged or unwritable database: bounded waits, clear errors, and no lost writes."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.store import damage
from services.store.checkpoints import CHECKPOINT_BYTES
from services.store.deferred import DeferredWrites
from services.store.errors import StoreError, StoreLocked
from services.store.records import Conversation, new_id
from services.store.repository import ConversationRepository, NoteRepository, Store, open_store
from tests.support.console import ROOT, wait_until
from tests.support.faults import corrupt_database, locked_database

PATIENCE = 0.2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "switchyard.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    """A store that waits for a lock only a moment."""
    store = open_store(path, lock_timeout=PATIENCE)
    yield store
    store.close()


@pytest.fixture
def chats(store: Store) -> ConversationRepository:
    return ConversationRepository(store)


def begin(chats: ConversationRepository, title: str) -> None:
    chats.add(Conversation(new_id(), title, 1.0, 1.0))


def filled(path: Path, conversations: int = 300) -> None:
    store = open_store(path)
    repository = ConversationRepository(store)
    for number in range(conversations):
        begin(repository, f"Conversation {number} " + "x" * 200)
    store.close()


def titles(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [title for (title,) in connection.execute("SELECT title FROM conversations")]


# Locked by another program.


def test_reads_work_while_another_program_writes(path: Path, chats: ConversationRepository) -> None:
    begin(chats, "A")
    with locked_database(path):
        assert [c.title for c in chats.newest_first()] == ["A"]


def test_a_write_waits_until_the_lock_is_gone(path: Path) -> None:
    store = open_store(path)
    written = threading.Event()

    def write() -> None:
        begin(ConversationRepository(store), "A")
        written.set()

    with locked_database(path):
        threading.Thread(target=write, daemon=True).start()
        assert not written.wait(0.1)
    wait_until(written.is_set, "the write")
    store.close()
    assert titles(path) == ["A"]


def test_a_lasting_lock_is_an_error(path: Path, chats: ConversationRepository) -> None:
    """Nothing was written, and writing works again as soon as the lock is gone."""
    with locked_database(path), pytest.raises(StoreLocked, match="locked by another program"):
        begin(chats, "A")
    begin(chats, "B")
    assert [c.title for c in chats.newest_first()] == ["B"]


def test_concurrent_writers_share_one_wait_for_a_lock(path: Path) -> None:
    """Waiting one after another, the last of twenty writers would wait twenty times as long."""
    store = open_store(path, lock_timeout=1.0)
    refused: list[float] = []

    def write() -> None:
        with pytest.raises(StoreLocked):
            begin(ConversationRepository(store), "A")
        refused.append(time.monotonic())

    with locked_database(path):
        began = time.monotonic()
        threads = [threading.Thread(target=write, daemon=True) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 20
        assert max(refused) - began < 10
    store.close()


def test_waiting_for_a_lock_blocks_no_other_greenlet(path: Path) -> None:
    """SQLite's own waiting blocked the whole app: here the greenlet that releases the lock could never run."""
    program = f"""
from gevent import monkey; monkey.patch_all()
import gevent, sqlite3
from services.store.records import Conversation
from services.store.repository import ConversationRepository, open_store
chats = ConversationRepository(open_store({str(path)!r}))
other = sqlite3.connect({str(path)!r}, isolation_level=None)
other.execute("BEGIN IMMEDIATE")
def let_go():
    for _ in range(20):
        gevent.sleep(0.005)
    other.execute("COMMIT")
release = gevent.spawn(let_go)
chats.add(Conversation("c", "A", 1.0, 1.0))
print(len(chats.newest_first()), release.ready())
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["1", "True"], run.stderr


def test_the_wal_file_stays_small(path: Path, store: Store) -> None:
    """A thread moves the WAL into the database; within a commit that would wait for the disk."""
    notes = NoteRepository(store)
    wal = path.with_name("switchyard.db-wal")
    with store.reading() as connection:
        assert connection.scalar(sa.text("PRAGMA wal_autocheckpoint")) == 0
    for number in range(400):
        notes.put("long", str(number) * 20_000)

    def short() -> bool:
        notes.put("last", str(time.monotonic()))
        return wal.stat().st_size <= CHECKPOINT_BYTES

    wait_until(short, "the checkpoint")
    assert path.stat().st_size > 20_000


# Background writes: no request waits for them, and none may be lost.


def test_deferred_writes_are_kept_until_they_succeed(path: Path, store: Store) -> None:
    """In their order. They were dropped with a line in the log."""
    notes = NoteRepository(store)
    writes = DeferredWrites(pause=0.02)
    with locked_database(path):
        for number in range(3):
            writes.put(lambda value=str(number): notes.put("last", value))
        time.sleep(2 * PATIENCE)  # the writes should have been refused by now; if not, the test proves less
    wait_until(lambda: notes.get("last") == "2", "the writes")
    writes.close()


def test_deferred_writes_are_given_up_when_closing(path: Path, store: Store) -> None:
    """Closing does not wait for a lock that stays."""
    writes = DeferredWrites(pause=0.02)
    with locked_database(path):
        writes.put(lambda: NoteRepository(store).put("a", "1"))
        writes.close(timeout=60)
    assert NoteRepository(store).get("a") is None


# Damaged.


def test_a_damaged_database_is_set_aside_unchanged(path: Path) -> None:
    """A new database replaces it; the damaged file is kept unchanged under a name with the date."""
    filled(path)
    corrupt_database(path)
    (wal := path.with_name("switchyard.db-wal")).write_bytes(b"what was written last")
    broken = path.read_bytes()
    store = open_store(path)
    assert ConversationRepository(store).newest_first() == []
    store.close()
    aside = damage.latest(path)
    assert aside is not None
    assert aside.name.startswith("switchyard-damaged-20")
    assert aside.read_bytes() == broken
    assert aside.with_name(aside.name + "-wal").read_bytes() == b"what was written last"
    assert not wal.exists() or wal.read_bytes() != b"what was written last"
    assert aside.stat().st_mode & 0o077 == 0


def test_a_file_that_is_no_database_is_set_aside(path: Path) -> None:
    path.write_bytes(b"this is not a database at all, but it is long enough to look like a file " * 20)
    open_store(path).close()
    aside = damage.latest(path)
    assert aside is not None
    assert aside.read_bytes().startswith(b"this is not")


def test_two_damaged_databases_get_different_names(path: Path) -> None:
    """Even within a second."""
    for content in (b"first" * 300, b"second" * 300):
        path.write_bytes(content)
        open_store(path).close()
    kept = {p.read_bytes() for p in path.parent.glob("switchyard-damaged-*.db")}
    assert kept == {b"first" * 300, b"second" * 300}
    latest = damage.latest(path)
    assert latest is not None
    assert latest.read_bytes() == b"second" * 300


def test_an_intact_database_is_kept(path: Path) -> None:
    filled(path, 3)
    assert damage.check(path) is None
    assert len(titles(path)) == 3
    assert damage.latest(path) is None


def test_a_locked_database_is_not_treated_as_damaged(path: Path) -> None:
    filled(path, 3)
    with locked_database(path, exclusive=True), pytest.raises(StoreLocked, match="locked by another program"):
        damage.check(path, lock_timeout=0.1)
    assert len(titles(path)) == 3


def test_damage_found_while_running_is_explained(path: Path) -> None:
    """A page that becomes corrupt while the app runs: the error says what helps."""
    filled(path)
    store = open_store(path)
    chats = ConversationRepository(store)
    with store.reading():
        pass
    corrupt_database(path)
    with pytest.raises(StoreError, match=r"is damaged.*[Ss]tart Switchyard again"):
        chats.newest_first()
    store.close()


def test_an_interrupted_migration_is_no_damage(path: Path) -> None:
    """SQLite rolls it back when the database is opened."""
    program = f"""
import os, sqlite3
connection = sqlite3.connect({str(path)!r}, isolation_level=None)
connection.execute("CREATE TABLE t (x)")
connection.execute("INSERT INTO t VALUES (1)")
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN")
for number in range(2000):
    connection.execute("INSERT INTO t VALUES (zeroblob(500))")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)
    assert path.with_name("switchyard.db-journal").exists()
    assert damage.check(path) is None
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (1,)
