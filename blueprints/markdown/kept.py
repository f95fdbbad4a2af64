"""The HTML of texts that were rendered lately, so that a page which is opened again costs nothing."""

from __future__ import annotations

from collections import OrderedDict

KEPT_CHARACTERS = 8_000_000
"""Of the texts and their HTML together; what was not asked for longest goes first."""


class Kept:
    """HTML by its text, at most `limit` characters of both together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._html: OrderedDict[str, str] = OrderedDict()

    def get(self, text: str) -> str | None:
        if text not in self._html:
            return None
        self._html.move_to_end(text)
        return self._html[text]

    def put(self, text: str, html: str) -> None:
        replaced = self._html.pop(text, None)
        if replaced is not None:
            self._held -= len(text) + len(replaced)
        self._html[text] = html
        self._held += len(text) + len(html)
        while self._held > self._limit:
            oldest, its_html = self._html.popitem(last=False)
            self._held -= len(oldest) + len(its_html)


kept = Kept(KEPT_CHARACTERS)
