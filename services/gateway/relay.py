"""Relays one request to an instance, and its response back as it arrives, the body unchanged.

The hot path of the data plane. The parser is llhttp, by httptools. Reading returns whatever has arrived instead of
waiting for a full block, as streamed tokens need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from services.engines.port import Endpoint
from services.gateway.connections import CONNECTIONS_PER_ENGINE, Connection, Network, Pool, PoolExhausted, Sockets
from services.gateway.router import ClientGone, GatewayError

BLOCK = 65_536
MAX_HEAD_BYTES = 262_144
"""Longest head of a response, interim responses (1xx) included."""
TRUNCATED = "the engine closed the connection in mid-answer"
PRUNE_SECONDS = 5.0
"""Interval between checks of idle connections, which engines close."""

API_PATH = "/v1"
"""Where this API is in the paths of requests; `Endpoint.base_path` is where it is at the engine."""
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers of a single connection, never forwarded (RFC 9110 section 7.6.1)."""
NOT_FORWARDED = HOP_BY_HOP | {
    "host",
    "content-length",
    "authorization",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "openai-organization",  # of the client's own account, not of the one whose key the endpoint has
    "openai-project",
    "forwarded",  # the client's address and cookies concern Switchyard only
    "x-forwarded-for",
    "x-real-ip",
    "referer",
    "cookie",
    "accept-encoding",
    "origin",  # Ollama answers 403 to the ones it doesn't know; the guard has checked ours
    "expect",
}

ANSWER_HEADERS = frozenset(
    {
        "accept-ranges",
        "allow",
        "cache-control",
        "content-disposition",
        "content-encoding",
        "content-language",
        "content-length",
        "content-range",
        "content-type",
        "etag",
        "last-modified",
        "request-id",
        "retry-after",
        "vary",
        "x-accel-buffering",
        "x-request-id",
    }
)
ANSWER_HEADER_FAMILIES = ("openai-", "anthropic-", "x-ratelimit-")
"""Response headers that are forwarded: those that describe the response. An engine must not set cookies for this
server, grant other sites access (Access-Control-*), redirect the browser (Location, Refresh) or clear its data
(Clear-Site-Data)."""


class Unanswered(ConnectionError):
    """The engine closed the connection before the first byte of a response."""


class BrokenResponse(Exception):
    """An engine's response is malformed or truncated."""


class EngineResponse:
    """An engine's response: `status_code`, `fields` (its headers as pairs of bytes), and its body as it arrives.

    Holds its connection until it is complete or closed.
    """

    def __init__(self, connection: Connection, pool: Pool, method: str) -> None:
        """Block until the headers are here.

        Raises OSError, BrokenResponse and Unanswered, and releases the connection then.
        """
        self.status_code = 0
        self.fields: list[tuple[bytes, bytes]] = []
        self.complete = False
        """Whether the whole response has arrived, though it may not have been read yet."""
        self._connection: Connection | None = connection
        self._pool = pool
        self._has_body = method != "HEAD"
        self._headers_complete = False
        self._reusable = False
        """Whether the connection can be used for another request."""
        self._chunks: list[bytes] = []
        self.on_body = self._chunks.append  # a builtin: the parser calls it once per chunk
        self._parser: Any = HttpResponseParser(self)
        """None after the end: the two refer to each other, and would be left to the garbage collector."""
        try:
            self._read_head(connection)
        except BaseException:
            self._release()
            raise

    @property
    def headers(self) -> list[tuple[str, str]]:
        return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.fields]

    def get(self, name: str) -> str | None:
        """Return the value of the first header called `name` (in lower case), None if there is none."""
        wanted = name.encode("latin-1")
        return next((value.decode("latin-1") for field, value in self.fields if field.lower() == wanted), None)

    def read_available(self) -> bytes:
        """Return the body bytes available, blocking until there are some; empty at the end.

        Raises OSError and BrokenResponse.
        """
        chunks = self._chunks
        while not chunks and (connection := self._connection) is not None:
            self._receive(connection)
        chunk = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        return chunk

    def peek(self, size: int) -> bytes:
        """Return the first `size` body bytes, fewer if the body is shorter, without consuming them.

        Raises GatewayError if the connection breaks.
        """
        try:
            while sum(map(len, self._chunks)) < size and self._connection is not None:
                self._receive(self._connection)
        except (OSError, BrokenResponse) as error:
            raise GatewayError("engine_unreachable", f"The engine's answer broke off: {error}.") from None
        return b"".join(self._chunks)[:size]

    def abort(self) -> None:
        """Shut the connection down, from any greenlet, so that the engine stops generating."""
        if self._connection is not None:
            self._connection.abort()

    def close(self) -> None:
        """Release the connection. Closing an incomplete response stops the generation."""
        self._release()

    # Called by the parser.

    def on_message_begin(self) -> None:
        """Reject a second response, which the parser would append to the first."""
        if self.complete:
            raise BrokenResponse("the engine answered twice")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.status_code = self._parser.get_status_code()
        if self.status_code >= 200:
            self._headers_complete = True
            if not self._has_body:
                self._end()

    def on_message_complete(self) -> None:
        if self.status_code >= 200:
            self._end()
        else:  # an interim response, which is not forwarded
            self.fields.clear()

    def _end(self) -> None:
        self.complete = True
        self._reusable = self._parser.should_keep_alive()

    def _read_head(self, connection: Connection) -> None:
        received = 0
        while not self._headers_complete:
            if received > MAX_HEAD_BYTES:
                raise BrokenResponse("the engine's headers have no end")
            try:
                data = connection.recv(BLOCK)
            except ConnectionResetError:
                data = b""
            if not data:
                raise BrokenResponse(TRUNCATED) if received else Unanswered("it closed the connection")
            received += len(data)
            self._feed(data)

    def _receive(self, connection: Connection) -> None:
        data = connection.recv(BLOCK)
        if data:
            self._feed(data)
        elif self._ends_with_connection:
            self.complete = True
            self._release()
        else:
            raise BrokenResponse(TRUNCATED)

    def _feed(self, data: bytes) -> None:
        """Parse received bytes. Bytes after a complete response are ignored, but then the connection is not reused."""
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if not self.complete:
                raise BrokenResponse(str(error)) from None
            self._reusable = False
        if self.complete:
            if self._chunks and not self._has_body:
                self._chunks.clear()
                self._reusable = False
            self._release()

    @property
    def _ends_with_connection(self) -> bool:
        """Whether only the end of the connection ends the body (RFC 9112 section 6.3)."""
        return self.get("content-length") is None and self.get("transfer-encoding") is None

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._parser = None
        if self._reusable:
            self._pool.put_idle(connection)
        else:
            self._pool.discard(connection)


