"""HTTP as Go's server writes it: header order, chunks, error responses, and the checks of host and origin."""

from __future__ import annotations

import ipaddress
import select
import socket
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

from .answers import openai_error
from .library import InvalidName
from .logs import log_request
from .scheduler import ClientGone, LoadFailed
from .settings import Settings
from .wire import BadRequest, dumps, read_json

JSON = "application/json; charset=utf-8"
PLAIN_JSON = "application/json"
LOCAL_SUFFIXES = (".localhost", ".local", ".internal")
CHUNKED_FROM = 2048
"""Go's server sends a response without Content-Length in chunks once it is longer than this many bytes."""


class ApiError(Exception):
    """A response other than 200; `content_type` depends on the layer of the server that refuses."""

    def __init__(self, status: int, text: str, content_type: str = JSON) -> None:
        super().__init__(text)
        self.status = status
        self.content_type = content_type


class Exchange(BaseHTTPRequestHandler):
    """Reads requests and writes responses; subclasses implement `_route` and `settings`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # like the real one; else each answer waits 40 ms for an acknowledgement
    body: bytes
    answered: int

    @property
    def settings(self) -> Settings:
        raise NotImplementedError

    def _route(self, path: str) -> None:
        raise NotImplementedError

    def handle_one_request(self) -> None:
        self.answered = 0
        super().handle_one_request()

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_DELETE = do_PUT = do_OPTIONS = do_GET

    def _serve(self) -> None:
        begun = time.monotonic()
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.settings.log_request(self.command, path, self._logged_body())
        while self.settings.fault("hang"):
            if self._gone():
                self.close_connection = True
                return
            time.sleep(0.02)
        try:
            if self._host_allowed() and self._origin_allowed():
                self._route(path)
            else:
                self._send(403, b"", None)
        except ApiError as error:
            self._refuse(path, error)
        except (BadRequest, InvalidName) as error:
            text = "invalid model name" if isinstance(error, InvalidName) else str(error)
            self._refuse(path, ApiError(400, text))
        except LoadFailed as error:
            self._refuse(path, ApiError(500, str(error), PLAIN_JSON if path.startswith("/v1/") else JSON))
        except ClientGone:
            self.answered = 499
            self.close_connection = True
        log_request(self.answered, time.monotonic() - begun, self.client_address[0], self.command, path)

    def _host_allowed(self) -> bool:
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host in {"", "localhost", socket.gethostname().lower()} or host.endswith(LOCAL_SUFFIXES)
        return address.is_loopback or address.is_private or address.is_unspecified

    def _origin_allowed(self) -> bool:
        origin = urlsplit(self.headers.get("Origin", ""))
        apps = {"", "app", "file", "tauri", "vscode-webview", "vscode-file"}
        return origin.scheme in apps or origin.hostname in {"localhost", "127.0.0.1", "0.0.0.0"}

    def _refuse(self, path: str, error: ApiError) -> None:
        if self.answered:
            self.close_connection = True
        elif path.startswith("/v1/"):
            after = "\n" if error.content_type == PLAIN_JSON else ""
            self._json(error.status, openai_error(error.status, str(error)), error.content_type, after)
        else:
            self._json(error.status, {"error": str(error)}, error.content_type)

    def _json(self, status: int, document: object, content_type: str = JSON, after: str = "") -> None:
        data = (dumps(document) + after).encode()
        if len(data) > CHUNKED_FROM:
            self._stream(content_type, iter([data.decode()]), status)
        else:
            self._send(status, data, content_type)

    def _head(self, status: int, content_type: str | None, **headers: str) -> None:
        self.answered = status
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if content_type:
            self.send_header("Content-Type", content_type)
        self.send_header("Date", formatdate(usegmt=True))

    def _end_head(self, name: str, value: str) -> None:
        """Write the last headers, in Go's order."""
        length = name == "Content-Length"
        if length:
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        if not length:
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, data: bytes, content_type: str | None, **headers: str) -> None:
        self._head(status, content_type, **headers)
        self._end_head("Content-Length", str(len(data)))
        if self.command != "HEAD":
            self.wfile.write(data)

    def _stream(self, content_type: str, pieces: Iterator[str], status: int = 200) -> None:
        """Send each piece as a chunk. The iterator is closed in every case, which releases what it holds."""
        try:
            self._head(status, content_type)
            self._end_head("Transfer-Encoding", "chunked")
            for piece in pieces:
                data = piece.encode()
                self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
        except (OSError, ClientGone):
            self.close_connection = True
        finally:
            if (close := getattr(pieces, "close", None)) is not None:
                close()

    def _gone(self) -> bool:
        """Whether the client has closed its sending side."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if not readable:
            return False
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    def _logged_body(self) -> object:
        try:
            return read_json(self.body, "Request") if self.body else None
        except BadRequest:
            return self.body.decode("utf-8", "replace")

    def log_message(self, *_: object) -> None:
        """Log nothing: `_serve` writes the line in Ollama's own format."""
