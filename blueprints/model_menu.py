"""The pieces of the Chat page that are the same for everybody: header, banner, and the menu of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from blueprints.filters import dom_id
from blueprints.live import Live
from blueprints.pieces import Piece, Sheet, order, sheet
from services.status import ModelStatus

MANY = 10
"""Number of models above which the menu has a filter."""
OTHERS = ("stopped", "failed")
"""States of models that are not in memory."""


def menu_pieces(live: Live) -> Sheet:
    """Return the current pieces of the menu and the page's head."""
    return (
        sheet("chat")
        .draw("parts", live.moment, lambda: _parts(live))
        .draw("menu", (live.text_models, live.status.switch, live.moving_looks), lambda: _choices(live))
    )


def drawn_menu(live: Live) -> Sheet | None:
    """Return the current pieces without drawing any; None if one has to be drawn."""
    found = sheet("chat")
    return found if found.is_drawn("parts", live.moment) else None


def menu_lists(live: Live) -> Mapping[str, list[str]]:
    """Return the menu's two lists, by id: the names of their pieces, in order."""
    models = live.text_models
    return {
        "menu-loaded": [_item_id(model) for model in models if model.state not in OTHERS],
        "menu-others": [_item_id(model) for model in models if model.state in OTHERS],
    }


def _parts(live: Live) -> Iterator[Piece]:
    yield Piece("top-status", "fragments/top_status.html", {"live": live})
    yield Piece("banner", "fragments/banner.html", {"live": live})
    shown = live.subject
    look = live.look(shown) if shown is not None else None
    yield Piece("model-button", "fragments/model_button.html", {"model": shown, "look": look})


def _choices(live: Live) -> Iterator[Piece]:
    yield Piece("menu-filter", "fragments/menu_filter.html", {"many": len(live.text_models) > MANY})
    for name, items in menu_lists(live).items():
        yield order(name, items)
    for model in live.text_models:
        choice = {"model": model, "look": live.look(model)}
        yield Piece(_item_id(model), "fragments/model_choice.html", choice, alone=False)


def _item_id(model: ModelStatus) -> str:
    return f"pick-item-{dom_id(model.id)}"
