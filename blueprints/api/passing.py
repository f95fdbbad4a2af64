"""One admitted request passed on to its engine, and the answer back, as plain WSGI values."""

from __future__ import annotations

import errno
import json
import select
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import gevent
from gevent.monkey import get_original
from werkzeug.exceptions import MethodNotAllowed, NotFound

from services.gateway.relay import Body, EngineResponse, Hangup, Relay, answer_fields
from services.gateway.router import Admission, GatewayError

_poll = get_original("select", "poll")

NO_ROUTE = frozenset(
    {"not found", "file not found", "404 page not found", "method not allowed", "405 method not allowed"}
)
"""What engines say, in lower case, of an address that they don't serve: vLLM, llama.cpp, Ollama. A model or a response
that they don't know is another matter, and told in other words."""
LONGEST_REFUSAL = 4096
"""Bytes of a 404's body that are looked at; what is longer is about more than the address."""
LOOK_SECONDS = 0.5
"""How often it is looked whether a client that sends nothing more is still there."""
GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL
KEEP_ALIVE = (
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 5),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 5),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 6),
)


@dataclass(frozen=True, slots=True)
class Passed:
    """An engine's answer: its status, the headers that may be passed on, and its body as it arrives."""

    status: int
    fields: list[tuple[bytes, bytes]]
    body: Body

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The same as text."""
        return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.fields]


class Client:
    """Whoever asked. Notices that they closed the connection, which a server otherwise learns at its next write.

    A client may close its sending side alone and wait for its answer, and nothing that comes from it tells it from one
    that has left. What is sent to it does: the one reads it, the other's system answers with a reset. So it is sent an
    interim answer (100), which every HTTP/1.1 client skips, as long as nothing of the real one has been sent.
    """

    def __init__(self, connection: Any = None, *, may_ask: bool = False) -> None:
        """`connection` is the client's, a socket of gevent's, None where there is none; `may_ask` says whether the
        client understands interim answers."""
        self._socket = connection
        self._may_ask = may_ask
        self._ask_at: float | None = None
        """When it is sent the next interim answer; None before it has closed its sending side."""
        self._half_closed_at = 0.0

    @classmethod
    def of(cls, environ: Mapping[str, Any]) -> Client:
        """The client of a request, by its WSGI environment."""
        return cls(environ.get("gunicorn.socket"), may_ask=environ.get("SERVER_PROTOCOL") == "HTTP/1.1")

    def left(self) -> bool:
        """Whether they have gone. Doesn't wait, so that a callback of the hub may ask."""
        if self._socket is None:
            return False
        events = self._events()
        if events & select.POLLRDHUP and not events & GONE:
            self._sound_out()
            events = self._events()  # on this machine the reset is here at once
        return bool(events & GONE)

    def answered(self) -> None:
        """Something of the answer is sent from now on."""
        self._may_ask = False

    def on_leaving(self, act: Callable[[], None]) -> Callable[[], None]:
        """Call `act` when they leave; returns what stops the watching."""
        if self._socket is None:
            return lambda: None
        loop = gevent.get_hub().loop
        watcher = loop.io(self._socket.fileno(), 1)
        timers: list[Any] = []

        def look() -> None:
            watcher.stop()  # their end, and bytes that they pipelined, would keep it firing
            if self.left():
                stop_timers()
                act()
            elif not timers:
                timers.append(loop.timer(LOOK_SECONDS, LOOK_SECONDS))
                timers[0].start(look)

        def stop_timers() -> None:
            for timer in timers:
                timer.stop()
                timer.close()
            timers.clear()

        def stop() -> None:
            stop_timers()
            watcher.stop()
            watcher.close()

        watcher.start(look)
        return stop

    def _events(self) -> int:
        poll = _poll()  # gevent's own would switch greenlets, which a callback of the hub must not
        poll.register(self._socket.fileno(), select.POLLIN | select.POLLRDHUP)
        return next((events for _, events in poll.poll(0)), 0)

    def _sound_out(self) -> None:
        """Send what makes the system of a client that has left answer with a reset; seldom, as time goes on."""
        now = time.monotonic()
        if self._ask_at is None:
            self._ask_at = self._half_closed_at = now
            for option, value in KEEP_ALIVE:  # where nothing may be sent: it takes that system a minute to reset these
                self._socket.setsockopt(*option, value)
        if self._may_ask and now >= self._ask_at:
            self._ask_at = now + max(LOOK_SECONDS, now - self._half_closed_at)
            with suppress(OSError):
                self._socket._sock.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)


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
    heard = admission.instance.traffic.note_activity
    heard()
    relayed = Body(answer, client.answered, heard, finish, _stream_error if streamed else _cut_off)
    return Passed(answer.status_code, answer_fields(answer), relayed)


def _check_served(answer: EngineResponse, model: str) -> None:
    """An engine's own words for an address that it doesn't serve are as many as there are engines: they become ours."""
    try:
        said = answer.peek(LONGEST_REFUSAL)
    except BaseException:
        answer.close()
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
    try:
        return json.dumps({**document, "model": model}).encode()
    except RecursionError:
        raise GatewayError("invalid_json", "The body is nested too deeply.") from None


def _stream_error(reason: str) -> bytes:
    error = {"error": {"message": f"The answer broke off: {reason}.", "type": "server_error", "code": "engine_failed"}}
    return f"data: {json.dumps(error)}\n\n".encode()


def _cut_off(reason: str) -> bytes:
    """End the connection, as the engine did: an answer that is no stream has no place for an error.

    As a reset, which gunicorn takes without a word. Any other error it logs with its traceback, also when it was the
    client who left in the middle.
    """
    raise ConnectionResetError(errno.ECONNRESET, f"the engine's answer broke off: {reason}")
