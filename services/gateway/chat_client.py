"""The chat page's own way into the gateway: the same router and relay as everyone's, the text of the answer out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from geventhttpclient.response import HTTPParseError

from services.abort import Abort, Aborted
from services.answers import GenerationError, Piece
from services.catalog import UnknownModel
from services.gateway.deltas import joined, pieces_of, told_apart
from services.gateway.relay import EngineAnswer, Hangup, Relay
from services.gateway.router import Admission, ClientGone, GatewayError, Router
from services.switching.events import InstanceView

JSON_HEADERS = (("Content-Type", "application/json"), ("Accept", "text/event-stream"))
LONGEST_ERROR = 65_536
"""Bytes of an engine's refusal that are read: one that never ends must not be waited for."""
LONGEST_EVENT = 1_000_000
"""Bytes of one event of an answer: one that never ends must not fill the memory."""


class ChatStream:
    """One answer as its pieces, and the model that gives it."""

    def __init__(self, model: str, answer: EngineAnswer, abort: Abort, on_piece: Callable[[], object]) -> None:
        self.model = model
        self._on_piece = on_piece
        self._answer = answer
        self._abort = abort

    def __iter__(self) -> Iterator[Piece]:
        return told_apart(joined(self._pieces()))

    def _pieces(self) -> Iterator[Piece]:
        for data in self._events():
            if data == "[DONE]":
                return
            yield from pieces_of(_chunk(data))

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
            raise GenerationError(f"The answer broke off: {error}. What came so far is kept; try again.") from None


class ChatClient:
    """Asks the model behind the gateway for chat answers."""

    def __init__(self, router: Router, relay: Relay) -> None:
        self._router = router
        self._relay = relay

    @contextmanager
    def stream_chat(
        self, model: str | None, messages: Sequence[Mapping[str, str]], abort: Abort
    ) -> Iterator[ChatStream]:
        """One streamed answer. Leaving the context stops the generation, and so does `abort`, at any time.

        Raises GenerationError, and Aborted.
        """
        admission = self._admit(model, abort)
        try:
            answer = self._ask(admission.instance, messages, abort)
            try:
                if answer.status_code != 200:
                    raise GenerationError(_error_text(answer))
                yield ChatStream(admission.instance.model, answer, abort, admission.instance.traffic.heard)
            finally:
                answer.break_off()
        finally:
            admission.release()

    def _admit(self, model: str | None, abort: Abort) -> Admission:
        try:
            return self._router.admit(model, lambda: abort.requested)
        except ClientGone:
            raise Aborted from None
        except (GatewayError, UnknownModel) as error:
            raise GenerationError(str(error)) from None

    def _ask(self, instance: InstanceView, messages: Sequence[Mapping[str, str]], abort: Abort) -> EngineAnswer:
        """The engine's answer once its headers are here; `abort` closes the connection from the first moment on."""
        assert instance.endpoint is not None, "a running instance has an endpoint"
        body = {"model": instance.endpoint.model or instance.model, "messages": list(messages), "stream": True}
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


def _error_text(answer: EngineAnswer) -> str:
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
