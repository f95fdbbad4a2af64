"""The store returns what was saved, in order, with concurrent writers."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from services.store.database import MIGRATIONS
from services.store.records import Conversation, DownloadRecord, Message, new_id
from services.store.repository import (
    ConversationRepository,
    DownloadRepository,
    LoadRecord,
    LoadRepository,
    Store,
    StoreError,
    open_store,
)
from services.store.tables import METADATA


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "switchyard.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = open_store(path)
    yield store
    store.close()


@pytest.fixture
def chats(store: Store) -> ConversationRepository:
    return ConversationRepository(store)


def message(conversation_id: str, content: str = "hello", **changes: object) -> Message:
    plain = Message(new_id(), conversation_id, "user", content, None, "complete", None, 10.0, 10.0, None, None)
    return replace(plain, **changes)  # type: ignore[arg-type]


def begun(chats: ConversationRepository, title: str, at: float) -> Conversation:
    """A new conversation without messages."""
    conversation = Conversation(new_id(), title, at, at)
    chats.add(conversation)
    return conversation


def load(at: float, model: str = "m", key: str = "k") -> LoadRecord:
    return LoadRecord(model, "llamacpp", key, "ready", 2.5, {"loading_weights": 2.0}, 10**10, "host", at)


def download(created_at: float, **changes: object) -> DownloadRecord:
    plain = DownloadRecord(
        id=new_id(),
        source="ollama",
        model="llama3.2:latest",
        state="queued",
        requested_by="somebody",
        message="Waiting for its turn",
        percent=0,
        completed_bytes=0,
        total_bytes=None,
        error=None,
        may_resume=False,
        created_at=created_at,
        started_at=None,
        finished_at=None,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_tables_and_migrations_agree(store: Store) -> None:
    """The migrations build the schema that the tables describe."""
    with store.reading() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, METADATA) == []


def test_the_database_is_tuned(store: Store) -> None:
    """Every connection uses WAL, checks foreign keys and never waits for a lock, which would block every greenlet."""
    with store.reading() as connection:
        found = [
            connection.scalar(sa.text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    assert found == ["wal", 1, 1, 0]


@pytest.mark.usefixtures("store")
def test_opening_again_needs_no_alembic(path: Path) -> None:
    """An up-to-date database is opened without importing Alembic, which would cost the start 0.2 s."""
    program = (
        "import sys; from services.store.repository import open_store;"
        f"open_store({str(path)!r}).close(); print('alembic' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.strip() == "False"


def test_a_database_of_the_first_version_is_migrated(path: Path) -> None:
    """Its data is kept, and new columns can be used."""
    engine = sa.create_engine(f"sqlite:///{path}")
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        assert not sa.inspect(connection).has_table("downloads")
        connection.execute(sa.text("INSERT INTO conversations VALUES ('c', 'Kept', 1.0, 2.0)"))
        said = "'m', 'c', 0, 'user', 'Said', NULL, 'complete', NULL, 1.0, 1.0, NULL, NULL"
        connection.execute(sa.text(f"INSERT INTO messages VALUES ({said})"))
    engine.dispose()
    store = open_store(path)
    kept = ConversationRepository(store).get("c")
    assert kept is not None
    assert (kept.title, [m.content for m in kept.messages]) == ("Kept", ["Said"])
    record = download(3.0)
    DownloadRepository(store).save(record)
    assert DownloadRepository(store).newest_first() == [record]
    store.close()


def test_a_newer_database_is_refused(store: Store, path: Path) -> None:
    """A database of a later version is not changed."""
    with store.writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match="revision 9999"):
        open_store(path)


def test_it_opens_by_url(path: Path) -> None:
    """A URL opens the same database as the path."""
    by_url = open_store(f"sqlite:///{path}")
    begun(ConversationRepository(by_url), "A", 1.0)
    by_url.close()
    by_path = open_store(path)
    assert [c.title for c in ConversationRepository(by_path).newest_first()] == ["A"]
    by_path.close()


def test_conversations_come_newest_first(chats: ConversationRepository) -> None:
    """A new message moves its conversation to the top; renaming doesn't."""
    old, new = begun(chats, "Old", 1.0), begun(chats, "New", 2.0)
    assert [c.id for c in chats.newest_first()] == [new.id, old.id]
    chats.append(message(old.id, created_at=3.0))
    chats.rename(new.id, "Newer")
    assert [(c.title, c.updated_at) for c in chats.newest_first()] == [("Old", 3.0), ("Newer", 2.0)]


