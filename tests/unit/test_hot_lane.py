"""The hot lane: which requests it relays, correct responses, and every byte of other requests left to gunicorn."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from types import SimpleNamespace

import gevent
import pytest
from gevent import socket
from gunicorn.config import Config
from gunicorn.http.errors import ParseException
from gunicorn.http.parser import RequestParser
from hypothesis import example, given
from hypothesis import strategies as st

from blueprints.polls import Polls
from server.client_socket import ClientSocket
from server.hot_lane import HotLane, read_head
from services.gateway.relay import forwarded
from services.gateway.router import GatewayError
from tests.support.in_process import InProcess, in_process
from tests.support.scripted_engine import DROP, Reply, answer

MINI, SMALL = "switchyard-mini", "switchyard-small"
LINE = "POST /v1/chat/completions HTTP/1.1"
HOST = "Host: 127.0.0.1:8787"
BODY = json.dumps({"model": MINI, "messages": []}).encode()
PATIENCE = 10.0
STATUS = "/v1/models/status"
CHAT = "/fragments/chat-status"
SSE = "Content-Type: text/event-stream"


class Connection:
    """A client's connection to the hot lane; `left` holds the bytes that the lane passed to gunicorn, once it did."""

    def __init__(self, console: InProcess) -> None:
        ours, self.client = socket.socketpair()
        self.client.settimeout(PATIENCE)
        self.server = ClientSocket(ours.detach())
        self.open = True
        self.under_way = 0
        guard, polls = console.app.extensions["switchyard.guard"], Polls(console.app)
        self._lane = HotLane(console.services, guard, polls, lambda: self.open, self._begin, self._end)
        self._serving = gevent.spawn(self._lane.serve, self.server, "127.0.0.1", b"")

    def _begin(self, _client: ClientSocket) -> None:
        self.under_way += 1

    def _end(self, client: ClientSocket) -> None:
        self.under_way -= 1
        client.expect_head()

    @property
    def left(self) -> bytes:
        return self._serving.get(timeout=PATIENCE)

    def answers(self, *statuses: bytes) -> bytes:
        """Read until responses with these statuses and JSON bodies have arrived."""
        came = b""
        while re.findall(rb"HTTP/1\.1 (.*)\r\n", came) != [*statuses] or not came.endswith(b"}"):
            came += self.read()
        return came

    def read(self) -> bytes:
        data = self.client.recv(65_536)
        assert data, "the connection was closed"
        return data

    def read_all(self) -> bytes:
        """Read until the lane has closed the connection or passed it on."""
        left = self.left
        self.server.close()
        assert left == b""
        return b"".join(iter(lambda: self.client.recv(65_536), b""))

    def close(self) -> None:
        self._serving.kill()
        self.server.close()
        self.client.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    with in_process(tmp_path_factory.mktemp("app"), max_body_mb=1) as console:
        yield console


@pytest.fixture
def connection(console: InProcess) -> Iterator[Connection]:
    connection = Connection(console)
    yield connection
    connection.close()


def request(*headers: str, line: str = LINE, body: bytes = BODY, length: int | None = None) -> bytes:
    sized = f"Content-Length: {len(body) if length is None else length}"
    return "\r\n".join([line, HOST, sized, *headers]).encode("latin-1") + b"\r\n\r\n" + body


def head_of(answered: bytes) -> tuple[bytes, dict[str, str], bytes]:
    """Status line, headers by name, and body."""
    head, _, body = answered.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    return status.encode(), dict(line.split(": ", 1) for line in lines), body


def traffic(console: InProcess) -> int:
    return console.services.board.current.instances[MINI].traffic.in_flight


