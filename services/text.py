"""Text that every consumer can take (SQLite, JSON and HTML refuse half of a character), and sentences about names."""

from __future__ import annotations

from collections.abc import Sequence


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


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them: "a", "a and b", "a, b and c"."""
    *first, last = names or ("",)
    return f"{', '.join(first)} and {last}" if first else last


def running_again(restored: Sequence[str]) -> str:
    """What came back after a switch, as a sentence; nothing where nothing did."""
    return f"{listed(restored)} {'is' if len(restored) == 1 else 'are'} running again." if restored else ""
