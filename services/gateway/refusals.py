"""What a remote service's refusal may tell clients: its own words, and nothing of the key that Switchyard sent it."""

from __future__ import annotations

import json
from urllib.parse import urlsplit

from services.gateway.relay import EngineResponse
from services.gateway.router import GatewayError
from services.redaction import without_key
from services.switching.events import InstanceView

MAX_BYTES = 65_536
"""Longest error that is read; a service may send one without end."""
MAX_WORDS = 500


def refusal_of(answer: EngineResponse, instance: InstanceView) -> GatewayError | None:
    """Return the error to report instead of passing a response on; None if it may pass.

    A remote service refuses the key that the settings give it: passed on, its 401 would say that the client's own key
    for Switchyard is wrong, and OpenAI's words quote parts of the key. Raises GatewayError if the connection breaks.
    """
    if not instance.entry.remote or answer.status_code < 400 or instance.endpoint is None:
        return None
    key = instance.endpoint.headers.get("Authorization", "").removeprefix("Bearer ")
    said = answer.peek(MAX_BYTES).decode("utf-8", "replace")
    words = words_of(said)[:MAX_WORDS] or f"It answered with status {answer.status_code}."
    words = without_key(words, key) if key else words
    host = urlsplit(instance.endpoint.origin).netloc
    if answer.status_code in (401, 403):
        return GatewayError("key_refused", f"{host} refused the key for {instance.model}: {words}")
    return GatewayError("engine_error", f"{host} refused: {words}") if key and key in said else None


def words_of(said: str) -> str:
    """Return the message of an error in OpenAI's shape, or in the shapes of other servers; empty if there is none."""
    try:
        document = json.loads(said)
    except (ValueError, RecursionError):
        return ""
    error = document.get("error", document.get("detail")) if isinstance(document, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else ""