def test_a_plain_request_is_relayed_with_its_body_and_response(console, loaded, connection):
    """The engine gets the body unchanged; the response has the engine's headers and the server's own."""
    engine = loaded(Reply(answer("200 OK", {"n": 1}, "X-Request-Id: 7", "Set-Cookie: a=b")))
    connection.client.sendall(request("Authorization: Bearer secret"))
    status, headers, body = head_of(connection.answers(b"200 OK"))
    assert (status, json.loads(body)) == (b"HTTP/1.1 200 OK", {"n": 1})
    assert (headers["X-Request-Id"], headers["Connection"]) == ("7", "keep-alive")
    assert "nosniff" in headers["X-Content-Type-Options"]
    assert "Set-Cookie" not in headers
    assert [sent.body for sent in engine.requests] == [BODY]
    assert (traffic(console), connection.under_way) == (0, 0)


def test_pipelined_requests_are_answered_in_order(loaded, connection):
    """Pipelined requests, the last one in two parts."""
    loaded(Reply(answer("200 OK")), Reply(answer("400 Bad Request")), Reply(answer("201 Created")))
    last = request()
    connection.client.sendall(request() + request() + last[:-10])
    connection.answers(b"200 OK", b"400 Bad Request")
    connection.client.sendall(last[-10:])
    connection.answers(b"201 Created")


def test_a_body_in_parts_is_read_completely(loaded, connection):
    engine = loaded(Reply(answer("200 OK")))
    big = json.dumps({"messages": ["x" * 300_000]}).encode()
    whole = request(body=big)
    for part in (whole[:150], whole[150:100_000], whole[100_000:]):
        connection.client.sendall(part)
        gevent.sleep(0)
    connection.answers(b"200 OK")
    assert engine.requests[0].body == big


UNUSUAL = {
    "another method": request(line="GET /v1/chat/completions HTTP/1.1"),
    "another path": request(line="POST /v1/models/switch HTTP/1.1"),
    "a query": request(line="POST /v1/chat/completions?a=b HTTP/1.1"),
    "an old version": request(line="POST /v1/chat/completions HTTP/1.0"),
    "no request at all": b"\x16\x03\x01\x02\x00",
    "a chunked body": request("Transfer-Encoding: chunked"),
    "a body that has to be asked for": request("Expect: 100-continue"),
    "an upgrade": request("Connection: Upgrade", "Upgrade: h2c"),
    "two lengths": request("Content-Length: 3"),
    "a length that is none": request(length=-1),
    "a folded header": request("X-Folded: a\r\n b"),
    "a bare line feed": request("X-Bare: a\nX-More: b"),
    "a header's name that WSGI can not tell from another": request("X_Request_Id: 7"),
    "a value beyond ASCII": request("X-Title: caf\xe9"),
    "two hosts": request(HOST),
    "no host": request().replace(HOST.encode() + b"\r\n", b""),
    "a foreign host": request().replace(b"127.0.0.1", b"evil.example"),
    "a page of another site": request("Origin: http://evil.example"),
    "contradicting proxies": request("X-Forwarded-Proto: http", "X-Forwarded-SSL: on"),
    "a long head": request("X-Long: " + "x" * 9000),
    "many headers": request(*(f"X-{number}: 1" for number in range(99))),
    "a body that is no JSON": request(body=b"{"),
    "a body that is no object": request(body=b"[]"),
    "a model that is none": request(body=b'{"model": 1}'),
    "a model that is not loaded": request(body=json.dumps({"model": SMALL}).encode()),
    "a body that is too long": request(length=1_000_001),
    "a poll of a foreign host": request(line=f"GET {STATUS} HTTP/1.1", body=b"").replace(b"127.0.0.1", b"evil.example"),
    "a poll of an old version": request(line=f"GET {CHAT}?since= HTTP/1.0", body=b""),
    "a poll with a fragment": request(line=f"GET {CHAT}?since=#x HTTP/1.1", body=b""),
    "a poll without a mark": request(line=f"GET {CHAT} HTTP/1.1", body=b""),
    "a question about a poll": request(line=f"HEAD {STATUS} HTTP/1.1", body=b""),
    "a path below a polled one": request(line=f"GET {STATUS}/x HTTP/1.1", body=b""),
}


