"""HTTP over a plain socket, for timed requests: no client library between the clock and the bytes."""

from __future__ import annotations

import json
import re
import socket
import time
from dataclasses import dataclass
from types import TracebackType

TIMEOUT = 60.0
BLOCK = 65_536
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class WireError(Exception):
    """A response other than the expected one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete response; `first` is seconds from sending to the first token (or the end)."""

    status: int
    head: bytes
    body: bytes
    first: float
    seconds: float

    def json(self) -> object:
        return json.loads(self.body)


class Wire:
    """One kept-alive connection to a local port, for one request at a time; a new one if the server closes it."""

    def __init__(self, port: int, timeout: float = TIMEOUT) -> None:
        self._port, self._timeout = port, timeout
        self._socket = connect(port, timeout)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()

    def ask(self, request: bytes) -> Answer:
        """Send the request and read the whole response. Raises WireError, OSError."""
        began = time.perf_counter()
        self._socket.sendall(request)
        data, first = b"", 0.0
        while not is_whole(data):
            part = self._socket.recv(BLOCK)
            if not part:
                raise WireError(f"the connection ended in mid-answer: {data[-200:]!r}")
            data += part
            if not first and b"data: " in data:
                first = time.perf_counter() - began
        took = time.perf_counter() - began
        head, _, body = data.partition(b"\r\n\r\n")
        if is_last(head):
            self._socket.close()
            self._socket = connect(self._port, self._timeout)
        return Answer(int(head[9:12]), head, body, first or took, took)

    def ask_well(self, request: bytes) -> Answer:
        """As `ask`, but raises WireError for every status except 200."""
        answer = self.ask(request)
        if answer.status != 200:
            raise WireError(f"status {answer.status}: {answer.body[:300]!r}")
        return answer


def connect(port: int, timeout: float = TIMEOUT) -> socket.socket:
    """A connection to a local port."""
    connection = socket.create_connection(("127.0.0.1", port), timeout)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def is_last(head: bytes | bytearray) -> bool:
    """Whether an answer with this head is the last one on its connection."""
    return _CLOSE.search(head) is not None


def is_whole(data: bytes | bytearray) -> bool:
    """Whether `data` holds one complete response, by its length or its last chunk; a 204 has no body."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return False
    if data.startswith(b"HTTP/1.1 204"):
        return True
    length = _LENGTH.search(data, 0, end + 2)
    if length is not None:
        return len(data) >= end + 4 + int(length[1])
    return data.endswith(b"\r\n0\r\n\r\n")


def get(path: str, **headers: str) -> bytes:
    """The bytes of a GET request; underscores in header names stand for dashes."""
    return _head("GET", path, headers) + b"\r\n"


def post(path: str, body: object = None, **headers: str) -> bytes:
    """The bytes of a POST request with a JSON body."""
    data = b"" if body is None else json.dumps(body).encode()
    headers = {"Content_Type": "application/json", **headers, "Content_Length": str(len(data))}
    return _head("POST", path, headers) + b"\r\n" + data


def _head(method: str, path: str, headers: dict[str, str]) -> bytes:
    named = {"Host": "127.0.0.1", "User_Agent": "switchyard-bench", "Accept": "*/*", **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in named.items())]
    return ("\r\n".join(lines) + "\r\n").encode()
