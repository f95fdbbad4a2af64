"""HTTP client of the control plane: requests whose reply is fetched whole or read line by line.

Clients' requests go through the relay instead (`gateway/`).

Every request has a time limit and a memory limit and can be cancelled, so that a slow or endless reply does not block
callers that poll every second. Proxies are not used.
"""

from __future__ import annotations

import io
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any, Protocol, cast
from urllib.parse import urljoin, urlsplit

import certifi

from services.cancellation import CancelToken
from services.host_lookup import look_up
from services.sizes import format_size

MOST_BYTES = 16_000_000
"""Limit of a reply's body. The longest, Ollama's `/api/show`, names every tensor and takes about a megabyte."""
REDIRECTS = (301, 302, 303, 307, 308)
CANCEL_LOOK_SECONDS = 0.1
"""How often a request checks for a cancel while its host name is looked up, which can't be interrupted."""


class FetchError(Exception):
    """The request got no whole reply. The text says why, without a full stop."""


class Unreachable(FetchError):
    """No connection could be made: no such host, no route."""


class ConnectionRefused(Unreachable):
    """No server listens at the address."""


class TooSlow(FetchError):
    """The reply was not complete in time."""


class TooLarge(FetchError):
    """The reply was longer than its limit."""


class ConnectionBroken(FetchError):
    """The connection ended before the reply did, the request was cancelled, or the reply is not HTTP."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply, whatever its status. The names of `headers` are in lower case."""

    status: int
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")

    def document(self) -> dict[str, Any]:
        """Return the body's JSON object. Raises ValueError if the body is not a JSON object."""
        try:
            said = json.loads(self.content)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(said, dict):
            raise ValueError("not an object")
        return said


