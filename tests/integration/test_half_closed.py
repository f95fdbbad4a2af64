"""Clients that close only their sending side, as RFC 9112 allows, and clients that have really left."""

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
    """Models that answer at once, after a while, token by token and never, and one that takes its time to load."""
    return start_shared(
        toml=fake_model("quick")
        + fake_model("talker", "slow_tokens:0.1")
        + fake_model("ponderer", "hang_answering")
        + fake_model("coming", "slow_load:2"),
        llamacpp_server=FAKE_LLAMA_SERVER,
    )


def asked(console: Console, model: str, version: str = "1.1", **body: object) -> Raw:
    """A client that has asked a model for an answer."""
    wish = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}], **body})
    raw = Raw(console.port)
    raw.send_head(f"POST {CHAT} HTTP/{version}", "Host: localhost", f"Content-Length: {len(wish)}")
    raw.send(wish.encode())
    return raw


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_sends_nothing_more_gets_its_answer(console, stream, version):
    """Streamed or not, to the end. What tells it from one that left is sent to no client that couldn't read it."""
    console.switch("talker")
    with asked(console, "talker", version, stream=stream) as raw:
        raw.half_close()
        answer = raw.response()
    assert answer.status == 200
    assert b"words." in answer.body
    assert set(answer.interim) <= {100}
    assert version == "1.1" or not answer.interim


def test_a_usual_client_skips_what_it_is_sent_meanwhile(console):
    """Python's own, which knows of no interim answer but that one."""
    console.switch("talker")
    link = http.client.HTTPConnection("127.0.0.1", console.port, timeout=TIMEOUT)
    with closing(link):
        link.request("POST", CHAT, json.dumps({"model": "talker", "messages": []}))
        link.sock.shutdown(socket.SHUT_WR)
        answer = link.getresponse()
        assert answer.status == 200
        assert b"words." in answer.read()


def test_it_gets_its_answer_from_a_model_that_has_to_be_loaded_first(console):
    """Waiting for its place it counts as there."""
    with asked(console, "coming") as raw:
        raw.half_close()
        answer = raw.response()
    assert answer.status == 200
    assert b"words." in answer.body


def test_it_gets_any_other_page_as_well(console):
    """Nobody watches those."""
    with Raw(console.port) as raw:
        raw.send_head("GET /v1/models/status HTTP/1.1", "Host: localhost")
        raw.half_close()
        assert raw.response().status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_left_is_noticed_before_the_engine_has_said_anything(console, stream):
    """The generation is broken off, though nothing can be written to it yet."""
    console.switch("ponderer")
    with asked(console, "ponderer", stream=stream):
        in_flight(console, "ponderer", 1)
    in_flight(console, "ponderer", 0)


def test_one_that_left_is_noticed_though_it_had_closed_its_sending_side_before(console):
    """First the one side, later the other: nothing arrives that would tell of the second."""
    console.switch("ponderer")
    with asked(console, "ponderer") as raw:
        raw.half_close()
        in_flight(console, "ponderer", 1)
    in_flight(console, "ponderer", 0)


def test_one_that_left_in_the_middle_of_a_stream_is_noticed(console):
    """At the next token."""
    console.switch("talker")
    with asked(console, "talker", stream=True) as raw:
        raw.half_close()
        assert raw.receive()
    in_flight(console, "talker", 0)


def test_one_that_left_the_queue_gives_up_its_place(console):
    """Before the model has come."""
    with asked(console, "coming"):
        wait_until(lambda: waiting(console) == 1, "it to wait")
    wait_until(lambda: waiting(console) == 0, "its place to be free")
    assert console.model("coming")["status"] == "loading", "it was noticed before the load was over"


def in_flight(console: Console, model: str, count: int) -> None:
    wait_until(lambda: console.model(model)["in_flight"] == count, f"{count} requests in flight")


def waiting(console: Console) -> int:
    return sum(entry["requests"] for entry in console.get("/v1/models/switch").json()["queue"])
