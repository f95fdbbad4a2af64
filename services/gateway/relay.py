"""Sends one request to an instance and gives its answer as it arrives, its body unchanged.

The hot path of the data plane. The parser is llhttp, by httptools; reading whatever has arrived instead of waiting for
a full block is what a streamed token needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from services.engines.port import Endpoint
from services.gateway.connections import CONNECTIONS_PER_ENGINE, Connection, Network, NoPlace, Pool, Sockets
from services.gateway.router import ClientGone, GatewayError

BLOCK = 65_536
LONGEST_HEAD = 262_144
"""Bytes of an answer before its body, interim answers included."""
CUT = "the engine closed the connection in mid-answer"
TIDY_SECONDS = 5.0
"""How often idle connections are looked at: engines hang up on them, and end."""

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
"""RFC 9110 section 7.6.1: these belong to one connection and are never passed on."""
NOT_FORWARDED = HOP_BY_HOP | {
    "host",
    "content-length",
    "authorization",
    "x-api-key",
    "cookie",
    "accept-encoding",
    "origin",  # Ollama answers 403 to the ones it doesn't know; ours was checked at the door
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
"""What of an engine's answer is passed on: what describes it. An engine must not set cookies for this server, speak for
it to other sites (Access-Control-*), lead a browser away (Location, Refresh) or empty it (Clear-Site-Data)."""


class Unanswered(ConnectionError):
    """The engine closed the connection without a byte of an answer."""


class BrokenAnswer(Exception):
    """An engine's answer is malformed, or ends before it is whole."""


class EngineAnswer:
    """An engine's answer: `status_code`, `fields` (its headers as pairs of bytes), and its body as it arrives.

    Holds its connection until the answer is whole or broken off.
    """

    def __init__(self, connection: Connection, pool: Pool, method: str) -> None:
        """Wait for the headers. Raises OSError, BrokenAnswer and Unanswered; the connection is released then."""
        self.status_code = 0
        self.fields: list[tuple[bytes, bytes]] = []
        self.whole = False
        """Whether all of it has arrived, though not all of it may have been read yet."""
        self._connection: Connection | None = connection
        self._pool = pool
        self._has_body = method != "HEAD"
        self._headers_complete = False
        self._reusable = False
        """Whether the next request may be sent over the same connection."""
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append  # a builtin: the parser calls it once per chunk
        self._parser = HttpResponseParser(self)
        try:
            self._read_head(connection)
        except BaseException:
            self._release()
            raise

    @property
    def headers(self) -> list[tuple[str, str]]:
        return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.fields]

    def get(self, name: str) -> str | None:
        """The value of the first header called `name`, which is in lower case; None where there is none."""
        wanted = name.encode("latin-1")
        return next((value.decode("latin-1") for field, value in self.fields if field.lower() == wanted), None)

    def arrived(self) -> bytes:
        """Body bytes that are here, waiting for some if none are; empty at the end. Raises OSError, BrokenAnswer."""
        pieces = self._pieces
        while not pieces and self._connection is not None:
            self._receive(self._connection)
        chunk = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return chunk

    def beginning(self, size: int) -> bytes:
        """The first `size` bytes of the body, fewer when it ends before; `arrived` still returns them.

        Raises GatewayError when the answer breaks off.
        """
        try:
            while sum(map(len, self._pieces)) < size and self._connection is not None:
                self._receive(self._connection)
        except (OSError, BrokenAnswer) as error:
            raise GatewayError("engine_unreachable", f"The engine's answer broke off: {error}.") from None
        return b"".join(self._pieces)[:size]

    def abort(self) -> None:
        """Close the connection, from any greenlet: the engine notices and stops generating."""
        if self._connection is not None:
            self._connection.shut()

    def break_off(self) -> None:
        """Release the connection. One in the middle of an answer is closed, which stops the generation."""
        self._release()

    # Called by the parser.

    def on_message_begin(self) -> None:
        """The parser would go on with a second answer as if it belonged to the first."""
        if self.whole:
            raise BrokenAnswer("the engine answered twice")

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
        else:  # an interim answer, which is not passed on
            self.fields.clear()

    def _end(self) -> None:
        self.whole = True
        self._reusable = self._parser.should_keep_alive()

    def _read_head(self, connection: Connection) -> None:
        came = 0
        while not self._headers_complete:
            if came > LONGEST_HEAD:
                raise BrokenAnswer("the engine's headers have no end")
            try:
                data = connection.recv(BLOCK)
            except ConnectionResetError:
                data = b""
            if not data:
                raise BrokenAnswer(CUT) if came else Unanswered("it closed the connection")
            came += len(data)
            self._feed(data)

    def _receive(self, connection: Connection) -> None:
        data = connection.recv(BLOCK)
        if data:
            self._feed(data)
        elif self._ends_with_connection:
            self.whole = True
            self._release()
        else:
            raise BrokenAnswer(CUT)

    def _feed(self, data: bytes) -> None:
        """Parse what has arrived. Bytes after a whole answer belong to no request: they close the connection."""
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if not self.whole:
                raise BrokenAnswer(str(error)) from None
            self._reusable = False
        if self.whole:
            if self._pieces and not self._has_body:
                self._pieces.clear()
                self._reusable = False
            self._release()

    @property
    def _ends_with_connection(self) -> bool:
        """Whether nothing but the end of the connection ends the body (RFC 9112 section 6.3)."""
        return self.get("content-length") is None and self.get("transfer-encoding") is None

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._reusable:
            self._pool.keep(connection)
        else:
            self._pool.drop(connection)


