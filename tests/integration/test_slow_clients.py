"""Slow, idle and too many clients, beside others that must be served."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
import requests

from tests.support.console import FAKE_LLAMA_SERVER, TIMEOUT, Console, fake_model
from tests.support.raw import Raw

DRIBBLERS, IDLERS = 2_000, 1_100
OPEN_FILES = 5_000


@pytest.fixture(scope="module")
def shared(start_shared) -> Iterator[Console]:
    """A console whose model answers at once. This process needs a socket for each client."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] != resource.RLIM_INFINITY and before[1] < OPEN_FILES:
        pytest.skip(f"{OPEN_FILES} open files are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], OPEN_FILES), before[1]))
    yield start_shared(toml=fake_model("plain"), llamacpp_server=FAKE_LLAMA_SERVER)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def crowd() -> Iterator[list[socket.socket]]:
    """Clients that keep connections to the console open until the test ends."""
    clients: list[socket.socket] = []
    yield clients
    for client in clients:
        client.close()


def test_thousands_of_slow_and_idle_clients_leave_others_served(console, crowd):
    """Others at the same address and at another one, both while the slow clients connect and afterwards."""
    console.switch("plain")
    kept = requests.Session()
    with kept:
        assert kept.get(f"{console.url}/healthz", timeout=TIMEOUT).status_code == 200
        for number in range(DRIBBLERS + IDLERS):
            crowd.append(_connect(console))
            if number < DRIBBLERS:
                _say(crowd[-1], "Content-Length: 100000", b"{")
            if number % 500 == 0:
                assert console.get("/v1/models/status").status_code == 200
        for client in crowd[:DRIBBLERS]:
            _send(client, b" ")
        for _ in range(5):
            assert console.get("/healthz").status_code == 200
            answer = console.ask("Hello", model="plain")
            assert answer.status_code == 200
            with Raw(console.port, "127.0.0.2") as raw:
                raw.send_head("GET /v1/models/status HTTP/1.1", "Host: localhost", "Connection: close")
                assert raw.response().status == 200
        assert kept.get(f"{console.url}/healthz", timeout=TIMEOUT).status_code == 200
    assert "Traceback" not in console.output()


def test_a_slow_body_gets_408_and_a_slow_head_is_disconnected(console):
    """A head must arrive within ten seconds, a body at 1 kB a second; a faster body may take longer."""
    body = b'{"messages": []' + b" " * 30_000 + b"}"
    with Raw(console.port) as slow_head, Raw(console.port) as slow_body, Raw(console.port) as steady:
        slow_head.send(b"POST /v1/chat/completions HTTP/1.1\r\n")
        head = ("POST /v1/chat/completions HTTP/1.1", "Host: localhost")
        slow_body.send_head(*head, f"Content-Length: {len(body)}")
        steady.send_head(*head, f"Content-Length: {len(body)}")
        over = threading.Event()

        def dribble() -> None:
            for number in range(0, len(body), 1500):
                slow_head.send(b"X")
                slow_body.send(body[number : number + 1])
                steady.send(body[number : number + 1500])
                if over.wait(0.7):
                    return

        sender = threading.Thread(target=dribble)
        sender.start()
        try:
            refused = slow_body.response()
            assert (refused.status, b'"code":"request_timeout"' in refused.body) == (408, True)
            assert slow_head.receive() == b""
            sender.join()
            assert steady.response().status == 409, "the whole body was read: no model is loaded"
        finally:
            over.set()
            sender.join()


def _connect(console: Console) -> socket.socket:
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            return socket.create_connection(("127.0.0.1", console.port), TIMEOUT)
        except OSError:
            assert time.monotonic() < deadline


def _say(client: socket.socket, *lines: str | bytes) -> None:
    head, body = lines
    _send(client, f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode() + bytes(body))


def _send(client: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # it may be disconnected already
        client.sendall(data)
