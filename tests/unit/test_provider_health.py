"""Checks of the services behind providers, and of the key for OpenAI."""

from __future__ import annotations

import socket
import threading

import pytest
from pydantic import SecretStr

from services.engines.ollama.watch import OllamaWatch
from services.providers.health import HealthChecks, ask_server
from services.providers.openai_key import OpenAIKey
from services.providers.probe import Probe
from services.redaction import without_key
from tests.support.console import NO_OLLAMA, free_port
from tests.support.health_servers import hanging_url, json_server
from tests.support.sockets import PlainServer

KEY = "sk-proj-abcdefghijklmnop0123456789"


@pytest.mark.parametrize(
    ("document", "status", "expected"),
    [
        ({"status": "ready", "model": "flux-schnell"}, 200, (True, ("flux-schnell",), False, None)),
        ({"status": "loading", "model": "flux-schnell"}, 200, (True, (), True, None)),
        ({"status": "ok"}, 200, (True, (), False, None)),
        ({"status": "failed", "error": "CUDA out of memory"}, 200, (False, (), False, "CUDA out of memory")),
        ({"status": "failed"}, 200, (False, (), False, "no reason")),
        ({"detail": "no"}, 404, (False, (), False, "404")),
        (["no object"], 200, (False, (), False, "not the service")),
        ({"service": "flux", "status": "ready", "model": "m"}, 200, (True, ("m",), False, None)),
        ({"service": "vision", "status": "ready", "model": "m"}, 200, (False, (), False, "vision")),
    ],
)
def test_what_a_server_says_of_itself(document, status, expected):
    available, models, loading, words = expected
    with json_server(document, status) as server:
        found = ask_server("flux", "Flux", server.url)
    assert (found.available, found.models, found.loading) == (available, models, loading)
    assert (words in found.error) if words else found.error is None
    assert found.latency_ms is not None


def test_nothing_listening_and_broken_answers_are_told_apart():
    """Only where nothing listens can a start help."""
    url = f"http://127.0.0.1:{free_port()}"
    assert ask_server("flux", "Flux", url).refused
    cut = PlainServer(lambda link, _request: link.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"))
    endless = PlainServer(lambda link, _request: _send_endlessly(link))
    nonsense = PlainServer(lambda link, _request: link.sendall(b"SSH-2.0-OpenSSH\r\n"))
    for server in (cut, endless, nonsense):
        found = ask_server("flux", "Flux", server.url)
        assert (found.available, found.refused) == (False, False)
        assert found.error
        server.close()


def _send_endlessly(link: socket.socket) -> None:
    link.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        link.sendall(b"x" * 100_000)


def test_the_services_are_checked_side_by_side():
    """Each answers only once the other was asked too: one after the other they would both hang."""
    both = threading.Barrier(2, timeout=60)

    def answer(link: socket.socket, _request: bytes) -> None:
        both.wait()
        link.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"status": "ok"}')

    flux, vision = PlainServer(answer), PlainServer(answer)
    found = HealthChecks(OllamaWatch(NO_OLLAMA), tuple, flux.url, vision.url).all()
    assert (found["flux"].available, found["vision"].available) == (True, True)
    flux.close()
    vision.close()


def test_a_service_that_hangs_is_given_up():
    with hanging_url() as url:
        found = ask_server("flux", "Flux", url)
    assert (found.available, found.refused) == (False, False)
    assert f"Flux at {url} hangs" in found.error


def test_callers_share_a_check_and_its_result():
    """A hundred tabs ask a service once, unless one of them has to know it now."""
    asked: list[int] = []
    go_on = threading.Event()

    def ask() -> int:
        asked.append(1)
        assert go_on.wait(60)
        return len(asked)

    probe = Probe(ask, fresh_seconds=1e9)
    first, second = probe.begin(), probe.begin(fresh=True)
    assert first is second
    go_on.set()
    assert first.result(60) == 1
    assert probe.begin().result(60) == 1
    assert probe.begin(fresh=True).result(60) == 2


def test_a_check_that_fails_is_reported_to_all_and_made_again():
    outcomes: list[object] = [OSError("no threads"), 7]

    def ask() -> object:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    probe = Probe(ask)
    with pytest.raises(OSError, match="no threads"):
        probe.begin().result(60)
    assert probe.begin().result(60) == 7


def test_the_key_is_sent_and_its_models_listed():
    with json_server({"data": [{"id": "gpt-5"}, {"id": "dall-e-3"}, "odd"]}) as server:
        openai = OpenAIKey(f"{server.url}/v1", SecretStr(KEY))
        assert openai.latest is None
        check = openai.check()
    assert (check.answer, check.models) == ("accepted", ("gpt-5", "dall-e-3"))
    assert openai.latest is check
    assert server.requests[0].startswith(b"GET /v1/models ")
    assert f"Authorization: Bearer {KEY}".encode() in server.requests[0]


@pytest.mark.parametrize(
    ("status", "document", "answer", "words"),
    [
        (
            401,
            {"error": {"message": f"Incorrect API key provided: {KEY}."}},
            "refused",
            "Incorrect API key provided: …",
        ),
        (401, {"error": {"message": "Incorrect API key provided: sk-proj-*****6789. Ask."}}, "refused", "provided: …"),
        (403, {"error": "Your country is not supported"}, "refused", "Your country is not supported"),
        (401, ["odd"], "refused", "no reason"),
        (429, {"error": {"message": "Rate limit reached"}}, "unclear", "429: Rate limit reached"),
        (500, {}, "unclear", "500"),
        (401, {"error": {"message": "a\r\nb\x1b[31m" + 9999 * "x"}}, "refused", "a b [31mx"),
    ],
)
def test_a_refused_key_is_reported_in_the_providers_words_without_the_key(status, document, answer, words):
    """A rate limit or an error of the server says nothing about the key."""
    with json_server(document, status) as server:
        check = OpenAIKey(server.url, SecretStr(KEY)).check()
    assert check.answer == answer
    assert words in check.error
    assert "6789" not in check.error
    assert KEY[:8] not in check.error
    assert len(check.error) < 400
    assert check.error.isprintable()


def test_no_answer_says_nothing_about_the_key():
    check = OpenAIKey(f"http://127.0.0.1:{free_port()}", SecretStr(KEY)).check()
    assert check.answer == "unclear"
    assert "could not be asked" in check.error
    assert OpenAIKey("http://127.0.0.1:9", None).check() is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"key {KEY}!", "key …"),
        ("key=sk-proj-abcd", "…"),
        ("your key 'abcdefgh' is bad", "your key '…' is bad"),
        ("se****ret is wrong", "… is wrong"),
        ("Nothing to hide here, at https://platform.openai.com/account", None),
    ],
)
def test_pieces_of_the_key_are_hidden(text, expected):
    assert without_key(text, KEY) == (expected or text)


def test_a_short_key_leaves_the_words_that_it_is_in():
    """Services of one's own take anything as a key, such as `x`."""
    assert without_key("The key x is none; expected another.", "x") == "The key … is none; expected another."
