"""Fast path: answers plain requests to running models, and polls, at the socket, before gunicorn parses them.

Nearly all processor time of such a request went into gunicorn's parser, the WSGI environment and the response object.
The lane answers only requests that need none of these. All others, errors included, go to gunicorn and the app with
every byte already read, so that each rule is implemented once. The lane relays only to running models, so it never
causes a switch. `docs/decisions/0008-hot-lane.md` says which requests it takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple

from gunicorn import SERVER
from gunicorn.util import http_date
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from werkzeug.exceptions import HTTPException

from blueprints.api.relaying import Client, RelayedResponse, relay_request
from blueprints.guard import Guard
from blueprints.polls import PATHS as POLLED_PATHS
from blueprints.polls import PollAnswer, Polls
from blueprints.web import SECURITY_HEADERS
from server.client_socket import BLOCK, ClientSocket
from services.container import Services
from services.gateway.router import ClientGone, GatewayError

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
REQUEST_LINES = (
    *(f"POST {path} HTTP/1.1\r\n".encode() for path in PATHS),
    *(f"GET {path}{end}".encode() for path in POLLED_PATHS for end in (" HTTP/1.1\r\n", "?")),
)
LONGEST_HEAD = 8190
"""Limit of a head in bytes. It is gunicorn's limit of one line, so only the number of headers needs a check as well."""
MOST_HEADERS = 100
"""Limit of headers per request: the default of gunicorn's `limit_request_fields`."""
LEFT_TO_GUNICORN = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"te", b"trailer"})
"""Headers that change how a request is read; requests with one of them go to gunicorn."""
SCHEME_HEADERS = frozenset({b"x-forwarded-protocol", b"x-forwarded-proto", b"x-forwarded-ssl"})
"""gunicorn refuses requests in which these contradict each other."""
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_FIXED = b"".join(f"{name}: {value}\r\n".encode() for name, value in (("Server", SERVER), *SECURITY_HEADERS))


class Request(NamedTuple):
    """A request's head, its headers by their names in lower case, and where in the bytes its body begins."""

    method: str
    path: str
    query: str
    headers: Mapping[bytes, bytes]
    body_at: int
    body_length: int


class HotLane:
    """Answers the requests of a connection as long as they need only the relay, or what is known to `polls`.

    `is_open` returns whether requests may be taken. `on_request` is called with the client before the lane answers a
    request, `on_answered` with the client afterwards.
    """

    def __init__(
        self,
        services: Services,
        guard: Guard,
        polls: Polls,
        is_open: Callable[[], bool],
        on_request: Callable[[ClientSocket], None],
        on_answered: Callable[[ClientSocket], None],
    ) -> None:
        self._services = services
        self._guard = guard
        self._polls = polls
        self._is_open = is_open
        self._on_request = on_request
        self._on_answered = on_answered
        self._longest = services.settings.max_body_bytes

    def serve(self, client: ClientSocket, address: str, received: bytes) -> bytes:
        """Answer requests until one needs gunicorn; return the bytes already read of that request.

        `received` holds the bytes already read of the first request. Returns empty bytes if the connection has ended or
        must be closed. An error of the relay that the app has to report is stored in `client.failed`.
        """
        while True:
            received = received or client.recv(BLOCK)
            if not received.startswith(REQUEST_LINES) or not self._is_open():
                return received
            request = read_head(received)
            if request is None or request.body_length > self._longest:
                return received
            if self._guard.refusal(_environ(request, address)) is not None:
                return received
            end = request.body_at + request.body_length
            if len(received) < end:
                received = _with_body(client, received, end)
                if len(received) < end:
                    return received
            if request.method == "GET":
                goes_on = self._answer_poll(client, request)
            else:
                goes_on = self._answer(client, request, received[request.body_at : end])
            if goes_on is None:
                return received
            if not goes_on:
                return b""
            received = received[end:]

    def _answer_poll(self, client: ClientSocket, request: Request) -> bool | None:
        """Answer a poll; return whether the connection stays open afterwards, or None if the app has to answer."""
        accepted = request.headers.get(b"accept-encoding", b"").decode("ascii")
        answer = self._polls.answer(request.path, request.query, accepted)
        if answer is None:
            return None
        self._on_request(client)
        try:
            goes_on = _stays_open(request)
            client.sendall(_head(answer, goes_on)[0] + answer.body)
        except OSError:  # the client has left or does not read
            return False
        finally:
            self._on_answered(client)
        return goes_on

    def _answer(self, client: ClientSocket, request: Request, body: bytes) -> bool | None:
        """Relay a request; return whether the connection stays open afterwards, or None if the app has to answer."""
        named, model = _named_model(body)
        admission = self._services.router.try_admit(model) if named else None
        if admission is None:
            return None
        self._on_request(client)
        try:
            peer = Client(client, may_probe=True)
            passed = relay_request(self._services.relay, admission, peer, "POST", request.path, _headers(request), body)
            return _send(client, passed, _stays_open(request))
        except ClientGone:
            return False
        except (GatewayError, HTTPException) as error:
            client.failed = error  # the app reports it and must not send the request to the engine again
            return None
        finally:
            self._on_answered(client)


