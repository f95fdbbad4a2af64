"""What the repositories take and give: immutable values, free of the database. Times are Unix seconds."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["user", "assistant", "system"]
MessageState = Literal["streaming", "complete", "stopped", "failed", "interrupted"]
DownloadState = Literal["queued", "downloading", "verifying", "paused", "complete", "failed", "cancelled"]
LoadOutcome = Literal["ready", "failed", "cancelled"]


def new_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    `model` is who wrote it, `error` why it failed. `tokens` counts the pieces an answer came in, `seconds` is the
    time from the first to the last of them; None for what nobody generated. `thinking` is what the model thought before
    it answered, for `thinking_seconds`. `told_from` is the oldest message that the model was told, where not all of
    them fitted; `context_full` says that the answer ended because nothing more fitted. `versions` are the ids of all
    answers to the same message, its own among them, in order of their writing; empty where there is one.
    """

    id: str
    conversation_id: str
    role: Role
    content: str
    model: str | None
    state: MessageState
    error: str | None
    created_at: float
    finished_at: float | None
    tokens: int | None
    seconds: float | None
    thinking: str = ""
    thinking_seconds: float | None = None
    told_from: str | None = None
    context_full: bool = False
    versions: tuple[str, ...] = ()

    @property
    def final(self) -> bool:
        return self.state != "streaming"

    @property
    def tokens_per_second(self) -> float | None:
        """The pace of writing; None before there are two tokens to time."""
        if not self.seconds or self.tokens is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / self.seconds


Place = tuple[float, str]
"""Where a conversation stands in the list: when it was last written in, and its id."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation; `messages` in order, empty in a list of conversations. `earlier` counts those left out before."""

    id: str
    title: str
    created_at: float
    updated_at: float
    messages: tuple[Message, ...] = ()
    earlier: int = 0

    @property
    def total(self) -> int:
        """How many messages it has."""
        return self.earlier + len(self.messages)

    @property
    def latest_answer(self) -> Message | None:
        """The last answer that a model has begun."""
        return next((m for m in reversed(self.messages) if m.role == "assistant" and m.model), None)

    @property
    def place(self) -> Place:
        return self.updated_at, self.id


@dataclass(frozen=True, slots=True)
class DownloadRecord:
    """One download as it stood when it last changed. Sizes are bytes; `error` is a code, `message` says it in words."""

    id: str
    source: Literal["ollama", "huggingface"]
    model: str
    state: DownloadState
    requested_by: str
    message: str
    percent: int
    completed_bytes: int
    total_bytes: int | None
    error: str | None
    may_resume: bool
    created_at: float
    started_at: float | None
    finished_at: float | None


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """How one load went. Seconds in all and by stage; `memory_bytes` is what it held when ready."""

    model: str
    engine: str
    settings_key: str
    outcome: LoadOutcome
    total_seconds: float
    stage_seconds: Mapping[str, float]
    memory_bytes: int | None
    device: str
    at: float
    id: str = field(default_factory=new_id)