class Hangup:
    """Breaks a request off wherever it is. Called from any greenlet, at any time, once or more."""

    def __init__(self) -> None:
        self.called = False
        self._act: Callable[[], None] | None = None

    def __call__(self) -> None:
        self.called = True
        if self._act is not None:
            self._act()

    def applies_to(self, act: Callable[[], None]) -> None:
        """What has to be done to break it off from now on. Raises ClientGone when it was already."""
        self._act = act
        if self.called:
            raise ClientGone


class Relay:
    """Sends requests to engines over kept connections. `serving` are the origins of the instances there are."""

    def __init__(
        self, timeout: float, network: Network | None = None, serving: Callable[[], Collection[str]] | None = None
    ) -> None:
        self._timeout = timeout
        self._network = network or Sockets(timeout)
        self._serving = serving
        self._pools: dict[str, Pool] = {}
        self._tidying = False
        self._closed = False

    def send(
        self,
        endpoint: Endpoint,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]],
        body: bytes,
        hangup: Hangup,
    ) -> EngineAnswer:
        """Pass one request on and return once the answer's headers are here. Raises GatewayError.

        `target` is the path with its query. An idle connection that the engine closed meanwhile, without a byte of an
        answer, is replaced once by a new one. What a new one was told is never said again: the engine that closes it
        may have generated the whole answer. Raises ClientGone once `hangup` was called.
        """
        request = _head(endpoint, method, target, headers, body) + body
        pool = self._pool(endpoint.origin)
        try:
            kept = pool.take()
            if kept is not None:
                try:
                    return _ask(pool, kept, request, method, hangup)
                except Unanswered:
                    if hangup.called or self._closed:
                        raise
            return _ask(pool, pool.dial(), request, method, hangup)
        except TimeoutError:
            raise GatewayError("engine_timeout", f"The engine said nothing for {self._timeout:.0f} s.") from None
        except NoPlace:
            raise GatewayError(
                "queue_full", f"The engine answers {CONNECTIONS_PER_ENGINE} requests already. Try again later.", 5
            ) from None
        except (OSError, BrokenAnswer) as error:
            if hangup.called:
                raise ClientGone from None
            if self._closed:
                raise GatewayError("stopping", "Switchyard stops, and broke the answer off. Ask again.", 2) from None
            raise GatewayError("engine_unreachable", f"The engine did not answer: {error}.") from None

    def close(self) -> None:
        """Break every answer off, and close what is idle: the app goes."""
        self._closed = True
        for pool in self._pools.values():
            pool.shut_used()
            pool.close_idle()

    def _pool(self, origin: str) -> Pool:
        pool = self._pools.get(origin)
        if pool is None:
            pool = self._pools[origin] = Pool(origin, self._network)
            if not self._tidying:
                self._tidying = True
                self._network.later(TIDY_SECONDS, self._tidy)
        return pool

    def _tidy(self) -> None:
        """Look at every idle connection, again and again as long as there are any. Those to an instance that was
        unloaded are closed: nobody will ask there again."""
        serving = None if self._serving is None else self._serving()
        for origin, pool in list(self._pools.items()):
            if serving is None or origin in serving:
                pool.tidy()
            else:
                pool.close_idle()
            if not pool.idle and not pool.in_use:
                del self._pools[origin]
        self._tidying = bool(self._pools)
        if self._tidying:
            self._network.later(TIDY_SECONDS, self._tidy)


