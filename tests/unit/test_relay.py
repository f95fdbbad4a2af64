"""The relay on the wire: how often an engine is asked, what a broken connection means, and TLS."""

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
    """Starts scripted engines that end with the test."""
    started: list[ScriptedEngine] = []

    def start(*replies: Reply, tls: bool = False) -> ScriptedEngine:
        started.append(ScriptedEngine(*replies, tls=tls))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def start_relay() -> Iterator[Callable[..., Relay]]:
    """Starts relays whose idle connections are closed with the test."""
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
    return relay.send(endpoint, "POST", "/v1/chat/completions", (), body, hangup or Hangup())


def whole(answer: EngineResponse) -> bytes:
    body = b""
    while piece := answer.read_available():
        body += piece
    return body


def test_an_engine_that_hangs_up_on_a_new_connection_is_not_asked_again(relay, engine):
    """It has read the whole request, and may have generated the whole answer: the client is told, and decides."""
    broken = engine(DROP, OK)
    with pytest.raises(GatewayError) as caught:
        ask(relay, broken)
    assert caught.value.code == "engine_unreachable"
    assert len(broken.requests) == 1


def test_a_used_connection_that_gives_nothing_is_replaced_by_a_new_one(relay, engine):
    """An engine may close an idle connection in the moment in which a request goes out over it."""
    tired = engine(OK, DROP, OK)
    whole(ask(relay, tired))
    assert ask(relay, tired).status_code == 200
    assert [request.connection for request in tired.requests] == [0, 0, 1]


def test_the_second_try_goes_over_a_new_connection_whatever_else_is_idle(relay, engine):
    """Two idle connections break at once when their engine restarts: the second would break as the first did."""
    long = Reply(answer(body=b"x" * 500_000))  # not all there with its headers, so that it keeps its connection
    restarted = engine(long, long, DROP, Reply(answer(body={"n": 4})))
    first, second = ask(relay, restarted), ask(relay, restarted)
    whole(first), whole(second)
    assert whole(ask(relay, restarted)) == b'{"n": 4}'
    assert [request.connection for request in restarted.requests] == [0, 1, 1, 2]


@pytest.mark.parametrize("said", [b"HTTP/1.1 200 OK\r\nContent-", b"HTTP/1.1 102 Processing\r\n\r\n"])
def test_one_byte_of_an_answer_is_enough_not_to_ask_again(relay, engine, said):
    """The engine was at work on it."""
    broken = engine(OK, Reply(said, close=True), OK)
    whole(ask(relay, broken))
    with pytest.raises(GatewayError) as caught:
        ask(relay, broken)
    assert caught.value.code == "engine_unreachable"
    assert len(broken.requests) == 2


def test_an_engine_is_asked_three_times_at_most_for_two_requests(relay, engine):
    """The new connection that replaces a broken one is no reason to try once more."""
    broken = engine(OK, DROP)
    whole(ask(relay, broken))
    with pytest.raises(GatewayError):
        ask(relay, broken)
    assert len(broken.requests) == 3


def test_an_answer_that_comes_before_the_request_was_read_is_passed_on(relay, engine):
    """An engine that refuses a long body says so and hangs up; the failing send must not hide what it said."""
    strict = engine(Reply(answer("413 Payload Too Large", {"error": "too long"}), close=True, unread=True))
    refused = ask(relay, strict, b"x" * 20_000_000)
    assert refused.status_code == 413
    assert whole(refused) == b'{"error": "too long"}'


def test_a_client_that_left_is_the_reason_and_no_second_try(relay, engine):
    """Hung up on by us, the engine's silence is not its failure."""
    silent, hangup = engine(OK, Reply()), Hangup()
    whole(ask(relay, silent))
    gevent.spawn_later(0.05, hangup)
    with pytest.raises(ClientGone):
        ask(relay, silent, hangup=hangup)
    assert len(silent.requests) == 2


def test_an_https_engine_answers_over_kept_connections(relay, engine, monkeypatch):
    """TLS at the origin's own port, its certificate signed by an authority that the system trusts."""
    monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
    remote = engine(Reply(answer(body={"hello": "there"})), tls=True)
    for _ in range(3):
        assert whole(ask(relay, remote)) == b'{"hello": "there"}'
    assert [request.connection for request in remote.requests] == [0, 0, 0]
    assert remote.lines[0] == "POST /v1/chat/completions HTTP/1.1"


