"""Pages as pieces: each is rendered when what it shows changes, and sent only to tabs that have not got it yet.

All tabs show the same pieces, so the work is done once per change, however many tabs poll.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from flask import Response, current_app, render_template, request
from htmx_flask import make_response
from markupsafe import Markup

SINCE = "since"
"""Form field in which a page sends the mark of the sheet as of its last poll."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One element of a page. `name` is its id; its HTML depends on the template and the context only.

    `alone`: it is valid HTML outside of its table or list; otherwise it is sent inside a <template>. `swap` is htmx's
    swap method.
    """

    name: str
    template: str
    context: Mapping[str, object]
    alone: bool = True
    swap: Literal["morph", "outerHTML"] = "morph"


def order(rows: str, names: Iterable[str]) -> Piece:
    """Return the piece that lists the rows of the element with the id `rows`; its own id is that with `-order`.

    It precedes the rows, and is swapped as a whole because htmx sends an event only for that: switchyard.js then
    creates empty elements for new rows.
    """
    return Piece(f"{rows}-order", "fragments/order.html", {"rows": rows, "names": [*names]}, swap="outerHTML")


@dataclass(slots=True)
class _Drawn:
    """A rendered piece, and the number of its last change."""

    piece: Piece
    html: str
    changed: int


@dataclass(frozen=True, slots=True)
class _Group:
    """The pieces that are made from the same data, by name."""

    basis: object
    drawn: Mapping[str, _Drawn]


_NOTHING = _Group(object(), {})


class Sheet:
    """The current pieces of one kind of page, each with the number of its last change.

    Used by one greenlet at a time: no method blocks. `mark_id` is the id of the hidden field that sends the mark; what
    is shown above a page needs one of its own.
    """

    def __init__(self, render: Callable[..., str] = render_template, mark_id: str = SINCE) -> None:
        self._render = render
        self._mark_id = mark_id
        self._edition = secrets.token_hex(4)  # tells marks of this run from those of an earlier one
        self._number = 0
        self._groups: dict[str, _Group] = {}

    @property
    def mark(self) -> str:
        """Identifies the current state; a page with this mark has every piece."""
        return f"{self._edition}-{self._number}"

    def is_drawn(self, group: str, basis: object) -> bool:
        """Return whether `draw` would do nothing, which needs no request."""
        return self._groups.get(group, _NOTHING).basis == basis

    def draw(self, group: str, basis: object, pieces: Callable[[], Iterable[Piece]]) -> Sheet:
        """Update a group of pieces, unless `basis`, everything they are made from, is unchanged.

        Pieces that are no longer returned are dropped.
        """
        kept = self._groups.get(group, _NOTHING)
        if self.is_drawn(group, basis):
            return self
        number = self._number + 1
        drawn = {piece.name: self._redraw(piece, kept.drawn.get(piece.name), number) for piece in pieces()}
        if any(one.changed == number for one in drawn.values()):
            self._number = number
        self._groups[group] = _Group(basis, drawn)
        return self

    def _redraw(self, piece: Piece, before: _Drawn | None, number: int) -> _Drawn:
        if before is not None and before.piece == piece:
            return before
        html = self._render(piece.template, **piece.context)
        changed = before.changed if before is not None and before.html == html else number
        return _Drawn(piece, html, changed)

    def __getitem__(self, name: str) -> Markup:
        """Return a piece for a whole page."""
        return Markup(next(group.drawn[name].html for group in self._groups.values() if name in group.drawn))

    def since(self, mark: str) -> Markup:
        """Return the pieces changed since `mark`, all for an unknown mark, as out-of-band swaps, and the new mark.

        Empty if none has changed.
        """
        number = self._number_of(mark)
        drawn = (one for group in self._groups.values() for one in group.drawn.values())
        news = [one for one in drawn if one.changed > number]
        if not news:
            return Markup()
        return Markup("".join([*map(_for_htmx, news), self._input(' hx-swap-oob="true"')]))

    @property
    def seen(self) -> Markup:
        """The hidden field that sends the mark with each poll."""
        return self._input()

    def _input(self, more: str = "") -> Markup:
        polled = ' class="shown"' if self._mark_id == SINCE else ""
        return Markup(f'<input type="hidden"{polled} id="{self._mark_id}" name="{SINCE}" value="{self.mark}"{more}>')

    def _number_of(self, mark: str) -> int:
        edition, _, number = mark.partition("-")
        return int(number) if edition == self._edition and number.isdecimal() else 0


def sheet(kind: str, mark_id: str = SINCE) -> Sheet:
    """Return the running app's sheet for one kind of page."""
    sheets: dict[str, Sheet] = current_app.extensions.setdefault("switchyard.sheets", {})
    return sheets.setdefault(kind, Sheet(mark_id=mark_id))


def news(found: Sheet) -> Response:
    """Respond to a poll: what has changed since the last one, or 204, on which htmx changes nothing."""
    html = found.since(request.args.get(SINCE, ""))
    answer: Response = make_response(html) if html else make_response("", 204)
    return answer


def _for_htmx(drawn: _Drawn) -> str:
    piece = drawn.piece
    html = drawn.html.replace(f'id="{piece.name}"', f'id="{piece.name}" hx-swap-oob="{piece.swap}"', 1)
    return html if piece.alone else f"<template>{html}</template>"
