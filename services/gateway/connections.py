"""Connections to engines: opened, kept while idle, reused and closed.

The relay reaches the network through the port `Network`, so that tests can use scripted engines and a virtual clock.
`recv` and `sendall` run once per chunk of an answer; on a real connection they are the socket's own methods.
"""

from __future__ import annotations

import ipaddress
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

from services.host_lookup import look_up

CONNECT_SECONDS = 5.0
CONNECTIONS_PER_ENGINE = 2048
"""Limit of concurrent requests to one engine; above the web server's limit of clients (`worker_connections`)."""
IDLE_PER_ENGINE = 64
IDLE_SECONDS = 60.0


class PoolExhausted(Exception):
    """An engine already has CONNECTIONS_PER_ENGINE requests in flight."""


class Connection(Protocol):
    """One connection to an engine.

    `recv` and `sendall` raise TimeoutError when the engine sends nothing for too long.
    """

    def recv(self, size: int, /) -> bytes:
        """Return available bytes, blocking until there are some; empty at the end. Raises OSError."""

    def sendall(self, data: bytes, /) -> None:
        """Send all bytes. Raises OSError."""

    def abort(self) -> None:
        """Shut the connection down from any greenlet without blocking; a blocked `recv` then returns the end."""

    def is_reusable(self) -> bool:
        """Return whether an idle connection has received nothing, neither bytes nor the end. Never blocks."""

    def close(self) -> None: ...


class Network(Protocol):
    """The operations the relay needs: dial, clock, timer."""

    def dial(self, origin: str) -> Connection:
        """Open a connection to an origin such as `http://127.0.0.1:40123`. Raises OSError within CONNECT_SECONDS."""

    def now(self) -> float:
        """Return monotonic seconds."""

    def call_later(self, seconds: float, act: Callable[[], None]) -> None:
        """Call `act` after `seconds`, in a greenlet of its own."""


class Pool:
    """The connections to one engine: in use, and idle for later requests.

    Each connection taken is returned exactly once, by `put_idle` or `discard`. Only `dial` blocks.
    """

    def __init__(self, origin: str, network: Network) -> None:
        self._origin = origin
        self._network = network
        self._in_use: set[Connection] = set()
        self._dialing = 0
        self._idle: deque[tuple[Connection, float]] = deque()
        """Each with the time it became idle (monotonic seconds), the most recently used last; that one is reused first.
        """

    @property
    def in_use(self) -> int:
        return len(self._in_use) + self._dialing

    @property
    def idle(self) -> int:
        return len(self._idle)

    def take_idle(self) -> Connection | None:
        """Take a reusable idle connection, None if there is none."""
        while self._idle:
            connection, _ = self._idle.pop()
            if connection.is_reusable():
                self._in_use.add(connection)
                return connection
            connection.close()
        return None

    def dial(self) -> Connection:
        """Open a new connection, even if there are idle ones. Raises OSError and PoolExhausted."""
        if self.in_use >= CONNECTIONS_PER_ENGINE:
            raise PoolExhausted
        self._dialing += 1
        try:
            connection = self._network.dial(self._origin)
        finally:
            self._dialing -= 1
        self._in_use.add(connection)
        return connection

    def put_idle(self, connection: Connection) -> None:
        """Return a connection after a complete response, for reuse."""
        self._in_use.remove(connection)
        if len(self._idle) < IDLE_PER_ENGINE:
            self._idle.append((connection, self._network.now()))
        else:
            connection.close()

    def discard(self, connection: Connection) -> None:
        """Close a connection that can't be reused."""
        self._in_use.remove(connection)
        connection.close()

    def prune(self) -> None:
        """Close idle connections that the engine has closed or that have been idle for IDLE_SECONDS.

        Otherwise only the next request would notice a closed one. There is none after an engine has ended: its
        connections stayed in CLOSE-WAIT until the app ended (198 to 941 descriptors over five loads).
        """
        oldest = self._network.now() - IDLE_SECONDS
        for connection, since in [self._idle.popleft() for _ in range(len(self._idle))]:
            if since > oldest and connection.is_reusable():
                self._idle.append((connection, since))
            else:
                connection.close()

    def close_idle(self) -> None:
        while self._idle:
            self._idle.pop()[0].close()

    def shut_in_use(self) -> None:
        """Shut down all connections in use; their readers then discard them."""
        for connection in tuple(self._in_use):
            connection.abort()


