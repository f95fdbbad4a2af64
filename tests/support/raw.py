"""An HTTP client over a plain socket that sends exactly the given bytes."""

from __future__ import annotations

import socket
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from tests.support.console import TIMEOUT


@dataclass(frozen=True)
class Response:
    """One HTTP response; `interim` are the statuses of the interim responses before it, `rest` the bytes after it."""

    status: int
    headers: dict[str, str]
    body: bytes
    interim: tuple[int, ...] = ()
    rest: bytes = b""


class Raw:
    """A connection to a server on this machine."""

    def __init__(self, port: int, address: str = "127.0.0.1") -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT, source_address=(address, 0))
        self._came = b""

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _b: TracebackType | None) -> None:
        self.close()

    def send_head(self, *lines: str) -> None:
        """Send a request's head."""
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n")

    def send(self, data: bytes) -> None:
        """Send bytes; errors of a server that has already closed the connection are ignored."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(data)

    def half_close(self) -> None:
        """Close the sending side and keep reading."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()

    def receive(self) -> bytes:
        """The bytes received, waiting for some; empty at the end."""
        try:
            return self._socket.recv(65_536)
        except ConnectionResetError:
            return b""

    def response(self) -> Response:
        """Read the next response; to the end of the connection if its headers send_head so."""
        interim: list[int] = []
        while True:
            head = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
            status = int(head[0].split()[1])
            if status >= 200:
                break
            interim.append(status)
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:] if line)}
        if "content-length" in headers:
            body = self._exactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            body = self._chunks()
        else:
            body = self._to_the_end()
        rest = self._to_the_end() if headers.get("connection") == "close" else b""
        return Response(status, headers, body, tuple(interim), rest)

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._came:
            piece = self.receive()
            if not piece:
                raise AssertionError(f"the connection ended after {self._came!r}")
            self._came += piece
        found, _, self._came = self._came.partition(mark)
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self._came) < size:
            piece = self.receive()
            if not piece:
                raise AssertionError(f"the connection ended {size - len(self._came)} bytes early")
            self._came += piece
        found, self._came = self._came[:size], self._came[size:]
        return found

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self._until(b"\r\n"), 16):
            body += self._exactly(size)
            self._exactly(2)
        self._until(b"\r\n")
        return body

    def _to_the_end(self) -> bytes:
        while piece := self.receive():
            self._came += piece
        rest, self._came = self._came, b""
        return rest


def chunked(data: bytes) -> bytes:
    """Encode one chunk of a body."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"