def test_a_used_tls_connection_that_gives_nothing_is_replaced(relay, engine, monkeypatch):
    """As without TLS, and on a new one it isn't."""
    monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
    tired = engine(OK, DROP, OK, tls=True)
    whole(ask(relay, tired))
    assert ask(relay, tired).status_code == 200
    assert [request.connection for request in tired.requests] == [0, 0, 1]
    fresh = engine(DROP, tls=True)
    with pytest.raises(GatewayError):
        ask(relay, fresh)
    assert len(fresh.requests) == 1


def test_a_tls_connection_that_was_closed_while_idle_is_noticed(relay, engine, monkeypatch):
    """Looked at before it is used: the request isn't sent into the void first."""
    monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
    brief = engine(Reply(answer(), close=True), tls=True)
    for _ in range(2):
        brief.disconnected.clear()
        whole(ask(relay, brief))
        assert brief.disconnected.wait(5)
    assert [request.connection for request in brief.requests] == [0, 1]


def test_a_certificate_that_nobody_vouches_for_is_refused(relay, engine):
    """The request is not sent; the reason is told."""
    impostor = engine(tls=True)
    with pytest.raises(GatewayError) as caught:
        ask(relay, impostor)
    assert caught.value.code == "engine_unreachable"
    assert "certificate" in caught.value.message
    assert impostor.requests == []


def test_leaving_breaks_a_tls_answer_off(relay, engine, monkeypatch):
    """The engine sees its connection close, whoever waits for the next byte goes on, and nothing is left behind."""
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


def test_a_silent_tls_engine_times_out_like_any_other(start_relay, engine, monkeypatch):
    """Its own error class must not turn a time-out into something else."""
    monkeypatch.setenv("SSL_CERT_FILE", str(AUTHORITY))
    silent = engine(Reply(), tls=True)
    with pytest.raises(GatewayError) as caught:
        ask(start_relay(0.2), silent)
    assert caught.value.code == "engine_timeout"


@pytest.mark.parametrize(("origin", "port"), [("https://localhost", 443), ("http://localhost", 80)])
def test_the_port_follows_the_scheme(relay, origin, port, monkeypatch):
    """What an address leaves out is 443 for https, 80 for http."""
    asked: list[int] = []

    def refuse(_host: str, number: int, *_more: object) -> None:
        asked.append(number)
        raise OSError("nobody there")

    monkeypatch.setattr("gevent.socket.getaddrinfo", refuse)
    with pytest.raises(GatewayError):
        relay.send(Endpoint(origin), "GET", "/v1/x", (), b"", Hangup())
    assert asked == [port]


def test_nothing_waits_for_ever_behind_a_failed_connection(relay, engine):
    """A new connection that can't be made gives its place back: 2,000 failures leave the pool as it was."""
    gone = engine()
    gone.close()
    before = threading.active_count()
    for _ in range(2_000):
        with pytest.raises(GatewayError):
            ask(relay, gone)
    assert threading.active_count() < before + 50


def test_idle_connections_to_an_engine_that_has_gone_are_closed(relay, engine, monkeypatch):
    """Nobody asks that engine again: without a look at them they stay open, half closed, until the app ends."""
    monkeypatch.setattr("services.gateway.relay.PRUNE_SECONDS", 0.02)
    gone, stays = engine(), engine()
    for one in (gone, gone, stays):
        whole(ask(relay, one))
    gone.close()
    with gevent.Timeout(5):
        while gone.origin in relay._pools:
            gevent.sleep(0.01)
    assert _half_closed() == 0
    assert ask(relay, stays).status_code == 200
    assert [request.connection for request in stays.requests] == [0, 0]


def test_an_engines_headers_pass_by_a_list(relay, engine):
    """One that is taken over, or speaks for another site, must not set cookies here, lead away or empty the browser."""
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
    """Connections of this process that the other side has closed, and this one has not."""
    return sum(link.status == psutil.CONN_CLOSE_WAIT for link in psutil.Process().net_connections(kind="tcp"))
