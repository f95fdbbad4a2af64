"""The relay over real sockets: when a request is sent again, errors for broken connections, and TLS."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import gevent
import psutil
import pytest

from services.engines.port import Endpoint
from services.gateway.relay import BrokenResponse, EngineResponse, Hangup, Relay, answer_fields
from services.gateway.router import ClientGone, GatewayError
from tests.support.scripted_engine import AUTHORITY, DROP, OK, Reply, ScriptedEngine, answer

StartEngine = Callable[..., ScriptedEngine]


@pytest.fixture
def engine() -> Iterator[StartEngine]:
    """Start scripted engines that end with the test."""
    started: list[ScriptedEngine] = []

    def start(*replies: Reply, tls: bool = False) -> ScriptedEngine:
        started.append(ScriptedEngine(*replies, tls=tls))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def start_relay() -> Iterator[Callable[..., Relay]]:
    """Start relays whose idle connections are closed with the test."""
    started: list[Relay] = []

    def start(timeout: float = 5) -> Relay:
        started.append(Relay(timeout))
        return started[-1]

    yield start
    for relay in started:
        relay.close()


@pytest.fixture
def relay(start_relay: Callable[..., Relay]) -> Relay:
    return start_relay()


def ask(relay: Relay, engine: ScriptedEngine, body: bytes = b"{}", hangup: Hangup | None = None) -> EngineResponse:
    endpoint = Endpoint(engine.origin)
    return relay.send(endpoint, "POST", "/v1/chat/completions", b"", body, hangup or Hangup())


def read_whole(answer: EngineResponse) -> bytes:
    body = b""
    while piece := answer.read_available():
        body += piece
    return body


def test_a_closed_new_connection_is_not_retried(relay, engine):
    """It has read the request and may have generated the answer: the client gets an error and decides."""
    broken = engine(DROP, OK)
    with pytest.raises(GatewayError) as caught:
        ask(relay, broken)
    assert caught.value.code == "engine_unreachable"
    assert len(broken.requests) == 1


def test_a_reused_connection_without_a_response_is_replaced(relay, engine):
    """An engine may close an idle connection at the moment a request is sent over it."""
    tired = engine(OK, DROP, OK)
    read_whole(ask(relay, tired))
    assert ask(relay, tired).status_code == 200
    assert [request.connection for request in tired.requests] == [0, 0, 1]


def test_the_second_attempt_uses_a_new_connection(relay, engine):
    """Several idle connections break at once when their engine restarts: another one would fail like the first."""
    long = Reply(answer(body=b"x" * 500_000))  # doesn't arrive at once with its headers, so its connection stays in use
    restarted = engine(long, long, DROP, Reply(answer(body={"n": 4})))
    first, second = ask(relay, restarted), ask(relay, restarted)
    read_whole(first), read_whole(second)
    assert read_whole(ask(relay, restarted)) == b'{"n": 4}'
    assert [request.connection for request in restarted.requests] == [0, 1, 1, 2]


@pytest.mark.parametrize("said", [b"HTTP/1.1 200 OK\r\nContent-", b"HTTP/1.1 102 Processing\r\n\r\n"])
def test_a_partial_answer_is_not_retried(relay, engine, said):
    """The engine was already working on it."""
    broken = engine(OK, Reply(said, close=True), OK)
    read_whole(ask(relay, broken))
    with pytest.raises(GatewayError) as caught:
        ask(relay, broken)
    assert caught.value.code == "engine_unreachable"
    assert len(broken.requests) == 2


def test_an_engine_gets_at_most_three_requests_for_two(relay, engine):
    """A failure of the new connection that replaced a broken one is not retried."""
    broken = engine(OK, DROP)
    read_whole(ask(relay, broken))
    with pytest.raises(GatewayError):
        ask(relay, broken)
    assert len(broken.requests) == 3


def test_an_early_answer_is_relayed(relay, engine):
    """An engine that refuses a long body answers and closes; the failing send must not hide the answer."""
    strict = engine(Reply(answer("413 Payload Too Large", {"error": "too long"}), close=True, unread=True))
    refused = ask(relay, strict, b"x" * 20_000_000)
    assert refused.status_code == 413
    assert read_whole(refused) == b'{"error": "too long"}'


def test_a_disconnected_client_causes_no_second_attempt(relay, engine):
    """The engine's silence is not its failure when we closed the connection."""
    silent, hangup = engine(OK, Reply()), Hangup()
    read_whole(ask(relay, silent))
    gevent.spawn_later(0.05, hangup)
    with pytest.raises(ClientGone):
        ask(relay, silent, hangup=hangup)
    assert len(silent.requests) == 2


