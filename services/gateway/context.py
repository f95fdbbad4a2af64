"""What fits into a model's context: from an engine's refusal to what is told of the conversation instead. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from services.answers import Prompt
from services.store.records import Message

FILLED = 0.5
"""The share of the context that is filled anew: the rest is for the answer, and for what is written next."""

REFUSALS = frozenset({400, 413, 422, 500})
TYPES = frozenset({"exceed_context_size_error", "context_length_exceeded"})
"""llama.cpp's type and OpenAI's code."""
WORDS = re.compile(
    r"maximum context length|maximum model length|exceeds? the (available |model's )?context"
    r"|context (length|window) exceeded|input length exceeds|max_tokens must be at least 1, got -",
    re.IGNORECASE,
)
CONTEXT = re.compile(
    r"maximum context length (?:is|of) (\d+)|maximum model length of (\d+)|context size \((\d+) tokens\)", re.IGNORECASE
)
PROMPT = re.compile(
    r"\((\d+) in the messages|(?:has|contains|contains at least) (\d+) input tokens|prompt \(length (\d+)\)"
    r"|request \((\d+) tokens\)|resulted in (\d+) tokens|requested (\d+) tokens(?! \()",
    re.IGNORECASE,
)
"""As vLLM 0.4 to 0.32, OpenAI and llama.cpp tell them. llama.cpp gives the figures in fields, too."""


@dataclass(frozen=True, slots=True)
class TooLong:
    """A refusal of a prompt that doesn't fit. Tokens; None where the engine doesn't say."""

    context: int | None = None
    prompt: int | None = None


def too_long(status: int, document: object) -> TooLong | None:
    """What an engine's refusal says of the context; None when it is about something else.

    `document` is its JSON: OpenAI's shape, or vLLM's before 0.10 with the error's fields at the top.
    """
    if status not in REFUSALS or not isinstance(document, Mapping):
        return None
    error = document.get("error", document)
    fields = error if isinstance(error, Mapping) else {"message": error}
    message = str(fields.get("message", ""))[:2000]
    if not {str(fields.get("type")), str(fields.get("code"))} & TYPES and not WORDS.search(message):
        return None
    return TooLong(
        _number(fields.get("n_ctx")) or _figure(CONTEXT, message),
        _number(fields.get("n_prompt_tokens")) or _figure(PROMPT, message),
    )


def first_told(prompt: Prompt, model: str) -> int:
    """From which message on `model` is told at first: from where it was told last time, since before that is too much.

    When nothing more fitted into the answer then, it is told less.
    """
    last = prompt.last_answer
    if last is None or last.model != model:
        return 0
    ids = [message.id for message in prompt.messages]
    first = ids.index(last.told_from) if last.told_from in ids else 0
    return (leave_out(prompt.messages, first, TooLong()) or first) if last.context_full else first


def leave_out(messages: Sequence[Message], told_from: int, refusal: TooLong) -> int | None:
    """From which message on to tell at the next try, after those from `told_from` on were too much.

    Whole turns are left out, the oldest first, until about half of the context is filled. None when a single one is
    left.
    """
    turns = [at for at in range(told_from + 1, len(messages)) if messages[at].role == "user"]
    if not turns:
        return None
    sizes = [len(message.content) for message in messages]
    share = FILLED * refusal.context / refusal.prompt if refusal.context and refusal.prompt else FILLED
    room = min(share, FILLED) * sum(sizes[told_from:])
    return next((at for at in turns if sum(sizes[at:]) <= room), turns[-1])


def _figure(pattern: re.Pattern[str], text: str) -> int | None:
    found = pattern.search(text)
    return None if found is None else int(next(filter(None, found.groups())))


def _number(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None
