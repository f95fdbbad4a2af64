"""Which part of the messages and conversations a Chat page shows.

A page sends it with each poll and form, so that what somebody has expanded stays expanded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from services.chats import Chats, Conversation
from services.store.records import Place

LISTED = 50
"""Number of conversations at first; scrolling to the end doubles it. A list of 10,000 made a page of 2.8 MB."""
LISTED_MOST = 1600
"""Largest list on one page; it continues on a page of its own."""


@dataclass(frozen=True, slots=True)
class Extent:
    """`since` is the position of the first message shown, None for a page's default.

    `listed` is the number of conversations, from those after `older` in the list (None: from the newest).
    """

    since: int | None = None
    listed: int = LISTED
    older: Place | None = None

    @classmethod
    def of(cls, values: Mapping[str, str]) -> Extent:
        """Parse an extent from a request; invalid values are ignored."""
        return cls(
            since=_number(values.get("from")),
            listed=min(max(LISTED, _number(values.get("listed")) or 0), LISTED_MOST),
            older=_place(values.get("older", "")),
        )


@dataclass(frozen=True, slots=True)
class ConversationPage:
    """A part of the list, and how to see more: with `more` entries in the same list, or the next part after `older`."""

    conversations: tuple[Conversation, ...]
    extent: Extent
    more: int | None
    older: str | None

    @classmethod
    def of(cls, chats: Chats, extent: Extent) -> ConversationPage:
        found = chats.conversations(extent.listed + 1, extent.older)
        shown = tuple(found[: extent.listed])
        has_more = len(found) > len(shown)
        more = 2 * extent.listed if has_more and extent.listed < LISTED_MOST else None
        return cls(shown, extent, more, _words(shown[-1].place) if has_more else None)

    @property
    def behind(self) -> str | None:
        """Where this part of the list begins, as in URLs."""
        return _words(self.extent.older) if self.extent.older else None


def _words(place: Place) -> str:
    return f"{place[0]!r}-{place[1]}"


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 10 else None


def _place(text: str) -> Place | None:
    at, _, conversation_id = text.partition("-")
    try:
        return (float(at), conversation_id) if isfinite(float(at)) else None
    except ValueError:
        return None