def test_an_https_engine_answers_over_kept_connections(relay, engine, monkeypatch):
    """TLS at the origin's own port, with a certificate of an authority that the system trusts."""
    monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
    remote = engine(Reply(answer(body={"hello": "there"})), tls=True)
    for _ in range(3):
        assert read_whole(ask(relay, remote)) == b'{"hello": "there"}'
    assert [request.connection for request in remote.requests] == [0, 0, 0]
    assert remote.lines[0] == "POST /v1/chat/completions HTTP/1.1"


def test_a_reused_tls_connection_without_a_response_is_replaced(relay, engine, monkeypatch):
    """As without TLS; a failure of a new connection is not retried."""
    monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
    tired = engine(OK, DROP, OK, tls=True)
    read_whole(ask(relay, tired))
    assert ask(relay, tired).status_code == 200
    assert [request.connection for request in tired.requests] == [0, 0, 1]
    fresh = engine(DROP, tls=True)
    with pytest.raises(GatewayError):
        ask(relay, fresh)
    assert len(fresh.requests) == 1


def test_a_tls_connection_closed_while_idle_is_not_used(relay, engine, monkeypatch):
    """The connection is checked before use: the request isn't sent over it first."""
    monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
    brief = engine(Reply(answer(), close=True), tls=True)
    for _ in range(2):
        brief.disconnected.clear()
        read_whole(ask(relay, brief))
        assert brief.disconnected.wait(5)
    assert [request.connection for request in brief.requests] == [0, 1]


def test_an_untrusted_certificate_is_refused(relay, engine):
    """The request is not sent, and the error has the reason."""
    impostor = engine(tls=True)
    with pytest.raises(GatewayError) as caught:
        ask(relay, impostor)
    assert caught.value.code == "engine_unreachable"
    assert "certificate" in caught.value.message
    assert impostor.requests == []


def test_disconnecting_aborts_a_tls_answer(relay, engine, monkeypatch):
    """The engine sees its connection close, the waiting reader returns, and nothing is left."""
    monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
    begun = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n"
    talker, hangup = engine(Reply(begun), tls=True), Hangup()
    streamed = ask(relay, talker, hangup=hangup)
    assert streamed.read_available() == b"hi"
    gevent.spawn_later(0.05, hangup)
    with pytest.raises((OSError, BrokenResponse)):
        streamed.read_available()
    streamed.close()
    assert talker.disconnected.wait(5)


def test_a_silent_tls_engine_times_out(start_relay, engine, monkeypatch):
    """TLS has its own exception for a timeout, which must be handled as one."""
    monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
    silent = engine(Reply(), tls=True)
    with pytest.raises(GatewayError) as caught:
        ask(start_relay(0.2), silent)
    assert caught.value.code == "engine_timeout"


@pytest.mark.parametrize(("origin", "port"), [("https://localhost", 443), ("http://localhost", 80)])
def test_the_port_follows_the_scheme(relay, origin, port, monkeypatch):
    """The default port is 443 for https, 80 for http."""
    asked: list[int] = []

    def refuse(_host: str, number: int) -> None:
        asked.append(number)
        raise OSError("nobody there")

    monkeypatch.setattr("services.gateway.connections.look_up", refuse)
    with pytest.raises(GatewayError):
        relay.send(Endpoint(origin), "GET", "/v1/x", b"", b"", Hangup())
    assert asked == [port]


