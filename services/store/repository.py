"""Repositories: conversations, messages, downloads, notes and loads, returned as immutable values."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, Delete, Update, and_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from services.store.database import Store, open_store
from services.store.errors import StoreError
from services.store.records import Conversation, DownloadRecord, LoadRecord, Message, MessageState, Place
from services.store.tables import ConversationRow, DownloadRow, LoadRow, MessageRow, NoteRow

__all__ = [
    "ConversationRepository",
    "DownloadRepository",
    "LoadRecord",
    "LoadRepository",
    "NoteRepository",
    "Store",
    "StoreError",
    "open_store",
]


class ConversationRepository:
    """Conversations and their messages. A missing row gives None or False, never an exception."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def newest_first(self, limit: int | None = None, older_than: Place | None = None) -> list[Conversation]:
        """Return conversations without messages, the one last written to first: all, or `limit` after a place."""
        at, row_id = ConversationRow.updated_at, ConversationRow.id
        query = select(ConversationRow).order_by(at.desc(), row_id).limit(limit)
        if older_than is not None:
            query = query.where(or_(at < older_than[0], and_(at == older_than[0], row_id > older_than[1])))
        with self._store.reading() as session:
            return [_conversation(row) for row in session.scalars(query)]

    def get(self, conversation_id: str, since: int = 0) -> Conversation | None:
        """Return one conversation with its messages from position `since` on; of several answers, the one shown."""
        shown = (MessageRow.conversation_id == conversation_id, MessageRow.shown, MessageRow.position >= since)
        with self._store.reading() as session:
            row = session.get(ConversationRow, conversation_id)
            if row is None:
                return None
            versions = _versions(session, conversation_id, MessageRow.position >= since)
            rows = session.scalars(select(MessageRow).where(*shown).order_by(MessageRow.position)).all()
            messages = tuple(_message(m, versions.get(m.position, ())) for m in rows)
            return replace(_conversation(row, messages), earlier=rows[0].position if rows else 0)

    def outline(self, conversation_id: str, since: int) -> tuple[Conversation, list[tuple[str, MessageState]]] | None:
        """Return a conversation without messages, and id and state of each message from `since` on. No text is read."""
        shown = (MessageRow.conversation_id == conversation_id, MessageRow.shown, MessageRow.position >= since)
        query = select(MessageRow.id, MessageRow.state).where(*shown).order_by(MessageRow.position)
        with self._store.reading() as session:
            row = session.get(ConversationRow, conversation_id)
            return None if row is None else (_conversation(row), [(i, state) for i, state in session.execute(query)])

    def page_start(self, conversation_id: str, before: int | None, messages: int, characters: int) -> int:
        """Return the position of the first of at most `messages` messages before position `before`, or the end.

        They have at most `characters` characters in all, except that the last two, a question and its answer, always
        fit.
        """
        length = func.length(MessageRow.content) + func.length(MessageRow.thinking)
        query = select(MessageRow.position, length).where(MessageRow.conversation_id == conversation_id)
        query = query.where(MessageRow.shown).order_by(MessageRow.position.desc()).limit(messages)
        if before is not None:
            query = query.where(MessageRow.position < before)
        start, held = before or 0, 0
        with self._store.reading() as session:
            for count, (position, size) in enumerate(session.execute(query)):
                held += size
                if count > 1 and held > characters:
                    break
                start = position
        return start

    def add(self, conversation: Conversation) -> None:
        """Save a new conversation with its messages, in one transaction."""
        row = ConversationRow(
            id=conversation.id,
            title=conversation.title,
            created_at=conversation.created_at,
            updated_at=conversation.updated_at,
        )
        with self._store.writing() as session:
            session.add(row)
            session.add_all(_row(message, position) for position, message in enumerate(conversation.messages))

    def rename(self, conversation_id: str, title: str) -> bool:
        """Rename a conversation; return whether it exists."""
        change = update(ConversationRow).where(ConversationRow.id == conversation_id).values(title=title)
        with self._store.writing() as session:
            return _changed(session, change) > 0

    def delete(self, conversation_id: str) -> bool:
        """Delete a conversation with its messages; return whether it existed."""
        with self._store.writing() as session:
            return _changed(session, delete(ConversationRow).where(ConversationRow.id == conversation_id)) > 0

    def message(self, message_id: str) -> Message | None:
        """Return one message, shown or not."""
        with self._store.reading() as session:
            row = session.get(MessageRow, message_id)
            if row is None:
                return None
            versions = _versions(session, row.conversation_id, MessageRow.position == row.position)
            return _message(row, versions.get(row.position, ()))

    def append(self, *messages: Message) -> bool:
        """Append messages to their conversation, in one transaction; return False if it is gone."""
        with self._store.writing() as session:
            conversation = session.get(ConversationRow, messages[0].conversation_id)
            if conversation is None:
                return False
            last = select(func.max(MessageRow.position)).where(MessageRow.conversation_id == conversation.id)
            position = session.scalar(last)
            first = 0 if position is None else position + 1
            session.add_all(_row(message, place) for place, message in enumerate(messages, first))
            conversation.updated_at = messages[-1].created_at
            return True

    def add_version(self, message: Message, beside: str, *, instead: bool = False) -> bool:
        """Save another answer beside the one with id `beside`, and show it; `instead` deletes that one.

        Return False if that one is gone.
        """
        with self._store.writing() as session:
            old = session.get(MessageRow, beside)
            if old is None:
                return False
            turn = (MessageRow.conversation_id == old.conversation_id, MessageRow.position == old.position)
            last = session.scalar(select(func.max(MessageRow.version)).where(*turn)) or 0
            session.execute(update(MessageRow).where(*turn).values(shown=False))
            session.add(_row(message, old.position, last + 1))
            session.execute(
                update(ConversationRow)
                .where(ConversationRow.id == old.conversation_id)
                .values(updated_at=message.created_at)
            )
            if instead:
                session.delete(old)
            return True

    def show(self, message_id: str) -> bool:
        """Show this version of an answer; return whether it exists."""
        with self._store.writing() as session:
            row = session.get(MessageRow, message_id)
            if row is None:
                return False
            turn = (MessageRow.conversation_id == row.conversation_id, MessageRow.position == row.position)
            session.execute(update(MessageRow).where(*turn).values(shown=MessageRow.id == message_id))
            return True

    def update(self, message: Message) -> bool:
        """Replace a message by its newer state; return whether it exists."""
        change = update(MessageRow).where(MessageRow.id == message.id).values(**_values(message))
        with self._store.writing() as session:
            return _changed(session, change) > 0

    def mark_interrupted(self, at: float) -> int:
        """Mark every message left `streaming` by an ended process as interrupted; return their number."""
        streaming = update(MessageRow).where(MessageRow.state == "streaming")
        with self._store.writing() as session:
            return _changed(session, streaming.values(state="interrupted", finished_at=at))


