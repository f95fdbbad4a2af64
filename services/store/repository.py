"""Repositories: conversations, messages, downloads, studio runs, notes and loads, returned as immutable values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    Table,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from services.store.database import Store, open_store
from services.store.errors import StoreError
from services.store.records import (
    Conversation,
    DownloadRecord,
    LoadRecord,
    Message,
    MessageState,
    Place,
    StudioCandidate,
    StudioRun,
)
from services.store.rows import to_record, to_row
from services.store.tables import (
    CONVERSATIONS,
    DOWNLOADS,
    LOADS,
    MESSAGES,
    NOTES,
    STUDIO_CANDIDATES,
    STUDIO_RUNS,
)

__all__ = [
    "ConversationRepository",
    "DownloadRepository",
    "LoadRecord",
    "LoadRepository",
    "NoteRepository",
    "Store",
    "StoreError",
    "StudioRepository",
    "open_store",
]


_OUTLINE = (
    select(CONVERSATIONS, MESSAGES.c.id.label("message_id"), MESSAGES.c.state)
    .outerjoin_from(
        CONVERSATIONS,
        MESSAGES,
        and_(
            MESSAGES.c.conversation_id == CONVERSATIONS.c.id,
            MESSAGES.c.shown,
            MESSAGES.c.position >= bindparam("since"),
        ),
    )
    .where(CONVERSATIONS.c.id == bindparam("id"))
    .order_by(MESSAGES.c.position)
)
"""A conversation and what is shown in it. Made once: every poll of a tab asks it, and making it took half the time."""


class ConversationRepository:
    """Conversations and their messages. A missing row gives None or False, never an exception."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def newest_first(self, limit: int | None = None, older_than: Place | None = None) -> list[Conversation]:
        """Return conversations without messages, the one last written to first: all, or `limit` after a place."""
        at, row_id = CONVERSATIONS.c.updated_at, CONVERSATIONS.c.id
        query = select(CONVERSATIONS).order_by(at.desc(), row_id).limit(limit)
        if older_than is not None:
            query = query.where(or_(at < older_than[0], and_(at == older_than[0], row_id > older_than[1])))
        with self._store.reading() as connection:
            return [to_record(Conversation, row) for row in connection.execute(query).mappings()]

    def get(self, conversation_id: str, since: int = 0) -> Conversation | None:
        """Return one conversation with its messages from position `since` on; of several answers, the one shown."""
        asked = and_(MESSAGES.c.conversation_id == conversation_id, MESSAGES.c.position >= since)
        query = select(MESSAGES).where(asked, MESSAGES.c.shown).order_by(MESSAGES.c.position)
        with self._store.reading() as connection:
            row = _row(connection, CONVERSATIONS, conversation_id)
            if row is None:
                return None
            versions = _versions(connection, asked)
            rows = connection.execute(query).mappings().all()
        messages = tuple(_message(message, versions) for message in rows)
        return to_record(Conversation, row, messages=messages, earlier=rows[0]["position"] if rows else 0)

    def outline(self, conversation_id: str, since: int) -> tuple[Conversation, list[tuple[str, MessageState]]] | None:
        """Return a conversation without messages, and id and state of each message from `since` on. No text is read."""
        with self._store.reading() as connection:
            rows = connection.execute(_OUTLINE, {"id": conversation_id, "since": since}).mappings().all()
        if not rows:
            return None
        states = [(row["message_id"], row["state"]) for row in rows if row["message_id"] is not None]
        return to_record(Conversation, rows[0]), states

    def page_start(self, conversation_id: str, before: int | None, messages: int, characters: int) -> int:
        """Return the position of the first of at most `messages` messages before position `before`, or the end.

        They have at most `characters` characters in all, except that the last two, a question and its answer, always
        fit.
        """
        length = func.length(MESSAGES.c.content) + func.length(MESSAGES.c.thinking)
        query = select(MESSAGES.c.position, length).where(MESSAGES.c.conversation_id == conversation_id)
        query = query.where(MESSAGES.c.shown).order_by(MESSAGES.c.position.desc()).limit(messages)
        if before is not None:
            query = query.where(MESSAGES.c.position < before)
        start, held = before or 0, 0
        with self._store.reading() as connection:
            for count, (position, size) in enumerate(connection.execute(query)):
                held += size
                if count > 1 and held > characters:
                    break
                start = position
        return start

    def add(self, conversation: Conversation) -> None:
        """Save a new conversation with its messages, in one transaction."""
        with self._store.writing() as connection:
            connection.execute(insert(CONVERSATIONS), to_row(conversation, CONVERSATIONS))
            _insert(connection, conversation.messages, 0)

    def rename(self, conversation_id: str, title: str) -> bool:
        """Rename a conversation; return whether it exists."""
        change = update(CONVERSATIONS).where(CONVERSATIONS.c.id == conversation_id).values(title=title)
        with self._store.writing() as connection:
            return connection.execute(change).rowcount > 0

    def delete(self, conversation_id: str) -> bool:
        """Delete a conversation with its messages; return whether it existed."""
        with self._store.writing() as connection:
            return _delete(connection, CONVERSATIONS, conversation_id)

    def message(self, message_id: str) -> Message | None:
        """Return one message, shown or not."""
        with self._store.reading() as connection:
            row = _row(connection, MESSAGES, message_id)
            if row is None:
                return None
            return _message(row, _versions(connection, _turn(row)))

    def append(self, *messages: Message) -> bool:
        """Append messages to their conversation, in one transaction; return False if it is gone."""
        conversation_id = messages[0].conversation_id
        last = select(func.max(MESSAGES.c.position)).where(MESSAGES.c.conversation_id == conversation_id)
        with self._store.writing() as connection:
            if not _touch(connection, conversation_id, messages[-1].created_at):
                return False
            position = connection.scalar(last)
            _insert(connection, messages, 0 if position is None else position + 1)
            return True

    def add_version(self, message: Message, beside: str, *, instead: bool = False) -> bool:
        """Save another answer beside the one with id `beside`, and show it; `instead` deletes that one.

        Return False if that one is gone.
        """
        with self._store.writing() as connection:
            old = _row(connection, MESSAGES, beside)
            if old is None:
                return False
            turn = _turn(old)
            last = connection.scalar(select(func.max(MESSAGES.c.version)).where(turn)) or 0
            connection.execute(update(MESSAGES).where(turn).values(shown=False))
            _insert(connection, (message,), old["position"], version=last + 1)
            _touch(connection, old["conversation_id"], message.created_at)
            if instead:
                _delete(connection, MESSAGES, beside)
            return True

    def show(self, message_id: str) -> bool:
        """Show this version of an answer; return whether it exists."""
        with self._store.writing() as connection:
            row = _row(connection, MESSAGES, message_id)
            if row is None:
                return False
            connection.execute(update(MESSAGES).where(_turn(row)).values(shown=MESSAGES.c.id == message_id))
            return True

    def update(self, message: Message) -> bool:
        """Replace a message by its newer state; return whether it exists."""
        change = update(MESSAGES).where(MESSAGES.c.id == message.id).values(to_row(message, MESSAGES))
        with self._store.writing() as connection:
            return connection.execute(change).rowcount > 0

    def mark_interrupted(self, at: float) -> int:
        """Mark every message left `streaming` by an ended process as interrupted; return their number."""
        streaming = update(MESSAGES).where(MESSAGES.c.state == "streaming")
        with self._store.writing() as connection:
            return connection.execute(streaming.values(state="interrupted", finished_at=at)).rowcount