class Hangup:
    """Cancels one relayed request, in whatever state. Callable from any greenlet, any number of times."""

    def __init__(self) -> None:
        self.called = False
        self._callback: Callable[[], None] | None = None

    def __call__(self) -> None:
        self.called = True
        if self._callback is not None:
            self._callback()

    def on_cancel(self, act: Callable[[], None]) -> None:
        """Set the callback that cancels the request from now on. Raises ClientGone if it was cancelled already."""
        self._callback = act
        if self.called:
            raise ClientGone


class Relay:
    """Sends requests to engines over pooled connections. `serving` returns the origins of all instances."""

    def __init__(
        self, timeout: float, network: Network | None = None, serving: Callable[[], Collection[str]] | None = None
    ) -> None:
        self._timeout = timeout
        self._network = network or Sockets(timeout)
        self._serving = serving
        self._pools: dict[str, Pool] = {}
        self._pruning = False
        self._closed = False

    def send(
        self,
        endpoint: Endpoint,
        method: str,
        target: str,
        headers: bytes,
        body: bytes,
        hangup: Hangup,
    ) -> EngineResponse:
        """Send a request and return the response once its headers are here. `target` is the path with its query,
        `headers` what `forwarded` returns.

        When an engine has closed an idle connection before the first byte of a response, the request is sent once more
        over a new connection. After a new connection it is never sent again, because the engine may have generated the
        whole answer. Raises GatewayError, and ClientGone once `hangup` was called.
        """
        request = _head(endpoint, method, target, headers, body) + body
        pool = self._pool(endpoint.origin)
        try:
            kept = pool.take_idle()
            if kept is not None:
                try:
                    return _exchange(pool, kept, request, method, hangup)
                except Unanswered:
                    if hangup.called or self._closed:
                        raise
            return _exchange(pool, pool.dial(), request, method, hangup)
        except TimeoutError:
            raise GatewayError("engine_timeout", f"The engine sent nothing for {self._timeout:.0f} s.") from None
        except PoolExhausted:
            raise GatewayError(
                "queue_full", f"The engine answers {CONNECTIONS_PER_ENGINE} requests already. Try again later.", 5
            ) from None
        except (OSError, BrokenResponse) as error:
            if hangup.called:
                raise ClientGone from None
            if self._closed:
                raise GatewayError(
                    "stopping", "Switchyard is stopping and aborted the answer. Send the request again.", 2
                ) from None
            raise GatewayError("engine_unreachable", f"The engine did not answer: {error}.") from None

    def close(self) -> None:
        """Break off every response and close idle connections, because the app shuts down."""
        self._closed = True
        for pool in self._pools.values():
            pool.shut_in_use()
            pool.close_idle()

    def _pool(self, origin: str) -> Pool:
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = Pool(origin, self._network)
            if not self._pruning:
                self._pruning = True
                self._network.call_later(PRUNE_SECONDS, self._prune)
        return pool

    def _prune(self) -> None:
        """Prune idle connections, and schedule the next run while there are any.

        All idle connections to an unloaded instance are closed: there will be no request to it.
        """
        serving = None if self._serving is None else self._serving()
        for origin, pool in list(self._pools.items()):
            if serving is None or origin in serving:
                pool.prune()
            else:
                pool.close_idle()
            if not pool.idle and not pool.in_use:
                del self._pools[origin]
        self._pruning = bool(self._pools)
        if self._pruning:
            self._network.call_later(PRUNE_SECONDS, self._prune)