def _ask(pool: Pool, connection: Connection, request: bytes, method: str, hangup: Hangup) -> EngineAnswer:
    """Raises Unanswered when the engine closed the connection without a byte of an answer."""
    try:
        hangup.applies_to(connection.shut)
        _send(connection, request)
    except BaseException:
        pool.drop(connection)
        raise
    answer = EngineAnswer(connection, pool, method)
    try:
        hangup.applies_to(answer.abort)
    except BaseException:
        answer.break_off()
        raise
    return answer


def _send(connection: Connection, request: bytes) -> None:
    """Send it all. An engine that hangs up in the middle may have said why: what it said, if anything, is read next."""
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(request)


class Body:
    """The body of a relayed answer, for a WSGI server to iterate.

    `on_begin` is called before the first of it is handed on, `on_piece` with each piece, `on_close` when it was closed.
    A class and not a generator: `close` has to run even when nothing was iterated.
    """

    def __init__(
        self,
        answer: EngineAnswer,
        on_begin: Callable[[], None],
        on_piece: Callable[[], object],
        on_close: Callable[[], None],
        error_tail: Callable[[str], bytes],
    ) -> None:
        self._answer = answer
        self._on_begin: Callable[[], None] | None = on_begin
        self._on_piece = on_piece
        self._on_close = on_close
        self._error_tail = error_tail
        self._over = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self._over:
            raise StopIteration
        try:
            chunk = self._answer.arrived()
        except (OSError, BrokenAnswer) as error:
            self._over = True
            chunk = self._error_tail(str(error))
        if self._on_begin is not None:
            self._on_begin()
            self._on_begin = None
        if not chunk:
            raise StopIteration
        self._on_piece()
        return chunk

    def close(self) -> None:
        """Give everything back, however much of it was iterated."""
        self._over = True
        try:
            self._answer.break_off()
        finally:
            self._on_close()


def answer_fields(answer: EngineAnswer) -> list[tuple[bytes, bytes]]:
    """The headers of an answer that may be passed on."""
    return [(name, value) for name, value in answer.fields if _describes(name)]


@lru_cache(maxsize=256)
def _describes(field: bytes) -> bool:
    """Whether a header describes an answer. Remembered: engines send the same few."""
    name = field.lower().decode("latin-1")
    return name in ANSWER_HEADERS or name.startswith(ANSWER_HEADER_FAMILIES)


def _head(endpoint: Endpoint, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", f"Host: {urlsplit(endpoint.origin).netloc}"]
    lines += [f"{name}: {value}" for name, value in headers if name.lower() not in NOT_FORWARDED]
    lines += [f"{name}: {value}" for name, value in endpoint.headers.items()]
    if body or method in ("POST", "PUT", "PATCH"):
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
