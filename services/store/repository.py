"""Conversations, messages, downloads and loads, kept in the database and handed out as immutable values."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, cast

from sqlalchemy import CursorResult, Delete, Update, delete, func, select, update
from sqlalchemy.orm import Session

from services.store.database import Store, StoreError, open_store
from services.store.records import Conversation, DownloadRecord, LoadRecord, Message
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
    """Conversations and their messages. What isn't there is None or False, never an error."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def newest_first(self) -> list[Conversation]:
        """Every conversation, the last one written in first, without messages."""
        query = select(ConversationRow).order_by(ConversationRow.updated_at.desc(), ConversationRow.id)
        with self._store.reading() as session:
            return [_conversation(row) for row in session.scalars(query)]

    def get(self, conversation_id: str) -> Conversation | None:
        """One conversation with its messages."""
        with self._store.reading() as session:
            row = session.get(ConversationRow, conversation_id)
            return None if row is None else _conversation(row, tuple(_message(m) for m in row.messages))

    def add(self, conversation: Conversation) -> None:
        """Save a new conversation with its messages, all or nothing."""
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
        """Whether there was one to rename."""
        change = update(ConversationRow).where(ConversationRow.id == conversation_id).values(title=title)
        with self._store.writing() as session:
            return _changed(session, change) > 0

    def delete(self, conversation_id: str) -> bool:
        """Delete it with its messages. Whether there was one."""
        with self._store.writing() as session:
            return _changed(session, delete(ConversationRow).where(ConversationRow.id == conversation_id)) > 0

    def message(self, message_id: str) -> Message | None:
        with self._store.reading() as session:
            row = session.get(MessageRow, message_id)
            return None if row is None else _message(row)

    def append(self, *messages: Message, title: str | None = None) -> bool:
        """Put messages of one conversation at its end, and give it a title if there is one: all of it or nothing.

        False when the conversation is gone.
        """
        with self._store.writing() as session:
            conversation = session.get(ConversationRow, messages[0].conversation_id)
            if conversation is None:
                return False
            last = select(func.max(MessageRow.position)).where(MessageRow.conversation_id == conversation.id)
            position = session.scalar(last)
            first = 0 if position is None else position + 1
            session.add_all(_row(message, place) for place, message in enumerate(messages, first))
            conversation.updated_at = messages[-1].created_at
            conversation.title = conversation.title if title is None else title
            return True

    def update(self, message: Message) -> bool:
        """Replace a message by its newer self. Whether it is still there."""
        change = update(MessageRow).where(MessageRow.id == message.id).values(**asdict(message))
        with self._store.writing() as session:
            return _changed(session, change) > 0

    def drop(self, message_id: str) -> bool:
        """Delete one message. Whether it was there."""
        with self._store.writing() as session:
            return _changed(session, delete(MessageRow).where(MessageRow.id == message_id)) > 0

    def mark_interrupted(self, at: float) -> int:
        """Say of each message left `streaming` by a dead process that it was interrupted. How many there were."""
        left = update(MessageRow).where(MessageRow.state == "streaming")
        with self._store.writing() as session:
            return _changed(session, left.values(state="interrupted", finished_at=at))


class DownloadRepository:
    """Downloads, finished and not."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def save(self, record: DownloadRecord) -> None:
        """Add it, or replace its older self."""
        with self._store.writing() as session:
            session.merge(DownloadRow(**asdict(record)))

    def newest_first(self) -> list[DownloadRecord]:
        """Every download, the last one asked for first."""
        query = select(DownloadRow).order_by(DownloadRow.created_at.desc(), DownloadRow.id)
        with self._store.reading() as session:
            return [_download(row) for row in session.scalars(query)]

    def delete(self, download_id: str) -> bool:
        """Whether there was one to delete."""
        with self._store.writing() as session:
            return _changed(session, delete(DownloadRow).where(DownloadRow.id == download_id)) > 0


class NoteRepository:
    """What the app remembers of itself between two runs, by key."""

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
    """How past loads went."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, record: LoadRecord) -> None:
        with self._store.writing() as session:
            session.add(LoadRow(**{**asdict(record), "stage_seconds": dict(record.stage_seconds)}))

    def recent(self, model: str, engine: str, settings_key: str, limit: int = 20) -> list[LoadRecord]:
        """The latest loads of one model with one engine and its settings, newest first."""
        mine = (LoadRow.model == model, LoadRow.engine == engine, LoadRow.settings_key == settings_key)
        query = select(LoadRow).where(*mine).order_by(LoadRow.at.desc()).limit(limit)
        with self._store.reading() as session:
            return [_load(row) for row in session.scalars(query)]

    def recent_all(self, limit: int) -> list[LoadRecord]:
        """The latest loads of every model, newest first."""
        with self._store.reading() as session:
            return [_load(row) for row in session.scalars(select(LoadRow).order_by(LoadRow.at.desc()).limit(limit))]


def _conversation(row: ConversationRow, messages: tuple[Message, ...] = ()) -> Conversation:
    return Conversation(row.id, row.title, row.created_at, row.updated_at, messages)


def _row(message: Message, position: int) -> MessageRow:
    return MessageRow(**asdict(message), position=position)


def _message(row: MessageRow) -> Message:
    return Message(
        id=row.id,
        conversation_id=row.conversation_id,
        role=row.role,
        content=row.content,
        model=row.model,
        state=row.state,
        error=row.error,
        created_at=row.created_at,
        finished_at=row.finished_at,
        tokens=row.tokens,
        seconds=row.seconds,
    )


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
    """Run a bulk change; how many rows it touched."""
    return cast("CursorResult[Any]", session.execute(change)).rowcount
