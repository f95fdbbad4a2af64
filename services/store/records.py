"""Immutable values that repositories take and return, independent of the database. Times are Unix seconds."""

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

    `model` wrote it; `error` says why that failed. `tokens` counts the deltas of an answer, `seconds` is the time from
    the first to the last of them; None for messages that no model wrote. `thinking` is the model's reasoning before the
    answer, which took `thinking_seconds`. `told_from` is the id of the oldest message that the model was given, if not
    all of them fitted. `context_full`: the answer ended because the context was full. `versions` are the ids of all
    answers to the same message, including this one, in the order of their creation; empty if there is one.
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
        """Generation rate; None below two tokens."""
        if not self.seconds or self.tokens is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / self.seconds


Place = tuple[float, str]
"""Sort key of a conversation in the list: when it was last written to, and its id."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation and its messages in order; lists of conversations omit the messages.

    `earlier` is the number of messages before the first one of `messages`.
    """

    id: str
    title: str
    created_at: float
    updated_at: float
    messages: tuple[Message, ...] = ()
    earlier: int = 0

    @property
    def total(self) -> int:
        """Number of messages."""
        return self.earlier + len(self.messages)

    @property
    def latest_answer(self) -> Message | None:
        """The latest answer that a model has begun, None without one."""
        return next((m for m in reversed(self.messages) if m.role == "assistant" and m.model), None)

    @property
    def place(self) -> Place:
        return self.updated_at, self.id


@dataclass(frozen=True, slots=True)
class DownloadRecord:
    """One download at its last change. Sizes are bytes; `error` is a code, `message` the same for people."""

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
    """One load: total seconds and seconds by stage; `memory_bytes` is what the model held when ready."""

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


RunState = Literal["running", "complete", "failed", "cancelled", "interrupted"]
CandidateState = Literal["written", "drawn", "scored", "dropped"]


@dataclass(frozen=True, slots=True)
class StudioRun:
    """One beam search. `candidates` is the number of new ones in each of `iterations`, the best `beam_width` are kept.

    `providers` maps llm, image and vision to the names of provider and model. `error` is a code, `message` the same for
    people. `notes` are sentences about what did not go as it should. `switching_seconds` is what loading the providers'
    models took, by capability. `calls` counts the calls made, by phase. `origin_run` and `origin_number` name the
    candidate that the run goes on from.
    """

    id: str
    prompt: str
    beam_width: int
    iterations: int
    candidates: int
    seed: int
    state: RunState
    providers: Mapping[str, Mapping[str, str | None]]
    created_at: float
    finished_at: float | None = None
    error: str | None = None
    message: str | None = None
    notes: tuple[str, ...] = ()
    switching_seconds: Mapping[str, float] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)
    origin_run: str | None = None
    origin_number: int | None = None

    @property
    def final(self) -> bool:
        return self.state != "running"


@dataclass(frozen=True, slots=True)
class StudioCandidate:
    """One candidate of a run, numbered from 1: its prompt on two axes, its picture and its score.

    `parent` is the number of the candidate that it refines. `by_rules`: not written by a model. `picture` is the
    SHA-256 of the picture's file. `reason` says why it was dropped. `rank` is its place in the final ranking, from 1;
    None before the end and for what has no score.
    """

    run_id: str
    number: int
    iteration: int
    parent: int | None
    what: str
    how: str
    by_rules: bool
    seed: int
    state: CandidateState = "written"
    picture: str | None = None
    alignment: float | None = None
    aesthetic: float | None = None
    total: float | None = None
    comment: str = ""
    reason: str | None = None
    rank: int | None = None
