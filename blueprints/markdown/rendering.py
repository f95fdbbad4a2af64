"""Renders a Markdown text: markdown-it without raw HTML, nh3 with a short allow-list, then our own frames.

Frames around code and tables are added last, so that a model's text can't imitate them. Each wraps a whole element in
one step: when both ends were inserted separately, each fence tagged `a:b` left a `</div>` too many.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, MutableMapping, Sequence
from itertools import repeat
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markupsafe import escape

from blueprints.markdown.mathematics import mathematics
from blueprints.markdown.yielding import yielding
from services.native_threads import compute_in_thread
from services.text import fix_surrogates

Env = MutableMapping[str, Any]
"""State shared by the parts of one text: the links it defines, and its yielder."""

INLINE_LIMIT = 20_000
"""Characters of one paragraph. A longer one is shown unformatted, because part of parsing it can't yield."""
PART = 16_000
"""Characters that are parsed at a time, if there are blank lines to split at."""
LARGE = 16_000
"""Characters of HTML from which on cleaning takes milliseconds, and is done in a thread."""
LANGUAGE_LENGTH = 40

_BLOCKS = ("blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "ol", "p", "table", "ul")
_TAGS = {
    *_BLOCKS, "a", "br", "code", "del", "em", "hr", "li", "pre", "s", "span", "strong", "tbody", "td", "th", "thead",
    "tr",
}  # fmt: skip
_ATTRIBUTES = {"a": {"href", "title"}, "code": {"class"}, "ol": {"start"}, "td": {"align"}, "th": {"align"}}
_VALUES = {
    **{tag: {"dir": {"auto"}} for tag in _BLOCKS},
    "p": {"dir": {"auto", "ltr"}, "class": {"math"}},
    "span": {"dir": {"ltr"}, "class": {"math"}},
}
_CODE = re.compile(r'<pre><code(?: class="([^"]*)")?>(.*?)</code></pre>', re.DOTALL)
_TABLE = re.compile(r"<table.*?</table>", re.DOTALL)
_COPY = '<button type="button" class="quiet small" data-copy>Copy</button>'


class _Renderer(RendererHTML):
    """markdown-it's renderer, within the limits of the strict CSP and the frames."""

    def text(self, tokens: Sequence[Token], idx: int, options: Any, env: Env) -> str:
        env["yielder"]()
        return super().text(tokens, idx, options, env)

    def image(self, tokens: Sequence[Token], idx: int, _options: Any, _env: Env) -> str:
        """Render an image as a link: nothing is loaded from other hosts unless the reader follows it."""
        token = tokens[idx]
        return f'<a href="{escape(token.attrs.get("src", ""))}">{escape(token.content or "picture")}</a>'

    def fence(self, tokens: Sequence[Token], idx: int, _options: Any, _env: Env) -> str:
        language = tokens[idx].info.split(maxsplit=1)
        named = f' class="{escape(language[0][:LANGUAGE_LENGTH])}"' if language else ""
        return f"<pre><code{named}>{escape(tokens[idx].content)}</code></pre>\n"

    def th_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Env) -> str:
        """Render a table cell, aligned by an attribute: the strict CSP forbids markdown-it's style attribute."""
        token = tokens[idx]
        style = str(token.attrs.pop("style", ""))
        if style.startswith("text-align:"):
            token.attrs["align"] = style.removeprefix("text-align:")
        return self.renderToken(tokens, idx, options, env)

    td_open = th_open

    def math_inline(self, tokens: Sequence[Token], idx: int, _options: Any, _env: Env) -> str:
        return f'<span class="math" dir="ltr">{escape(tokens[idx].content)}</span>'

    def math_block(self, tokens: Sequence[Token], idx: int, _options: Any, _env: Env) -> str:
        return f'<p class="math" dir="ltr">{escape(tokens[idx].content)}</p>\n'


def html_of(text: str, env: Env | None = None) -> str:
    """Return the HTML of a text, or of whole blocks of one; `env` has the links that other blocks define."""
    text = fix_surrogates(text)
    with yielding(len(text)) as take_breaks:
        env = {} if env is None else env
        env["yielder"] = take_breaks
        parts = map(_markdown.parse, _parts(text, env), repeat(env))
        return "".join(_html_of_block(tokens, env) for part in parts for tokens in _blocks(part))


