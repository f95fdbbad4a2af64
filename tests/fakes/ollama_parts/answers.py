"""A model's answer, word by word, and the four formats in which Ollama 0.24.0 sends it."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Any

from .wire import dumps, rfc3339

FINGERPRINT = "fp_ollama"
PROMPT_TOKENS = 32


@dataclass(frozen=True)
class Token:
    text: str
    thinking: bool = False


def tokens(answer: str, thinking: str, limit: object) -> tuple[list[Token], str]:
    """The tokens of an answer and why it ends: `stop`, or `length` if `limit` (a count above 0) truncated it."""
    said = [Token(word, True) for word in _words(thinking)] + [Token(word) for word in _words(answer)]
    if isinstance(limit, int) and 0 < limit <= len(said):
        return said[:limit], "length"
    return said, "stop"


def _words(text: str) -> list[str]:
    first, *rest = text.split() or [""]
    return [word for word in (first, *(f" {word}" for word in rest)) if word]


@dataclass
class Answer:
    """One answer being sent: the request's body, and the counts and durations (ns) so far."""

    model: str
    body: dict[str, Any]
    number: int = field(default_factory=lambda: random.randrange(1000))
    begun: int = field(default_factory=time.monotonic_ns)
    load_duration: int = 0
    count: int = 0
    reason: str = ""

    def durations(self) -> dict[str, object]:
        total = time.monotonic_ns() - self.begun
        return {
            "total_duration": total,
            "load_duration": self.load_duration,
            "prompt_eval_count": PROMPT_TOKENS,
            "prompt_eval_duration": 2_049_329,
            "eval_count": self.count,
            "eval_duration": max(1, total - self.load_duration),
        }

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": self.count,
            "total_tokens": PROMPT_TOKENS + self.count,
        }


class NativeFormat:
    """Format of /api/generate and /api/chat: NDJSON; the last object has `done` and the durations."""

    stream_type = "application/x-ndjson"
    whole_type = "application/json; charset=utf-8"
    after_whole = ""
    by_default_a_stream = True

    def __init__(self, chat: bool) -> None:
        self._chat = chat

    def piece(self, answer: Answer, token: Token) -> str:
        return dumps(self._front(answer, [token]) | {"done": False}) + "\n"

    def end(self, answer: Answer) -> str:
        return dumps(self._front(answer, []) | self._back(answer)) + "\n"

    def error(self, text: str) -> str:
        return dumps({"error": text}) + "\n"

    def whole(self, answer: Answer, said: list[Token]) -> dict[str, object]:
        return self._front(answer, said) | self._back(answer)

    def _front(self, answer: Answer, said: list[Token]) -> dict[str, object]:
        text = "".join(token.text for token in said if not token.thinking)
        thought = "".join(token.text for token in said if token.thinking)
        thinking = {"thinking": thought} if thought else {}
        front: dict[str, object] = {"model": answer.model, "created_at": rfc3339(time.time_ns())}
        if self._chat:
            return front | {"message": {"role": "assistant", "content": text} | thinking}
        return front | {"response": text} | thinking

    def _back(self, answer: Answer) -> dict[str, object]:
        context = {} if self._chat else {"context": list(range(PROMPT_TOKENS + answer.count))}
        return {"done": True, "done_reason": answer.reason} | context | answer.durations()


class OpenAiFormat:
    """Format of /v1/chat/completions and /v1/completions: server-sent events, or one object."""

    stream_type = "text/event-stream"
    whole_type = "application/json"
    after_whole = "\n"
    by_default_a_stream = False

    def __init__(self, chat: bool) -> None:
        self._chat = chat

    def piece(self, answer: Answer, token: Token) -> str:
        return self._event(answer, [self._choice_of(token, None)])

    def end(self, answer: Answer) -> str:
        events = self._event(answer, [self._choice_of(Token(""), answer.reason)])
        if (answer.body.get("stream_options") or {}).get("include_usage"):
            events += self._event(answer, [], usage=answer.usage())
        return events + "data: [DONE]\n\n"

    def error(self, text: str) -> str:
        return f"data: {dumps(openai_error(500, text))}\n\n"

    def whole(self, answer: Answer, said: list[Token]) -> dict[str, object]:
        text = "".join(token.text for token in said if not token.thinking)
        thought = "".join(token.text for token in said if token.thinking)
        if self._chat:
            message = {"role": "assistant", "content": text} | ({"reasoning": thought} if thought else {})
            choice: dict[str, object] = {"index": 0, "message": message, "finish_reason": answer.reason}
        else:
            choice = {"text": text, "index": 0, "finish_reason": answer.reason}
        kind = "chat.completion" if self._chat else "text_completion"
        return self._front(answer, kind) | {"choices": [choice], "usage": answer.usage()}

    def _choice_of(self, token: Token, reason: str | None) -> dict[str, object]:
        if not self._chat:
            return {"text": token.text, "index": 0, "finish_reason": reason}
        delta = {"role": "assistant", "content": "" if token.thinking else token.text}
        thought = {"reasoning": token.text} if token.thinking else {}
        return {"index": 0, "delta": delta | thought, "finish_reason": reason}

    def _event(self, answer: Answer, choices: list[dict[str, object]], **more: object) -> str:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return f"data: {dumps(self._front(answer, kind) | {'choices': choices} | more)}\n\n"

    def _front(self, answer: Answer, kind: str) -> dict[str, object]:
        return {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{answer.number}",
            "object": kind,
            "created": int(time.time()),
            "model": answer.model,
            "system_fingerprint": FINGERPRINT,
        }


def openai_error(status: int, text: str) -> dict[str, object]:
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(status, "api_error")
    return {"error": {"message": text, "type": kind, "param": None, "code": None}}
