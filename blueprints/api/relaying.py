"""Relays one admitted request to its engine and returns the response as plain WSGI values."""

from __future__ import annotations

import errno
import json
import select
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import gevent
from gevent.monkey import get_original
from werkzeug.exceptions import MethodNotAllowed, NotFound

from services.gateway.refusals import refusal_of
from services.gateway.relay import Body, EngineResponse, Hangup, Relay, answer_fields
from services.gateway.router import Admission, GatewayError
from services.switching.events import InstanceView

_poll = get_original("select", "poll")

NO_ROUTE = frozenset(
    {"not found", "file not found", "404 page not found", "method not allowed", "405 method not allowed"}
)
"""What vLLM, llama.cpp and Ollama say, in lower case, about a path they don't serve. They describe an unknown model or
response in other words."""
MAX_ERROR_BYTES = 4096
"""Longest body of a 404 that is inspected; a longer one is about more than the path."""
POLL_SECONDS = 0.5
"""Interval at which a client that sends nothing more is checked."""
GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL
KEEP_ALIVE = (
    ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), 1),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 5),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPINTVL), 5),
    ((socket.IPPROTO_TCP, socket.TCP_KEEPCNT), 6),
)


@dataclass(frozen=True, slots=True)
class RelayedResponse:
    """An engine's response: its status, the headers that may be forwarded, and its body as it arrives."""

    status: int
    fields: list[tuple[bytes, bytes]]
    body: Body

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The headers as text."""
        return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.fields]


class Client:
    """The client of a request. Detects that it disconnected, which a server otherwise notices at its next write.

    A client may close only its sending side and wait for the response; reading its socket can't tell that from a full
    close. Sending can: a client that still reads ignores it, the system of one that has gone answers with a reset. So a
    half-closed client is sent interim responses (100), which every HTTP/1.1 client skips, until the real one begins.
    """

    def __init__(self, connection: Any = None, *, may_probe: bool = False) -> None:
        """Wrap `connection`, a gevent socket or None.

        `may_probe` says whether the client understands interim responses.
        """
        self._socket = connection
        self._may_probe = may_probe
        self._probe_at: float | None = None
        """Time of the next interim response; None until it has closed its sending side."""
        self._half_closed_at = 0.0

    @classmethod
    def of(cls, environ: Mapping[str, Any]) -> Client:
        """Return the client of a request, given its WSGI environment."""
        return cls(environ.get("gunicorn.socket"), may_probe=environ.get("SERVER_PROTOCOL") == "HTTP/1.1")

    def disconnected(self) -> bool:
        """Return whether the client has disconnected. Never blocks, so that callbacks of gevent's hub may call it."""
        if self._socket is None:
            return False
        events = self._events()
        if events & select.POLLRDHUP and not events & GONE:
            self._probe_half_closed()
            events = self._events()  # a reset from this machine arrives at once
        return bool(events & GONE)

    def response_started(self) -> None:
        """Note that the response begins: no interim response may follow."""
        self._may_probe = False

    def on_disconnect(self, act: Callable[[], None]) -> Callable[[], None]:
        """Call `act` when the client disconnects; return a function that stops watching."""
        if self._socket is None:
            return lambda: None
        return _Watch(self._socket.fileno(), self.disconnected, act).stop

    def _events(self) -> int:
        poll = _poll()  # gevent's poll would switch greenlets, which a callback of its hub must not do
        poll.register(self._socket.fileno(), select.POLLIN | select.POLLRDHUP)
        return next((events for _, events in poll.poll(0)), 0)

    def _probe_half_closed(self) -> None:
        """Send an interim response, ever less often. The system of a disconnected client answers with a reset."""
        now = time.monotonic()
        if self._probe_at is None:
            self._probe_at = self._half_closed_at = now
            for option, value in KEEP_ALIVE:  # detects it within a minute where no interim response may be sent
                self._socket.setsockopt(*option, value)
        if self._may_probe and now >= self._probe_at:
            self._probe_at = now + max(POLL_SECONDS, now - self._half_closed_at)
            with suppress(OSError):
                self._socket._sock.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)


