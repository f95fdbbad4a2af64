"""Renders Markdown as safe HTML, whatever a model wrote, without blocking the event loop.

`rendering` renders a text, `mathematics` preserves formulas, `yielding` lets other greenlets run meanwhile, and
`incremental` renders only what is new of an answer under way.
"""

from __future__ import annotations

from markupsafe import Markup

from blueprints.markdown.html_cache import html_cache

FORMAT_LIMIT = 256_000
"""Characters. A longer text is shown unformatted: formatting 5 MB took 16 s."""
PLAIN_EXCERPT = 64_000
"""Characters of an unformatted text that a page shows; the whole text has an address of its own."""


def render_markdown(text: str) -> Markup:
    """Return the HTML of `text`, cached because finished answers never change."""
    html = html_cache.get(text)
    if html is None:
        from blueprints.markdown.rendering import html_of  # on demand: 5 MB that users of the API alone never need

        html = html_of(text)
        html_cache.put(text, html)
    return Markup(html)