class DownloadRepository:
    """Downloads, finished and unfinished."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def save(self, record: DownloadRecord) -> None:
        """Insert a download, or replace its older state."""
        with self._store.writing() as connection:
            _put(connection, DOWNLOADS, to_row(record, DOWNLOADS))

    def newest_first(self) -> list[DownloadRecord]:
        """Return every download, the one requested last first."""
        query = select(DOWNLOADS).order_by(DOWNLOADS.c.created_at.desc(), DOWNLOADS.c.id)
        with self._store.reading() as connection:
            return [to_record(DownloadRecord, row) for row in connection.execute(query).mappings()]

    def delete(self, download_id: str) -> bool:
        """Delete a download; return whether it existed."""
        with self._store.writing() as connection:
            return _delete(connection, DOWNLOADS, download_id)


class StudioRepository:
    """The Studio's runs and their candidates."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def save(self, run: StudioRun, candidates: Iterable[StudioCandidate] = ()) -> None:
        """Insert a run and candidates of it, or replace their older states."""
        row = to_row(run, STUDIO_RUNS, notes=list(run.notes))
        rows = [to_row(candidate, STUDIO_CANDIDATES) for candidate in candidates]
        with self._store.writing() as connection:
            _put(connection, STUDIO_RUNS, row)
            for one in rows:
                _put(connection, STUDIO_CANDIDATES, one)

    def newest_first(self, limit: int | None = None, older_than: Place | None = None) -> list[StudioRun]:
        """Return runs, the one begun last first: all, or `limit` after a place (time of its beginning, id)."""
        at, row_id = STUDIO_RUNS.c.created_at, STUDIO_RUNS.c.id
        query = select(STUDIO_RUNS).order_by(at.desc(), row_id).limit(limit)
        if older_than is not None:
            query = query.where(or_(at < older_than[0], and_(at == older_than[0], row_id > older_than[1])))
        with self._store.reading() as connection:
            return [_studio_run(row) for row in connection.execute(query).mappings()]

    def get(self, run_id: str) -> tuple[StudioRun, list[StudioCandidate]] | None:
        """Return a run and its candidates in the order of their numbers."""
        theirs = select(STUDIO_CANDIDATES).where(STUDIO_CANDIDATES.c.run_id == run_id)
        with self._store.reading() as connection:
            row = _row(connection, STUDIO_RUNS, run_id)
            rows = connection.execute(theirs.order_by(STUDIO_CANDIDATES.c.number)).mappings().all()
        if row is None:
            return None
        return _studio_run(row), [to_record(StudioCandidate, candidate) for candidate in rows]

    def best(self, run_ids: Sequence[str]) -> dict[str, StudioCandidate]:
        """Return the best candidate of each run that has one with a rank."""
        columns = STUDIO_CANDIDATES.c
        query = select(STUDIO_CANDIDATES).where(columns.run_id.in_(run_ids), columns.rank == 1)
        with self._store.reading() as connection:
            found = [to_record(StudioCandidate, row) for row in connection.execute(query).mappings()]
        return {candidate.run_id: candidate for candidate in found}

    def delete(self, run_id: str) -> set[str] | None:
        """Delete a run; return the pictures that no other run has, None if there was no such run."""
        columns = STUDIO_CANDIDATES.c
        theirs = select(columns.picture).where(columns.run_id == run_id, columns.picture.is_not(None))
        with self._store.writing() as connection:
            had = set(connection.scalars(theirs))
            if not _delete(connection, STUDIO_RUNS, run_id):
                return None
            shared = set(connection.scalars(select(columns.picture).where(columns.picture.in_(had)).distinct()))
        return had - shared

    def mark_interrupted(self, at: float) -> int:
        """Mark every run left `running` by an ended process as interrupted; return their number."""
        running = update(STUDIO_RUNS).where(STUDIO_RUNS.c.state == "running")
        with self._store.writing() as connection:
            return connection.execute(running.values(state="interrupted", finished_at=at)).rowcount


