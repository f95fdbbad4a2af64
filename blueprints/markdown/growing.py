"""The HTML of an answer as it is written: finished blocks are rendered once, for all who watch, the rest each time."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from blueprints.markdown.kept import kept
from blueprints.markdown.rendering import FORMAT_LIMIT, Env, html_of, last_boundary

PACE_SECONDS = 0.06
"""The least time between two looks at an answer, by all who watch it together."""
REST = 4
"""A long last block takes longer to render: rest this many times as long, so that it can't starve everybody else."""
WATCHED = 16
"""So many answers are remembered; one that nobody looked at for longest is rendered anew when somebody does."""


@dataclass(frozen=True, slots=True)
class Look:
    """An answer at one moment: the HTML of its finished blocks, in order, and of what may still change."""

    finished: tuple[str, ...]
    rest: str


class Growing:
    """One answer's HTML, as its text grows. Finished blocks stay as they are until the answer is complete.

    Only links that are defined further down may then change them.
    """

    def __init__(self, pace: float = PACE_SECONDS, rest: float = REST) -> None:
        self._pace, self._rest = pace, rest
        self._lock = threading.Lock()
        self._links: Env = {}
        self._seen = 0
        self._finished_to = 0
        self._look = Look((), "")
        self._due = 0.0

    def look(self, latest: Callable[[], str]) -> Look:
        """The HTML of the text that `latest` gives, once it is time for another look."""
        with self._lock:
            if len(latest()) > self._seen:
                time.sleep(max(0.0, self._due - time.monotonic()))
                self._render(latest())
            return self._look

    def complete(self, text: str) -> str | None:
        """The HTML of the whole text; None where it defines links, which blocks before them were rendered without."""
        with self._lock:
            self._render(text)
            return None if self._links.get("references") else "".join(self._look.finished) + self._look.rest

    def _render(self, text: str) -> None:
        began = time.monotonic()
        self._seen = len(text)
        lines = text.replace("\r\n", "\n").replace("\r", "\n")
        finished, start = self._look.finished, self._finished_to
        boundary = start + last_boundary(lines[start:], self._links)
        if boundary > start:
            finished = (*finished, html_of(lines[start:boundary], self._links))
        self._look = Look(finished, html_of(lines[boundary:], self._links))
        self._finished_to = boundary
        ended = time.monotonic()
        self._due = ended + max(self._pace, self._rest * (ended - began))


class Watched:
    """The answers that somebody looks at, by their ids."""

    def __init__(self) -> None:
        self._growing: OrderedDict[str, Growing] = OrderedDict()

    def __getitem__(self, message_id: str) -> Growing:
        if message_id not in self._growing:
            self._growing[message_id] = Growing()
        self._growing.move_to_end(message_id)
        if len(self._growing) > WATCHED:
            self._growing.popitem(last=False)
        return self._growing[message_id]

    def complete(self, message_id: str, text: str) -> None:
        """Forget an answer that is complete; keep what is known of its HTML."""
        growing = self._growing.pop(message_id, None)
        html = growing.complete(text) if growing is not None and len(text) <= FORMAT_LIMIT else None
        if html is not None:
            kept.put(text, html)


watched = Watched()
