r"""markdown-it plugin that preserves formulas as typed: `\(x\)`, `\[x\]`, `$x$`, `$$x$$` and `\begin{…}…\end{…}`.

Markdown treats `\(` as an escaped bracket and `_` as emphasis: `\(a_1\)` became "(a_1)", and a matrix vanished.
"""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline

INLINE_LIMIT = 1_000
BLOCK_LINES = 200
"""Limit of the search for an end: a text full of openers would take quadratic time without it."""

_CLOSERS = {r"\(": r"\)", r"\[": r"\]", "$$": "$$"}
_BLOCK = re.compile(r"\$\$|\\\[|\\begin\{([A-Za-z]{1,24}\*?)\}")


def mathematics(markdown: MarkdownIt) -> None:
    """Plugin: add `math_inline` and `math_block` tokens, whose content is the source text."""
    markdown.inline.ruler.before("escape", "math_inline", _inline)
    ends = ["paragraph", "reference", "blockquote", "list"]
    markdown.block.ruler.before("fence", "math_block", _block, {"alt": ends})


def _inline(state: StateInline, silent: bool) -> bool:
    opener = state.src[state.pos : state.pos + 2]
    if opener in _CLOSERS:
        end = _end(state, 2, _CLOSERS[opener])
    elif opener[:1] == "$":
        end = _end_of_dollars(state)
    else:
        return False
    if end is None:
        return False
    if not silent:
        token = state.push("math_inline", "", 0)
        token.content = state.src[state.pos : end]
    state.pos = end
    return True


def _end(state: StateInline, opener: int, closer: str) -> int | None:
    """Return the position after the closer; None without one, or with nothing before it."""
    start = state.pos + opener
    found = state.src.find(closer, start, min(start + INLINE_LIMIT, state.posMax))
    return found + len(closer) if found > start else None


def _end_of_dollars(state: StateInline) -> int | None:
    """Return the position after `$x$`.

    Prices don't count: no space inside the dollars, no digit after (pandoc's rule).
    """
    end = _end(state, 1, "$")
    if end is None:
        return None
    inside, behind = state.src[state.pos + 1 : end - 1], state.src[end : end + 1]
    return None if inside != inside.strip() or inside.endswith("\\") or behind.isdigit() else end


def _block(state: StateBlock, start_line: int, end_line: int, silent: bool) -> bool:
    """Match lines from one that begins with an opener to one that ends with its closer, none of them blank."""
    if state.is_code_block(start_line):
        return False
    first = _line(state, start_line)
    opener = _BLOCK.match(first)
    if opener is None:
        return False
    closer = rf"\end{{{opener[1]}}}" if opener[1] else _CLOSERS[opener[0]]
    rest = first[opener.end() :]
    for line in range(start_line, min(end_line, start_line + BLOCK_LINES)):
        text = rest if line == start_line else _line(state, line)
        if line > start_line and (not text or state.sCount[line] < state.blkIndent):
            return False
        if text.endswith(closer):
            break
        if closer in text:
            return False
    else:
        return False
    if not silent:
        token = state.push("math_block", "", 0)
        token.content = state.getLines(start_line, line + 1, state.blkIndent, False)
        token.map = [start_line, line + 1]
        state.line = line + 1
    return True


def _line(state: StateBlock, line: int) -> str:
    return state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]].rstrip()
