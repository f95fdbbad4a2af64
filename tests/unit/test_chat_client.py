"""The chat page's way to an engine: what it tells of a refusal, and that nothing is waited for without end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.answers import GenerationError
from services.engines.port import Endpoint, Model
from services.gateway.chat_client import ChatClient
from services.gateway.relay import Relay
from services.gateway.router import Admission
from services.switching.events import InstanceView
from services.switching.traffic import Traffic
from tests.support.scripted_engine import Act, ScriptedEngine, answer


class OneModel:
    """A router that admits everybody to one engine."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.traffic = Traffic()
        self._engine = engine

    def admit(self, *_: object) -> Admission:
        self.traffic.enter()
        entry, endpoint = Model("m", "llamacpp", "m"), Endpoint(self._engine.origin)
        return Admission(InstanceView("m", "llamacpp", "running", "host", self.traffic, entry, endpoint=endpoint))


@pytest.fixture
def relay() -> Iterator[Relay]:
    relay = Relay(5)
    yield relay
    for origin in list(relay._pools):
        relay.forget(origin)


def refused(relay: Relay, act: Act) -> str:
    """What is said of an engine's refusal, once nothing of the request is left anywhere."""
    engine = ScriptedEngine(act)
    router = OneModel(engine)
    client = ChatClient(router, relay)  # type: ignore[arg-type]
    with pytest.raises(GenerationError) as caught, client.stream_chat(None, [], lambda: False):
        pass
    assert engine.left.wait(2)
    engine.close()
    assert router.traffic.in_flight == 0
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"error": {"message": "too long"}}, "The engine refused: too long"),
        ({"error": "too long"}, "The engine refused: too long"),
        (b"<html>", "The engine answered with status 400."),
        ([1], "The engine answered with status 400."),
        (b"[" * 50_000, "The engine answered with status 400."),
    ],
)
def test_a_refusal_is_told_in_the_engines_words_where_it_has_any(relay, body, told):
    """Whatever its shape."""
    assert refused(relay, Act(answer("400 Bad Request", body), hangs_up=True)) == told


def test_a_refusal_that_never_ends_is_not_read_to_its_end(relay):
    """Nor waited for: what has come says enough, and the connection is closed."""
    endless = b"HTTP/1.1 500 Oops\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 200_000
    assert refused(relay, Act(endless)) == "The engine answered with status 500."


def test_a_refusal_that_breaks_off_is_one_all_the_same(relay):
    """It is no error of Switchyard's own."""
    told = refused(relay, Act(b"HTTP/1.1 500 Oops\r\nContent-Length: 10\r\n\r\nx", hangs_up=True))
    assert "broke off" in told
