"""Malformed requests are refused in the contract's shape, and never partly executed."""

from __future__ import annotations

import json
import socket

import pytest

from tests.support.console import FAKE_LLAMA_SERVER, Console, fake_model
from tests.support.raw import Raw, Response, chunked

WISHES = {
    "/v1/models/switch": {"target_model": "plain"},
    "/v1/models/plain/start": {},
    "/v1/chat/completions": {"model": "plain", "messages": []},
    "/api/switch-model": {"model_id": "plain"},
}
"""The model that each of these requests would load."""


@pytest.fixture(scope="module")
def shared(start_shared) -> Console:
    """A console whose models answer at once."""
    return start_shared(toml=fake_model("plain"), llamacpp_server=FAKE_LLAMA_SERVER, max_body_mb=0.1)


def send(console: Console, path: str, framing: str, *pieces: bytes) -> Response:
    """A POST with this body, after which nothing more is sent."""
    with Raw(console.port) as raw:
        raw.send_head(f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", framing)
        for piece in pieces:
            raw.send(piece)
        raw.half_close()
        return raw.response()


def check_refused(console: Console, answer: Response, path: str, status: int) -> None:
    """Assert an error in the contract's shape, a closed connection, and that nothing was executed."""
    assert answer.status == status, answer
    document = json.loads(answer.body)
    if path.startswith("/v1/"):
        assert document["error"]["type"] == "invalid_request_error"
        assert document["error"]["message"]
    else:
        assert document["status"] == "error"
        assert document["message"]
    assert answer.rest == b""
    after = console.status()
    assert after["switch"] is None
    assert after["models"]["plain"]["status"] == "stopped"


BROKEN = {
    "a size that is no number": lambda wish: [chunked(wish), b"zz\r\n"],
    "a negative size": lambda wish: [chunked(wish), b"-5\r\n"],
    "a chunk longer than its size": lambda wish: [b"1\r\n" + wish + b"\r\n0\r\n\r\n"],
    "no end": lambda wish: [chunked(wish)],
    "an end in the middle of a chunk": lambda wish: [b"fff\r\n", wish],
    "half of the last mark": lambda wish: [chunked(wish), b"0\r\n"],
    "a trailer that is none": lambda wish: [chunked(wish), b"0\r\nno trailer\r\n\r\n"],
    "an extension that is none": lambda wish: [b"%x;=\r\n%s\r\n0\r\n\r\n" % (len(wish), wish)],
    "a size line without end": lambda wish: [chunked(wish), b"0" * 20_000],
    "a size of many digits": lambda wish: [b"f" * 8_000 + b"\r\n", wish],
}


@pytest.mark.parametrize("path", WISHES)
@pytest.mark.parametrize("what", BROKEN)
def test_a_malformed_body_is_refused_and_not_executed(console, path, what):
    """The beginning of each body is a valid request."""
    wish = json.dumps(WISHES[path]).encode()
    answer = send(console, path, "Transfer-Encoding: chunked", *BROKEN[what](wish))
    check_refused(console, answer, path, 400)


@pytest.mark.parametrize("path", WISHES)
def test_a_body_that_ends_early_is_refused_and_not_executed(console, path):
    """A part of the announced body is missing, even if only white space."""
    wish = json.dumps(WISHES[path]).encode()
    answer = send(console, path, f"Content-Length: {len(wish) + 1}", wish)
    check_refused(console, answer, path, 400)


def test_a_form_that_ends_early_is_refused_and_not_executed(console):
    """A switch by the page's own form."""
    form = b"target_model=plain&confirm=yes"
    with Raw(console.port) as raw:
        raw.send_head(
            "POST /models/switch HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/x-www-form-urlencoded",
            f"Content-Length: {len(form) + 9}",
        )
        raw.send(form)
        raw.half_close()
        check_refused(console, raw.response(), "/models/switch", 400)


@pytest.mark.parametrize("path", WISHES)
def test_a_chunked_body_is_limited_like_any_other(console, path):
    """It announces no length, so its bytes are counted."""
    wish = json.dumps(WISHES[path]).encode()
    pieces = [chunked(wish), *[chunked(b" " * 50_000)] * 3, b"0\r\n\r\n"]
    check_refused(console, send(console, path, "Transfer-Encoding: chunked", *pieces), path, 413)


def test_a_chunked_body_without_end_is_refused_before_it_ends(shared):
    """The client need not finish sending."""
    with Raw(shared.port) as raw:
        raw.send_head("POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Transfer-Encoding: chunked")
        for _ in range(8):
            raw.send(chunked(b" " * 50_000))
        assert raw.response().status == 413


def test_a_complete_chunked_body_is_executed(console):
    """With extensions, trailers and odd chunk sizes, all of which are allowed."""
    wish = json.dumps(WISHES["/v1/models/switch"]).encode()
    pieces = [
        b"1;name=value\r\n" + wish[:1] + b"\r\n",
        chunked(wish[1:10]),
        chunked(wish[10:]),
        b"000\r\nX-Sum: 1\r\n\r\n",
    ]
    answer = send(console, "/v1/models/switch", "Transfer-Encoding: chunked", *pieces)
    assert json.loads(answer.body)["status"] == "success"


DEEP = [900, 950, *range(960, 1000, 2), 1_000, 3_000, 40_000]
"""Around the depth at which Python's parser gives up, which depends on the current depth of the stack."""


DEEP_PATHS = [
    "/v1/models/switch",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/api/switch-model",
    "/api/providers/models/download",
    "/ollama/models/switch",
]


@pytest.mark.parametrize("path", DEEP_PATHS)
def test_deep_json_is_answered_within_the_contract(shared, path):
    """Refused or executed, never an internal error."""
    for depth in DEEP:
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            inside = opening * depth + (b"1" if closing == b"}" else b"") + closing * depth
            body = b'{"model":"nobody","target_model":"nobody","model_id":"nobody","messages":%s}' % inside
            if len(body) > 100_000:
                continue
            answer = send(shared, path, f"Content-Length: {len(body)}", body)
            assert answer.status in (400, 404, 422, 503), (depth, answer)


def test_deep_json_for_a_running_model_is_answered(console):
    """It is relayed to the engine, which may accept it, or refused."""
    console.switch("plain")
    for depth in DEEP:
        body = b'{"model":"plain","messages":%s}' % (b"[" * depth + b"]" * depth)
        if len(body) < 100_000:
            answer = send(console, "/v1/chat/completions", f"Content-Length: {len(body)}", body)
            assert answer.status in (200, 400), (depth, answer)
    assert console.ask("Hello").status_code == 200


ODD_NUMBERS = ["-1", "abc", "²", "٣", "1.5", "9" * 5_000, "99999999999999999999", "", "0x10", "1 2"]


@pytest.mark.parametrize("number", ODD_NUMBERS)
def test_an_odd_last_event_id_starts_from_the_beginning(console, number):
    """A value that a browser kept of another stream, or that a person typed."""
    console.switch("plain")
    with socket.create_connection(("127.0.0.1", console.port), 30) as link:
        link.sendall(
            b"GET /v1/models/switch/events HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Last-Event-ID: " + number.encode() + b"\r\n\r\n"
        )
        said = b""
        while piece := link.recv(65_536):
            said += piece
    assert said.startswith((b"HTTP/1.1 200", b"HTTP/1.1 404")), said[:200]


BROKEN_HEADS = {
    "no request line": (400, ["hello"]),
    "a method in lower case": (400, ["get / HTTP/1.1", "Host: localhost"]),
    "another protocol": (400, ["GET / HTTPS/2", "Host: localhost"]),
    "a header without a colon": (400, ["GET / HTTP/1.1", "Host: localhost", "Broken"]),
    "a folded header": (400, ["GET / HTTP/1.1", "Host: localhost", "X-Folded: a", " b"]),
    "two lengths": (
        400,
        ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Length: 1", "Content-Length: 2"],
    ),
    "an unknown transfer coding": (501, ["POST / HTTP/1.1", "Host: localhost", "Transfer-Encoding: zip"]),
    "a transfer coding that /v1 does not know": (
        501,
        ["POST /v1/completions HTTP/1.1", "Host: localhost", "Transfer-Encoding: zip"],
    ),
    "a folded header to /v1": (400, ["GET /v1/models HTTP/1.1", "Host: localhost", "X-Folded: a", " b"]),
    "a long address below /v1": (414, [f"GET /v1/{'x' * 9000} HTTP/1.1", "Host: localhost"]),
    "a long request line": (414, [f"GET /{'x' * 9000} HTTP/1.1", "Host: localhost"]),
    "a long header": (431, ["GET / HTTP/1.1", "Host: localhost", f"X-Long: {'x' * 9000}"]),
}


@pytest.mark.parametrize(("status", "head"), BROKEN_HEADS.values(), ids=BROKEN_HEADS)
def test_a_malformed_head_is_refused_in_the_contract_s_shape(shared, status, head):
    """gunicorn answers these with an HTML page, which no script understands. Under /v1 the shape is OpenAI's."""
    with Raw(shared.port) as raw:
        raw.send_head(*head)
        answer = raw.response()
    assert (answer.status, answer.headers["content-type"]) == (status, "application/json")
    document = json.loads(answer.body)
    code = "bad_request" if status < 500 else "not_implemented"
    if " /v1/" in head[0]:
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = document["error"]
        assert (error["code"], error["type"], error["param"]) == (code, kind, None)
        assert error["message"]
    else:
        assert (document["status"], document["error"]) == ("error", code)
        assert document["message"]
