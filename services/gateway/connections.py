"""Connections to engines: made, kept while they are idle, and closed.

What the relay needs of the world is the port `Network`, so that tests can put scripted engines and a virtual clock in
its place. A connection's own methods are called once per chunk of an answer: on a real one they are the socket's.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit

import certifi
import gevent
from gevent import socket as gevent_socket
from gevent import ssl

CONNECT_SECONDS = 5.0
CONNECTIONS_PER_ENGINE = 2048
"""Requests that one engine answers at a time: more than the web server lets in (`worker_connections`)."""
IDLE_PER_ENGINE = 64
IDLE_SECONDS = 60.0


class NoPlace(Exception):
    """An engine is answering as many requests as it may."""


class Connection(Protocol):
    """One connection to an engine. `recv` and `sendall` raise TimeoutError once the engine has been silent too long."""

    def recv(self, size: int, /) -> bytes:
        """Bytes that are here, waiting for some if none are; empty at the end. Raises OSError."""

    def sendall(self, data: bytes, /) -> None:
        """Raises OSError."""

    def shut(self) -> None:
        """End it, from any greenlet and without waiting: whoever reads from it gets the end."""

    def quiet(self) -> bool:
        """Whether an idle one can be used again: nothing has come, neither bytes nor the end. Doesn't wait."""

    def close(self) -> None: ...


class Network(Protocol):
    """What the relay needs of the world around it."""

    def dial(self, origin: str) -> Connection:
        """A new connection to an engine, such as `http://127.0.0.1:40123`. Raises OSError within CONNECT_SECONDS."""

    def now(self) -> float:
        """Monotonic seconds."""

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` in so many seconds, in a greenlet of its own."""


class Pool:
    """The connections to one engine: those in use, and idle ones for the next requests.

    Who takes one gives it back once, by `keep` or `drop`. Nothing here waits but `dial`.
    """

    def __init__(self, origin: str, network: Network) -> None:
        self._origin = origin
        self._network = network
        self._in_use: set[Connection] = set()
        self._dialing = 0
        self._idle: deque[tuple[Connection, float]] = deque()
        """With the time since when; the last one used is last, and the next one to be used."""

    @property
    def in_use(self) -> int:
        return len(self._in_use) + self._dialing

    @property
    def idle(self) -> int:
        return len(self._idle)

    def take(self) -> Connection | None:
        """A connection that was used before and can be used again; None where there is none."""
        while self._idle:
            connection, _ = self._idle.pop()
            if connection.quiet():
                self._in_use.add(connection)
                return connection
            connection.close()
        return None

    def dial(self) -> Connection:
        """A new connection, though there may be idle ones. Raises OSError, NoPlace."""
        if self.in_use >= CONNECTIONS_PER_ENGINE:
            raise NoPlace
        self._dialing += 1
        try:
            connection = self._network.dial(self._origin)
        finally:
            self._dialing -= 1
        self._in_use.add(connection)
        return connection

    def keep(self, connection: Connection) -> None:
        """A whole answer has come over it: it can be used again."""
        self._in_use.remove(connection)
        if len(self._idle) < IDLE_PER_ENGINE:
            self._idle.append((connection, self._network.now()))
        else:
            connection.close()

    def drop(self, connection: Connection) -> None:
        """It is of no use any more."""
        self._in_use.remove(connection)
        connection.close()

    def tidy(self) -> None:
        """Close the idle connections that the engine has closed, and those that nobody has used for a while.

        Only a request would notice that an engine hung up; to one that has ended there will be none, and each of its
        connections stayed half closed until the app ended.
        """
        oldest = self._network.now() - IDLE_SECONDS
        for connection, since in [self._idle.popleft() for _ in range(len(self._idle))]:
            if since > oldest and connection.quiet():
                self._idle.append((connection, since))
            else:
                connection.close()

    def close_idle(self) -> None:
        while self._idle:
            self._idle.pop()[0].close()

    def shut_used(self) -> None:
        """End those in use: whoever waits for an answer over one gives it back."""
        for connection in tuple(self._in_use):
            connection.shut()


class _Ours:
    """What a socket of gevent's lacks to be a `Connection`."""

    _sock: Any

    def shut(self) -> None:
        """The connection itself: a TLS socket would forget its session first, under the feet of whoever reads."""
        with suppress(OSError):
            gevent_socket.socket.shutdown(self, socket.SHUT_RDWR)

    def quiet(self) -> bool:
        """By the bytes on the wire, since a TLS socket refuses to peek at its own; gevent's never block."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False


class PlainConnection(_Ours, gevent_socket.socket):  # type: ignore[misc]
    """A connection over TCP."""


class TlsConnection(_Ours, ssl.SSLSocket):  # type: ignore[misc]
    """A connection over TLS."""


class Sockets:
    """The real network. `silence` is how many seconds an engine may say nothing."""

    def __init__(self, silence: float) -> None:
        self._silence = silence
        self._tls: Any = None

    def dial(self, origin: str) -> Connection:
        try:
            return self._dial(urlsplit(origin))
        except TimeoutError:  # not that of an engine that took the request and says nothing
            raise ConnectionError(f"it took no connection within {CONNECT_SECONDS:.0f} s") from None

    def now(self) -> float:
        return time.monotonic()

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        gevent.spawn_later(seconds, act)

    def _dial(self, address: SplitResult) -> Connection:
        host, secure = address.hostname or "127.0.0.1", address.scheme == "https"
        connection = _connect(host, address.port or (443 if secure else 80))
        try:
            if secure:
                connection = self._trusted().wrap_socket(connection, server_hostname=host)
            connection.settimeout(self._silence)
        except BaseException:
            connection.close()
            raise
        return connection  # type: ignore[no-any-return]

    def _trusted(self) -> Any:
        """Checks an engine's certificate, and whose it is, as the control plane does (`services.http.tls_context`)."""
        if self._tls is None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._tls.sslsocket_class = TlsConnection
            self._tls.load_default_certs()
            self._tls.load_verify_locations(certifi.where())
        return self._tls


def _connect(host: str, port: int) -> Any:
    """Raises OSError; the first address's, when a name has several and none takes a connection."""
    first: OSError | None = None
    for family, kind, protocol, _, address in gevent_socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
        connection = PlainConnection(family, kind, protocol)
        try:
            connection.settimeout(CONNECT_SECONDS)
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except BaseException as error:
            connection.close()
            if not isinstance(error, OSError):
                raise
            first = first or error
    raise first or ConnectionError(f"{host} has no address")
