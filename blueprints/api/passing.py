"""One admitted request passed on to its engine, and the answer back, as plain WSGI values."""

from __future__ import annotations

import errno
import json
import select
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gevent
from gevent.monkey import get_original
from werkzeug.exceptions import MethodNotAllowed, NotFound

from services.gateway.relay import Answer, Body, Hangup, Relay, answer_headers
from services.gateway.router import Admission

_poll = get_original("select", "poll")

NO_ROUTE = frozenset(
    {"not found", "file not found", "404 page not found", "method not allowed", "405 method not allowed"}
)
"""What engines say, in lower case, of an address that they don't serve: vLLM, llama.cpp, Ollama. A model or a response
that they don't know is another matter, and told in other words."""
LONGEST_REFUSAL = 4096
"""Bytes of a 404's body that are looked at; what is longer is about more than the address."""


@dataclass(frozen=True, slots=True)
class Passed:
    """An engine's answer: its status, the headers that may be passed on, and its body as it comes."""

    status: int
    headers: list[tuple[str, str]]
    body: Body


class Client:
    """Whoever asked. Notices that they closed the connection, which a server otherwise learns at its next write."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        self._socket: socket.socket | None = environ.get("gunicorn.socket")

    def left(self) -> bool:
        """Whether they have closed their side."""
        if self._socket is None:
            return False
        poll = _poll()  # gevent's own would switch greenlets, which a callback of the hub must not
        poll.register(self._socket.fileno(), select.POLLIN | select.POLLRDHUP)
        return any(event & (select.POLLRDHUP | select.POLLHUP) for _, event in poll.poll(0))

    def on_leaving(self, act: Callable[[], None]) -> Callable[[], None]:
        """Call `act` when they leave; returns what stops the watching."""
        if self._socket is None:
            return lambda: None
        watcher = gevent.get_hub().loop.io(self._socket.fileno(), 1)

        def look() -> None:
            watcher.stop()  # one look: pipelined bytes would keep it firing
            if self.left():
                act()

        def stop() -> None:
            watcher.stop()
            watcher.close()

        watcher.start(look)
        return stop


def pass_on(
    relay: Relay,
    admission: Admission,
    client: Client,
    method: str,
    target: str,
    headers: Iterable[tuple[str, str]],
    body: bytes,
) -> Passed:
    """Send one request to the instance it was admitted to. The admission is given back with the body, or on failure.

    From here on the client's leaving breaks the request off, wherever it is. Raises GatewayError, ClientGone, and
    NotFound or MethodNotAllowed when the engine serves nothing at `target`.
    """
    endpoint = admission.instance.endpoint
    assert endpoint is not None, "a running instance has an endpoint"
    hangup = Hangup()
    stop_watching = client.on_leaving(hangup)

    def finish() -> None:
        stop_watching()
        admission.release()

    try:
        addressed = body if endpoint.model is None else _addressed(body, endpoint.model)
        answer = relay.send(endpoint, method, target, headers, addressed, hangup)
        if answer.status_code in (404, 405):
            _check_served(answer, admission.instance.model)
    except BaseException:
        finish()
        raise
    streamed = "text/event-stream" in str(answer.get("content-type"))
    relayed = Body(answer, finish, _stream_error if streamed else _cut_off)
    return Passed(answer.status_code, answer_headers(answer), relayed)


def _check_served(answer: Answer, model: str) -> None:
    """An engine's own words for an address that it doesn't serve are as many as there are engines: they become ours."""
    try:
        said = answer.beginning(LONGEST_REFUSAL)
    except BaseException:
        answer.break_off()
        raise
    if len(said) == LONGEST_REFUSAL or not _names_no_route(said):
        return
    if answer.status_code == 405:
        allowed = str(answer.get("allow") or "")
        raise MethodNotAllowed([method.strip() for method in allowed.split(",") if method.strip()])
    raise NotFound(f"The engine of {model} serves nothing at this address.")


def _names_no_route(said: bytes) -> bool:
    """Whether a 404 is about the address alone: in the usual words, or not even in OpenAI's shape."""
    try:
        document = json.loads(said)
    except (ValueError, RecursionError):
        return True
    error = document.get("error") if isinstance(document, dict) else None
    if not isinstance(error, dict):
        return True
    return str(error.get("message", "")).strip().rstrip(".").lower() in NO_ROUTE


def _addressed(body: bytes, model: str) -> bytes:
    """The request with the name that its engine knows the model by; as it is where it says that, or isn't JSON."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return body
    if not isinstance(document, dict) or document.get("model") == model:
        return body
    return json.dumps({**document, "model": model}).encode()


def _stream_error(reason: str) -> bytes:
    error = {"error": {"message": f"The answer broke off: {reason}.", "type": "server_error", "code": "engine_failed"}}
    return f"data: {json.dumps(error)}\n\n".encode()


def _cut_off(reason: str) -> bytes:
    """End the connection, as the engine did: an answer that is no stream has no place for an error.

    As a reset, which gunicorn takes without a word. Any other error it logs with its traceback, also when it was the
    client who left in the middle.
    """
    raise ConnectionResetError(errno.ECONNRESET, f"the engine's answer broke off: {reason}")