class DownloadRepository:
    """Downloads, finished and unfinished."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def save(self, record: DownloadRecord) -> None:
        """Insert a download, or replace its older state."""
        with self._store.writing() as session:
            session.merge(DownloadRow(**asdict(record)))

    def newest_first(self) -> list[DownloadRecord]:
        """Return every download, the one requested last first."""
        query = select(DownloadRow).order_by(DownloadRow.created_at.desc(), DownloadRow.id)
        with self._store.reading() as session:
            return [_download(row) for row in session.scalars(query)]

    def delete(self, download_id: str) -> bool:
        """Delete a download; return whether it existed."""
        with self._store.writing() as session:
            return _changed(session, delete(DownloadRow).where(DownloadRow.id == download_id)) > 0


class NoteRepository:
    """Key-value notes that the app keeps across restarts."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def get(self, key: str) -> str | None:
        with self._store.reading() as session:
            row = session.get(NoteRow, key)
            return None if row is None else row.value

    def put(self, key: str, value: str) -> None:
        with self._store.writing() as session:
            session.merge(NoteRow(key=key, value=value))


class LoadRepository:
    """Records of past loads."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, record: LoadRecord) -> None:
        with self._store.writing() as session:
            session.add(LoadRow(**{**asdict(record), "stage_seconds": dict(record.stage_seconds)}))

    def recent(self, model: str, engine: str, settings_key: str, limit: int = 20) -> list[LoadRecord]:
        """Return the latest loads of one (model, engine, settings), newest first."""
        mine = (LoadRow.model == model, LoadRow.engine == engine, LoadRow.settings_key == settings_key)
        query = select(LoadRow).where(*mine).order_by(LoadRow.at.desc()).limit(limit)
        with self._store.reading() as session:
            return [_load(row) for row in session.scalars(query)]

    def recent_all(self, limit: int) -> list[LoadRecord]:
        """Return the latest loads of all models, newest first."""
        with self._store.reading() as session:
            return [_load(row) for row in session.scalars(select(LoadRow).order_by(LoadRow.at.desc()).limit(limit))]


def _conversation(row: ConversationRow, messages: tuple[Message, ...] = ()) -> Conversation:
    return Conversation(row.id, row.title, row.created_at, row.updated_at, messages)


def _versions(session: Session, conversation_id: str, where: ColumnElement[bool]) -> dict[int, tuple[str, ...]]:
    """Return the ids of the answers at each position that has several."""
    here = (MessageRow.conversation_id == conversation_id, where)
    several = select(MessageRow.position).where(*here).group_by(MessageRow.position).having(func.count() > 1)
    found = select(MessageRow.position, MessageRow.id).where(*here, MessageRow.position.in_(several))
    ids: dict[int, tuple[str, ...]] = {}
    for place, message_id in session.execute(found.order_by(MessageRow.position, MessageRow.version)):
        ids[place] = (*ids.get(place, ()), message_id)
    return ids


def _values(message: Message) -> dict[str, Any]:
    """Return a message's columns, except its position."""
    values = asdict(message)
    del values["versions"]
    return values


def _row(message: Message, position: int, version: int = 1) -> MessageRow:
    return MessageRow(**_values(message), position=position, version=version, shown=True)


def _message(row: MessageRow, versions: tuple[str, ...]) -> Message:
    values = {field.name: getattr(row, field.name) for field in fields(Message) if field.name != "versions"}
    return Message(**values, versions=versions)


def _download(row: DownloadRow) -> DownloadRecord:
    return DownloadRecord(**{field.name: getattr(row, field.name) for field in fields(DownloadRecord)})


def _load(row: LoadRow) -> LoadRecord:
    return LoadRecord(
        model=row.model,
        engine=row.engine,
        settings_key=row.settings_key,
        outcome=row.outcome,
        total_seconds=row.total_seconds,
        stage_seconds=row.stage_seconds,
        memory_bytes=row.memory_bytes,
        device=row.device,
        at=row.at,
        id=row.id,
    )


def _changed(session: Session, change: Update | Delete) -> int:
    """Run a bulk statement; return the number of rows it changed."""
    return cast("CursorResult[Any]", session.execute(change)).rowcount
