"""The HTML of a Markdown text: markdown-it without raw HTML, nh3 with a short allow-list, then our own frames.

The frames around code and tables come last, so that nothing a model writes can pass for them. Each is put around a
whole element at once: halves that were found apart once left a `</div>` too many for each fence tagged `a:b`.
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

from blueprints.markdown.breaks import breaks
from blueprints.markdown.mathematics import mathematics
from services.offhub import compute_off_hub
from services.text import whole_characters

Env = MutableMapping[str, Any]
"""What the parts of one text share: the links that it defines, and the breaks to take."""

FORMAT_LIMIT = 256_000
"""Characters. A longer text is shown as it is: formatting 5 MB took 16 s, and no page is read that way."""
INLINE_LIMIT = 20_000
"""Characters of one paragraph. A longer one stays as it was typed: a part of its work knows no breaks."""
PART = 16_000
"""Characters that are parsed at a time, where there are blank lines to cut a text at."""
LARGE = 16_000
"""Characters of HTML from which on cleaning takes milliseconds: that is done in a thread."""
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
    """markdown-it's HTML, within what the strict CSP and the frames allow."""

    def text(self, tokens: Sequence[Token], idx: int, options: Any, env: Env) -> str:
        env["breaks"]()
        return super().text(tokens, idx, options, env)

    def image(self, tokens: Sequence[Token], idx: int, _options: Any, _env: Env) -> str:
        """A picture from elsewhere is not loaded: whoever reads decides whether to follow its link."""
        token = tokens[idx]
        return f'<a href="{escape(token.attrs.get("src", ""))}">{escape(token.content or "picture")}</a>'

    def fence(self, tokens: Sequence[Token], idx: int, _options: Any, _env: Env) -> str:
        language = tokens[idx].info.split(maxsplit=1)
        named = f' class="{escape(language[0][:LANGUAGE_LENGTH])}"' if language else ""
        return f"<pre><code{named}>{escape(tokens[idx].content)}</code></pre>\n"

    def th_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Env) -> str:
        """A table cell, aligned by an attribute: the strict CSP forbids the style that markdown-it would write."""
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
    """The HTML of a whole text, or of some whole blocks of one; `env` knows the links that the other blocks define."""
    text = whole_characters(text)
    with breaks(len(text)) as take_breaks:
        env = {} if env is None else env
        env["breaks"] = take_breaks
        parts = map(_markdown.parse, _parts(text, env), repeat(env))
        return "".join(_html_of_block(tokens, env) for part in parts for tokens in _blocks(part))


def last_boundary(text: str, env: Env) -> int:
    """Where the last block of `text` begins that has a blank line before it; 0 when there is no such block.

    What is written on behind the last line break changes nothing before this position. `text` has `\\n` line breaks.
    """
    with breaks(len(text)) as take_breaks:
        env["breaks"] = take_breaks
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
    """The text in parts that mean the same by themselves, so that few tokens are alive at a time.

    Collecting garbage among those of 256 kB took 40 ms. Links that the text defines itself may be used before that.
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
    """The tokens of each block that is in no other one."""
    begin = 0
    for index, token in enumerate(tokens):
        if token.level == 0 and token.nesting <= 0 and token.type != "inline":
            yield tokens[begin : index + 1]
            begin = index + 1


def _html_of_block(tokens: Sequence[Token], env: Env) -> str:
    if tokens[0].tag in _BLOCKS:
        tokens[0].attrs["dir"] = "auto"
    rendered = _markdown.renderer.render(tokens, _markdown.options, env)
    clean = compute_off_hub(_clean, rendered) if len(rendered) > LARGE else _clean(rendered)
    env["breaks"]()
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
    """Give a code block its language, a copy button, and a way to be scrolled by keyboard."""
    language = escape(html.unescape(match[1] or ""))
    head = f'<div class="code-head"><span>{language}</span>{_COPY}</div>'
    return f'<div class="code" dir="ltr">{head}<pre tabindex="0"><code>{match[2]}</code></pre></div>'


def _frame_table(match: re.Match[str]) -> str:
    """Let a wide table scroll by itself instead of the page."""
    return f'<div class="wide" tabindex="0">{match[0]}</div>'


def _break_in_block(state: StateBlock, _start_line: int, _end_line: int, _silent: bool) -> bool:
    """A rule that never applies: it is asked at every line, and lets others run."""
    state.env["breaks"]()
    return False


def _break_in_line(state: StateInline, _silent: bool) -> bool:
    state.env["breaks"]()
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
    made.block.ruler.before("table", "break", _break_in_block, {"alt": terminating})
    made.inline.ruler.before("text", "break", _break_in_line)
    return made


_markdown = _make_markdown()
