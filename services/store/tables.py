"""The tables as SQLAlchemy models. Their history is in `migrations/`."""

from __future__ import annotations

from typing import Literal

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, Text, UniqueConstraint, false, true
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from services.store.records import DownloadState, LoadOutcome, MessageState, Role

ID_LENGTH = 32


class Base(DeclarativeBase):
    """Base class of all tables."""


class ConversationRow(Base):
    __tablename__ = "conversations"

    id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    title: Mapped[str] = mapped_column(Text)
    created_at: Mapped[float]
    updated_at: Mapped[float] = mapped_column(index=True)


class MessageRow(Base):
    """A message.

    Rows with the same `position` are versions of one answer, numbered by `version`; one of them is `shown`.
    """

    __tablename__ = "messages"
    __table_args__ = (UniqueConstraint("conversation_id", "position", "version", name="uq_messages_version"),)

    id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    conversation_id: Mapped[str] = mapped_column(
        String(ID_LENGTH), ForeignKey("conversations.id", ondelete="CASCADE", name="fk_messages_conversation")
    )
    position: Mapped[int]
    version: Mapped[int] = mapped_column(default=1, server_default="1")
    shown: Mapped[bool] = mapped_column(default=True, server_default=true())
    role: Mapped[Role] = mapped_column(String(16))
    content: Mapped[str] = mapped_column(Text)
    model: Mapped[str | None] = mapped_column(Text)
    state: Mapped[MessageState] = mapped_column(String(16), index=True)
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float]
    finished_at: Mapped[float | None]
    tokens: Mapped[int | None]
    seconds: Mapped[float | None]
    thinking: Mapped[str] = mapped_column(Text, server_default="")
    thinking_seconds: Mapped[float | None]
    told_from: Mapped[str | None] = mapped_column(String(ID_LENGTH))
    context_full: Mapped[bool] = mapped_column(server_default=false())


class DownloadRow(Base):
    __tablename__ = "downloads"

    id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    source: Mapped[Literal["ollama", "huggingface"]] = mapped_column(String(16))
    model: Mapped[str] = mapped_column(Text)
    state: Mapped[DownloadState] = mapped_column(String(16))
    requested_by: Mapped[str] = mapped_column(Text)
    message: Mapped[str] = mapped_column(Text)
    percent: Mapped[int]
    completed_bytes: Mapped[int] = mapped_column(BigInteger)
    total_bytes: Mapped[int | None] = mapped_column(BigInteger)
    error: Mapped[str | None] = mapped_column(Text)
    may_resume: Mapped[bool]
    created_at: Mapped[float] = mapped_column(index=True)
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]


class NoteRow(Base):
    __tablename__ = "notes"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class LoadRow(Base):
    __tablename__ = "loads"
    __table_args__ = (Index("ix_loads_key", "model", "engine", "settings_key", "at"),)

    id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    model: Mapped[str] = mapped_column(Text)
    engine: Mapped[str] = mapped_column(Text)
    settings_key: Mapped[str] = mapped_column(Text)
    outcome: Mapped[LoadOutcome] = mapped_column(String(16))
    total_seconds: Mapped[float]
    stage_seconds: Mapped[dict[str, float]] = mapped_column(JSON)
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    device: Mapped[str] = mapped_column(Text)
    at: Mapped[float] = mapped_column(index=True)
