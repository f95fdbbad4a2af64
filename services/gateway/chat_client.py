"""The chat page's own way into the gateway: the same router and relay as everyone's, the text of the answer out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from geventhttpclient.response import HTTPParseError

from services.abort import Abort, Aborted
from services.answers import GenerationError, Piece, Prompt
from services.catalog import UnknownModel
from services.gateway.context import TooLong, first_told, leave_out, too_long
from services.gateway.deltas import finish_reason, joined, pieces_of, told_apart
from services.gateway.relay import EngineAnswer, Hangup, Relay
from services.gateway.router import Admission, ClientGone, GatewayError, Router
from services.store.records import Message
from services.switching.events import InstanceView

JSON_HEADERS = (("Content-Type", "application/json"), ("Accept", "text/event-stream"))
LONGEST_ERROR = 65_536
"""Bytes of an engine's refusal that are read: one that never ends must not be waited for."""
LONGEST_EVENT = 1_000_000
"""Bytes of one event of an answer: one that never ends must not fill the memory."""


class ChatStream:
    """One answer as its pieces, and the model that gives it. `told_from`: the first of the messages that it is told."""

    def __init__(
        self, model: str, answer: EngineAnswer, abort: Abort, told_from: int, on_piece: Callable[[], object]
    ) -> None:
        self.model = model
        self.told_from = told_from
        self.context_full = False
        self._on_piece = on_piece
        self._answer = answer
        self._abort = abort

    def __iter__(self) -> Iterator[Piece]:
        return told_apart(joined(self._pieces()))

    def _pieces(self) -> Iterator[Piece]:
        for data in self._events():
            if data == "[DONE]":
                return
            chunk = _chunk(data)
            yield from pieces_of(chunk)
            if finish_reason(chunk) == "length":  # no length was asked for
                self.context_full = True

    def _events(self) -> Iterator[str]:
        rest = b""
        while chunk := self._chunk():
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > LONGEST_EVENT:
                raise GenerationError("The engine sent something that is no answer. What came so far is kept.")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip().decode("utf-8", "replace")

    def _chunk(self) -> bytes:
        try:
            chunk = self._answer.arrived()
            self._on_piece()
            return chunk
        except (OSError, HTTPParseError) as error:
            self._abort.check()
            why = "the engine closed the connection" if isinstance(error, HTTPParseError) else str(error).rstrip(".")
            raise GenerationError(f"The answer broke off: {why}. What came so far is kept; try again.") from None


class ChatClient:
    """Asks the model behind the gateway for chat answers."""

    def __init__(self, router: Router, relay: Relay) -> None:
        self._router = router
        self._relay = relay

    @contextmanager
    def stream_chat(self, model: str | None, prompt: Prompt, abort: Abort) -> Iterator[ChatStream]:
        """One streamed answer. Leaving the context stops the generation, and so does `abort`, at any time.

        What doesn't fit into the model's context is left out, the oldest turns first. Raises GenerationError, and
        Aborted.
        """
        admission = self._admit(model, abort)
        try:
            instance = admission.instance
            told_from: int | None = first_told(prompt, instance.model)
            while told_from is not None:
                answer = self._ask(instance, prompt.messages[told_from:], abort)
                try:
                    if answer.status_code == 200:
                        yield ChatStream(instance.model, answer, abort, told_from, instance.traffic.heard)
                        return
                    refusal = _length_refusal(answer)
                finally:
                    answer.break_off()
                told_from = leave_out(prompt.messages, told_from, refusal)
            raise GenerationError(_say_too_long(instance.model, refusal))
        finally:
            admission.release()

    def _admit(self, model: str | None, abort: Abort) -> Admission:
        try:
            return self._router.admit(model, lambda: abort.requested)
        except ClientGone:
            raise Aborted from None
        except (GatewayError, UnknownModel) as error:
            raise GenerationError(str(error)) from None

    def _ask(self, instance: InstanceView, messages: Iterable[Message], abort: Abort) -> EngineAnswer:
        """The engine's answer once its headers are here; `abort` closes the connection from the first moment on."""
        assert instance.endpoint is not None, "a running instance has an endpoint"
        told = [{"role": message.role, "content": message.content} for message in messages]
        body = {"model": instance.endpoint.model or instance.model, "messages": told, "stream": True}
        hangup = Hangup()
        abort.applies_to(hangup)
        try:
            with _as_generation_error():
                return self._relay.send(
                    instance.endpoint, "POST", "/v1/chat/completions", JSON_HEADERS, json.dumps(body).encode(), hangup
                )
        except ClientGone:
            raise Aborted from None


@contextmanager
def _as_generation_error() -> Iterator[None]:
    try:
        yield
    except GatewayError as error:
        raise GenerationError(error.message) from None


def _chunk(data: str) -> Mapping[str, Any]:
    """One chunk of the stream; empty where it is none. Raises GenerationError when it holds an error."""
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(chunk, Mapping):
        return {}
    if "error" in chunk:
        raise GenerationError(f"The engine reported: {_message(chunk)}")
    return chunk


def _length_refusal(answer: EngineAnswer) -> TooLong:
    """An engine's refusal of what doesn't fit into its context. Raises GenerationError for any other refusal."""
    with _as_generation_error():
        said = answer.beginning(LONGEST_ERROR)
    try:
        document = json.loads(said)
    except (ValueError, RecursionError):
        document = None
    refusal = too_long(answer.status_code, document)
    if refusal is not None:
        return refusal
    if isinstance(document, Mapping) and "error" in document:
        raise GenerationError(f"The engine refused: {_message(document)}")
    raise GenerationError(f"The engine answered with status {answer.status_code}.")


def _say_too_long(model: str, refusal: TooLong) -> str:
    """What is the matter, and what can be done here, once nothing but the user's message is left to tell."""
    held = f" holds {refusal.context:,} tokens" if refusal.context else " is too small for it"
    needed = f", and it needs {refusal.prompt:,}" if refusal.context and refusal.prompt else ""
    return (
        f"This message is too long: the context of {model}{held}{needed}. Send it in parts, or use a model with a "
        "larger context; the setting context_length gives embedded models more."
    )


def _message(document: Mapping[str, object]) -> str:
    error = document.get("error")
    return str(error.get("message") if isinstance(error, Mapping) else error)[:500]