def test_messages_are_restored_unchanged(chats: ConversationRepository) -> None:
    """Every field is restored, in the order of writing, unknown ones as None."""
    conversation = begun(chats, "A", 1.0)
    first = message(conversation.id)
    second = message(
        conversation.id, "öé 🚂", role="assistant", model="m", state="failed", error="why", tokens=3, seconds=0.25
    )
    assert chats.append(first)
    assert chats.append(second)
    found = chats.get(conversation.id)
    assert found is not None
    assert found.messages == (first, second)
    assert chats.message(second.id) == second


def test_a_message_is_replaced(chats: ConversationRepository) -> None:
    """An update changes only that message, and its position stays."""
    conversation = begun(chats, "A", 1.0)
    first, second = (message(conversation.id, str(n)) for n in range(2))
    chats.append(first, second)
    changed = replace(first, content="changed", thinking="hm", thinking_seconds=0.5, told_from="x", context_full=True)
    assert chats.update(changed)
    found = chats.get(conversation.id)
    assert found is not None
    assert found.messages == (changed, second)


def test_answers_are_versions_of_which_one_is_shown(chats: ConversationRepository) -> None:
    """The newest is shown first, then the chosen one; each knows all versions, and later messages stay."""
    conversation = begun(chats, "A", 1.0)
    question, first, second, third = (message(conversation.id, text) for text in ("?", "1", "2", "3"))
    chats.append(question, first)
    assert chats.add_version(replace(second, created_at=9.0), first.id)
    assert chats.add_version(third, second.id)
    after = message(conversation.id, "after")
    chats.append(after)
    ids = (first.id, second.id, third.id)

    def shown() -> list[Message]:
        found = chats.get(conversation.id)
        assert found is not None
        return list(found.messages)

    assert shown() == [question, replace(third, versions=ids), after]
    assert chats.show(first.id)
    assert shown() == [question, replace(first, versions=ids), after]
    assert chats.message(second.id) == replace(second, created_at=9.0, versions=ids)
    assert not chats.show("nothing")
    assert not chats.add_version(message(conversation.id), "nothing")


def test_an_answer_can_replace_another(chats: ConversationRepository) -> None:
    """The old one is deleted; the newest is still the last."""
    conversation = begun(chats, "A", 1.0)
    question, first, empty, third = (message(conversation.id, text) for text in ("?", "1", "", "3"))
    chats.append(question, first)
    chats.add_version(empty, first.id)
    assert chats.add_version(third, empty.id, instead=True)
    found = chats.get(conversation.id)
    assert found is not None
    assert found.messages == (question, replace(third, versions=(first.id, third.id)))
    assert chats.message(empty.id) is None


def test_deleting_a_conversation_deletes_its_messages(chats: ConversationRepository) -> None:
    """Nothing of a deleted conversation stays, and nothing can be added to it."""
    conversation = begun(chats, "A", 1.0)
    said = message(conversation.id)
    chats.append(said)
    assert chats.delete(conversation.id)
    assert chats.get(conversation.id) is None
    assert chats.message(said.id) is None
    assert not chats.append(message(conversation.id))
    assert not chats.update(said)


