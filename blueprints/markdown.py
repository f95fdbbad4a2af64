"""Markdown to HTML that is safe to show, whatever a model wrote.

Three steps: markdown-it without raw HTML, nh3 with a short allow-list, then our own frame around code and tables. The
frame comes last, so that nothing a model writes can pass for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

_TAGS = {
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p",
    "pre", "s", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
_ATTRIBUTES = {"a": {"href", "title"}, "code": {"class"}, "ol": {"start"}, "td": {"align"}, "th": {"align"}}
_CODE = re.compile(r'<pre><code(?: class="language-([\w+#.-]{1,24})")?>')
_COPY = '<button type="button" class="quiet small" data-copy>Copy</button>'


def _image_as_link(_self: Any, tokens: Sequence[Token], index: int, *_: object) -> str:
    """A picture from elsewhere is not loaded: whoever reads decides whether to follow its link."""
    token = tokens[index]
    label = token.content or "picture"
    return f'<a href="{escape(token.attrs.get("src", ""))}">{escape(label)}</a>'


def _cell(self: Any, tokens: Sequence[Token], index: int, options: Any, _env: Any) -> str:
    """A table cell, aligned by an attribute: the strict CSP forbids the style that markdown-it would write."""
    token = tokens[index]
    style = str(token.attrs.pop("style", ""))
    if style.startswith("text-align:"):
        token.attrs["align"] = style.removeprefix("text-align:")
    return str(self.renderToken(tokens, index, options, _env))


_markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
_markdown.add_render_rule("image", _image_as_link)
_markdown.add_render_rule("th_open", _cell)
_markdown.add_render_rule("td_open", _cell)


@lru_cache(maxsize=512)
def render_markdown(text: str) -> Markup:
    """The HTML of `text`. Finished answers never change, so what was rendered once is kept."""
    clean = nh3.clean(
        _markdown.render(text),
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )
    return Markup(_frame_tables(_frame_code(clean)))


def _frame_code(html: str) -> str:
    """Give every code block its language, a copy button, and a way to be scrolled by keyboard."""

    def head(match: re.Match[str]) -> str:
        language = match[1] or ""
        return f'<div class="code"><div class="code-head"><span>{language}</span>{_COPY}</div><pre tabindex="0"><code>'

    return _CODE.sub(head, html).replace("</code></pre>", "</code></pre></div>")


def _frame_tables(html: str) -> str:
    """Let wide tables scroll by themselves instead of the page."""
    return html.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")