class HttpRequest:
    """One request, to be sent once. `cancel` may be called from any thread.

    `timeout` is seconds for all of it, from the look-up of the host's name to the last byte of the reply; of a stream,
    up to the connection. `body` is sent as JSON, bytes as they are.
    """

    def __init__(
        self,
        method: str,
        url: str,
        *,
        timeout: float,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._method = method
        self._url = url
        self._timeout = timeout
        self._body = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        self._headers = dict(headers or {})
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._link: socket.socket | None = None
        self._cancelled = False
        self.redirect: str | None = None
        """Address that the reply redirects to; None before the reply. It is not followed."""

    def reply(self) -> Reply:
        """Send it and block until the reply is whole. Raises FetchError."""
        deadline = _Deadline(self._timeout)
        try:
            with _errors(f"there was no whole answer within {self._timeout:.0f} s"):
                self._connect(deadline)
                return self._whole(self._send(deadline))
        finally:
            self._close()

    @contextmanager
    def stream(self, patience: Callable[[], float]) -> Iterator[HttpStream]:
        """Send it and return the reply as it comes; leaving the context closes the connection.

        `patience()` is how many seconds the server may send nothing from now on. Raises Unreachable where no connection
        is made, and other FetchErrors.
        """
        silence = "nothing came for too long"
        try:
            with _errors(silence):
                try:
                    self._connect(_Deadline(self._timeout))
                except TimeoutError:
                    raise Unreachable(f"no connection within {self._timeout:.0f} s") from None
                response = self._send(_Patience(patience))
            with response:
                yield HttpStream(response, self._most_bytes, silence, self._check_cancelled)
        finally:
            self._close()

    def cancel(self) -> None:
        """Close the connection. A thread that waits for the reply gets ConnectionBroken at once."""
        with self._lock:
            self._cancelled = True
            if self._link is not None:
                with suppress(OSError):  # not the TLS socket's shutdown: another thread reads through that socket
                    socket.socket.shutdown(self._link, socket.SHUT_RDWR)

    def _connect(self, deadline: _Deadline) -> None:
        """Connect to the first address that accepts. Raises OSError, ConnectionRefused and Unreachable."""
        parts = urlsplit(self._url)
        secure = parts.scheme == "https"
        host, port = parts.hostname or "127.0.0.1", parts.port or (443 if secure else 80)
        reason: OSError | None = None
        for family, address in self._addresses(host, port, deadline):
            link = socket.socket(family, socket.SOCK_STREAM)
            self._hold(link)
            try:
                link.settimeout(deadline.left())
                link.connect(address)
            except OSError as error:
                self._check_cancelled()
                reason = error
                continue
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # header and body go out as two pieces
            if secure:
                link.settimeout(deadline.left())
                wrapped = tls_context().wrap_socket(link, server_hostname=host, do_handshake_on_connect=False)
                self._hold(wrapped)
                wrapped.do_handshake()
            return
        if isinstance(reason, TimeoutError):
            raise reason
        if isinstance(reason, ConnectionRefusedError):
            raise ConnectionRefused("nothing listens there")
        raise Unreachable(f"{host} can't be reached: {reason}")

    def _addresses(self, host: str, port: int, deadline: _Deadline) -> list[tuple[int, Any]]:
        """Families and addresses of a host. Raises TimeoutError and Unreachable."""
        with suppress(ValueError):  # an address already: no resolver is asked
            version = ipaddress.ip_address(host).version
            return [(socket.AF_INET if version == 4 else socket.AF_INET6, (host, port))]
        lookup = look_up(host, port)
        while not lookup.over.wait(min(CANCEL_LOOK_SECONDS, deadline.left())):
            self._check_cancelled()
        if lookup.error is not None:
            raise Unreachable(f"{host} is not known: {lookup.error.strerror or lookup.error}")
        return lookup.addresses

    def _hold(self, link: socket.socket) -> None:
        """Keep the connection for `cancel` to close, and close the previous one, which failed."""
        with self._lock:
            before, self._link = self._link, link
        if before is not None:
            before.close()
        self._check_cancelled()

    def _check_cancelled(self) -> None:
        if self._cancelled:
            raise ConnectionAbortedError("it was cancelled")

    def _close(self) -> None:
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()

    def _send(self, limit: _Limit) -> HTTPResponse:
        assert self._link is not None
        parts = urlsplit(self._url)
        connection = HTTPConnection(parts.hostname or "")
        connection.sock = cast("socket.socket", _Link(self._link, limit))
        headers = {"Host": parts.netloc.rpartition("@")[2], "Connection": "close", **self._headers}
        if self._body is not None:
            headers.setdefault("Content-Type", "application/json")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(self._method, target, self._body, headers)
        return connection.getresponse()

    def _whole(self, response: HTTPResponse) -> Reply:
        with response:
            content = response.read(self._most_bytes + 1)
            self._check_cancelled()  # the end of a body without a length is the end of the connection
            if len(content) > self._most_bytes:
                raise TooLarge(f"more than {format_size(self._most_bytes)} came")
            if response.length:
                raise ConnectionBroken("the answer ended too soon")
            if response.status in REDIRECTS:
                self.redirect = response.getheader("Location")
            return Reply(response.status, content, {name.lower(): value for name, value in response.getheaders()})


class HttpStream:
    """A reply whose header has come and whose body comes piece by piece. Its methods raise FetchError."""

    def __init__(
        self, response: HTTPResponse, most_bytes: int, silence: str, check_cancelled: Callable[[], None]
    ) -> None:
        self._response = response
        self._most_bytes = most_bytes
        self._silence = silence
        self._check_cancelled = check_cancelled
        self.status = response.status
        self.reason = response.reason

    def line(self) -> bytes:
        """Wait for the next line, at most `most_bytes` of it; empty at the end of the body."""
        with _errors(self._silence):
            line = self._response.readline(self._most_bytes)
            self._check_cancelled()
            return line

    def read(self) -> bytes:
        """Wait for what is left of the body, at most `most_bytes` of it."""
        with _errors(self._silence):
            content = self._response.read(self._most_bytes)
            self._check_cancelled()
            return content


@dataclass(frozen=True, slots=True)
class Redirects:
    """How many redirects are followed, and to which addresses of another origin (scheme, host or port)."""

    most: int
    allowed: Callable[[str], bool] = lambda _url: False


NO_REDIRECTS = Redirects(0)


def fetch(
    method: str,
    url: str,
    *,
    timeout: float,
    body: object = None,
    headers: Mapping[str, str] | None = None,
    most_bytes: int = MOST_BYTES,
    redirects: Redirects = NO_REDIRECTS,
    token: CancelToken | None = None,
) -> Reply:
    """Send one request and return the whole reply. Raises FetchError, and Cancelled as soon as `token` is cancelled.

    `timeout` is seconds for everything together, redirects included.
    """
    token = token or CancelToken()
    deadline = _Deadline(timeout)
    followed = 0
    while True:
        with _errors(f"there was no whole answer within {timeout:.0f} s"):
            left = deadline.left()
        request = HttpRequest(method, url, timeout=left, body=body, headers=headers, most_bytes=most_bytes)
        try:
            with token.cancelling(request.cancel):
                reply = request.reply()
        except ConnectionBroken:
            token.check()
            raise
        if request.redirect is None or followed == redirects.most:
            return reply
        there, followed = _redirected(url, request.redirect), followed + 1
        if urlsplit(there)[:2] != urlsplit(url)[:2] and not redirects.allowed(there):
            raise ConnectionBroken(f"it sent us on to {urlsplit(there).netloc[:100]}, which is not asked")
        url = there


def _redirected(url: str, location: str) -> str:
    """Return the address that a redirect of `url` leads to. Raises ConnectionBroken when it is not an HTTP address."""
    with suppress(ValueError):
        there = urljoin(url, location)
        parts = urlsplit(there)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0:
            return there
    raise ConnectionBroken("it sent us on to what is no web address")


@cache
def tls_context() -> ssl.SSLContext:
    """Trust this machine's certificate authorities and certifi's: small container images have none of their own."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def is_loopback(host: str) -> bool:
    """Return whether a host name or address, without its port, is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Limit(Protocol):
    def left(self) -> float:
        """Return the seconds that the next step may take, always positive. Raises TimeoutError if none are left."""


class _Patience:
    """A new limit for each read and write."""

    def __init__(self, patience: Callable[[], float]) -> None:
        self._patience = patience

    def left(self) -> float:
        left = self._patience()
        if left <= 0:
            raise TimeoutError
        return left


class _Deadline:
    """One limit for all reads and writes together."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def left(self) -> float:
        left = self._at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _Link:
    """A socket for http.client, with a time limit on each read and write.

    Its `close` does nothing, because http.client would call it before the body is read; the request closes the socket.
    """

    def __init__(self, link: socket.socket, limit: _Limit) -> None:
        self._link = link
        self._limit = limit

    def sendall(self, data: bytes) -> None:
        self._link.settimeout(self._limit.left())
        self._link.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._link, self._limit))

    def close(self) -> None:
        """Do nothing: the request closes the socket."""


class _Reader(io.RawIOBase):
    def __init__(self, link: socket.socket, limit: _Limit) -> None:
        self._link = link
        self._limit = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._link.settimeout(self._limit.left())
        return self._link.recv_into(buffer)


@contextmanager
def _errors(too_slow: str) -> Iterator[None]:
    """Convert exceptions of the libraries to FetchError. `too_slow` is the text of a time-out."""
    try:
        yield
    except TimeoutError:
        raise TooSlow(too_slow) from None
    except (OSError, HTTPException, ValueError) as error:
        raise ConnectionBroken(f"the connection broke off ({error or type(error).__name__})") from None