def read_head(received: bytes) -> Request | None:
    """Parse the head that `received` begins with; None if it is incomplete or unusual.

    Unusual is a head that gunicorn would refuse or change, because a proxy in front may read it differently (RFC 9112).
    """
    body_at = received.find(b"\r\n\r\n", 0, LONGEST_HEAD) + 4
    head = received[:body_at]
    if body_at < 4 or not head.isascii():
        return None
    fields: list[tuple[bytes, bytes]] = []
    parser = HttpRequestParser(_Fields(fields))
    try:
        parser.feed_data(head)
    except (HttpParserError, HttpParserUpgrade):
        return None
    headers = {name.lower(): value for name, value in fields}
    method, _, rest = head.decode("ascii").partition(" ")
    target = rest.partition(" ")[0]
    length = headers.get(b"content-length", b"" if method == "POST" else b"0")
    if (
        parser.get_http_version() != "1.1"
        or "#" in target
        or len(headers) != len(fields)
        or len(fields) > MOST_HEADERS
        or not length.isdigit()
        or b"host" not in headers
        or headers.get(b"connection", b"keep-alive").lower() not in (b"keep-alive", b"close")
        or not LEFT_TO_GUNICORN.isdisjoint(headers)
        or len(SCHEME_HEADERS & headers.keys()) > 1
        or any(b"_" in name for name in headers)
    ):
        return None
    path, _, query = target.partition("?")
    return Request(method, path, query, headers, body_at, int(length))


class _Fields:
    """Collects headers: the object whose methods the parser calls."""

    def __init__(self, fields: list[tuple[bytes, bytes]]) -> None:
        self._fields = fields

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value.strip(b" \t")))


def _environ(request: Request, address: str) -> dict[str, str]:
    """Return the part of a WSGI environment that the guard reads."""
    environ = {
        "REQUEST_METHOD": request.method,
        "PATH_INFO": request.path,
        "QUERY_STRING": request.query,
        "REMOTE_ADDR": address,
    }
    for name, value in request.headers.items():
        environ[_key(name)] = value.decode("ascii")
    return environ


@lru_cache(maxsize=256)
def _key(name: bytes) -> str:
    """Return a header's key in a WSGI environment. Cached, because clients send the same few headers."""
    key = name.decode("ascii").upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"


def _headers(request: Request) -> Iterator[tuple[str, str]]:
    """Yield a request's headers as text. Names stay in lower case, which says the same (RFC 9110 section 5.1)."""
    for name, value in request.headers.items():
        yield name.decode("ascii"), value.decode("ascii")


def _stays_open(request: Request) -> bool:
    """Return whether the client wants to use its connection again."""
    return request.headers.get(b"connection", b"").lower() != b"close"


def _with_body(client: ClientSocket, received: bytes, end: int) -> bytes:
    """Read the rest of a body; return all bytes received, fewer than `end` if it ends early or comes too slowly."""
    pieces, missing = [received], end - len(received)
    client.expect_body()
    while missing > 0:
        try:
            piece = client.recv(max(BLOCK, min(missing, 1_048_576)))
        except OSError:  # includes TimeoutError: gunicorn reads on and gets the same error
            break
        if not piece:
            break
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _named_model(body: bytes) -> tuple[bool, str | None]:
    """Return whether the body is a valid JSON object, and the model that it names, if any."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False, None
    if not isinstance(document, dict):
        return False, None
    name = document.get("model")
    return (True, name) if name is None or isinstance(name, str) else (False, None)


def _send(client: ClientSocket, passed: RelayedResponse, goes_on: bool) -> bool:
    """Send an answer, its head with the first piece of the body; return whether the connection can be used again.

    A chunked body is divided into new chunks, one per piece that arrives, so that an error can still be reported if the
    engine breaks off inside a chunk.
    """
    body = passed.body
    try:
        unsent, chunked = _head(passed, goes_on)
        for piece in body:
            client.sendall(unsent + (b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece))
            unsent = b""
        if chunked:
            unsent += b"0\r\n\r\n"
        if unsent:
            client.sendall(unsent)
        return goes_on
    except OSError:  # the client has left or does not read, or the engine's answer broke off
        return False
    finally:
        body.close()


def _head(passed: RelayedResponse | PollAnswer, goes_on: bool) -> tuple[bytes, bool]:
    """Return an answer's head, and whether its body is chunked."""
    status, fields = passed.status, passed.fields
    chunked = status not in (204, 304) and not any(name.lower() == b"content-length" for name, _ in fields)
    lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status]
    lines += [b"%b: %b\r\n" % field for field in fields if status != 204 or field[0].lower() != b"content-length"]
    lines += (
        b"Transfer-Encoding: chunked\r\n" if chunked else b"",
        _date(int(time.time())),
        _FIXED,
        b"Connection: keep-alive\r\n\r\n" if goes_on else b"Connection: close\r\n\r\n",
    )
    return b"".join(lines), chunked


@lru_cache(maxsize=1)
def _date(now: int) -> bytes:
    return f"Date: {http_date(now)}\r\n".encode()