class _Watch:
    """Calls `act` when the client of a socket has disconnected, until it is stopped.

    A class, because functions that refer to each other are left to the garbage collector, a tenth of a request's time.
    """

    def __init__(self, descriptor: int, disconnected: Callable[[], bool], act: Callable[[], None]) -> None:
        self._disconnected = disconnected
        self._act = act
        self._loop = gevent.get_hub().loop
        self._timer: Any = None
        self._watcher = self._loop.io(descriptor, 1)
        self._watcher.start(self._check)

    def stop(self) -> None:
        self._stop_timer()
        self._watcher.stop()
        self._watcher.close()

    def _check(self) -> None:
        self._watcher.stop()  # the end of the stream, and pipelined bytes, would keep it firing
        if self._disconnected():
            self._stop_timer()
            self._act()
        elif self._timer is None:
            self._timer = self._loop.timer(POLL_SECONDS, POLL_SECONDS)
            self._timer.start(self._check)

    def _stop_timer(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.stop()
            timer.close()


def relay_request(
    relay: Relay,
    admission: Admission,
    client: Client,
    method: str,
    target: str,
    headers: bytes,
    body: bytes,
) -> RelayedResponse:
    """Send one request to the instance it was admitted to. The admission is released with the body, or on failure.

    `headers` are the lines that `services.gateway.relay.forwarded` returns.

    A disconnect of the client cancels the request from here on. Raises GatewayError, ClientGone, and NotFound or
    MethodNotAllowed if the engine serves nothing at `target`.
    """
    endpoint = admission.instance.endpoint
    assert endpoint is not None, "a running instance has an endpoint"
    hangup = Hangup()
    stop_watching = client.on_disconnect(hangup)

    def finish() -> None:
        stop_watching()
        admission.release()

    try:
        addressed = body if endpoint.model is None else _addressed(body, endpoint.model)
        answer = relay.send(endpoint, method, target, headers, addressed, hangup)
        if answer.status_code >= 400:
            _check_refusal(answer, admission.instance)
    except BaseException:
        finish()
        raise
    streamed = "text/event-stream" in str(answer.get("content-type"))
    note_activity = admission.instance.traffic.note_activity
    note_activity()
    error_tail = _stream_error if streamed else _cut_off
    relayed = Body(answer, client.response_started, note_activity, finish, error_tail)
    return RelayedResponse(answer.status_code, answer_fields(answer), relayed)


def _check_refusal(answer: EngineResponse, instance: InstanceView) -> None:
    """Raise our own error instead of an engine's where its words must not be passed on, or differ by engine."""
    try:
        refusal = refusal_of(answer, instance)
        if refusal is not None:
            raise refusal
        if answer.status_code in (404, 405):
            _check_served(answer, instance.model)
    except BaseException:
        answer.close()
        raise


def _check_served(answer: EngineResponse, model: str) -> None:
    """Replace an engine's own response for an unknown path or method by ours, because each engine has another one."""
    said = answer.peek(MAX_ERROR_BYTES)
    if len(said) == MAX_ERROR_BYTES or not _names_no_route(said):
        return
    if answer.status_code == 405:
        allowed = str(answer.get("allow") or "")
        raise MethodNotAllowed([method.strip() for method in allowed.split(",") if method.strip()])
    raise NotFound(f"The engine of {model} serves nothing at this address.")


def _names_no_route(said: bytes) -> bool:
    """Return whether a 404 is about the path: in the usual words, or not in OpenAI's error shape."""
    try:
        document = json.loads(said)
    except (ValueError, RecursionError):
        return True
    error = document.get("error") if isinstance(document, dict) else None
    if not isinstance(error, dict):
        return True
    return str(error.get("message", "")).strip().rstrip(".").lower() in NO_ROUTE


def _addressed(body: bytes, model: str) -> bytes:
    """Return the body with the name that its engine knows the model by; unchanged if it has that name or isn't JSON."""
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
    """Reset the connection, because a response that is no stream can't report an error in its body.

    A ConnectionResetError, which gunicorn ignores. It logs any other error with a traceback, although it also occurs
    when a client disconnects.
    """
    raise ConnectionResetError(errno.ECONNRESET, f"the engine's answer broke off: {reason}")
