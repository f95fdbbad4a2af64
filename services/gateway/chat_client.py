"""The chat page's client of the gateway: sends a prompt through the router and relay, yields the answer's deltas."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from services.answers import Delta, GenerationError, Prompt
from services.cancellation import Cancelled, CancelToken
from services.catalog import UnknownModel
from services.gateway.context import ContextOverflow, drop_oldest, first_included, parse_overflow
from services.gateway.deltas import finish_reason, join_surrogates, parse_chunk, split_thoughts
from services.gateway.refusals import refusal_of
from services.gateway.relay import BrokenResponse, EngineResponse, Hangup, Relay
from services.gateway.router import Admission, ClientGone, GatewayError, Router
from services.store.records import Message
from services.switching.events import InstanceView

JSON_HEADERS = b"Content-Type: application/json\r\nAccept: text/event-stream\r\n"
MAX_ERROR_BYTES = 65_536
"""Longest error body that is read; an engine may send one without end."""
MAX_EVENT_BYTES = 1_000_000
"""Longest server-sent event that is buffered; an engine may send one without end."""


class ChatStream:
    """Deltas of one answer, and the model that gives it.

    `told_from` is the index of the first prompt message that the model was given.
    """

    def __init__(
        self, model: str, answer: EngineResponse, token: CancelToken, told_from: int, on_chunk: Callable[[], object]
    ) -> None:
        self.model = model
        self.told_from = told_from
        self.context_full = False
        self._on_chunk = on_chunk
        self._answer = answer
        self._token = token

    def __iter__(self) -> Iterator[Delta]:
        return split_thoughts(join_surrogates(self._deltas()))

    def _deltas(self) -> Iterator[Delta]:
        for data in self._events():
            if data == "[DONE]":
                return
            chunk = _chunk(data)
            yield from parse_chunk(chunk)
            if finish_reason(chunk) == "length":  # no max_tokens was sent, so the context is full
                self.context_full = True

    def _events(self) -> Iterator[str]:
        rest = b""
        while chunk := self._chunk():
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_EVENT_BYTES:
                raise GenerationError("The engine sent an invalid response. The text so far is kept.")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip().decode("utf-8", "replace")

    def _chunk(self) -> bytes:
        try:
            chunk = self._answer.read_available()
            self._on_chunk()
            return chunk
        except (OSError, BrokenResponse) as error:
            self._token.check()
            why = "the engine closed the connection" if isinstance(error, BrokenResponse) else str(error).rstrip(".")
            raise GenerationError(f"The answer broke off: {why}. The text so far is kept; try again.") from None


class ChatClient:
    """Requests chat answers from the model behind the gateway."""

    def __init__(self, router: Router, relay: Relay) -> None:
        self._router = router
        self._relay = relay

    @contextmanager
    def stream_chat(self, model: str | None, prompt: Prompt, token: CancelToken) -> Iterator[ChatStream]:
        """Open one streamed answer. Leaving the context, or cancelling `token` at any time, stops the generation.

        The oldest turns are left out while the prompt exceeds the model's context. Raises GenerationError and
        Cancelled.
        """
        admission = self._admit(model, token)
        try:
            instance = admission.instance
            told_from: int | None = first_included(prompt, instance.model)
            while told_from is not None:
                answer = self._ask(instance, prompt.messages[told_from:], token)
                try:
                    if answer.status_code == 200:
                        yield ChatStream(instance.model, answer, token, told_from, instance.traffic.note_activity)
                        return
                    refusal = _read_overflow(answer, instance)
                finally:
                    answer.close()
                told_from = drop_oldest(prompt.messages, told_from, refusal)
            raise GenerationError(_overflow_message(instance.model, refusal))
        finally:
            admission.release()

    def _admit(self, model: str | None, token: CancelToken) -> Admission:
        try:
            return self._router.admit(model, lambda: token.cancelled)
        except ClientGone:
            raise Cancelled from None
        except (GatewayError, UnknownModel) as error:
            raise GenerationError(str(error)) from None

    def _ask(self, instance: InstanceView, messages: Iterable[Message], token: CancelToken) -> EngineResponse:
        """Send the prompt and return the response once its headers are here.

        Cancelling `token` closes the connection at any time.
        """
        assert instance.endpoint is not None, "a running instance has an endpoint"
        told = [{"role": message.role, "content": message.content} for message in messages]
        body = {"model": instance.endpoint.model or instance.model, "messages": told, "stream": True}
        hangup = Hangup()
        token.on_cancel(hangup)
        try:
            with _as_generation_error():
                return self._relay.send(
                    instance.endpoint, "POST", "/v1/chat/completions", JSON_HEADERS, json.dumps(body).encode(), hangup
                )
        except ClientGone:
            raise Cancelled from None


@contextmanager
def _as_generation_error() -> Iterator[None]:
    try:
        yield
    except GatewayError as error:
        raise GenerationError(error.message) from None


def _chunk(data: str) -> Mapping[str, Any]:
    """Return one chunk of the stream, {} if it can't be parsed. Raises GenerationError if it reports an error."""
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(chunk, Mapping):
        return {}
    if "error" in chunk:
        raise GenerationError(f"The engine reported: {_message(chunk)}")
    return chunk


def _read_overflow(answer: EngineResponse, instance: InstanceView) -> ContextOverflow:
    """Return what an engine's refusal says about the context. Raises GenerationError for any other refusal."""
    with _as_generation_error():
        refused = refusal_of(answer, instance)
        said = answer.peek(MAX_ERROR_BYTES)
    if refused is not None:
        raise GenerationError(refused.message)
    try:
        document = json.loads(said)
    except (ValueError, RecursionError):
        document = None
    refusal = parse_overflow(answer.status_code, document)
    if refusal is not None:
        return refusal
    if isinstance(document, Mapping) and "error" in document:
        raise GenerationError(f"The engine refused: {_message(document)}")
    raise GenerationError(f"The engine answered with status {answer.status_code}.")


def _overflow_message(model: str, refusal: ContextOverflow) -> str:
    """Return the message for a single user message that exceeds the context: what is wrong, and what helps."""
    held = f" holds {refusal.context:,} tokens" if refusal.context else " is too small for it"
    needed = f", and it needs {refusal.prompt:,}" if refusal.context and refusal.prompt else ""
    return (
        f"This message is too long: the context of {model}{held}{needed}. Send it in parts, or use a model with a "
        "larger context; the setting context_length gives embedded models more."
    )


def _message(document: Mapping[str, object]) -> str:
    error = document.get("error")
    return str(error.get("message") if isinstance(error, Mapping) else error)[:500]
