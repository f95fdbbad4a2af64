"""Control-plane HTTP: short questions to other programs. Streams go through the relay, and downloads have their own.

Whatever the other program does, a question ends within its time and takes no more memory than its limit: an answer that
drips, or never ends, must not hold up whoever looks every second. Proxies are not asked.
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
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any, cast
from urllib.parse import urljoin, urlsplit

import certifi

MOST_BYTES = 16_000_000
"""The longest answers are those of `/api/show`, which names every tensor: about a megabyte."""
REDIRECTS = (301, 302, 303, 307, 308)


class FetchError(Exception):
    """No whole answer came. The text says why, without a full stop."""


class NoWay(FetchError):
    """It can't be connected to: no such host, no route."""


class ConnectionRefused(NoWay):
    """No server listens at the address."""


class TooSlow(FetchError):
    """The answer was not whole in time."""


class TooLarge(FetchError):
    """There was more of the answer than it may have."""


class BrokenOff(FetchError):
    """The connection ended before the answer did, or what came is no HTTP. So also after `abort`."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer, whatever its status."""

    status: int
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", "replace")

    def document(self) -> dict[str, Any]:
        """The JSON object that it is. Raises ValueError when it is none."""
        try:
            said = json.loads(self.content)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(said, dict):
            raise ValueError("not an object")
        return said


class HttpRequest:
    """One question, to be sent once. `timeout` is seconds for all of it, from the connection to the answer's last byte.

    (Looking up a host's name comes before that, with the resolver's own limits.) `body` is sent as JSON. `abort` may be
    called from any thread.
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
        self._body = None if body is None else json.dumps(body).encode()
        self._headers = dict(headers or {})
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._link: socket.socket | None = None
        self._aborted = False
        self.redirect: str | None = None
        """Where the answer sends us, once it is here. It isn't followed."""

    def answer(self) -> Reply:
        """Send it and block until the answer is whole. Raises FetchError."""
        deadline = _Deadline(self._timeout)
        try:
            with _errors(self._timeout):
                self._open(deadline)
                return self._exchange(deadline)
        finally:
            with self._lock:
                link, self._link = self._link, None
            if link is not None:
                link.close()

    def abort(self) -> None:
        """Drop it: the other side sees the connection end, and `answer` raises BrokenOff."""
        with self._lock:
            self._aborted = True
            if self._link is not None:
                with suppress(OSError):  # not TLS's own: another thread is reading through that
                    socket.socket.shutdown(self._link, socket.SHUT_RDWR)

    def _open(self, deadline: _Deadline) -> None:
        parts = urlsplit(self._url)
        secure = parts.scheme == "https"
        host = parts.hostname or "127.0.0.1"
        self._hold(_connect(host, parts.port or (443 if secure else 80), deadline))
        if secure:
            assert self._link is not None
            self._link.settimeout(deadline.left())
            self._hold(tls_context().wrap_socket(self._link, server_hostname=host))

    def _hold(self, link: socket.socket) -> None:
        """This is the connection that an abort has to end."""
        with self._lock:
            self._link = link
            if self._aborted:
                raise ConnectionAbortedError("it was cancelled")

    def _exchange(self, deadline: _Deadline) -> Reply:
        assert self._link is not None
        parts = urlsplit(self._url)
        connection = HTTPConnection(parts.hostname or "")
        connection.sock = cast("socket.socket", _Link(self._link, deadline))
        headers = {"Host": parts.netloc.rpartition("@")[2], "Connection": "close", **self._headers}
        if self._body is not None:
            headers["Content-Type"] = "application/json"
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(self._method, target, self._body, headers)
        with connection.getresponse() as response:
            content = response.read(self._most_bytes + 1)
            self._insist_it_is_whole(response, content)
            if response.status in REDIRECTS:
                self.redirect = response.getheader("Location")
            return Reply(response.status, content)

    def _insist_it_is_whole(self, response: HTTPResponse, content: bytes) -> None:
        if len(content) > self._most_bytes:
            raise TooLarge(f"more than {self._most_bytes / 1e6:.0f} MB came")
        if response.length:
            raise BrokenOff("the answer ended too soon")


