"""Control-plane HTTP client: every request ends in bounded time and memory, whatever the server sends."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress

import psutil
import pytest

from services.cancellation import Cancelled, CancelToken
from services.http import (
    ConnectionBroken,
    ConnectionRefused,
    FetchError,
    HttpRequest,
    Redirects,
    Reply,
    TooLarge,
    TooSlow,
    Unreachable,
    fetch,
)
from tests.support.console import ROOT, TIMEOUT, free_port, wait_until
from tests.support.sockets import PlainServer

LIMIT = 0.5
GIVEN = 5.0
"""Seconds that a test allows a request with `LIMIT` seconds: a busy machine is slow, an unbounded wait never ends."""


@pytest.fixture
def serve() -> Iterator[Callable[..., PlainServer]]:
    started: list[PlainServer] = []

    def start(answer: Callable[[socket.socket, bytes], None]) -> PlainServer:
        started.append(PlainServer(answer))
        return started[-1]

    yield start
    for server in started:
        server.close()


def send(*pieces: bytes) -> Callable[[socket.socket, bytes], None]:
    def answer(link: socket.socket, _request: bytes) -> None:
        for piece in pieces:
            link.sendall(piece)

    return answer


def drip(head: bytes, drop: bytes) -> Callable[[socket.socket, bytes], None]:
    """Send `head`, then `drop` repeatedly, each within the time limit of a single step."""

    def answer(link: socket.socket, _request: bytes) -> None:
        link.sendall(head)
        while True:
            link.sendall(drop)
            time.sleep(LIMIT / 10)

    return answer


def flood(head: bytes, piece: bytes) -> Callable[[socket.socket, bytes], None]:
    def answer(link: socket.socket, _request: bytes) -> None:
        link.sendall(head)
        while True:
            link.sendall(piece)

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        drip(b"", b""),
        drip(b"HTTP/1.1 ", b"2"),
        drip(b"HTTP/1.1 200 OK\r\n", b"X-Drop: x\r\n"),
        drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x"),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1"),
        drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
    ],
    ids=["silence", "status", "headers", "continues", "body", "chunks", "size", "no_length"],
)
def test_a_slow_response_times_out_in_total(serve, answer):
    """No single read exceeds its limit, but the total does."""
    server = serve(answer)
    began = time.monotonic()
    with pytest.raises(FetchError) as caught:
        fetch("GET", f"{server.url}/x", timeout=LIMIT)
    assert isinstance(caught.value, TooSlow | ConnectionBroken), caught.value
    assert time.monotonic() - began < GIVEN


@pytest.mark.parametrize(
    "answer",
    [
        flood(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65_536),
        flood(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"x" * 65_536),
        flood(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65_536 + b"\r\n"),
    ],
    ids=["no_length", "length", "chunks"],
)
def test_an_endless_response_is_closed_at_its_limit(serve, answer):
    """The size is limited, whatever the speed."""
    with pytest.raises(TooLarge):
        fetch("GET", serve(answer).url, timeout=30, most_bytes=300_000)


@pytest.mark.parametrize(
    "answer",
    [
        send(b"SSH-2.0-OpenSSH_9\r\n"),
        send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"),
        send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhalf"),
        send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n"),
        send(),
        send(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"),
        flood(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        flood(b"HTTP/1.1 200 ", b"x" * 1000),
    ],
    ids=["no_http", "short_body", "short_chunk", "no_chunk", "nothing", "negative", "many_headers", "long_line"],
)
def test_an_incomplete_response_raises_or_is_empty(serve, answer):
    """A truncated response never looks complete, and raises no other exception."""
    with suppress(ConnectionBroken):
        assert fetch("GET", serve(answer).url, timeout=GIVEN).content == b""


def test_a_refused_connection_raises_its_own_error():
    """Distinguished from a broken connection: nothing of the request can be running."""
    with pytest.raises(ConnectionRefused):
        fetch("GET", f"http://127.0.0.1:{free_port()}", timeout=GIVEN)


def test_a_complete_response_has_its_status(serve):
    """Error statuses as well; the request has its body, headers and host."""
    asked: list[bytes] = []

    def answer(link: socket.socket, request: bytes) -> None:
        asked.append(request)
        link.sendall(b'HTTP/1.1 404 Not Found\r\nContent-Length: 14\r\n\r\n{"error": "x"}')

    server = serve(answer)
    url = server.url + "/a?b=c"
    assert fetch("POST", url, timeout=GIVEN, body={"a": 1}, headers={"X-Key": "k"}).document() == {"error": "x"}
    lines = asked[0].split(b"\r\n")
    assert lines[0] == b"POST /a?b=c HTTP/1.1"
    assert {b"X-Key: k", f"Host: {server.url[7:]}".encode(), b"Content-Type: application/json"} < set(lines)
    assert lines[-1] == b'{"a": 1}'


def test_a_redirect_is_followed_on_request(serve):
    """Up to the given number, to another origin only if allowed, and only over HTTP."""
    there = serve(send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    here = serve(send(f"HTTP/1.1 302 Found\r\nLocation: {there.url}/x\r\nContent-Length: 0\r\n\r\n".encode()))
    loop = serve(send(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"))
    file = serve(send(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"))
    assert (
        fetch("GET", here.url, timeout=GIVEN, redirects=Redirects(1, lambda url: url == f"{there.url}/x")).content
        == b"ok"
    )
    assert fetch("GET", here.url, timeout=GIVEN).status == 302
    assert fetch("GET", loop.url, timeout=GIVEN, redirects=Redirects(3)).status == 302
    for url in (file.url, here.url):
        with pytest.raises(ConnectionBroken, match="it sent us on"):
            fetch("GET", url, timeout=GIVEN, redirects=Redirects(3))


@pytest.mark.parametrize(
    "location", ["https:///x", "http://[::1", "http://a:99999/", "gopher://127.0.0.1/", "https://"]
)
def test_an_invalid_redirect_is_refused(serve, location):
    """Even if any redirect may be followed."""
    server = serve(send(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()))
    with pytest.raises(FetchError):
        fetch("GET", server.url, timeout=GIVEN, redirects=Redirects(1, lambda _url: True))


def test_a_request_can_be_cancelled_from_another_thread(serve):
    """The waiting thread returns at once, the server sees the connection close; a cancelled request isn't sent."""
    asked, left = threading.Event(), threading.Event()

    def answer(link: socket.socket, _request: bytes) -> None:
        asked.set()
        if link.recv(1) == b"":
            left.set()

    request = HttpRequest("POST", serve(answer).url, timeout=60, body={})
    raised: list[Exception] = []

    def ask() -> None:
        try:
            request.reply()
        except FetchError as error:
            raised.append(error)

    waiting = threading.Thread(target=ask, daemon=True)
    waiting.start()
    assert asked.wait(GIVEN)
    request.cancel()
    waiting.join(GIVEN)
    assert isinstance(raised[0], ConnectionBroken)
    assert left.wait(GIVEN)
    with pytest.raises(ConnectionBroken):
        request.reply()


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_json_that_is_not_an_object_is_a_value_error(content):
    """Never a TypeError or RecursionError in code that polls every second."""
    with pytest.raises(ValueError, match=r"."):
        Reply(200, content).document()


