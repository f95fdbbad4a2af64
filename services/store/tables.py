"""The tables. Their history is in `migrations/`."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    true,
)

ID = String(32)
METADATA = MetaData()

CONVERSATIONS = Table(
    "conversations",
    METADATA,
    Column("id", ID, primary_key=True),
    Column("title", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False, index=True),
)

MESSAGES = Table(
    "messages",
    METADATA,
    Column("id", ID, primary_key=True),
    Column(
        "conversation_id",
        ID,
        ForeignKey("conversations.id", ondelete="CASCADE", name="fk_messages_conversation"),
        nullable=False,
    ),
    Column("position", Integer, nullable=False),
    Column("version", Integer, nullable=False, server_default="1"),
    Column("shown", Boolean, nullable=False, server_default=true()),
    Column("role", String(16), nullable=False),
    Column("content", Text, nullable=False),
    Column("model", Text),
    Column("state", String(16), nullable=False, index=True),
    Column("error", Text),
    Column("created_at", Double, nullable=False),
    Column("finished_at", Double),
    Column("tokens", Integer),
    Column("seconds", Double),
    Column("thinking", Text, nullable=False, server_default=""),
    Column("thinking_seconds", Double),
    Column("told_from", ID),
    Column("context_full", Boolean, nullable=False, server_default=false()),
    UniqueConstraint("conversation_id", "position", "version", name="uq_messages_version"),
)
"""Rows with the same `position` are versions of one answer, numbered by `version`; one of them is `shown`."""

DOWNLOADS = Table(
    "downloads",
    METADATA,
    Column("id", ID, primary_key=True),
    Column("source", String(16), nullable=False),
    Column("model", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("requested_by", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("percent", Integer, nullable=False),
    Column("completed_bytes", BigInteger, nullable=False),
    Column("total_bytes", BigInteger),
    Column("error", Text),
    Column("may_resume", Boolean, nullable=False),
    Column("created_at", Double, nullable=False, index=True),
    Column("started_at", Double),
    Column("finished_at", Double),
)

NOTES = Table(
    "notes",
    METADATA,
    Column("key", String(64), primary_key=True),
    Column("value", Text, nullable=False),
)

STUDIO_RUNS = Table(
    "studio_runs",
    METADATA,
    Column("id", ID, primary_key=True),
    Column("prompt", Text, nullable=False),
    Column("beam_width", Integer, nullable=False),
    Column("iterations", Integer, nullable=False),
    Column("candidates", Integer, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("providers", JSON, nullable=False),
    Column("created_at", Double, nullable=False, index=True),
    Column("finished_at", Double),
    Column("error", String(64)),
    Column("message", Text),
    Column("notes", JSON, nullable=False),
    Column("switching_seconds", JSON, nullable=False),
    Column("calls", JSON, nullable=False),
    Column("origin_run", ID),
    Column("origin_number", Integer),
)

STUDIO_CANDIDATES = Table(
    "studio_candidates",
    METADATA,
    Column(
        "run_id",
        ID,
        ForeignKey("studio_runs.id", ondelete="CASCADE", name="fk_studio_candidates_run"),
        primary_key=True,
    ),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("iteration", Integer, nullable=False),
    Column("parent", Integer),
    Column("what", Text, nullable=False),
    Column("how", Text, nullable=False),
    Column("by_rules", Boolean, nullable=False),
    Column("seed", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("picture", String(64), index=True),
    Column("alignment", Double),
    Column("aesthetic", Double),
    Column("total", Double),
    Column("comment", Text, nullable=False),
    Column("reason", Text),
    Column("rank", Integer),
)

LOADS = Table(
    "loads",
    METADATA,
    Column("id", ID, primary_key=True),
    Column("model", Text, nullable=False),
    Column("engine", Text, nullable=False),
    Column("settings_key", Text, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("total_seconds", Double, nullable=False),
    Column("stage_seconds", JSON, nullable=False),
    Column("memory_bytes", BigInteger),
    Column("device", Text, nullable=False),
    Column("at", Double, nullable=False, index=True),
    Index("ix_loads_key", "model", "engine", "settings_key", "at"),
)
