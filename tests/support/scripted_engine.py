"""A fake engine that sends exactly the scripted bytes: replies, silence, closed connections, with or without TLS."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

TLS = Path(__file__).with_name("tls")
"""Keys without value: they prove that certificates are checked, and only the tests trust them."""
AUTHORITY = TLS / "authority.pem"


@dataclass(frozen=True)
class Reply:
    """What happens to one request: `data` is sent, then the connection is closed if `close` is set.

    With `unread` the reply is sent before the request's body is read.
    """

    data: bytes = b""
    close: bool = False
    unread: bool = False


@dataclass(frozen=True)
class Request:
    """A received request: its connection (counted from 0), request line and body."""

    connection: int
    line: str
    body: bytes


def answer(status: str = "200 OK", body: object = None, *headers: str) -> bytes:
    """A complete HTTP response; a body that isn't bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
    kind = "text/plain" if isinstance(body, bytes) else "application/json"
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


OK = Reply(answer())
DROP = Reply(close=True)


class ScriptedEngine:
    """Listens on loopback. Each request consumes the next reply; the last one repeats."""

    def __init__(self, *replies: Reply, tls: bool = False) -> None:
        self._replies = list(replies) or [OK]
        self._lock = threading.Lock()
        self._context = _context() if tls else None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.requests: list[Request] = []
        self.disconnected = threading.Event()
        """Set when a client has closed a connection."""
        scheme, host = ("https", "localhost") if tls else ("http", "127.0.0.1")
        self.origin = f"{scheme}://{host}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def lines(self) -> list[str]:
        return [request.line for request in self.requests]

    def close(self) -> None:
        for sock in (self._listener, *self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        with suppress(OSError):
            for number in range(10_000):
                sock, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(sock, number), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        with suppress(OSError):
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True)
            with sock:
                self._open.append(sock)
                while self._answer_one(sock, number):
                    pass
        self.disconnected.set()

    def _answer_one(self, sock: socket.socket, number: int) -> bool:
        head = b""
        while b"\r\n\r\n" not in head:
            piece = sock.recv(65_536)
            if not piece:
                return False
            head += piece
        head, _, body = head.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        with self._lock:
            reply = self._replies.pop(0) if len(self._replies) > 1 else self._replies[0]
        length = 0 if reply.unread else _length(lines)
        while len(body) < length:
            body += sock.recv(65_536)
        with self._lock:
            self.requests.append(Request(number, lines[0], body))
        sock.sendall(reply.data)
        return not reply.close


def _length(lines: Iterable[str]) -> int:
    fields = dict(line.lower().split(": ", 1) for line in list(lines)[1:])
    return int(fields.get("content-length", 0))


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "server.pem")
    return context