def _exchange(pool: Pool, connection: Connection, request: bytes, method: str, hangup: Hangup) -> EngineResponse:
    """Send a request over a connection and read the head of its response. Raises Unanswered."""
    try:
        hangup.on_cancel(connection.abort)
        _send(connection, request)
    except BaseException:
        pool.discard(connection)
        raise
    answer = EngineResponse(connection, pool, method)
    try:
        hangup.on_cancel(answer.abort)
    except BaseException:
        answer.close()
        raise
    return answer


def _send(connection: Connection, request: bytes) -> None:
    """Send all bytes.

    If the engine closes the connection early, it may have sent an error response, which is read next.
    """
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(request)


class Body:
    """The body of a relayed response, as an iterable for a WSGI server.

    `on_begin` is called before the first chunk is yielded, `on_chunk` with every chunk, `on_close` on close. Not a
    generator itself, because `close` has to run even if nothing was iterated. To be iterated once.
    """

    def __init__(
        self,
        answer: EngineResponse,
        on_begin: Callable[[], None],
        on_chunk: Callable[[], object],
        on_close: Callable[[], None],
        error_tail: Callable[[str], bytes],
    ) -> None:
        self._answer = answer
        self._on_begin: Callable[[], None] | None = on_begin
        self._on_chunk = on_chunk
        self._on_close = on_close
        self._error_tail = error_tail
        self._over = False

    def __iter__(self) -> Iterator[bytes]:
        read, note_chunk = self._answer.read_available, self._on_chunk
        while not self._over:
            try:
                chunk = read()
            except (OSError, BrokenResponse) as error:
                self._over = True
                chunk = self._error_tail(str(error))
            if self._on_begin is not None:
                self._on_begin()
                self._on_begin = None
            if not chunk:
                return
            note_chunk()
            yield chunk

    def close(self) -> None:
        """Release the connection, however much was iterated."""
        self._over = True
        try:
            self._answer.close()
        finally:
            self._on_close()


def answer_fields(answer: EngineResponse) -> list[tuple[bytes, bytes]]:
    """Return the headers of a response that may be forwarded."""
    return [(name, value) for name, value in answer.fields if _describes(name)]


@lru_cache(maxsize=256)
def _describes(field: bytes) -> bool:
    """Return whether a header describes the response. Cached, because engines send the same few."""
    name = field.lower().decode("latin-1")
    return name in ANSWER_HEADERS or name.startswith(ANSWER_HEADER_FAMILIES)


def forwarded(headers: Iterable[tuple[str, str]]) -> bytes:
    """Return the lines of a request's headers that may be forwarded."""
    lines = [f"{name}: {value}\r\n" for name, value in headers if name.lower() not in NOT_FORWARDED]
    return "".join(lines).encode("latin-1")


def _head(endpoint: Endpoint, method: str, target: str, headers: bytes, body: bytes) -> bytes:
    if endpoint.base_path != API_PATH and target.startswith(f"{API_PATH}/"):
        target = endpoint.base_path + target.removeprefix(API_PATH)
    first = f"{method} {target} HTTP/1.1\r\nHost: {_host(endpoint.origin)}\r\n"
    for name, value in endpoint.headers.items():
        first += f"{name}: {value}\r\n"
    if body or method in ("POST", "PUT", "PATCH"):
        first += f"Content-Length: {len(body)}\r\n"
    return first.encode("latin-1") + headers + b"\r\n"


@lru_cache(maxsize=64)
def _host(origin: str) -> str:
    return urlsplit(origin).netloc
