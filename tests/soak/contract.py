"""Rules for any response: the contract's codes, statuses and shapes. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

ENGINE_TROUBLE = frozenset({"load_failed", "engine_error", "engine_unreachable", "memory_not_freed"})
"""Codes that are allowed only after an injected fault of a model."""
STATE_TROUBLE = frozenset({"state_unwritable", "database_locked", "database_unavailable"})
"""Codes that are allowed only during a fault of the environment (`faults.py`)."""
NOT_NOW = frozenset(
    {
        "cancelled",
        "chat_busy",
        "confirmation_required",
        "insufficient_memory",
        "model_not_loaded",
        "model_unusable",
        "no_switch",
        "not_ollama",
        "switch_in_progress",
    }
)
STATUSES: Mapping[str, frozenset[int]] = {
    "invalid_json": frozenset({400}),
    "invalid_value": frozenset({400, 422}),
    "not_found": frozenset({404}),
    "model_not_found": frozenset({404}),
    "method_not_allowed": frozenset({405}),
    **{code: frozenset({409}) for code in NOT_NOW},
    "load_failed": frozenset({502}),
    "engine_error": frozenset({502}),
    "engine_unreachable": frozenset({502}),
    "memory_not_freed": frozenset({409}),
    "queue_full": frozenset({503}),
    **{code: frozenset({503}) for code in STATE_TROUBLE},
    "starting": frozenset({503}),
    "stopping": frozenset({503}),
    "engine_timeout": frozenset({504}),
    "queue_timeout": frozenset({504}),
}
"""Every error that a soak test may meet. Any other, above all `internal_error`, violates an invariant."""
OPENAI_SHAPED = ("/v1/", "/chat/completions")


def code_of(body: bytes) -> str | None:
    """The code of an error in either shape; None if the body holds none."""
    try:
        document = json.loads(body)
    except ValueError:
        return None
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    code = error.get("code") if isinstance(error, dict) else error
    return code if isinstance(code, str) else None


def is_from_engine(path: str, body: bytes) -> bool:
    """Whether an error was relayed from the engine: an Ollama whose runner was killed answers 500 itself."""
    try:
        document = json.loads(body)
    except ValueError:
        return False
    error = document.get("error") if isinstance(document, dict) else None
    return path.endswith("/chat/completions") and isinstance(error, dict) and code_of(body) not in STATUSES


def find_violation(path: str, status: int, headers: Mapping[str, str], body: bytes) -> str | None:
    """What is wrong with an error response; None if it is one of the contract's, in its shape."""
    if (path, status) == ("/readyz", 503) and "Retry-After" in headers:
        return None  # not an error: it says "not ready yet"
    try:
        document = json.loads(body)
    except ValueError:
        return f"is no JSON: {body[:200]!r}"
    if not isinstance(document, dict) or not (
        _is_flat(document) or (path.startswith(OPENAI_SHAPED) and _is_openais(document))
    ):
        return f"has neither shape of the contract: {body[:200]!r}"
    code = code_of(body) or ""
    if status not in STATUSES.get(code, ()):
        return f"says {code!r}: {body[:300]!r}"
    if status == 503 and not headers.get("Retry-After", "").isdigit():
        return f"says {code!r} without Retry-After"
    return None


def _is_flat(document: Mapping[str, Any]) -> bool:
    texts = document.get("error"), document.get("message")
    return document.get("status") == "error" and all(isinstance(text, str) and text for text in texts)


def _is_openais(document: Mapping[str, Any]) -> bool:
    error = document.get("error")
    return isinstance(error, dict) and set(error) == {"message", "type", "param", "code"} and bool(error["message"])
