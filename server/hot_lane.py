"""Fast path: answers plain requests to running models, and polls, at the socket, before gunicorn parses them.

Nearly all processor time of such a request went into gunicorn's parser, the WSGI environment and the response object.
The lane answers only requests that need none of these. All others, errors included, go to gunicorn and the app with
every byte already read, so that each rule is implemented once. The lane relays only to running models, so it never
causes a switch. `docs/decisions/0008-hot-lane.md` says which requests it takes.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
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
from services.gateway.relay import forwarded
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
_LINE = re.compile(rb"(GET|POST) (/[A-Za-z0-9/._~%-]*)(?:\?([A-Za-z0-9/._~%:@!$&'()*+,;=?-]*))? HTTP/1\.1(?=\r\n)")
_LENGTH = re.compile(rb"\r\nContent-Length:[ \t]*([0-9]{1,18})\r\n", re.IGNORECASE)
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_FIXED = b"".join(f"{name}: {value}\r\n".encode() for name, value in (("Server", SERVER), *SECURITY_HEADERS))


class Fields(NamedTuple):
    """A request's headers without its length, which is all that differs between most requests of a client.

    `environ` is their part of a WSGI environment, `forwarded` their lines for an engine.
    """

    environ: Mapping[str, str]
    forwarded: bytes
    keeps_connection: bool


class Request(NamedTuple):
    """A request's head, and where in the bytes its body begins and ends."""

    method: str
    path: str
    query: str
    fields: Fields
    body_at: int
    end: int


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
            if request is None or request.end - request.body_at > self._longest:
                return received
            if self._guard.refusal(_environ(request, address)) is not None:
                return received
            end = request.end
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
        accepted = request.fields.environ.get("HTTP_ACCEPT_ENCODING", "")
        answer = self._polls.answer(request.path, request.query, accepted)
        if answer is None:
            return None
        self._on_request(client)
        try:
            goes_on = request.fields.keeps_connection
            client.sendall(_head(answer, goes_on)[0] + answer.body)
        except OSError:  # the client has left or does not read
            return False
        finally:
            self._on_answered(client)
        return goes_on

    def _answer(self, client: ClientSocket, request: Request, body: bytes) -> bool | None:
        """Relay a request; return whether the connection stays open afterwards, or None if the app has to answer."""
        named, model = _named_model(body)
        admission = self._services.router.try_admit(model, "text") if named else None
        if admission is None:
            return None
        self._on_request(client)
        try:
            peer = Client(client, may_probe=True)
            headers = request.fields.forwarded
            passed = relay_request(self._services.relay, admission, peer, "POST", request.path, headers, body)
            return _send(client, passed, request.fields.keeps_connection)
        except ClientGone:
            return False
        except (GatewayError, HTTPException) as error:
            client.failed = error  # the app reports it and must not send the request to the engine again
            return None
        finally:
            self._on_answered(client)


def read_head(received: bytes) -> Request | None:
    """Read the head that `received` begins with; None if it is incomplete or unusual.

    Unusual is a head that gunicorn would refuse or change, because a proxy in front may read it differently (RFC 9112).
    """
    body_at = received.find(b"\r\n\r\n", 0, LONGEST_HEAD) + 4
    line = _LINE.match(received, 0, body_at)
    if line is None:
        return None
    method, path, query = (part.decode("ascii") for part in line.groups(b""))
    length = _LENGTH.search(received, 0, body_at)
    if length is not None:
        fields = _parse(received[line.end() : length.start()] + received[length.end() - 2 : body_at])
    elif method == "GET":
        fields = _parse(received[line.end() : body_at])
    else:
        return None
    if fields is None:
        return None
    return Request(method, path, query, fields, body_at, body_at + (int(length[1]) if length else 0))


@lru_cache(maxsize=128)
def _parse(lines: bytes) -> Fields | None:
    """Parse a request's header lines, from the end of its first line on and without its length; None if unusual.

    Cached, because those of one client are always the same: parsing took a tenth of a request's time.
    """
    if not lines.isascii():
        return None
    pairs: list[tuple[bytes, bytes]] = []
    try:
        HttpRequestParser(_Pairs(pairs)).feed_data(b"GET / HTTP/1.1" + lines)
    except (HttpParserError, HttpParserUpgrade):
        return None
    headers = {name.lower(): value for name, value in pairs}
    connection = headers.get(b"connection", b"keep-alive").lower()
    if (
        len(headers) != len(pairs)
        or len(pairs) >= MOST_HEADERS
        or b"content-length" in headers
        or b"host" not in headers
        or connection not in (b"keep-alive", b"close")
        or not LEFT_TO_GUNICORN.isdisjoint(headers)
        or len(SCHEME_HEADERS & headers.keys()) > 1
        or any(b"_" in name for name in headers)
    ):
        return None
    texts = [(name.decode("ascii"), value.decode("ascii")) for name, value in headers.items()]
    return Fields({_key(name): value for name, value in texts}, forwarded(texts), connection != b"close")


class _Pairs:
    """Collects headers: the object whose methods the parser calls."""

    def __init__(self, pairs: list[tuple[bytes, bytes]]) -> None:
        self._pairs = pairs

    def on_header(self, name: bytes, value: bytes) -> None:
        self._pairs.append((name, value.strip(b" \t")))


def _key(name: str) -> str:
    """Return a header's key in a WSGI environment."""
    key = name.upper().replace("-", "_")
    return key if key == "CONTENT_TYPE" else f"HTTP_{key}"


def _environ(request: Request, address: str) -> dict[str, str]:
    """Return the part of a WSGI environment that the guard reads."""
    return {
        **request.fields.environ,
        "REQUEST_METHOD": request.method,
        "PATH_INFO": request.path,
        "QUERY_STRING": request.query,
        "REMOTE_ADDR": address,
    }


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