class NoteRepository:
    """Key-value notes that the app keeps across restarts."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def get(self, key: str) -> str | None:
        with self._store.reading() as connection:
            value: str | None = connection.scalar(select(NOTES.c.value).where(NOTES.c.key == key))
            return value

    def put(self, key: str, value: str) -> None:
        with self._store.writing() as connection:
            _put(connection, NOTES, {"key": key, "value": value})


class LoadRepository:
    """Records of past loads."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, record: LoadRecord) -> None:
        with self._store.writing() as connection:
            connection.execute(insert(LOADS), to_row(record, LOADS, stage_seconds=dict(record.stage_seconds)))

    def recent(self, model: str, engine: str, settings_key: str, limit: int = 20) -> list[LoadRecord]:
        """Return the latest loads of one (model, engine, settings), newest first."""
        mine = (LOADS.c.model == model, LOADS.c.engine == engine, LOADS.c.settings_key == settings_key)
        return self._latest(limit, *mine)

    def recent_all(self, limit: int) -> list[LoadRecord]:
        """Return the latest loads of all models, newest first."""
        return self._latest(limit)

    def _latest(self, limit: int, *where: ColumnElement[bool]) -> list[LoadRecord]:
        query = select(LOADS).where(*where).order_by(LOADS.c.at.desc()).limit(limit)
        with self._store.reading() as connection:
            return [to_record(LoadRecord, row) for row in connection.execute(query).mappings()]