def last_boundary(text: str, env: Env) -> int:
    """Return where the last block of `text` begins that follows a blank line; 0 if there is none.

    Text appended after the last line break changes nothing before this position. `text` has `\\n` line breaks.
    """
    with yielding(len(text)) as take_breaks:
        env["yielder"] = take_breaks
        return _last_boundary(text, env)


def _last_boundary(text: str, env: Env) -> int:
    complete = text[: text.rfind("\n") + 1]
    tokens: list[Token] = []
    _markdown.block.parse(complete, _markdown, env, tokens)
    lines = complete.split("\n")
    starts = [token.map[0] for token in tokens if token.level == 0 and token.nesting >= 0 and token.map]
    line = next((start for start in reversed(starts) if start and not lines[start - 1].strip()), 0)
    return sum(len(each) + 1 for each in lines[:line])


def _parts(text: str, env: Env) -> Iterator[str]:
    """Split the text into parts that render the same independently, so that few tokens are alive at a time.

    Garbage collection among the tokens of 256 kB took 40 ms. A text that defines links is not split, because they may
    be used before their definition.
    """
    if len(text) <= PART or "]:" in text:
        yield text
        return
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    start, size = 0, PART
    while start + size < len(text):
        boundary = _last_boundary(text[start : start + size], env)
        if boundary:
            yield text[start : start + boundary]
        start, size = start + boundary, PART if boundary else 4 * size
    yield text[start:]


def _blocks(tokens: Sequence[Token]) -> Iterator[Sequence[Token]]:
    """Yield the tokens of each top-level block."""
    begin = 0
    for index, token in enumerate(tokens):
        if token.level == 0 and token.nesting <= 0 and token.type != "inline":
            yield tokens[begin : index + 1]
            begin = index + 1


def _html_of_block(tokens: Sequence[Token], env: Env) -> str:
    if tokens[0].tag in _BLOCKS:
        tokens[0].attrs["dir"] = "auto"
    rendered = _markdown.renderer.render(tokens, _markdown.options, env)
    clean = compute_in_thread(_clean, rendered) if len(rendered) > LARGE else _clean(rendered)
    env["yielder"]()
    return _TABLE.sub(_frame_table, _CODE.sub(_frame_code, clean))


def _clean(rendered: str) -> str:
    return nh3.clean(
        rendered,
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        tag_attribute_values=_VALUES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


def _frame_code(match: re.Match[str]) -> str:
    """Add language, copy button and keyboard scrolling to a code block."""
    language = escape(html.unescape(match[1] or ""))
    head = f'<div class="code-head"><span>{language}</span>{_COPY}</div>'
    return f'<div class="code" dir="ltr">{head}<pre tabindex="0"><code>{match[2]}</code></pre></div>'


def _frame_table(match: re.Match[str]) -> str:
    """Let a wide table scroll instead of the page."""
    return f'<div class="wide" tabindex="0">{match[0]}</div>'


def _yield_in_block(state: StateBlock, _start_line: int, _end_line: int, _silent: bool) -> bool:
    """A rule that never matches: it is tried at every line, and yields."""
    state.env["yielder"]()
    return False


def _yield_in_line(state: StateInline, _silent: bool) -> bool:
    state.env["yielder"]()
    return False


def _inline(state: Any) -> None:
    for token in state.tokens:
        if token.type != "inline":
            continue
        if len(token.content) > INLINE_LIMIT:
            token.children = [Token("text", "", 0, content=token.content)]
        else:
            state.md.inline.parse(token.content, state.md, state.env, token.children)


def _make_markdown() -> MarkdownIt:
    made = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable(["table", "strikethrough"])
    made.use(mathematics)
    made.core.ruler.at("inline", _inline)
    terminating = ["paragraph", "reference", "blockquote", "list"]
    made.block.ruler.before("table", "break", _yield_in_block, {"alt": terminating})
    made.inline.ruler.before("text", "break", _yield_in_line)
    return made


_markdown = _make_markdown()
