"""Fits conversations into a model's context: parses refusals of too long prompts, drops the oldest turns. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.answers import Prompt
from services.store.records import Message

REFILL_SHARE = 0.5
"""Share of the context to fill again; the rest is for the answer and later messages."""

OVERFLOW_STATUSES = frozenset({400, 413, 422, 500})
OVERFLOW_TYPES = frozenset({"exceed_context_size_error", "context_length_exceeded"})
"""llama.cpp's error type and OpenAI's error code."""
OVERFLOW_WORDS = re.compile(
    r"maximum context length|maximum model length|exceeds? the (available |model's )?context"
    r"|context (length|window) exceeded|input length exceeds|max_tokens must be at least 1, got -",
    re.IGNORECASE,
)
CONTEXT_FIGURE = re.compile(
    r"maximum context length (?:is|of) (\d+)|maximum model length of (\d+)|context size \((\d+) tokens\)", re.IGNORECASE
)
PROMPT_FIGURE = re.compile(
    r"\((\d+) in the messages|(?:has|contains|contains at least) (\d+) input tokens|prompt \(length (\d+)\)"
    r"|request \((\d+) tokens\)|resulted in (\d+) tokens|requested (\d+) tokens(?! \()",
    re.IGNORECASE,
)
"""Wordings of vLLM 0.4 to 0.32, OpenAI and llama.cpp. llama.cpp also has the figures in fields."""


@dataclass(frozen=True, slots=True)
class ContextOverflow:
    """A prompt that exceeds the context. Sizes are tokens, None where the engine doesn't give them."""

    context: int | None = None
    prompt: int | None = None


def parse_overflow(status: int, document: object) -> ContextOverflow | None:
    """Return what an error response says about a context overflow; None if it is about something else.

    `document` is its JSON: OpenAI's shape, or that of vLLM before 0.10 with the error's fields at the top level.
    """
    if status not in OVERFLOW_STATUSES or not isinstance(document, Mapping):
        return None
    error = document.get("error", document)
    fields = error if isinstance(error, Mapping) else {"message": error}
    message = str(fields.get("message", ""))[:2000]
    if not {str(fields.get("type")), str(fields.get("code"))} & OVERFLOW_TYPES and not OVERFLOW_WORDS.search(message):
        return None
    return ContextOverflow(
        _number(fields.get("n_ctx")) or _figure(CONTEXT_FIGURE, message),
        _number(fields.get("n_prompt_tokens")) or _figure(PROMPT_FIGURE, message),
    )


def first_included(prompt: Prompt, model: str) -> int:
    """Return the index of the first message to send to `model`.

    It starts where the last answer by the same model started, because earlier messages did not fit then, and later if
    that answer filled the context.
    """
    last = prompt.last_answer
    if last is None or last.model != model:
        return 0
    ids = [message.id for message in prompt.messages]
    first = ids.index(last.told_from) if last.told_from in ids else 0
    return (drop_oldest(prompt.messages, first, ContextOverflow()) or first) if last.context_full else first


def drop_oldest(messages: Sequence[Message], told_from: int, refusal: ContextOverflow) -> int | None:
    """Return the index of the first message to send after those from `told_from` on did not fit; None if one is left.

    Whole turns are dropped, the oldest first, until about half of the context is filled.
    """
    turns = [at for at in range(told_from + 1, len(messages)) if messages[at].role == "user"]
    if not turns:
        return None
    sizes = [len(message.content) for message in messages]
    share = REFILL_SHARE * refusal.context / refusal.prompt if refusal.context and refusal.prompt else REFILL_SHARE
    room = min(share, REFILL_SHARE) * sum(sizes[told_from:])
    return next((at for at in turns if sum(sizes[at:]) <= room), turns[-1])


def _figure(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    return None if found is None else int(next(filter(None, found.groups())))


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