def _row(connection: Connection, table: Table, row_id: str) -> RowMapping | None:
    """Return the row with this id, None if there is none."""
    return connection.execute(select(table).where(table.c.id == row_id)).mappings().one_or_none()


def _delete(connection: Connection, table: Table, row_id: str) -> bool:
    """Delete the row with this id; return whether there was one."""
    return connection.execute(delete(table).where(table.c.id == row_id)).rowcount > 0


def _put(connection: Connection, table: Table, row: Mapping[str, Any]) -> None:
    """Insert a row, or replace the one with its primary key."""
    same = and_(*(key == row[key.name] for key in table.primary_key))
    if connection.execute(update(table).where(same).values(row)).rowcount == 0:
        connection.execute(insert(table), row)


def _insert(connection: Connection, messages: Sequence[Message], position: int, version: int = 1) -> None:
    """Insert messages at consecutive positions from `position` on, and show them."""
    rows = [
        to_row(message, MESSAGES, position=place, version=version, shown=True)
        for place, message in enumerate(messages, position)
    ]
    if rows:  # an empty list would insert one row of defaults
        connection.execute(insert(MESSAGES), rows)


def _studio_run(row: RowMapping) -> StudioRun:
    return to_record(StudioRun, row, notes=tuple(row["notes"]))


def _touch(connection: Connection, conversation_id: str, at: float) -> bool:
    """Record when a conversation was last written to; return whether it exists."""
    change = update(CONVERSATIONS).where(CONVERSATIONS.c.id == conversation_id).values(updated_at=at)
    return connection.execute(change).rowcount > 0


def _turn(row: RowMapping) -> ColumnElement[bool]:
    """Return the condition for all versions of the answer in a row."""
    same_conversation = MESSAGES.c.conversation_id == row["conversation_id"]
    return and_(same_conversation, MESSAGES.c.position == row["position"])


def _versions(connection: Connection, where: ColumnElement[bool]) -> dict[int, tuple[str, ...]]:
    """Return the ids of the answers at each position that has several."""
    several = select(MESSAGES.c.position).where(where).group_by(MESSAGES.c.position).having(func.count() > 1)
    query = select(MESSAGES.c.position, MESSAGES.c.id).where(where, MESSAGES.c.position.in_(several))
    ids: dict[int, tuple[str, ...]] = {}
    for position, message_id in connection.execute(query.order_by(MESSAGES.c.position, MESSAGES.c.version)):
        ids[position] = (*ids.get(position, ()), message_id)
    return ids


def _message(row: RowMapping, versions: Mapping[int, tuple[str, ...]]) -> Message:
    """Return the message in a row; `versions` are those of `_versions`."""
    return to_record(Message, row, versions=versions.get(row["position"], ()))
