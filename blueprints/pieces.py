"""Pages in pieces: each is rendered when what it shows changes, and sent only to those who have not seen that yet.

Everybody sees the same pieces, so however many tabs look, the work is done once for each change.
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
"""The field in which a page says what it has seen: the mark of the sheet when it was last answered."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One element of a page. `name` is its id there; its HTML depends on the template and the context alone.

    `alone`: it can stand outside of a table or list; what can't travels in a <template>. `swap` is how htmx puts it
    there.
    """

    name: str
    template: str
    context: Mapping[str, object]
    alone: bool = True
    swap: Literal["morph", "outerHTML"] = "morph"


def order(rows: str, names: Iterable[str]) -> Piece:
    """The piece that says which rows the element with the id `rows` has; its own name is that with `-order`.

    Swapped whole, since htmx tells of that alone, and before any row: switchyard.js makes room for those that are new.
    """
    return Piece(f"{rows}-order", "fragments/order.html", {"rows": rows, "names": [*names]}, swap="outerHTML")


@dataclass(slots=True)
class _Drawn:
    piece: Piece
    html: str
    changed: int


@dataclass(frozen=True, slots=True)
class _Group:
    """Pieces that are made from the same, by their names."""

    basis: object
    drawn: Mapping[str, _Drawn]


_NOTHING = _Group(object(), {})


class Sheet:
    """The pieces of one kind of page as they are now, each with the number of the change by which it became so.

    Called by one greenlet at a time: nothing in here waits.
    """

    def __init__(self, render: Callable[..., str] = render_template) -> None:
        self._render = render
        self._edition = secrets.token_hex(4)  # the numbers of another run of the app mean nothing
        self._number = 0
        self._groups: dict[str, _Group] = {}

    @property
    def mark(self) -> str:
        """What somebody has seen who has every piece as it is now."""
        return f"{self._edition}-{self._number}"

    def draw(self, group: str, basis: object, pieces: Callable[[], Iterable[Piece]]) -> Sheet:
        """Bring a group of pieces up to date; nothing is done while `basis`, all that they are made from, is the same.

        Pieces that are not named any more are dropped.
        """
        kept = self._groups.get(group, _NOTHING)
        if kept.basis == basis:
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
        """A piece as it stands in a whole page."""
        return Markup(next(group.drawn[name].html for group in self._groups.values() if name in group.drawn))

    def since(self, mark: str) -> Markup:
        """The pieces that have changed since `mark`, all where it isn't one of ours, for htmx to put in place.

        Empty when none has. With them comes the mark to ask with the next time.
        """
        number = self._number_of(mark)
        drawn = (one for group in self._groups.values() for one in group.drawn.values())
        news = [one for one in drawn if one.changed > number]
        if not news:
            return Markup()
        return Markup("".join([*map(_for_htmx, news), _input(self.mark, ' hx-swap-oob="true"')]))

    @property
    def seen(self) -> Markup:
        """What a page keeps of the sheet, to send along whenever it looks again."""
        return _input(self.mark)

    def _number_of(self, mark: str) -> int:
        edition, _, number = mark.partition("-")
        return int(number) if edition == self._edition and number.isdecimal() else 0


def sheet(kind: str) -> Sheet:
    """The running app's sheet for one kind of page."""
    made: Sheet = current_app.extensions.setdefault("switchyard.sheets", {}).setdefault(kind, Sheet())
    return made


def news(found: Sheet) -> Response:
    """The answer to a look: what has changed since the last one, or 204, which has htmx leave the page alone."""
    html = found.since(request.args.get(SINCE, ""))
    answer: Response = make_response(html) if html else make_response("", 204)
    return answer


def _for_htmx(drawn: _Drawn) -> str:
    piece = drawn.piece
    html = drawn.html.replace(f'id="{piece.name}"', f'id="{piece.name}" hx-swap-oob="{piece.swap}"', 1)
    return html if piece.alone else f"<template>{html}</template>"


def _input(mark: str, more: str = "") -> Markup:
    return Markup(f'<input type="hidden" class="shown" id="since" name="{SINCE}" value="{mark}"{more}>')
