"""The chat page's client of the engines: error messages, limits in size and time, dropped history."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import gevent
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.answers import Delta, GenerationError, Prompt
from services.cancellation import Cancelled, CancelToken
from services.engines.port import Endpoint, Model
from services.gateway.chat_client import ChatClient
from services.gateway.relay import Relay
from services.gateway.router import Admission
from services.store.records import Message
from services.switching.events import InstanceView
from services.switching.traffic import Traffic
from services.text import fix_surrogates
from tests.support.scripted_engine import Reply, ScriptedEngine, answer


class OneModel:
    """A router that admits every request to one engine."""

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
    relay.close()


def refusal(relay: Relay, act: Reply) -> str:
    """The error message for an engine's refusal; asserts that nothing of the request is left."""
    engine = ScriptedEngine(act)
    router = OneModel(engine)
    client = ChatClient(router, relay)  # type: ignore[arg-type]
    with pytest.raises(GenerationError) as caught, client.stream_chat(None, Prompt(()), CancelToken()):
        pass
    assert engine.disconnected.wait(2)
    engine.close()
    assert router.traffic.in_flight == 0
    return str(caught.value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"error": {"message": "too long"}}, "The engine refused: too long"),
        ({"error": "too long"}, "The engine refused: too long"),
        (b"<html>", "The engine answered with status 400."),
        ([1], "The engine answered with status 400."),
        (b"[" * 50_000, "The engine answered with status 400."),
    ],
)
def test_a_refusal_shows_the_engines_message_if_there_is_one(relay, body, expected):
    """In whatever shape the engine reports it."""
    assert refusal(relay, Reply(answer("400 Bad Request", body), close=True)) == expected


def test_an_endless_refusal_is_not_read_to_its_end(relay):
    """What has arrived is enough for a message, and the connection is closed."""
    endless = b"HTTP/1.1 500 Oops\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 200_000
    assert refusal(relay, Reply(endless)) == "The engine answered with status 500."


def test_a_truncated_refusal_is_still_a_refusal(relay):
    """It is reported as the engine's error, not as one of ours."""
    message = refusal(relay, Reply(b"HTTP/1.1 500 Oops\r\nContent-Length: 10\r\n\r\nx", close=True))
    assert "broke off" in message


def test_stopping_before_the_first_token_closes_the_connection(relay):
    """An engine that still processes a long prompt has sent nothing, not even headers; it notices the stop at once."""
    engine = ScriptedEngine(Reply())
    router, token = OneModel(engine), CancelToken()

    def stop() -> None:
        while not engine.requests:
            gevent.sleep(0.001)
        token.cancel()

    stopping = gevent.spawn(stop)
    with pytest.raises(Cancelled), ChatClient(router, relay).stream_chat(None, Prompt(()), token):  # type: ignore[arg-type]
        pass
    assert engine.disconnected.wait(2)
    stopping.join()
    engine.close()
    assert router.traffic.in_flight == 0


def test_stopping_before_the_request_sends_nothing(relay):
    """As when the model becomes ready at the moment of the click."""
    engine = ScriptedEngine()
    router, token = OneModel(engine), CancelToken()
    token.cancel()
    with pytest.raises(Cancelled), ChatClient(router, relay).stream_chat(None, Prompt(()), token):  # type: ignore[arg-type]
        pass
    engine.close()
    assert engine.requests == []
    assert router.traffic.in_flight == 0


def delta(**fields: object) -> object:
    return {"choices": [{"index": 0, "delta": fields}]}


def streamed(relay: Relay, *events: object) -> list[Delta]:
    """The deltas of an answer with these events. A str is sent unchanged as an event's data."""
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    body = "".join(f"data: {line}\n\n" for line in lines).encode()
    engine = ScriptedEngine(Reply(answer(body=body)))
    with (
        suppress(GenerationError),
        ChatClient(OneModel(engine), relay).stream_chat(None, Prompt(()), CancelToken()) as stream,
    ):  # type: ignore[arg-type]
        pieces = list(stream)
    engine.close()
    return pieces


def test_split_surrogates_are_joined_or_replaced(relay):
    """JSON can encode surrogates separately: a split pair is joined, a lone surrogate is replaced."""
    pieces = streamed(
        relay, *(delta(content=text) for text in ("a\ud83d", "\ude00b", "c\ud83d", "d\ude00", "\ud83d")), "[DONE]"
    )
    assert "".join(piece.text for piece in pieces) == "a\U0001f600bc\ufffdd\ufffd\ufffd"
    assert all(piece.text.encode() for piece in pieces)


@given(st.text(st.characters(exclude_categories=())))
def test_cleaned_text_can_be_encoded_and_loses_nothing_else(text):
    """Any text can be encoded after cleaning; text without surrogates is unchanged."""
    clean = fix_surrogates(text)
    clean.encode()
    assert fix_surrogates(clean) == clean
    without = [c for c in text if not "\ud800" <= c <= "\udfff" and c != "\ufffd" and c < "\U00010000"]
    assert [c for c in clean if c != "\ufffd" and c < "\U00010000"] == without


def test_thoughts_are_read_once_under_any_field_name(relay):
    """llama.cpp, newer vLLM and Ollama name the field differently; one vLLM version sends both names."""
    both = delta(reasoning="c ", reasoning_content="c ")
    events = (delta(reasoning_content="a "), delta(reasoning="b "), both, delta(thinking="d"), delta(content="Yes."))
    pieces = streamed(relay, *events, "[DONE]")
    assert "".join(piece.text for piece in pieces if piece.thought) == "a b c d"
    assert [piece.text for piece in pieces if not piece.thought] == ["Yes."]


