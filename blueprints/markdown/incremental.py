"""The HTML of an answer while it is written: finished blocks are rendered once for all readers, the tail each time."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blueprints.markdown import FORMAT_LIMIT
from blueprints.markdown.html_cache import html_cache

PACE_SECONDS = 0.06
"""Minimum interval between two renderings of an answer."""
PAUSE_FACTOR = 4
"""Pause after a rendering, as a multiple of its duration: a long tail must not starve other greenlets."""
MAX_ANSWERS = 16
"""Number of answers that are remembered; the least recently read one is dropped, and rendered anew when read again."""


@dataclass(frozen=True, slots=True)
class AnswerHtml:
    """An answer at one moment: the HTML of its finished blocks, in order, and of the tail that may still change."""

    finished: tuple[str, ...]
    tail: str


class IncrementalHtml:
    """One answer's HTML while its text grows. Finished blocks are not rendered again until the answer is complete.

    A link definition further down may change them then.
    """

    def __init__(self, pace: float = PACE_SECONDS, pause_factor: float = PAUSE_FACTOR) -> None:
        self._pace, self._pause_factor = pace, pause_factor
        self._lock = threading.Lock()
        self._links: dict[str, Any] = {}
        self._seen = 0
        self._finished_to = 0
        self._html = AnswerHtml((), "")
        self._due = 0.0

    def update(self, latest: Callable[[], str]) -> AnswerHtml:
        """Return the HTML of the text that `latest` returns, rendered at most every PACE_SECONDS."""
        with self._lock:
            if len(latest()) > self._seen:
                time.sleep(max(0.0, self._due - time.monotonic()))
                self._render(latest())
            return self._html

    def complete(self, text: str) -> str | None:
        """Return the HTML of the whole text; None if it defines links, which earlier blocks were rendered without."""
        with self._lock:
            self._render(text)
            return None if self._links.get("references") else "".join(self._html.finished) + self._html.tail

    def _render(self, text: str) -> None:
        from blueprints.markdown.rendering import html_of, last_boundary  # on demand, as in `render_markdown`

        began = time.monotonic()
        self._seen = len(text)
        lines = text.replace("\r\n", "\n").replace("\r", "\n")
        finished, start = self._html.finished, self._finished_to
        boundary = start + last_boundary(lines[start:], self._links)
        if boundary > start:
            finished = (*finished, html_of(lines[start:boundary], self._links))
        self._html = AnswerHtml(finished, html_of(lines[boundary:], self._links))
        self._finished_to = boundary
        ended = time.monotonic()
        self._due = ended + max(self._pace, self._pause_factor * (ended - began))


class IncrementalHtmlCache:
    """Answers that are being read, by their keys."""

    def __init__(self) -> None:
        self._growing: OrderedDict[str, IncrementalHtml] = OrderedDict()

    def __getitem__(self, message_id: str) -> IncrementalHtml:
        if message_id not in self._growing:
            self._growing[message_id] = IncrementalHtml()
        self._growing.move_to_end(message_id)
        if len(self._growing) > MAX_ANSWERS:
            self._growing.popitem(last=False)
        return self._growing[message_id]

    def complete(self, message_id: str, text: str) -> None:
        """Drop an answer that is complete, and cache its HTML."""
        incremental = self._growing.pop(message_id, None)
        html = incremental.complete(text) if incremental is not None and len(text) <= FORMAT_LIMIT else None
        if html is not None:
            html_cache.put(text, html)


incremental_html = IncrementalHtmlCache()
