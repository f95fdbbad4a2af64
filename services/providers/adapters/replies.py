"""Reads what the servers behind local adapters reply: errors in their own words, waits, figures of memory. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from services.gateway import refusals
from services.http import Reply
from services.providers.ports import ProviderError
from services.sizes import format_size
from services.text import join_names

MAX_WORDS = 500


def checked(reply: Reply, title: str, beside: list[str] | None = None) -> Reply:
    """Return a reply with status 200; raise ProviderError for any other, in the words that it has.

    `beside` are models that could be unloaded to make room.
    """
    status = reply.status
    if status == 200:
        return reply
    words = words_of(reply) or f"it answered with status {status}."
    wait = retry_after(reply.headers.get("retry-after"))
    if status == 429:
        raise ProviderError("rate_limited", f"{title} has no room for another request: {words}", wait or 1.0)
    if status == 507:
        raise ProviderError("out_of_memory", _out_of_memory(reply, title, words, beside or []))
    if status >= 500:
        raise ProviderError("provider_unavailable", f"{title} failed: {words}", wait)
    raise ProviderError("provider_refused", f"{title} refused: {words}")


def document_of(reply: Reply, title: str) -> Mapping[str, object]:
    """Return a reply's JSON object. Raises ProviderError `bad_answer`."""
    try:
        return reply.document()
    except ValueError:
        raise ProviderError("bad_answer", f"{title} sent something that can't be read.") from None


def words_of(reply: Reply) -> str:
    """Return what a reply says about its error, in one line; empty if nothing."""
    return " ".join(refusals.words_of(reply.text).split())[:MAX_WORDS]


def retry_after(value: str | None) -> float | None:
    """Return the seconds in a Retry-After header, None without one. A date counts as none."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def _out_of_memory(reply: Reply, title: str, words: str, beside: list[str]) -> str:
    """Return the message for a 507: what was free, what is needed, and what to unload."""
    try:
        error = reply.document().get("error")
    except ValueError:
        error = None
    figures = error if isinstance(error, Mapping) else {}
    free, needed = figures.get("free_bytes"), figures.get("needed_bytes")
    if isinstance(free, int) and isinstance(needed, int):
        words = f"{format_size(free)} was free, and it needs {format_size(needed)}."
    advice = f" Unload {join_names(beside)} to make room." if beside else " Close other programs to make room."
    return f"{title} ran out of memory: {words}{advice}"