def fetch(
    method: str,
    url: str,
    *,
    timeout: float,
    body: object = None,
    headers: Mapping[str, str] | None = None,
    most_bytes: int = MOST_BYTES,
    redirects: int = 0,
    follow: Callable[[str], bool] = lambda _url: False,
) -> Reply:
    """Ask once and give the whole answer; `redirects` is how often it may send us on. Raises FetchError.

    To another origin (scheme, host or port) only where `follow` says so of the address. `timeout` is seconds for
    everything together.
    """
    deadline = _Deadline(timeout)
    while True:
        with _errors(timeout):
            left = deadline.left()
        request = HttpRequest(method, url, timeout=left, body=body, headers=headers, most_bytes=most_bytes)
        answer = request.answer()
        if request.redirect is None or not redirects:
            return answer
        there, redirects = _redirected(url, request.redirect), redirects - 1
        if urlsplit(there)[:2] != urlsplit(url)[:2] and not follow(there):
            raise BrokenOff(f"it sent us on to {urlsplit(there).netloc[:100]}, which is not asked")
        url = there


def _redirected(url: str, location: str) -> str:
    """The address that a redirect of `url` leads to. Raises BrokenOff when it is none of HTTP's."""
    with suppress(ValueError):
        there = urljoin(url, location)
        parts = urlsplit(there)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0:
            return there
    raise BrokenOff("it sent us on to what is no web address")


@cache
def tls_context() -> ssl.SSLContext:
    """Trusts whom this machine trusts, and the authorities that everybody does: small images bring none."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without its port, is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Deadline:
    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds, always some. Raises TimeoutError when there are none."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


class _Link:
    """A socket as http.client uses one, each step of which has only what is left of the time for all.

    Whoever made the socket closes it: http.client does so while the answer's body still has to be read.
    """

    def __init__(self, link: socket.socket, deadline: _Deadline) -> None:
        self._link = link
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._link.settimeout(self._deadline.left())
        self._link.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self._link, self._deadline))

    def close(self) -> None:
        """Left to whoever made it."""


class _Reader(io.RawIOBase):
    def __init__(self, link: socket.socket, deadline: _Deadline) -> None:
        self._link = link
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._link.settimeout(self._deadline.left())
        return self._link.recv_into(buffer)


def _connect(host: str, port: int, deadline: _Deadline) -> socket.socket:
    """To the first address of a host that takes the connection. Raises TimeoutError, Refused and NoWay."""
    reason: OSError | None = None
    for family, address in _addresses(host, port):
        link = socket.socket(family, socket.SOCK_STREAM)
        try:
            link.settimeout(deadline.left())
            link.connect(address)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # header and body go out as two pieces
            return link
        except OSError as error:
            link.close()
            reason = error
    if isinstance(reason, TimeoutError):
        raise reason
    if isinstance(reason, ConnectionRefusedError):
        raise ConnectionRefused("nobody listens there")
    raise NoWay(f"{host} can't be reached: {reason}")


def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    """Families and addresses of a host. Raises NoWay. One that is an address already needs no resolver's thread."""
    with suppress(ValueError):
        version = ipaddress.ip_address(host).version
        return [(socket.AF_INET if version == 4 else socket.AF_INET6, (host, port))]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise NoWay(f"{host} is not known: {error.strerror or error}") from None
    return [(family, address) for family, _, _, _, address in found]


@contextmanager
def _errors(timeout: float) -> Iterator[None]:
    """The one place where what the libraries raise becomes what this module raises."""
    try:
        yield
    except TimeoutError:
        raise TooSlow(f"there was no whole answer within {timeout:.0f} s") from None
    except (OSError, HTTPException, ValueError) as error:
        raise BrokenOff(f"the connection broke off ({error or type(error).__name__})") from None