def test_connections_are_closed(serve):
    """Whether the request succeeded or not."""
    gone = threading.Event()

    def answer(link: socket.socket, _request: bytes) -> None:
        link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        if link.recv(1) == b"":
            gone.set()

    with closing(serve(answer)) as server:
        assert fetch("GET", server.url, timeout=GIVEN).content == b"ok"
        assert gone.wait(GIVEN)


def run(act: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """`act` in a thread of its own, and what it has raised."""
    raised: list[BaseException] = []

    def catch() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=catch, daemon=True)
    thread.start()
    return thread, raised


def test_a_stream_gives_each_line_as_it_comes(serve):
    """Its status first; the next line is sent only once the one before was read; then the end."""
    read = threading.Semaphore(0)

    def answer(link: socket.socket, _request: bytes) -> None:
        link.sendall(b"HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n")
        for line in (b"one\n", b"two\n"):
            link.sendall(b"%x\r\n%s\r\n" % (len(line), line))
            assert read.acquire(timeout=TIMEOUT)
        link.sendall(b"0\r\n\r\n")

    with HttpRequest("POST", serve(answer).url, timeout=GIVEN, body={}).stream(lambda: TIMEOUT) as stream:
        lines = []
        while line := stream.line():
            lines.append(line)
            read.release()
    assert (stream.status, lines) == (201, [b"one\n", b"two\n"])


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\none\n", TooSlow),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\none\ntw", TooSlow),
        (b"HTTP/1.1 200 OK\r\n", TooSlow),
        (b"", TooSlow),
    ],
    ids=["body", "line", "headers", "nothing"],
)
def test_a_stream_that_falls_silent_ends(serve, sent, error):
    """After as long as was said, wherever it does."""

    def answer(link: socket.socket, _request: bytes) -> None:
        link.sendall(sent)
        link.recv(1)

    def read() -> None:
        with HttpRequest("GET", serve(answer).url, timeout=GIVEN).stream(lambda: LIMIT) as stream:
            while stream.line():
                continue

    with pytest.raises(error):
        read()