@pytest.mark.parametrize("sent", UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_requests_are_left_to_gunicorn_with_every_byte(loaded, connection, sent):
    """The app has the rules for such requests; the engine is not called."""
    engine = loaded()
    connection.client.sendall(sent)
    assert connection.left == sent
    assert engine.requests == []


def test_a_body_that_ends_early_is_left_to_gunicorn(loaded, connection):
    """An incomplete body is no request, even if it is valid JSON."""
    engine = loaded()
    sent = request(length=len(BODY) + 1)
    connection.client.sendall(sent)
    connection.client.shutdown(socket.SHUT_WR)
    assert connection.left == sent
    assert engine.requests == []


def test_nothing_is_relayed_while_the_app_restarts(loaded, connection):
    """Such requests are for the next worker."""
    engine = loaded()
    connection.open = False
    connection.client.sendall(request())
    assert connection.left == request()
    assert engine.requests == []


def test_a_failing_engine_is_called_once_and_the_app_reports_the_error(console, loaded, connection):
    """The whole request goes to the app, with the error."""
    engine = loaded(DROP)
    connection.client.sendall(request())
    assert connection.left == request()
    assert isinstance(connection.server.failed, GatewayError)
    assert connection.server.failed.code == "engine_unreachable"
    assert len(engine.requests) == 1
    assert (traffic(console), connection.under_way) == (0, 0)


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def test_an_interrupted_stream_ends_with_an_error_event(loaded, connection):
    """Even in the middle of a chunk; the response is completed, so that clients read the event."""
    loaded(Reply(CHUNKED + b"20\r\ndata: {}\n\n", close=True))
    connection.client.sendall(request("Connection: close"))
    _, headers, body = head_of(connection.read_all())
    assert headers["Transfer-Encoding"] == "chunked"
    assert body.startswith(b"a\r\ndata: {}\n\n\r\n")
    assert b"engine_failed" in body
    assert body.endswith(b"\r\n0\r\n\r\n")


def test_an_interrupted_answer_of_known_length_closes_the_connection(console, loaded, connection):
    """Half an answer must not look complete."""
    loaded(Reply(answer("200 OK", b"0123456789")[:-4], close=True))
    connection.client.sendall(request())
    _, headers, body = head_of(connection.read_all())
    assert (headers["Content-Length"], body) == ("10", b"012345")
    assert traffic(console) == 0


def test_an_answer_without_length_is_chunked(loaded, connection):
    """So that the client's connection can be kept open."""
    loaded(Reply(b"HTTP/1.1 200 OK\r\n\r\nto the end", close=True))
    connection.client.sendall(request())
    came = b""
    while not came.endswith(b"0\r\n\r\n"):
        came += connection.read()
    assert head_of(came)[2] == b"a\r\nto the end\r\n0\r\n\r\n"


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_an_answer_without_a_body_is_not_framed(loaded, connection, status):
    """RFC 9110 section 8.6: a 204 has no Content-Length either."""
    loaded(Reply(f"HTTP/1.1 {status}\r\n\r\n".encode()))
    connection.client.sendall(request("Connection: close"))
    got, headers, body = head_of(connection.read_all())
    assert (got, body) == (f"HTTP/1.1 {status}".encode(), b"")
    assert not {"Content-Length", "Transfer-Encoding"} & headers.keys()


def test_a_client_that_asks_to_close_is_not_waited_for(loaded, connection):
    loaded(Reply(answer("200 OK")))
    connection.client.sendall(request("Connection: close"))
    assert head_of(connection.read_all())[1]["Connection"] == "close"


def test_a_client_that_disconnects_stops_the_engine(console, loaded, connection):
    """The engine sees its connection closed, even before it has sent anything."""
    engine = loaded(Reply())
    connection.client.sendall(request())
    with gevent.Timeout(PATIENCE):
        while not engine.requests:
            gevent.sleep(0.001)
    connection.client.close()
    assert connection.left == b""
    assert engine.disconnected.wait(PATIENCE)
    assert (traffic(console), connection.under_way) == (0, 0)


def test_a_poll_is_answered_without_a_body_when_nothing_has_changed(console, connection, monkeypatch):
    """The connection serves the next request; each header of ours is there once."""
    now = time.time()
    monkeypatch.setattr("blueprints.pages.time", SimpleNamespace(time=lambda: now))
    monkeypatch.setattr(console.services.status, "_clock", lambda: 0.0)
    (mark,) = re.findall(r'name="since" value="([^"]*)"', console.client.get("/models").text)
    for _ in range(2):
        connection.client.sendall(request(line=f"GET /fragments/models?since={mark} HTTP/1.1", body=b""))
        came = connection.read()
        status, headers, body = head_of(came)
        assert (status, headers["Connection"], body) == (b"HTTP/1.1 204 No Content", "keep-alive", b"")
        assert not {"Content-Length", "Transfer-Encoding"} & headers.keys()
        assert came.count(b"Content-Security-Policy: ") == 1
    assert connection.under_way == 0


def test_a_poll_is_left_to_gunicorn_while_the_app_restarts(connection):
    connection.open = False
    sent = request(line=f"GET {STATUS} HTTP/1.1", body=b"")
    connection.client.sendall(sent)
    assert connection.left == sent


VALUES = st.text('ab ,;=\t"_-:\x00\x1f\x7f\xe9\r\n', max_size=12)
NAMES = st.sampled_from(
    ["Content-Length", "Host", "Connection", "X-A", "x-a", "X_A", "X A", "Expect", "Te", "Content-Type", ":", ""]
)
FIELDS = st.one_of(
    st.tuples(NAMES, VALUES),
    st.sampled_from(
        [
            ("Content-Length", "2"),
            ("Content-Length", " 2 "),
            ("Content-Length", "+2"),
            ("Content-Length", "2, 2"),
            ("Transfer-Encoding", "chunked"),
            ("Connection", "keep-alive"),
            ("Connection", "close, x"),
            ("Host", "a"),
            ("X-Forwarded-Proto", "https"),
        ]
    ),
)
LINES = st.sampled_from(
    [LINE, LINE, f"GET {STATUS} HTTP/1.1", f"GET {CHAT}?a=%20b&c=?d HTTP/1.1", f"GET {CHAT}?#d HTTP/1.1"]
)
HEADS = st.builds(
    lambda line, fields, ends: line + "\r\n" + "".join(f"{name}: {value}{ends}" for name, value in fields) + "\r\n",
    LINES,
    st.lists(FIELDS, max_size=6),
    st.sampled_from(["\r\n", "\r\n", "\r\n", "\n", "\r"]),
)


@given(HEADS)
@example(f"{LINE}\r\n{HOST}\r\nContent-Length: 2\r\n\r\n")
@example(f"GET {CHAT}?a=%20b&c=?d HTTP/1.1\r\n{HOST}\r\n\r\n")
def test_the_lane_reads_a_head_as_gunicorn_does(text):
    """gunicorn accepts every head that the lane accepts, with the same headers and body."""
    sent = text.encode("latin-1") + b"{}"
    head = read_head(sent)
    if head is None:
        return
    fields = head.fields
    config = Config()
    config.set("forwarded_allow_ips", "*")
    try:
        parsed = next(RequestParser(config, iter([sent]), ("127.0.0.1", 1)))
    except ParseException as error:
        raise AssertionError(f"gunicorn refuses what the lane takes: {error!r}") from error
    assert (parsed.method, parsed.path, parsed.query) == (head.method, head.path, head.query)
    others = [(name, value) for name, value in parsed.headers if name != "CONTENT-LENGTH"]
    assert fields.forwarded == forwarded((name.lower(), value) for name, value in others)
    keys = {name: "CONTENT_TYPE" if name == "CONTENT-TYPE" else f"HTTP_{name.replace('-', '_')}" for name, _ in others}
    assert fields.environ == {keys[name]: value for name, value in others}
    assert parsed.body.read() == sent[head.body_at : head.end]
    assert parsed.should_close() == (not fields.keeps_connection)


@given(st.binary(max_size=200), st.integers(0, 200))
def test_arbitrary_bytes_in_a_head_are_handled(noise, at):
    """A damaged head is read, or left to gunicorn."""
    whole = request()
    read_head(whole[:at] + noise + whole[at:])
    read_head(whole[:at])
