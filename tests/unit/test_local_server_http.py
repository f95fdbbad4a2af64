"""The HTTP side of the image and vision servers, in this process: its limits, and clients that keep to no rule."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from typing import Any

import pytest
import requests
import serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.console import wait_until


class Echo:
    """A service that returns its body's `value`, after `gate` has opened."""

    model = "echo"
    name = "echo"
    max_body_bytes = 1_000

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.routes = {"/echo": self.echo, "/stream": self.stream, "/broken": self.broken}

    def load(self, report: Callable[[serving.Progress], None]) -> None:
        report(serving.Progress("loading", 1, 2))

    def health(self) -> Mapping[str, object]:
        return {"device": "cpu"}

    def echo(self, body: dict[str, Any], exchange: serving.Exchange) -> None:
        exchange.send_json({"value": exchange.run("Echo", lambda _: self.wait(body.get("value")))})

    def stream(self, body: dict[str, Any], exchange: serving.Exchange) -> None:
        exchange.stream("Echo", lambda _: {"value": self.wait(body.get("value"))})

    def broken(self, *_: object) -> None:
        raise KeyError("a defect")

    def wait(self, value: object) -> object:
        self.gate.wait(60)
        return value


class Running:
    def __init__(self, service: Echo) -> None:
        self.service = service
        self.server = serving.Server(service, "127.0.0.1", 0)
        self.server.load()
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.service.gate.set()
        self.server.stop(5)
        self.server.shutdown()
        self.server.server_close()

    def connect(self, data: bytes = b"") -> socket.socket:
        link = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        link.sendall(data)
        return link

    def talk(self, data: bytes) -> bytes:
        """Return the whole answer to these bytes, after which this side of the connection is closed for sending."""
        with self.connect(data) as link:
            link.shutdown(socket.SHUT_WR)
            return read_all(link)


def read_all(link: socket.socket) -> bytes:
    answer = b""
    try:
        while piece := link.recv(65_536):
            answer += piece
    except ConnectionResetError:
        pass
    return answer


def error_code(answer: bytes) -> str:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head
    code: str = json.loads(body)["error"]["code"]
    return code


@pytest.fixture
def running() -> Iterator[Running]:
    with closing(Running(Echo())) as running:
        yield running


def test_a_request_that_does_not_arrive_in_time_is_ended(running: Running, monkeypatch: pytest.MonkeyPatch):
    """The time is for all of it: a byte now and then doesn't prolong it. A body gets an answer, a head none."""
    monkeypatch.setattr(serving, "READ_SECONDS", 0.3)
    with running.connect(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{") as slow:
        sending = threading.Event()

        def drip() -> None:
            while not sending.wait(0.02):
                try:
                    slow.sendall(b" ")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        answer = read_all(slow)
        sending.set()
        thread.join()
    assert answer.startswith(b"HTTP/1.1 408 ")
    with running.connect(b"GET /health HTTP/1.1\r\nHost: local") as half_a_head:
        assert read_all(half_a_head) == b""


def test_connections_beyond_the_limit_are_closed_and_room_is_made_by_those_that_end(
    running: Running, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(serving, "CONNECTION_LIMIT", 3)
    with ExitStack() as stack:
        idle = [stack.enter_context(running.connect()) for _ in range(3)]
        wait_until(lambda: running.server._connections == 3, "the connections to be accepted")
        with running.connect() as refused:
            assert read_all(refused) == b""
        idle[0].close()
        wait_until(lambda: running.server._connections == 2, "the closed connection to be noticed")
        assert requests.get(f"{running.url}/health", timeout=30).status_code == 200


def test_a_defect_is_answered_as_an_error(running: Running):
    response = requests.post(f"{running.url}/broken", json={}, timeout=30)
    assert response.status_code == 500
    assert response.json() == {"error": {"code": "failed", "message": "KeyError: 'a defect'"}}


def test_nan_is_an_error_instead_of_invalid_json(running: Running):
    response = requests.post(f"{running.url}/echo", data='{"value": 1e999}', timeout=30)  # infinity, once it is read
    assert response.status_code == 500
    assert "Infinity" not in response.text


def test_a_stream_that_waits_says_so_now_and_then(running: Running, monkeypatch: pytest.MonkeyPatch):
    """Comments, which a reader of events skips, show a client behind a proxy that the server is there."""
    monkeypatch.setattr(serving, "KEEP_ALIVE_SECONDS", 0.05)
    running.service.gate.clear()
    with requests.post(f"{running.url}/stream", json={"value": 1}, stream=True, timeout=30) as response:
        lines = response.iter_lines(chunk_size=1)
        assert [next(lines), next(lines), next(lines)] == [b": waiting", b"", b": waiting"]
        running.service.gate.set()
        assert [line for line in lines if line.startswith(b"data")] == [b'data: {"value": 1}']


def test_a_stop_answers_those_who_wait_and_those_whose_work_runs(running: Running):
    """The running work is told to end; nobody is left without an answer."""
    running.service.gate.clear()
    body = b'{"value": 1}'
    request = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with running.connect(request) as first, running.connect(request) as second:
        wait_until(lambda: running.server.queue.figures()["waiting"] == 1, "one request to wait")
        stopping = threading.Thread(target=running.server.stop, args=(30,))
        stopping.start()
        answers = [read_all(second)]
        running.service.gate.set()
        answers.append(read_all(first))
        stopping.join()
    assert error_code(answers[0]) == "stopping"
    assert answers[1].startswith(b"HTTP/1.1 200 ")  # its work has no step at which it could end
    late = requests.post(f"{running.url}/echo", json={}, timeout=30)
    assert (late.status_code, late.json()["error"]["code"]) == (503, "stopping")


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET /health HTTP/1.1\r\n\r\n", b"403"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", b"403"),
        (b"GET /health HTTP/1.1\r\nHost: localhost@attacker.example\r\n\r\n", b"403"),
        (b"GET /health HTTP/1.1\r\nHost: localhost/../attacker.example\r\n\r\n", b"403"),
        (b"GET /health HTTP/1.1\r\nHost: [::1\r\n\r\n", b"403"),
        (b"POST /echo HTTP/1.1\r\nHost: localhost\r\n\r\n{}", b"400"),
        (b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n{}", b"400"),
        (b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0x2\r\n\r\n{}", b"400"),
        (b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\n{}", b"400"),
        (b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 50 + b"\r\n\r\n{}", b"413"),
        (b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", b"400"),
        (b"BREW /echo HTTP/1.1\r\nHost: localhost\r\n\r\n", b"405"),
        (b"GET /health HTTP/9.1\r\nHost: localhost\r\n\r\n", b"505"),
        (b"GET\r\n\r\n", b"400"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_odd_requests_get_an_error_in_json(running: Running, request_head: bytes, status: bytes):
    answer = running.talk(request_head)
    assert status in answer.partition(b"\r\n")[0] or answer.startswith(b"{")  # http.server answers HTTP/0.9 bare
    assert b'"error"' in answer


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.sampled_from(
        [b"POST /echo HTTP/1.1\r\nHost: localhost\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b""]
    ),
    rest=st.binary(max_size=300),
)
def test_no_bytes_take_the_server_down(running: Running, head: bytes, rest: bytes):
    """Whatever arrives, the connection ends, and the next request is answered."""
    running.talk(head + rest)
    assert requests.get(f"{running.url}/health", timeout=30).json()["status"] == "ready"
    wait_until(lambda: running.server._connections == 0, "every connection to be given back")
