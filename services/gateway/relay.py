"""Bytes through: one request to an instance, its answer passed on unchanged and as it comes.

The data plane's hot path. The parser (llhttp) and the pool are geventhttpclient's; what is ours reads whatever has
arrived instead of waiting for a full block, which is what a streamed token needs.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

import certifi
from gevent import socket as gevent_socket
from gevent import spawn_later, ssl
from geventhttpclient.connectionpool import ConnectionPool
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError, HTTPSocketPoolResponse

from services.engines.port import Endpoint
from services.gateway.router import ClientGone, GatewayError

CONNECT_SECONDS = 5.0
CONNECTIONS_PER_ENGINE = 1024
BLOCK = 65_536
POOLS_KEPT = 64
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


class Connection(gevent_socket.socket):  # type: ignore[misc]
    """A connection to an engine. `answered`: a whole answer has come over it, so that it is used again."""

    answered = False


class Pool(ConnectionPool):  # type: ignore[misc]
    """Idle connections to one engine."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        super().__init__(
            host,
            port,
            host,
            port,
            size=CONNECTIONS_PER_ENGINE,
            connection_timeout=CONNECT_SECONDS,
            network_timeout=timeout,
        )

    def new_socket(self) -> socket.socket:
        """A new connection, though there may be idle ones. Raises OSError."""
        self._semaphore.acquire()
        try:
            return self._create_socket()  # type: ignore[no-any-return]
        except BaseException:
            self._semaphore.release()
            raise

    def tidy(self) -> bool:
        """Close the idle connections that the engine has closed; whether any connection is left.

        Only a request would notice, and to an engine that has ended there will be none: each of its connections stayed
        half closed until the app ended.
        """
        idle = [self._socket_queue.get(block=False) for _ in range(self._socket_queue.qsize())]
        for sock in reversed(idle):  # the last one used comes first, and has to again
            if self._is_socket_alive(sock):
                self._socket_queue.put(sock)
            else:
                sock.close()
        return bool(self._socket_queue.qsize()) or self._semaphore.counter < self.size

    def return_socket(self, sock: Connection) -> None:
        sock.answered = True
        super().return_socket(sock)

    def after_connect(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _create_tcp_socket(self, family: int, kind: int, protocol: int) -> Connection:
        return Connection(family, kind, protocol)

    def _is_socket_alive(self, sock: socket.socket) -> bool:
        """A healthy idle connection has nothing to read; the library asks `select`, which costs a turn of the hub."""
        try:
            sock.settimeout(0.0)
            Connection.recv(sock, 1, socket.MSG_PEEK)  # the bytes on the wire: a TLS socket refuses to peek at its own
        except BlockingIOError:
            sock.settimeout(self.network_timeout)
            return True
        except OSError:
            pass
        return False


class TlsPool(Pool):
    """Idle connections to one engine behind TLS, whose certificate has to be one that this machine trusts."""

    def __init__(self, host: str, port: int, timeout: float) -> None:
        super().__init__(host, port, timeout)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the certificate, and whose it is
        self._context.load_default_certs()
        self._context.load_verify_locations(certifi.where())  # as the control plane trusts: `services.http.tls_context`

    def _connect_socket(self, sock: Connection, address: tuple[object, ...]) -> socket.socket:
        sock.connect(address)
        return self._context.wrap_socket(sock, server_hostname=self._request_host)  # type: ignore[no-any-return]


class Answer(HTTPSocketPoolResponse):  # type: ignore[misc]
    """An engine's answer, its body as it arrives."""

    def __init__(self, sock: socket.socket, pool: Pool, method: str) -> None:
        self._ended_early = False
        super().__init__(sock, pool=pool, block_size=BLOCK, method=method)

    def arrived(self) -> bytes:
        """Body bytes that are here, waiting for some if none are; empty at the end. Raises OSError, HTTPParseError."""
        while not self._body_buffer and not self.message_complete and self._sock is not None:
            self._receive()
        chunk = bytes(self._body_buffer)
        self._body_buffer.clear()
        return chunk

    def beginning(self, size: int) -> bytes:
        """The first `size` bytes of the body, fewer when it ends before; `arrived` still gives them.

        Raises GatewayError when it breaks off.
        """
        try:
            while len(self._body_buffer) < size and not self.message_complete and self._sock is not None:
                self._receive()
        except (OSError, HTTPParseError) as error:
            raise GatewayError("engine_unreachable", f"The engine's answer broke off: {error}.") from None
        return bytes(self._body_buffer[:size])

    def abort(self) -> None:
        """Close the connection, from any greenlet: the engine notices and stops generating."""
        if self._sock is not None:
            _shut(self._sock)

    def break_off(self) -> None:
        """Give the connection back. An answer that was left in the middle is aborted, which stops the generation."""
        if not self.message_complete:
            self.abort()
            self.release()

    def _receive(self) -> None:
        data = self._sock.recv(BLOCK)
        self.feed(data)
        if not data and not self.message_complete:
            self.release()
            raise HTTPParseError("the engine closed the connection in mid-answer")


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
    """Sends requests to engines over kept connections."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._lock = threading.Lock()
        self._pools: dict[str, Pool] = {}
        self._tidying = False

    def send(
        self,
        endpoint: Endpoint,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]],
        body: bytes,
        hangup: Hangup,
    ) -> Answer:
        """Pass one request on and return once the answer's headers are here. Raises GatewayError.

        `target` is the path with its query. An idle connection that the engine closed meanwhile, without a byte of an
        answer, is replaced once by a new one. What a new one was told is never said again: the engine that closes it
        may have generated the whole answer. Raises ClientGone once `hangup` was called.
        """
        request = _head(endpoint, method, target, headers, body) + body
        pool = self._pool(endpoint.origin)
        try:
            sock = pool.get_socket()
            used_before = getattr(sock, "answered", False)  # a TLS socket that is new has no such attribute
            try:
                return self._ask(pool, sock, request, method, hangup)
            except HTTPConnectionClosed:
                if not used_before:
                    raise
            return self._ask(pool, pool.new_socket(), request, method, hangup)
        except TimeoutError:
            raise GatewayError("engine_timeout", f"The engine said nothing for {self._timeout:.0f} s.") from None
        except (OSError, HTTPParseError) as error:
            if hangup.called:
                raise ClientGone from None
            raise GatewayError("engine_unreachable", f"The engine did not answer: {error}.") from None

    def forget(self, origin: str) -> None:
        """Close the idle connections to an engine that is gone."""
        with self._lock:
            pool = self._pools.pop(origin, None)
        if pool is not None:
            pool.close()

    def _ask(self, pool: Pool, sock: socket.socket, request: bytes, method: str, hangup: Hangup) -> Answer:
        """Raises HTTPConnectionClosed when the engine closed the connection without a byte of an answer."""
        try:
            hangup.applies_to(lambda: _shut(sock))
            _send(sock, request)
        except BaseException:
            pool.release_socket(sock)
            raise
        answer = Answer(sock, pool, method)
        hangup.applies_to(answer.abort)
        return answer

    def _pool(self, origin: str) -> Pool:
        pool = self._pools.get(origin)
        if pool is None:
            with self._lock:
                if len(self._pools) >= POOLS_KEPT:
                    self._pools.pop(next(iter(self._pools))).close()
                pool = self._pools.setdefault(origin, _pool_for(urlsplit(origin), self._timeout))
                if not self._tidying:
                    self._tidying = True
                    spawn_later(TIDY_SECONDS, self._tidy)
        return pool

    def _tidy(self) -> None:
        """Look at every idle connection, again and again as long as there are any."""
        with self._lock:
            self._pools = {origin: pool for origin, pool in self._pools.items() if pool.tidy()}
            self._tidying = bool(self._pools)
            if self._tidying:
                spawn_later(TIDY_SECONDS, self._tidy)


def _pool_for(address: SplitResult, timeout: float) -> Pool:
    host = address.hostname or "127.0.0.1"
    if address.scheme == "https":
        return TlsPool(host, address.port or 443, timeout)
    return Pool(host, address.port or 80, timeout)


def _send(sock: socket.socket, request: bytes) -> None:
    """Send it all. An engine that hangs up in the middle may have said why: what it said, if anything, is read next."""
    with suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(request)


class Body:
    """The body of a relayed answer, for a WSGI server to iterate.

    A class and not a generator: `close` has to run even when nothing was iterated.
    """

    def __init__(self, answer: Answer, on_close: Callable[[], None], error_tail: Callable[[str], bytes]) -> None:
        self._answer = answer
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
        except (OSError, HTTPParseError) as error:
            self._over = True
            chunk = self._error_tail(str(error))
        if not chunk:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Give everything back, however much of it was iterated."""
        self._over = True
        self._answer.break_off()
        self._on_close()


def _shut(sock: socket.socket) -> None:
    """The connection itself: a TLS socket would forget its session first, under the feet of whoever reads from it."""
    with suppress(OSError):
        gevent_socket.socket.shutdown(sock, socket.SHUT_RDWR)


def answer_headers(answer: Answer) -> list[tuple[str, str]]:
    """The headers of an answer that may be passed on."""
    return [(name, value) for name, value in answer.headers if name.lower() not in HOP_BY_HOP]


def _head(endpoint: Endpoint, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", f"Host: {urlsplit(endpoint.origin).netloc}"]
    lines += [f"{name}: {value}" for name, value in headers if name.lower() not in NOT_FORWARDED]
    lines += [f"{name}: {value}" for name, value in endpoint.headers.items()]
    if body or method in ("POST", "PUT", "PATCH"):
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
