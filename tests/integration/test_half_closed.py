"""Clients that close only their sending side, as RFC 9112 allows, and clients that have disconnected."""

from __future__ import annotations

import http.client
import json
import socket
from contextlib import closing

import pytest

from tests.support.console import FAKE_LLAMA_SERVER, TIMEOUT, Console, fake_model, wait_until
from tests.support.raw import Raw

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def shared(start_shared) -> Console:
    """Models that answer at once, after a while, token by token and never, and one that is slow to load."""
    return start_shared(
        toml=fake_model("quick")
        + fake_model("talker", "slow_tokens:0.1")
        + fake_model("ponderer", "hang_answering")
        + fake_model("coming", "slow_load:2"),
        llamacpp_server=FAKE_LLAMA_SERVER,
    )


def send_chat(console: Console, model: str, version: str = "1.1", **body: object) -> Raw:
    """A client that has sent a chat request."""
    wish = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], **body})
    raw = Raw(console.port)
    raw.send_head(f"POST {CHAT} HTTP/{version}", "Host: localhost", f"Content-Length: {len(wish)}")
    raw.send(wish.encode())
    return raw


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_half_closed_client_gets_its_answer(console, stream, version):
    """Streamed or not, completely. Interim responses, which probe it, are sent only if it accepts them."""
    console.switch("talker")
    with send_chat(console, "talker", version, stream=stream) as raw:
        raw.half_close()
        answer = raw.response()
    assert answer.status == 200
    assert b"words." in answer.body
    assert set(answer.interim) <= {100}
    assert version == "1.1" or not answer.interim


def test_pythons_client_skips_interim_responses(console):
    """Python's own client, which knows only the interim response 100."""
    console.switch("talker")
    link = http.client.HTTPConnection("127.0.0.1", console.port, timeout=TIMEOUT)
    with closing(link):
        link.request("POST", CHAT, json.dumps({"model": "talker", "messages": []}))
        link.sock.shutdown(socket.SHUT_WR)
        answer = link.getresponse()
        assert answer.status == 200
        assert b"words." in answer.read()


def test_a_half_closed_client_waits_for_its_model(console):
    """While it waits in the queue it counts as connected."""
    with send_chat(console, "coming") as raw:
        raw.half_close()
        answer = raw.response()
    assert answer.status == 200
    assert b"words." in answer.body


def test_a_half_closed_client_gets_any_other_page(console):
    """Only gateway requests are probed."""
    with Raw(console.port) as raw:
        raw.send_head("GET /v1/models/status HTTP/1.1", "Host: localhost")
        raw.half_close()
        assert raw.response().status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnect_is_noticed_before_the_first_token(console, stream):
    """The generation stops, although nothing can be written to the client yet."""
    console.switch("ponderer")
    with send_chat(console, "ponderer", stream=stream):
        in_flight(console, "ponderer", 1)
    in_flight(console, "ponderer", 0)


def test_a_disconnect_after_a_half_close_is_noticed(console):
    """Closing the second side sends nothing that could be noticed directly."""
    console.switch("ponderer")
    with send_chat(console, "ponderer") as raw:
        raw.half_close()
        in_flight(console, "ponderer", 1)
    in_flight(console, "ponderer", 0)


def test_a_disconnect_during_a_stream_is_noticed(console):
    """At the next token."""
    console.switch("talker")
    with send_chat(console, "talker", stream=True) as raw:
        raw.half_close()
        assert raw.receive()
    in_flight(console, "talker", 0)


def test_a_disconnect_frees_the_place_in_the_queue(console):
    """Before the model is loaded."""
    with send_chat(console, "coming"):
        wait_until(lambda: waiting(console) == 1, "the request to wait")
    wait_until(lambda: waiting(console) == 0, "its place to be free")
    assert console.model("coming")["status"] == "loading", "it was noticed before the load ended"


def in_flight(console: Console, model: str, count: int) -> None:
    wait_until(lambda: console.model(model)["in_flight"] == count, f"{count} requests in flight")


def waiting(console: Console) -> int:
    return sum(entry["requests"] for entry in console.get("/v1/models/switch").json()["queue"])