def test_a_stream_can_be_cancelled_from_another_thread(serve):
    """The one who reads it finds it broken at once; the other side sees the connection end."""
    begun, left = threading.Event(), threading.Event()

    def answer(link: socket.socket, _request: bytes) -> None:
        link.sendall(b"HTTP/1.1 200 OK\r\n\r\none\n")
        if link.recv(1) == b"":
            left.set()

    request = HttpRequest("GET", serve(answer).url, timeout=GIVEN)

    def read() -> None:
        with request.stream(lambda: 10 * TIMEOUT) as stream:
            assert stream.line() == b"one\n"
            begun.set()
            stream.line()

    reader, raised = run(read)
    assert begun.wait(TIMEOUT)
    request.cancel()
    reader.join(TIMEOUT)
    assert isinstance(raised[0], ConnectionBroken)
    assert left.wait(TIMEOUT)


@pytest.fixture
def full() -> Iterator[int]:
    """The port of a server that takes no more connections: who connects waits."""
    with ExitStack() as held, socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        port: int = server.getsockname()[1]
        for _ in range(4):
            link = held.enter_context(socket.socket())
            link.setblocking(False)
            link.connect_ex(("127.0.0.1", port))
        yield port


def test_who_connects_can_be_cancelled(full):
    """And waits no longer than was said where nobody cancels."""
    request = HttpRequest("GET", f"http://127.0.0.1:{full}/", timeout=10 * TIMEOUT)
    waiting, raised = run(request.reply)
    wait_until(lambda: len(connecting(full)) == 4, "it to connect")
    request.cancel()
    waiting.join(TIMEOUT)
    assert isinstance(raised[0], ConnectionBroken)
    with pytest.raises(TooSlow):
        fetch("GET", f"http://127.0.0.1:{full}/", timeout=LIMIT)
    with pytest.raises(Unreachable), HttpRequest("GET", f"http://127.0.0.1:{full}/", timeout=LIMIT).stream(lambda: 1):
        raise AssertionError("it was connected")


def connecting(port: int) -> list[int]:
    """The local ports of this process's connections to `port` that wait to be taken."""
    found = psutil.Process().net_connections("tcp")
    return [c.laddr.port for c in found if c.status == psutil.CONN_SYN_SENT and c.raddr.port == port]


def test_a_resolver_that_hangs_holds_nobody_up(monkeypatch):
    """Who asks ends in time, and at once when cancelled; the resolver is asked once, however many wait for it."""
    asked: list[object] = []
    answered = threading.Event()

    def hang(*address: object, **_: object) -> list[object]:
        asked.append(address)
        answered.wait(TIMEOUT)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    for _ in range(2):
        with pytest.raises(TooSlow):
            fetch("GET", "http://slow.example/", timeout=LIMIT)
    token = CancelToken()
    waiting, raised = run(lambda: fetch("GET", "http://slow.example/", timeout=10 * TIMEOUT, token=token))
    token.cancel()
    waiting.join(TIMEOUT)
    assert isinstance(raised[0], Cancelled)
    assert len(asked) == 1
    answered.set()
    with pytest.raises(Unreachable, match=r"slow\.example is not known"):
        fetch("GET", "http://slow.example/", timeout=TIMEOUT)


def test_the_same_holds_under_gevent():
    """As the app runs: cancels and limits, where a socket is waited for by the event loop."""
    code = (
        "from gevent import monkey; monkey.patch_all()\n"
        "import sys, pytest; sys.exit(pytest.main([sys.argv[1], '-q', '-p', 'no:cacheprovider', '-k', sys.argv[2]]))"
    )
    chosen = "cancelled or resolver"
    done = subprocess.run(
        [sys.executable, "-c", code, __file__, chosen], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
