"""Text helpers: surrogates, which SQLite, JSON and HTML refuse, and lists of names in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def fix_surrogates(text: str) -> str:
    r"""Return `text` with surrogate pairs joined, and U+FFFD in place of each lone surrogate.

    JSON can contain a lone one (`"\ud83d"`): Python parses it, but no encoding can write it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def is_high_surrogate(character: str) -> bool:
    """Return whether a character is a high surrogate."""
    return "\ud800" <= character <= "\udbff"


def join_names(names: Sequence[str]) -> str:
    """Join names for a sentence: "a", "a and b", "a, b and c"."""
    *first, last = names or ("",)
    return f"{', '.join(first)} and {last}" if first else last


def running_again(restored: Sequence[str]) -> str:
    """Return a sentence about the restored models; empty without any."""
    return f"{join_names(restored)} {'is' if len(restored) == 1 else 'are'} running again." if restored else ""