def test_unknown_ids_give_none_or_false(chats: ConversationRepository) -> None:
    """Unknown ids give None or False, not an error."""
    assert chats.get("x") is None
    assert chats.message("x") is None
    assert not chats.rename("x", "y")
    assert not chats.delete("x")


def test_streaming_messages_become_interrupted(chats: ConversationRepository) -> None:
    """Messages that a dead process left unfinished are marked, with their text so far; others are unchanged."""
    conversation = begun(chats, "A", 1.0)
    done = message(conversation.id)
    cut = message(conversation.id, "half", state="streaming", finished_at=None)
    chats.append(done)
    chats.append(cut)
    assert chats.mark_interrupted(20.0) == 1
    assert chats.message(done.id) == done
    assert chats.message(cut.id) == replace(cut, state="interrupted", finished_at=20.0)
    assert chats.mark_interrupted(30.0) == 0


def test_loads_come_newest_first_and_by_key(store: Store) -> None:
    """The latest loads by model, engine and settings; and of all."""
    loads = LoadRepository(store)
    records = [load(1.0), load(2.0), load(3.0, key="other"), load(4.0, model="n")]
    for record in records:
        loads.add(record)
    assert loads.recent("m", "llamacpp", "k") == [records[1], records[0]]
    assert loads.recent("m", "llamacpp", "k", limit=1) == [records[1]]
    assert loads.recent_all(3) == [records[3], records[2], records[1]]


def test_downloads_come_newest_first_unchanged(store: Store) -> None:
    """Every field is restored, sizes beyond 32 bits too; saving again replaces, deleting removes one."""
    downloads = DownloadRepository(store)
    old = download(1.0)
    new = download(
        2.0,
        source="huggingface",
        state="failed",
        percent=99,
        completed_bytes=3 * 10**12,
        total_bytes=4 * 10**12,
        error="disk_full",
        message="The disk is full.",
        may_resume=True,
        started_at=2.5,
        finished_at=3.5,
    )
    for record in (old, new):
        downloads.save(record)
    assert downloads.newest_first() == [new, old]
    changed = replace(old, state="downloading", percent=5)
    downloads.save(changed)
    assert downloads.newest_first() == [new, changed]
    assert downloads.delete(new.id)
    assert not downloads.delete(new.id)
    assert downloads.newest_first() == [changed]


def test_an_exchange_is_saved_atomically(chats: ConversationRepository) -> None:
    """Two messages at once; if saving fails, neither is stored."""
    conversation = begun(chats, "A", 1.0)
    question, answer = message(conversation.id, "?"), message(conversation.id, "!", role="assistant")
    assert chats.append(question, answer)
    with pytest.raises(sa.exc.IntegrityError):
        chats.append(message(conversation.id), answer)
    found = chats.get(conversation.id)
    assert found is not None
    assert found.messages == (question, answer)
    with pytest.raises(sa.exc.IntegrityError):
        chats.add(Conversation(new_id(), "D", 1.0, 1.0, (message("", "first"), answer)))
    assert len(chats.newest_first()) == 1


def test_many_writers_at_once(chats: ConversationRepository) -> None:
    """Eight threads write to one conversation: no message is lost, and none fails on a locked database."""
    conversation = begun(chats, "A", 1.0)
    failures: list[Exception] = []

    def write(name: int) -> None:
        try:
            for n in range(20):
                chats.append(message(conversation.id, f"{name}.{n}"))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = chats.get(conversation.id)
    assert found is not None
    assert len({m.content for m in found.messages}) == 160


def test_a_failed_write_is_rolled_back(chats: ConversationRepository, store: Store) -> None:
    """A write that raises leaves nothing behind."""
    conversation = begun(chats, "A", 1.0)
    delete_then_fail = sa.text("DELETE FROM conversations"), sa.text("DELETE FROM nothing")
    with pytest.raises(sa.exc.OperationalError), store.writing() as connection:
        deque(map(connection.execute, delete_then_fail))
    assert chats.get(conversation.id) is not None