def test_a_resolver_that_hangs_delays_a_request_for_a_bounded_time(relay, monkeypatch):
    """It can't be interrupted and may take half a minute; the models of other hosts don't wait for it."""
    monkeypatch.setattr("services.gateway.connections.CONNECT_SECONDS", 0.05)
    asked = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_args, **_options: asked.wait(30) and [])
    with pytest.raises(GatewayError, match="accepted no connection"):
        relay.send(Endpoint("http://slow.test"), "GET", "/v1/x", b"", b"", Hangup())
    asked.set()


def test_the_path_of_an_api_elsewhere_takes_the_place_of_v1(relay, engine):
    """Of paths under /v1 alone: the local image and vision servers have paths beside it."""
    upstream = engine(OK)
    endpoint = Endpoint(upstream.origin, base_path="/api/openai/v1")
    for target in ("/v1/chat/completions?a=/v1/b", "/v1x", "/score"):
        relay.send(endpoint, "POST", target, b"", b"{}", Hangup()).close()
    assert [line.split(" ")[1] for line in upstream.lines] == [
        "/api/openai/v1/chat/completions?a=/v1/b",
        "/v1x",
        "/score",
    ]


def test_a_failed_connection_frees_its_place(relay, engine):
    """A failed connection frees its place: 2,000 failures leave the pool unchanged."""
    gone = engine()
    gone.close()
    before = threading.active_count()
    for _ in range(2_000):
        with pytest.raises(GatewayError):
            ask(relay, gone)
    assert threading.active_count() < before + 50


def test_idle_connections_to_an_ended_engine_are_closed(relay, engine, monkeypatch):
    """No request uses them again: they would stay half closed until the app ends."""
    monkeypatch.setattr("services.gateway.relay.PRUNE_SECONDS", 0.02)
    gone, stays = engine(), engine()
    for one in (gone, gone, stays):
        read_whole(ask(relay, one))
    gone.close()
    with gevent.Timeout(5):
        while gone.origin in relay._pools:
            gevent.sleep(0.01)
    assert _half_closed() == 0
    assert ask(relay, stays).status_code == 200
    assert [request.connection for request in stays.requests] == [0, 0]


def test_an_engines_headers_pass_an_allow_list(relay, engine):
    """A compromised engine, or one of another site, must not set cookies, redirect, or clear the browser's data."""
    harmful = (
        "Set-Cookie: a=b",
        "Access-Control-Allow-Origin: *",
        "Access-Control-Allow-Credentials: true",
        "Refresh: 0; url=https://evil.example",
        "Location: https://evil.example",
        'Clear-Site-Data: "*"',
        "Content-Security-Policy: default-src *",
        "WWW-Authenticate: Basic",
        "Service-Worker-Allowed: /",
        "Server: engine",
        "Connection: keep-alive, X-Request-Id",
        "Keep-Alive: timeout=5",
    )
    useful = ("X-Request-Id: 7", "Retry-After: 3", "X-RateLimit-Remaining: 9", "OpenAI-Processing-Ms: 12")
    talkative = engine(Reply(answer("200 OK", {"n": 1}, *harmful, *useful)))
    fields = answer_fields(ask(relay, talkative))
    passed = {name.decode(): value.decode() for name, value in fields}
    assert passed == {
        "Content-Type": "application/json",
        "Content-Length": "8",
        **dict(line.split(": ", 1) for line in useful),
    }


def _half_closed() -> int:
    """Connections of this process that only the other side has closed."""
    return sum(link.status == psutil.CONN_CLOSE_WAIT for link in psutil.Process().net_connections(kind="tcp"))
