"""The chat page's own way into the gateway: the same router and relay as everyone's, the text of the answer out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from geventhttpclient.response import HTTPParseError

from services.catalog import UnknownModel
from services.chats import GenerationError
from services.gateway.relay import Answer, Hangup, Relay
from services.gateway.router import ClientGone, GatewayError, Router

JSON_HEADERS = (("Content-Type", "application/json"), ("Accept", "text/event-stream"))
LONGEST_ERROR = 65_536
"""Bytes of an engine's refusal that are read: one that never ends must not be waited for."""


class ChatStream:
    """One answer as text deltas, and the model that gives it."""

    def __init__(self, model: str, answer: Answer) -> None:
        self.model = model
        self._answer = answer
        self._cancelled = False

    def __iter__(self) -> Iterator[str]:
        for data in self._events():
            if data == "[DONE]":
                return
            yield from _delta(data)

    def cancel(self) -> None:
        """End the iteration, from any thread; the engine stops generating."""
        self._cancelled = True
        self._answer.abort()

    def _events(self) -> Iterator[str]:
        rest = b""
        while chunk := self._chunk():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip().decode("utf-8", "replace")

    def _chunk(self) -> bytes:
        try:
            return self._answer.arrived()
        except (OSError, HTTPParseError) as error:
            if self._cancelled:
                return b""
            raise GenerationError(f"The answer broke off: {error}. What came so far is kept; try again.") from None


class ChatClient:
    """Asks the model behind the gateway for chat answers."""

    def __init__(self, router: Router, relay: Relay) -> None:
        self._router = router
        self._relay = relay

    @contextmanager
    def stream_chat(
        self, model: str | None, messages: Sequence[Mapping[str, str]], given_up: Callable[[], bool]
    ) -> Iterator[ChatStream]:
        """One streamed answer; leaving the context stops the generation. Raises GenerationError."""
        try:
            admission = self._router.admit(model, given_up)
        except (GatewayError, UnknownModel, ClientGone) as error:
            raise GenerationError(str(error)) from None
        try:
            instance = admission.instance
            assert instance.endpoint is not None, "a running instance has an endpoint"
            question = json.dumps(
                {"model": instance.endpoint.model or instance.model, "messages": list(messages), "stream": True}
            ).encode()
            with _as_generation_error():
                answer = self._relay.send(
                    instance.endpoint, "POST", "/v1/chat/completions", JSON_HEADERS, question, Hangup()
                )
            try:
                if answer.status_code != 200:
                    raise GenerationError(_error_text(answer))
                yield ChatStream(instance.model, answer)
            finally:
                answer.break_off()
        finally:
            admission.release()


@contextmanager
def _as_generation_error() -> Iterator[None]:
    try:
        yield
    except GatewayError as error:
        raise GenerationError(error.message) from None


def _delta(data: str) -> Iterator[str]:
    """The text in one chunk of an OpenAI-style stream. Raises GenerationError when it holds an error."""
    try:
        chunk = json.loads(data)
    except ValueError:
        return
    if "error" in chunk:
        raise GenerationError(f"The engine reported: {_message(chunk)}")
    for choice in chunk.get("choices") or ():
        text = (choice.get("delta") or {}).get("content")
        if text:
            yield text


def _error_text(answer: Answer) -> str:
    with _as_generation_error():
        said = answer.beginning(LONGEST_ERROR)
    try:
        document = json.loads(said)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, Mapping) and "error" in document:
        return f"The engine refused: {_message(document)}"
    return f"The engine answered with status {answer.status_code}."


def _message(document: Mapping[str, object]) -> str:
    error = document.get("error")
    return str(error.get("message") if isinstance(error, Mapping) else error)[:500]
