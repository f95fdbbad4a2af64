"""Recognising engines' errors about a full context, and which turns are dropped then."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.gateway.context import ContextOverflow, drop_oldest, parse_overflow
from services.store.records import Message

VLLM = "This model's maximum context length is 4096 tokens. However, "


@pytest.mark.parametrize(
    ("message", "context", "prompt"),
    [
        ("request (1502 tokens) exceeds the available context size (512 tokens), try increasing it", 512, 1502),
        ("the request exceeds the available context size. try increasing the context size", None, None),
        (VLLM + "you requested 4500 tokens (4200 in the messages, 300 in the completion).", 4096, 4200),
        (VLLM + "your request has 4200 input tokens. Please reduce the length of the input messages.", 4096, 4200),
        (VLLM + "your prompt contains 4200 input tokens, which exceeds this limit", 4096, 4200),
        (VLLM + "your prompt contains at least 4097 input tokens, which exceeds this limit", 4096, 4097),
        (VLLM + "your prompt contains 90000 characters (more than 40960 characters, which is the", 4096, None),
        (VLLM + "your messages resulted in 4200 tokens.", 4096, 4200),
        ("The decoder prompt (length 5000) is longer than the maximum model length of 4096. Make sure", 4096, 5000),
        ("max_tokens must be at least 1, got -344.", None, None),
    ],
)
def test_errors_recognised_by_their_text(message: str, context: int | None, prompt: int | None) -> None:
    """Texts of llama.cpp (old and new), vLLM 0.4 to 0.32 and OpenAI, in OpenAI's error shape and vLLM's older one."""
    expected = ContextOverflow(context, prompt)
    assert parse_overflow(400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}) == expected
    assert (
        parse_overflow(400, {"object": "error", "message": message, "type": "BadRequestError", "code": 400}) == expected
    )
    assert parse_overflow(400, {"error": message}) == expected


def test_errors_recognised_by_their_fields() -> None:
    """An error type or code is enough, whatever the text; llama.cpp's figures are in fields."""
    fields = {"type": "exceed_context_size_error", "message": "zu lang", "n_prompt_tokens": 1502, "n_ctx": 512}
    assert parse_overflow(400, {"error": fields}) == ContextOverflow(512, 1502)
    assert parse_overflow(400, {"error": {"code": "context_length_exceeded", "message": "x"}}) == ContextOverflow()


@pytest.mark.parametrize(
    ("status", "document"),
    [
        (400, {"error": {"message": "Conversation roles must alternate", "type": "BadRequestError"}}),
        (400, {"error": None}),
        (400, [1]),
        (400, None),
        (400, {}),
        (503, {"error": {"message": "exceeds the available context size"}}),
        (404, {"error": {"message": "model 'maximum context length' not found"}}),
    ],
)
def test_other_errors_are_not_context_errors(status: int, document: object) -> None:
    """Such errors must not drop anything from the history."""
    assert parse_overflow(status, document) is None


MESSAGES = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.integers(0, 500)), max_size=20)
FIGURES = st.none() | st.integers(1, 10_000)


@given(MESSAGES, st.integers(0, 19), FIGURES, FIGURES)
def test_each_attempt_drops_turns_until_one_is_left(
    made: list[tuple[str, int]], told_from: int, context: int | None, prompt: int | None
) -> None:
    """For any figures the attempts end, each starts with a question, and the last message is always kept."""
    messages = [
        Message(str(n), "c", role, "x" * size, None, "complete", None, 0.0, 0.0, None, None)  # type: ignore[arg-type]
        for n, (role, size) in enumerate(made)
    ]
    at: int | None = told_from
    while at is not None:
        following = drop_oldest(messages, at, ContextOverflow(context, prompt))
        if following is not None:
            assert at < following < len(messages)
            assert messages[following].role == "user"
        at = following
