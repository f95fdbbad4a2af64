"""What the soak takes for an answer of the contract, and what not."""

from __future__ import annotations

import json

import pytest

from tests.soak.contract import code_of, is_engines_own, objection

FLAT = {"status": "error", "error": "insufficient_memory", "message": "It needs more."}
OPENAI = {"error": {"message": "No.", "type": "invalid_request_error", "param": None, "code": "model_not_found"}}


@pytest.mark.parametrize(
    ("path", "status", "document"),
    [("/v1/models/switch", 409, FLAT), ("/api/switch-model", 409, FLAT), ("/v1/chat/completions", 404, OPENAI)],
)
def test_both_shapes_are_fine_where_they_belong(path, status, document):
    """Seed 003's flat one anywhere, OpenAI's under /v1."""
    assert objection(path, status, {}, json.dumps(document).encode()) is None


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
def test_everything_else_is_a_broken_promise(path, status, body, words):
    """No JSON, the wrong place for a shape, an unforeseen error, a code with another status, a 503 for ever."""
    wrong = objection(path, status, {}, body)
    assert wrong is not None
    assert words in wrong


def test_the_code_is_found_in_either_shape():
    """And None in what has none."""
    codes = [code_of(json.dumps(document).encode()) for document in (FLAT, OPENAI, {}, [])]
    assert codes == ["insufficient_memory", "model_not_found", None, None]


def test_an_engines_own_error_is_told_from_ours():
    """Ollama's has no code; `internal_error` would be ours, wherever it came from."""
    ollamas = {"error": {"message": "llama runner process has terminated", "type": "api_error", "code": None}}
    assert is_engines_own("/v1/chat/completions", json.dumps(ollamas).encode())
    assert not is_engines_own("/v1/models/switch", json.dumps(ollamas).encode())
    assert not is_engines_own("/v1/chat/completions", json.dumps(OPENAI).encode())
    assert not is_engines_own("/v1/chat/completions", b"<h1>Internal Server Error</h1>")


def test_not_being_ready_yet_is_an_answer_and_no_error():
    """`/readyz` says 503 until the first look at the engines is over, and when to come back."""
    body = b'{"status": "starting"}'
    assert objection("/readyz", 503, {"Retry-After": "1"}, body) is None
    assert objection("/readyz", 503, {}, body) is not None
    assert objection("/v1/models/status", 503, {"Retry-After": "1"}, body) is not None
