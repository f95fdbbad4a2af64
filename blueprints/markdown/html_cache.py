"""Cache of rendered texts, so that opening a page again costs nothing."""

from __future__ import annotations

from collections import OrderedDict

MAX_CHARACTERS = 8_000_000
"""Limit of texts and HTML together; the least recently used entries are dropped."""


class HtmlCache:
    """LRU cache of HTML by its text, at most `limit` characters of both together."""

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


html_cache = HtmlCache(MAX_CHARACTERS)
