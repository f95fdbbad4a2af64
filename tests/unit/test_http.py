"""Control-plane HTTP: every question ends in time and in bounded memory, whatever the other side sends."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest

from services.http import BrokenOff, ConnectionRefused, FetchError, HttpRequest, Reply, TooLarge, TooSlow, fetch
from tests.support.console import free_port
from tests.support.sockets import PlainServer

LIMIT = 0.5
GIVEN = 5.0
"""Seconds that a test gives a question with `LIMIT` seconds; a busy machine is slow, an endless one never ends."""


@pytest.fixture
def serve() -> Iterator[Callable[..., PlainServer]]:
    started: list[PlainServer] = []

    def start(answer: Callable[[socket.socket, bytes], None]) -> PlainServer:
        started.append(PlainServer(answer))
        return started[-1]

    yield start
    for server in started:
        server.close()


def say(*pieces: bytes) -> Callable[[socket.socket, bytes], None]:
    def answer(link: socket.socket, _request: bytes) -> None:
        for piece in pieces:
            link.sendall(piece)

    return answer


def drip(head: bytes, drop: bytes) -> Callable[[socket.socket, bytes], None]:
    """`head`, then `drop` again and again, each well within any time for a single step."""

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
def test_what_comes_in_drops_ends_in_time(serve, answer):
    """No single step is late, yet the whole is: it ends all the same."""
    server = serve(answer)
    began = time.monotonic()
    with pytest.raises(FetchError) as caught:
        fetch("GET", f"{server.url}/x", timeout=LIMIT)
    assert isinstance(caught.value, TooSlow | BrokenOff), caught.value
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
def test_an_endless_answer_is_dropped_at_its_limit(serve, answer):
    """What may come is bounded, however fast it does."""
    with pytest.raises(TooLarge):
        fetch("GET", serve(answer).url, timeout=30, most_bytes=300_000)


@pytest.mark.parametrize(
    "answer",
    [
        say(b"SSH-2.0-OpenSSH_9\r\n"),
        say(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"),
        say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhalf"),
        say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n"),
        say(),
        say(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"),
        flood(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        flood(b"HTTP/1.1 200 ", b"x" * 1000),
    ],
    ids=["no_http", "short_body", "short_chunk", "no_chunk", "nothing", "negative", "many_headers", "long_line"],
)
def test_what_is_no_whole_answer_is_broken_off_or_empty(serve, answer):
    """Never half an answer passed off as a whole one, never another exception."""
    with suppress(BrokenOff):
        assert fetch("GET", serve(answer).url, timeout=GIVEN).content == b""


def test_nobody_there_is_refused():
    """Told apart from one that breaks off: nothing of it can be running."""
    with pytest.raises(ConnectionRefused):
        fetch("GET", f"http://127.0.0.1:{free_port()}", timeout=GIVEN)


def test_a_whole_answer_comes_with_its_status(serve):
    """Errors as well; the question has its body, its headers and the host that was asked."""
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


def test_a_redirect_is_followed_where_that_is_wanted(serve):
    """At most as often as was said, to another origin only where that was allowed, and nowhere but over HTTP."""
    there = serve(say(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    here = serve(say(f"HTTP/1.1 302 Found\r\nLocation: {there.url}/x\r\nContent-Length: 0\r\n\r\n".encode()))
    loop = serve(say(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"))
    file = serve(say(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n"))
    assert (
        fetch("GET", here.url, timeout=GIVEN, redirects=1, follow=lambda url: url == f"{there.url}/x").content == b"ok"
    )
    assert fetch("GET", here.url, timeout=GIVEN).status == 302
    assert fetch("GET", loop.url, timeout=GIVEN, redirects=3).status == 302
    for url in (file.url, here.url):
        with pytest.raises(BrokenOff, match="it sent us on"):
            fetch("GET", url, timeout=GIVEN, redirects=3)


@pytest.mark.parametrize(
    "location", ["https:///x", "http://[::1", "http://a:99999/", "gopher://127.0.0.1/", "https://"]
)
def test_a_redirect_to_nowhere_is_refused(serve, location):
    """Even where any redirect may be followed."""
    server = serve(say(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()))
    with pytest.raises(FetchError):
        fetch("GET", server.url, timeout=GIVEN, redirects=1, follow=lambda _url: True)


def test_a_question_can_be_dropped_from_another_thread(serve):
    """The waiting one ends at once, the other side sees the connection end; once dropped it isn't sent."""
    asked, left = threading.Event(), threading.Event()

    def answer(link: socket.socket, _request: bytes) -> None:
        asked.set()
        if link.recv(1) == b"":
            left.set()

    request = HttpRequest("POST", serve(answer).url, timeout=60, body={})
    raised: list[Exception] = []

    def ask() -> None:
        try:
            request.answer()
        except FetchError as error:
            raised.append(error)

    waiting = threading.Thread(target=ask, daemon=True)
    waiting.start()
    assert asked.wait(GIVEN)
    request.abort()
    waiting.join(GIVEN)
    assert isinstance(raised[0], BrokenOff)
    assert left.wait(GIVEN)
    with pytest.raises(BrokenOff):
        request.answer()


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_what_is_no_object_is_a_value_error(content):
    """Never a TypeError or RecursionError in whoever looks every second."""
    with pytest.raises(ValueError, match=r"."):
        Reply(200, content).document()


def test_connections_are_closed(serve):
    """Whether the answer came or not."""
    gone = threading.Event()

    def answer(link: socket.socket, _request: bytes) -> None:
        link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        if link.recv(1) == b"":
            gone.set()

    with closing(serve(answer)) as server:
        assert fetch("GET", server.url, timeout=GIVEN).content == b"ok"
        assert gone.wait(GIVEN)
