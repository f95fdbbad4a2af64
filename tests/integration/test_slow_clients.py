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

from bench import wire
from bench.load import RateJob, run_rate
from bench.rig import worker
from tests.support.console import FAKE_LLAMA_SERVER, TIMEOUT, Console, fake_model
from tests.support.raw import Raw
from tests.support.stopwatch import Stopwatch

DRIBBLERS, IDLERS = 2_000, 1_100
STREAMS = 1_000
SIPPERS, BLOCKS, BLOCK_BYTES = 5, 500, 65_400
WORDS = 10
"""In an answer of the fake, which sends each as an event, and an end mark after them."""
OPEN_FILES = 5_000


@pytest.fixture(scope="module")
def shared(start_shared) -> Iterator[Console]:
    """A console with a model that answers at once, and one that waits for a thousand clients.

    This process needs a socket for each client.
    """
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert before[1] == resource.RLIM_INFINITY or before[1] >= OPEN_FILES, "Raise the hard limit on open files."
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], OPEN_FILES), before[1]))
    toml = fake_model("plain") + fake_model("gathering", f"gather:{STREAMS}")
    yield start_shared(toml=toml, llamacpp_server=FAKE_LLAMA_SERVER)
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


def test_a_thousand_streams_at_once_complete(console):
    """The engine sends no word of any before all of them are under way; each then gets every word."""
    console.switch("gathering")
    body = {"model": "gathering", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
    request = wire.post("/v1/chat/completions", body).decode()
    job = RateJob(console.port, request, STREAMS, TIMEOUT, expect=WORDS + 1, once=True)
    result = run_rate(job)
    assert (result.completed, result.errors) == (STREAMS, 0), result.first_error
    assert console.model("gathering")["in_flight"] == 0


def test_clients_that_read_a_byte_a_second_cost_nobody_else_anything(console, crowd):
    """Others are answered without delay, and what the slow ones don't take stays with the engine, not in memory."""
    console.switch("plain")
    assert console.ask("Hello", model="plain").status_code == 200
    process = worker(console)
    before = process.memory_info().rss
    for _ in range(SIPPERS):
        crowd.append(_connect(console, receives=4096))
        body = b'{"model": "plain", "stream": true, "flood": %d, "messages": []}' % BLOCKS
        _say(crowd[-1], f"Content-Length: {len(body)}", body)
    console.wait_for(lambda status: status["models"]["plain"]["in_flight"] == SIPPERS, "the streams to be under way")
    over = threading.Event()

    def sip() -> None:
        while not over.wait(1):
            for client in crowd:
                client.recv(1)

    sipper = threading.Thread(target=sip)
    sipper.start()
    try:
        waiting = Stopwatch()
        for _ in range(50):
            assert console.ask("Hello", model="plain").status_code == 200
            assert console.get("/v1/models/status").status_code == 200
        assert waiting.waited < 1
        assert console.model("plain")["in_flight"] == SIPPERS
        assert process.memory_info().rss - before < BLOCKS * BLOCK_BYTES, "not even one of the answers is in memory"
    finally:
        over.set()
        sipper.join()
    for client in crowd:
        client.close()
    console.wait_for(lambda status: status["models"]["plain"]["in_flight"] == 0, "the streams to be ended")


def _connect(console: Console, receives: int | None = None) -> socket.socket:
    """A connection; `receives` is the size of its buffer for what it receives."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            client = socket.socket()
            client.settimeout(TIMEOUT)
            if receives is not None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
            client.connect(("127.0.0.1", console.port))
            return client
        except OSError:
            client.close()
            assert time.monotonic() < deadline


def _say(client: socket.socket, *lines: str | bytes) -> None:
    head, body = lines
    _send(client, f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode() + bytes(body))


def _send(client: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # it may be disconnected already
        client.sendall(data)