@pytest.mark.parametrize(
    "odd",
    [
        "",
        "null",
        "[]",
        "[" * 50_000,
        "{",
        {"choices": 3},
        {"choices": [None, 3, {}, {"delta": None}, {"delta": [1]}]},
        delta(content=None),
        delta(content=3, reasoning=[]),
        delta(role="assistant"),
    ],
)
def test_events_that_are_not_deltas_are_ignored(relay, odd):
    """The rest of the answer is unaffected."""
    assert streamed(relay, delta(content="a"), odd, delta(content="b"), "[DONE]") == [Delta("a"), Delta("b")]


def test_an_endless_event_is_not_read_to_its_end(relay):
    """Its data isn't kept either, because memory is shared by all requests."""
    engine = ScriptedEngine(Reply(answer(body=b"data: " + b"x" * 2_000_000)))
    with (
        pytest.raises(GenerationError, match="an invalid response"),
        ChatClient(OneModel(engine), relay).stream_chat(None, Prompt(()), CancelToken()) as stream,  # type: ignore[arg-type]
    ):
        list(stream)
    engine.close()


FULL = {"code": 400, "type": "exceed_context_size_error", "n_prompt_tokens": 900, "n_ctx": 300, "message": "request"}
ANSWER = Reply(answer(body=b'data: {"choices":[{"delta":{"content":"ok"}}]}\n\ndata: [DONE]\n\n'))


def turns(count: int) -> tuple[Message, ...]:
    """`count` messages of 100 characters, alternating question and answer, ending with a question."""
    roles = ["user", "assistant"] * count
    made = (
        Message(f"m{n}", "c", role, f"{n}".ljust(100, "x"), "m", "complete", None, 0.0, 0.0, None, None)  # type: ignore[arg-type]
        for n, role in enumerate(roles[:-1])
    )
    return tuple(made)


def sent_numbers(engine: ScriptedEngine) -> list[list[str]]:
    """The numbers of the messages in each request."""
    return [[m["content"].rstrip("x") for m in json.loads(a.body)["messages"]] for a in engine.requests]


def first_sent_and_attempts(relay: Relay, prompt: Prompt, *replies: Reply) -> tuple[int, list[list[str]]]:
    """The index of the first message that was finally sent, and the messages of each attempt."""
    engine = ScriptedEngine(*replies)
    router = OneModel(engine)
    try:
        with ChatClient(router, relay).stream_chat(None, prompt, CancelToken()) as stream:  # type: ignore[arg-type]
            assert [piece.text for piece in stream] == ["ok"]
            return stream.told_from, sent_numbers(engine)
    finally:
        engine.close()
        assert router.traffic.in_flight == 0


def test_the_oldest_turns_are_dropped_when_the_context_is_full(relay):
    """The remaining turns fill about half of the context, and start with a question."""
    first, requests = first_sent_and_attempts(
        relay, Prompt(turns(6)), Reply(answer("400 Bad Request", {"error": FULL})), ANSWER
    )
    assert first == 10
    assert requests == [[str(n) for n in range(11)], ["10"]]


def test_without_figures_half_of_the_history_is_dropped_repeatedly(relay):
    """When the engine's error has no figures that can be parsed."""
    vague = Reply(answer("400 Bad Request", {"message": "This model's maximum context length is full"}))
    first, requests = first_sent_and_attempts(relay, Prompt(turns(6)), vague, vague, ANSWER)
    assert first == 10
    assert [request[0] for request in requests] == ["0", "6", "10"]


def test_dropped_turns_stay_dropped_for_the_same_model(relay):
    """The same model gets the history from the same turn on, so that its prompt cache works. Another model may have
    more room, and one that filled the context with its answer gets less history."""
    messages = turns(6)
    last = replace(messages[9], told_from="m4")
    assert first_sent_and_attempts(relay, Prompt(messages, last), ANSWER)[0] == 4
    assert first_sent_and_attempts(relay, Prompt(messages, replace(last, model="other")), ANSWER)[0] == 0
    assert first_sent_and_attempts(relay, Prompt(messages, replace(last, context_full=True)), ANSWER)[0] == 8
    assert first_sent_and_attempts(relay, Prompt(messages, replace(last, told_from="gone")), ANSWER)[0] == 0


def test_a_message_that_is_too_long_by_itself_is_explained(relay):
    """With the figures, and what can be done."""
    with pytest.raises(GenerationError) as caught:
        first_sent_and_attempts(relay, Prompt(turns(2)), Reply(answer("400 Bad Request", {"error": FULL})))
    assert str(caught.value).startswith(
        "This message is too long: the context of m holds 300 tokens, and it needs 900. Send it in parts, or"
    )


def test_an_answer_that_fills_the_context_says_so(relay):
    """No length limit was requested, so `length` can only mean a full context."""
    chunk = {"choices": [{"delta": {}, "finish_reason": "length"}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()
    for said, full in ((body, True), (body.replace(b"length", b"stop"), False)):
        engine = ScriptedEngine(Reply(answer(body=said)))
        with ChatClient(OneModel(engine), relay).stream_chat(None, Prompt(turns(1)), CancelToken()) as stream:  # type: ignore[arg-type]
            assert list(stream) == []
            assert stream.context_full == full
        engine.close()
