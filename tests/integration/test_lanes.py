"""The hot lane and the Flask app answer identically: clients and engines can't tell them apart."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.console import FAKE_LLAMA_SERVER, Console, fake_model
from tests.support.raw import Raw, Response, chunked

MODEL = "mirror"
APP_ONLY = "TE: trailers"
"""A header that makes the hot lane leave the request to the app, without another effect."""
CHANGING = ("date", "connection", "transfer-encoding")
"""Headers that may differ: the time, and the framing of an answer of unknown length."""

NAMES = st.sampled_from(["X-Title", "Accept", "User-Agent", "Authorization", "Cookie", "Origin", "X-Forwarded-Proto"])
VALUES = st.text("abc ,;=\"'()\t", max_size=10)
REQUEST_HEADERS = st.dictionaries(NAMES.filter(lambda name: name != "Origin"), VALUES, max_size=4)
ODD_HEADERS = st.sampled_from(
    [{}, {"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Content-Type": "text/plain"}]
)
ANSWER_HEADERS = st.lists(
    st.sampled_from(
        [
            "Content-Type: application/json",
            "Content-Type: text/event-stream",
            "Content-Type: text/plain; charset=utf-8",
            "Set-Cookie: a=b",
            "Retry-After: 3",
            "X-RateLimit-Remaining: 9",
            "openai-processing-ms: 7",
            "Location: http://evil.example",
            "Cache-Control: no-cache",
            "X-Accel-Buffering: no",
        ]
    ),
    max_size=4,
    unique_by=lambda line: line.partition(":")[0],
)
PARTS = st.lists(st.binary(min_size=1, max_size=60) | st.just(b"data: {}\n\n"), max_size=4)
STATUSES = st.sampled_from(
    ["200 OK", "200 Fine", "201 Created", "400 Bad Request", "404 Not Found", "500 Internal Server Error", "599 Odd"]
)
FRAMING = st.sampled_from(["sized", "chunked", "until_close"])


@pytest.fixture(scope="module")
def shared(start_shared) -> Console:
    console = start_shared(toml=fake_model(MODEL), llamacpp_server=FAKE_LLAMA_SERVER)
    console.switch(MODEL)
    return console


def reply(status: str, headers: list[str], parts: list[bytes], framing: str, interim: bool) -> str:
    """The bytes of an engine's answer; a header in it repeats the request as the engine received it."""
    body = b"".join(parts)
    framed = {
        "sized": ([f"Content-Length: {len(body)}"], body),
        "chunked": (["Transfer-Encoding: chunked"], b"".join(map(chunked, parts)) + b"0\r\n\r\n"),
        "until_close": (["Connection: close"], body),
    }[framing]
    lines = [f"HTTP/1.1 {status}", *headers, *framed[0], "X-Request-Id: ECHO"]
    before = "HTTP/1.1 102 Processing\r\n\r\n" if interim else ""
    return before + "\r\n".join(lines) + "\r\n\r\n" + framed[1].decode("latin-1")


def ask(raw: Raw, path: str, headers: dict[str, str], body: bytes, *more: str) -> Response:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *more]
    raw.send_head(*lines, *(f"{name}: {value}" for name, value in headers.items()))
    raw.send(body)
    return raw.response()


def comparable(answer: Response) -> tuple[int, dict[str, str], bytes]:
    kept = {name: value for name, value in answer.headers.items() if name not in CHANGING}
    if "x-request-id" in kept:
        kept["x-request-id"] = bytes.fromhex(kept["x-request-id"]).decode("latin-1")
    return answer.status, kept, answer.body


@settings(max_examples=400, deadline=None)
@given(
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]),
    headers=REQUEST_HEADERS,
    odd=ODD_HEADERS,
    model=st.sampled_from([MODEL, MODEL, MODEL, None, "auto", "nobody", 7]),
    content=st.text(max_size=40),
    answer=st.tuples(STATUSES, ANSWER_HEADERS, PARTS, FRAMING, st.booleans()),
    cut=st.none() | st.integers(0, 400),
)
def test_both_lanes_relay_identically(shared, path, headers, odd, model, content, answer, cut):
    """Status, headers and body for the client, and method, path, headers and body for the engine; also if the engine
    closes the connection anywhere in its answer."""
    said = reply(*answer)[:cut]
    wish = {"model": model, "content": content, "reply": said, "hang_up": cut is not None or answer[3] == "until_close"}
    body = json.dumps(wish if model is not None else {**wish, "model": MODEL}).encode()
    outcomes = []
    for more in ((), (APP_ONLY,)):
        with Raw(shared.port) as raw:
            try:
                outcomes.append(comparable(ask(raw, path, {**headers, **odd}, body, *more)))
            except AssertionError as broken_off:
                outcomes.append(str(broken_off).partition(" ended ")[0])
    assert outcomes[0] == outcomes[1]


def test_both_lanes_answer_a_poll_identically(shared):
    """All headers; the length may differ, because the free memory does from one moment to the next."""
    answers = []
    for more in ((), (APP_ONLY,)):
        with Raw(shared.port) as raw:
            raw.send_head("GET /v1/models/status HTTP/1.1", "Host: 127.0.0.1", *more)
            answers.append(raw.response())
    lane, app = ({k: v for k, v in a.headers.items() if k not in ("date", "content-length")} for a in answers)
    assert lane == app
    assert [json.loads(answer.body)["models"][MODEL]["status"] for answer in answers] == ["running", "running"]
