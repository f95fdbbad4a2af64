"""Which responses the soak test accepts as the contract's."""

from __future__ import annotations

import json

import pytest

from tests.soak.contract import code_of, find_violation, is_from_engine

FLAT = {"status": "error", "error": "insufficient_memory", "message": "It needs more."}
OPENAI = {"error": {"message": "No.", "type": "invalid_request_error", "param": None, "code": "model_not_found"}}


@pytest.mark.parametrize(
    ("path", "status", "document"),
    [("/v1/models/switch", 409, FLAT), ("/api/switch-model", 409, FLAT), ("/v1/chat/completions", 404, OPENAI)],
)
def test_both_error_shapes_are_accepted_where_they_belong(path, status, document):
    """The flat shape of seed 003 is accepted anywhere, OpenAI's under /v1."""
    assert find_violation(path, status, {}, json.dumps(document).encode()) is None


@pytest.mark.parametrize(
    ("path", "status", "body", "words"),
    [
        ("/v1/models", 500, b"<h1>Internal Server Error</h1>", "no JSON"),
        ("/api/switch-model", 404, json.dumps(OPENAI).encode(), "neither shape"),
        ("/v1/models", 500, json.dumps({**FLAT, "error": "internal_error"}).encode(), "internal_error"),
        ("/v1/models", 502, json.dumps(FLAT).encode(), "insufficient_memory"),
        ("/v1/models", 503, json.dumps({**FLAT, "error": "stopping"}).encode(), "without Retry-After"),
        ("/v1/models", 409, b"[]", "neither shape"),
    ],
)
def test_any_other_error_is_a_violation(path, status, body, words):
    """No JSON, a shape in the wrong place, an unknown code, a code with another status, a 503 without Retry-After."""
    wrong = find_violation(path, status, {}, body)
    assert wrong is not None
    assert words in wrong


def test_the_code_is_found_in_either_shape():
    """A body without an error gives None."""
    codes = [code_of(json.dumps(document).encode()) for document in (FLAT, OPENAI, {}, [])]
    assert codes == ["insufficient_memory", "model_not_found", None, None]


def test_an_engines_own_error_is_recognised():
    """Ollama's has no code; `internal_error` would be ours, wherever it appears."""
    ollamas = {"error": {"message": "llama runner process has terminated", "type": "api_error", "code": None}}
    assert is_from_engine("/v1/chat/completions", json.dumps(ollamas).encode())
    assert not is_from_engine("/v1/models/switch", json.dumps(ollamas).encode())
    assert not is_from_engine("/v1/chat/completions", json.dumps(OPENAI).encode())
    assert not is_from_engine("/v1/chat/completions", b"<h1>Internal Server Error</h1>")


def test_not_ready_yet_is_accepted():
    """`/readyz` answers 503 with Retry-After until the engines have been checked for the first time."""
    body = b'{"status": "starting"}'
    assert find_violation("/readyz", 503, {"Retry-After": "1"}, body) is None
    assert find_violation("/readyz", 503, {}, body) is not None
    assert find_violation("/v1/models/status", 503, {"Retry-After": "1"}, body) is not None
