"""Checks of a request's values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from errors import invalid


def text(body: Mapping[str, Any], name: str, limit: int) -> str:
    """Return a text of the body, which must be there, not blank, and at most `limit` characters long."""
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        raise invalid(f"{name} must be a text that is not empty.")
    if len(value) > limit:
        raise invalid(f"{name} may have {limit} characters; this one has {len(value)}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"{name} contains half of a surrogate pair.") from error
    return value


def integer(body: Mapping[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    """Return an integer of the body from `low` to `high`, or the default if it is missing or null."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise invalid(f"{name} must be a whole number from {low} to {high}.")
    return value
