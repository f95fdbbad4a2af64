"""Text that every consumer can take: SQLite, JSON and HTML all refuse half of a character."""

from __future__ import annotations


def whole_characters(text: str) -> str:
    r"""`text` with its surrogate pairs joined, and U+FFFD in place of each surrogate that has no partner.

    JSON may spell one out (`"\ud83d"`): Python reads it, and no encoding can write it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def is_first_half(character: str) -> bool:
    """Whether it is the first surrogate of a pair."""
    return "\ud800" <= character <= "\udbff"
