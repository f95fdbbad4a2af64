"""Markdown to HTML that is safe to show, whatever a model wrote, without holding up anybody else.

`rendering` makes the HTML of a text, `mathematics` leaves formulas as they were typed, `breaks` lets others run
meanwhile, and `growing` renders of an answer under way only what is new.
"""

from __future__ import annotations

from markupsafe import Markup

from blueprints.markdown.kept import kept
from blueprints.markdown.rendering import FORMAT_LIMIT, html_of

__all__ = ["FORMAT_LIMIT", "PLAIN_EXCERPT", "render_markdown"]

PLAIN_EXCERPT = 64_000
"""How many characters of such a text the page shows itself; the whole one is an address of its own."""


def render_markdown(text: str) -> Markup:
    """The HTML of `text`. Finished answers never change, so what was rendered once is kept for a while."""
    html = kept.get(text)
    if html is None:
        html = html_of(text)
        kept.put(text, html)
    return Markup(html)
