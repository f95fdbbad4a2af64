"""How much of all there is a Chat page shows: its messages from which on, how many conversations, and from where.

A page says it with each look and each form, so that what somebody has unfolded stays when something changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from services.chats import Chats, Conversation
from services.store.records import Place

LISTED = 50
"""Conversations at first. Scrolling to the end of the list doubles it: 10,000 of them made a page of 2.8 MB."""
LISTED_MOST = 1600
"""From so many on the list goes on at a page of its own."""


@dataclass(frozen=True, slots=True)
class Extent:
    """`since` is the position of the first message (None: as many as a page begins with).

    `listed` counts the conversations, those that come behind `older` in the list (None: the newest).
    """

    since: int | None = None
    listed: int = LISTED
    older: Place | None = None

    @classmethod
    def of(cls, values: Mapping[str, str]) -> Extent:
        """What a request asks for. What makes no sense is as if it were not there."""
        return cls(
            since=_number(values.get("from")),
            listed=min(max(LISTED, _number(values.get("listed")) or 0), LISTED_MOST),
            older=_place(values.get("older", "")),
        )


@dataclass(frozen=True, slots=True)
class Listed:
    """A part of the list, and how to see what comes behind it: as `more` in the same list, or as those `older`."""

    conversations: tuple[Conversation, ...]
    extent: Extent
    more: int | None
    older: str | None

    @classmethod
    def of(cls, chats: Chats, extent: Extent) -> Listed:
        found = chats.conversations(extent.listed + 1, extent.older)
        shown = tuple(found[: extent.listed])
        rest = len(found) > len(shown)
        more = 2 * extent.listed if rest and extent.listed < LISTED_MOST else None
        return cls(shown, extent, more, _words(shown[-1].place) if rest else None)

    @property
    def behind(self) -> str | None:
        """Where this part of the list begins, as addresses say it."""
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
