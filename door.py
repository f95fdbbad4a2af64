"""Who may hold a connection, and for how long without sending anything of use.

gunicorn waits 75 s for a request's head and for ever for its body, and takes its connections from whoever comes first:
two thousand slow or idle ones, from one machine, kept everybody else out.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gevent.socket import socket as GeventSocket
from gevent.socket import wait_read

HEAD_SECONDS = 10.0
"""From the first byte of a request to the end of its head."""
BODY_BYTES_PER_SECOND = 1000
BODY_SECONDS = 10.0
"""What a body may take besides, for a client that thinks before it sends."""
SEND_SECONDS = 60.0
"""For which a client may take nothing of its answer."""
REFUSED_SECONDS = 1.0
"""For which one that is sent away may go on sending."""
SHARE = 0.75
"""Of all connections, how many one address may have: a proxy, or the browsers of this machine, have them all."""


_WORDS = b'{"status": "error", "error": "too_many_connections", "message": "Too many connections. Try again later."}\n'
FULL = b"\r\n".join(
    [
        b"HTTP/1.1 503 Service Unavailable",
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(_WORDS),
        b"Retry-After: 5",
        b"Connection: close",
        b"",
        _WORDS,
    ]
)


class ClientSocket(GeventSocket):  # type: ignore[misc]
    """A client's connection. One that sends its request too slowly has closed it, as far as its reader can tell; in
    the middle of a body it raises TimeoutError, so that it can be told.

    `read_before` is what was read from it already.
    """

    def __init__(self, descriptor: int, read_before: bytes = b"", clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(fileno=descriptor)
        self._clock = clock
        self._read_before = read_before
        self._body = False
        self._since: float | None = None
        """When the head or body that is being read began; None while nothing of a head has come."""
        self._came = 0
        self.timeout = SEND_SECONDS

    def expect_head(self) -> None:
        """The next request is waited for."""
        self._body, self._since = False, None

    def expect_body(self) -> None:
        """What comes is the body of the request that was read."""
        self._body, self._since, self._came = True, self._clock(), 0

    def recv(self, *args: Any) -> bytes:
        if self._read_before and (before := self._take_read_before(args[0])):
            return before
        self.timeout = self._patience()
        try:
            data: bytes = super().recv(*args)
        except TimeoutError:
            if self._body:
                raise TimeoutError(f"less than {BODY_BYTES_PER_SECOND} bytes of it came in a second") from None
            return b""
        finally:
            self.timeout = SEND_SECONDS
        self._came += len(data)
        if self._since is None:
            self._since = self._clock()
        return data

    def _take_read_before(self, size: int) -> bytes:
        taken, self._read_before = self._read_before[:size], self._read_before[size:]
        return taken

    def _patience(self) -> float | None:
        """Seconds for which the next bytes may be waited for; None between two requests, where gunicorn has a limit."""
        if self._since is None:
            return None
        allowed = BODY_SECONDS + self._came / BODY_BYTES_PER_SECOND if self._body else HEAD_SECONDS
        return max(0.01, self._since + allowed - self._clock())

    def refuse(self) -> None:
        """Send it away with an answer. That would be lost if its request lay unread when the connection is closed."""
        with suppress(OSError):
            self._sock.send(FULL, socket.MSG_DONTWAIT)
            self._sock.shutdown(socket.SHUT_WR)
            wait_read(self.fileno(), REFUSED_SECONDS)
            self._sock.recv(65_536, socket.MSG_DONTWAIT)
        self.close()

    def hang_up(self) -> None:
        """End it, from any greenlet: whoever reads from it finds it closed."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


class Door:
    """Keeps room for whoever comes next: `most` connections, and of those a share from one address.

    Where there is none, the client goes that has kept us waiting longest, for a request or the rest of one. One that is
    being answered never does. Clients are anything with `hang_up`.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._share = max(1, int(most * SHARE))
        self._addresses: dict[Any, str] = {}
        self._count: Counter[str] = Counter()
        self._waited_for: dict[str, dict[Any, None]] = {}
        """By address, the one that we have waited for longest first."""

    def enter(self, client: Any, address: str) -> bool:
        """Let a client in, and wait for it; False when there is no room for it."""
        if self._count[address] >= self._share:
            room = self._send_off(address)
        else:
            room = len(self._addresses) < self._most or self._send_off(self._crowded())
        if room:
            self._addresses[client] = address
            self._count[address] += 1
            self.wait_for(client)
        return room

    def leave(self, client: Any) -> None:
        """A client has gone. May be called twice."""
        address = self._addresses.pop(client, None)
        if address is not None:
            self._count[address] -= 1
            self._stop_waiting(client, address)
            if not self._count[address]:
                del self._count[address]

    def wait_for(self, client: Any) -> None:
        """It is the client's turn, to send a request."""
        if client in self._addresses:
            self._waited_for.setdefault(self._addresses[client], {}).setdefault(client)

    def answer(self, client: Any) -> None:
        """A whole request is here."""
        if client in self._addresses:
            self._stop_waiting(client, self._addresses[client])

    def _stop_waiting(self, client: Any, address: str) -> None:
        waiting = self._waited_for.get(address, {})
        waiting.pop(client, None)
        if not waiting:
            self._waited_for.pop(address, None)

    def _crowded(self) -> str:
        """The address with the most connections, of those where somebody is waited for."""
        return max(self._waited_for, key=self._count.__getitem__, default="")

    def _send_off(self, address: str) -> bool:
        """Make room among an address's clients. Whether that was possible."""
        client = next(iter(self._waited_for.get(address, ())), None)
        if client is None:
            return False
        self.leave(client)
        client.hang_up()
        return True