class _ConnectionMixin:
    """What a gevent socket lacks to be a `Connection`."""

    _sock: Any

    def abort(self) -> None:
        """Shut down the TCP connection.

        SSLSocket.shutdown would drop the TLS session while another greenlet reads from it.
        """
        with suppress(OSError):
            gevent_socket.socket.shutdown(self, socket.SHUT_RDWR)

    def is_reusable(self) -> bool:
        """Peek at the raw socket, because SSLSocket refuses MSG_PEEK; gevent's sockets are non-blocking."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False


class PatientSocket(gevent_socket.socket):  # type: ignore[misc]
    """A gevent socket whose reads share one timer: gevent creates and starts one for every read.

    Nearly every wait ends before its timeout. So a wait only notes until when it lasts; the timer goes on, and when it
    ends before the wait, it is started again for the rest.
    """

    _timer: Any = None
    _timer_ends: float | None = None
    """Monotonic time at which the timer ends; None while it does not run."""
    _reader: Any = None
    """The greenlet that waits, if one does."""
    _waits_until = 0.0

    def wait_readable(self, seconds: float) -> None:
        """Block until there is something to read, or the end. Raises TimeoutError after `seconds`."""
        self._waits_until = until = time.monotonic() + seconds
        if self._timer_ends is None or until < self._timer_ends:
            self._start_timer(seconds)
        self._reader = gevent.getcurrent()
        try:
            self.hub.wait(self._read_event)
        finally:
            self._reader = None

    def close(self) -> None:
        self._stop_timer()  # it refers to this socket
        super().close()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer_ends = time.monotonic() + seconds
        self._timer = self.hub.loop.timer(seconds, ref=False)
        self._timer.start(self._on_timer)

    def _stop_timer(self) -> None:
        timer, self._timer, self._timer_ends = self._timer, None, None
        if timer is not None:
            timer.stop()
            timer.close()

    def _on_timer(self) -> None:
        self._stop_timer()
        if self._reader is None:
            return
        left = self._waits_until - time.monotonic()
        if left > 0:
            self._start_timer(left)
        else:
            self._reader.throw(TimeoutError("timed out"))


class PlainConnection(_ConnectionMixin, PatientSocket):
    """TCP connection."""

    def recv(self, size: int) -> bytes:
        """Let other greenlets run first: a fast stream can't keep them waiting, and more of it has arrived by then."""
        self.wait_readable(self.timeout)
        try:
            data: bytes = self._sock.recv(size)
        except BlockingIOError:  # nothing has come after all
            data = super().recv(size)
        return data


class TlsConnection(_ConnectionMixin, ssl.SSLSocket):  # type: ignore[misc]
    """TLS connection."""


class Sockets:
    """The real network. `read_timeout` is how many seconds an engine may send nothing."""

    def __init__(self, read_timeout: float) -> None:
        self._read_timeout = read_timeout
        self._tls: Any = None

    def dial(self, origin: str) -> Connection:
        try:
            return self._dial(urlsplit(origin))
        except TimeoutError:  # told apart from the read timeout of an engine that has accepted the request
            raise ConnectionError(f"it accepted no connection within {CONNECT_SECONDS:.0f} s") from None

    def now(self) -> float:
        return time.monotonic()

    def call_later(self, seconds: float, act: Callable[[], None]) -> None:
        gevent.spawn_later(seconds, act)

    def _dial(self, address: SplitResult) -> Connection:
        host, secure = address.hostname or "127.0.0.1", address.scheme == "https"
        connection = _connect(host, address.port or (443 if secure else 80))
        try:
            if secure:
                connection = self._trusted().wrap_socket(connection, server_hostname=host)
            connection.settimeout(self._read_timeout)
        except BaseException:
            connection.close()
            raise
        return connection  # type: ignore[no-any-return]

    def _trusted(self) -> Any:
        """Return a context that verifies certificates and host names, like `services.http.tls_context`."""
        if self._tls is None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            self._tls.sslsocket_class = TlsConnection
            self._tls.load_default_certs()
            self._tls.load_verify_locations(certifi.where())
        return self._tls


def _connect(host: str, port: int) -> Any:
    """Connect to the first address of `host` that accepts. Raises the first address's OSError if none does."""
    first: OSError | None = None
    for family, address in _addresses(host, port):
        connection = PlainConnection(family, socket.SOCK_STREAM)
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


def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    """Families and addresses of a host. Raises OSError within CONNECT_SECONDS, however long the resolver takes."""
    with suppress(ValueError):  # an address already: no resolver is asked
        version = ipaddress.ip_address(host).version
        return [(socket.AF_INET if version == 4 else socket.AF_INET6, (host, port))]
    lookup = look_up(host, port)
    if not lookup.over.wait(CONNECT_SECONDS):
        raise TimeoutError
    if lookup.error is not None:
        raise lookup.error
    return lookup.addresses
