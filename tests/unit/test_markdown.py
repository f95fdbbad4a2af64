"""Rendered Markdown is safe for its readers, leaves formulas alone, and breaks no page, whatever a model wrote."""

from __future__ import annotations

import threading
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import nh3
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blueprints.markdown import render_markdown
from blueprints.markdown import yielding as breaks_module
from blueprints.markdown.html_cache import HtmlCache
from blueprints.markdown.incremental import IncrementalHtml
from blueprints.markdown.rendering import html_of

PIECES = (
    *("```", "````", "~~~", "a:b", "python", "`", "``", "    ", "\t", "\n", "\n\n", " ", "\r\n", "\r"),
    *("- ", "* ", "+ ", "1. ", "2) ", "> ", "# ", "###### ", "---", "===", "***", "**", "_", "~~", "\\", "\\\\"),
    *("[", "]", "(", ")", "![", "](", "](https://a.example/)", "](javascript:x)", "[x]: /y", "<https://b.e>", "<"),
    *("|", "|-|", "|:-:|", "| a | b |\n|--:|---|\n", "<div>", "</div>", "</code></pre>", "<pre><code>", "<table>", '"'),
    *("$", "$$", "\\(", "\\)", "\\[", "\\]", "\\begin{x}", "\\end{x}", "&amp;", "&#0;", "&quot;", "\0", "\ud800"),
    *("word", "кириллица", "שלום", "é", "0", "!", "</", "-->", "<!--", 'class="code"', "data-copy"),
)
TEXTS = st.one_of(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.text(max_size=60))
DERIVED_PREFIX = {
    *("a", "blockquote", "br", "button", "code", "del", "div", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li"),
    *("ol", "p", "pre", "s", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"),
}
"""All elements and attributes that a rendered message may have, our own wrappers included."""
KNOWN = {
    "a": {"href", "title", "target", "rel"},
    "button": {"type", "class", "data-copy"},
    "div": {"class", "dir", "tabindex"},
    "p": {"class", "dir"},
    "span": {"class", "dir"},
    "pre": {"tabindex"},
    "ol": {"start", "dir"},
    "td": {"align"},
    "th": {"align"},
    **{tag: {"dir"} for tag in ("blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "table", "ul")},
}


class Elements(HTMLParser):
    """Parses HTML strictly: each element must be in the list, and closed by the next end tag."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.words: list[str] = []
        self.seen: list[object] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in DERIVED_PREFIX
        for name, value in attrs:
            assert name in KNOWN.get(tag, set()), f"{tag} has {name}"
            assert name != "href" or (value or "").partition(":")[0].lower() not in ("javascript", "data", "vbscript")
            assert name != "class" or value in ("code", "code-head", "wide", "math", "quiet small")
        self.seen.append((tag, [(name, value or "") for name, value in attrs], len(self.open)))
        if tag not in ("br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(html: str) -> Elements:
    elements = Elements()
    elements.feed(html)
    elements.close()
    assert elements.open == []
    return elements


@given(TEXTS)
@example("```a:b\nx\n```")
@example("```a:b\nx\n```\n" * 12)
@example("- ```a:b\n  x")
@example('```" onclick="x\nx\n```')
@example("| a |\n|---|\n| `</table>` |")
@example("\ud800")
def test_any_text_gives_balanced_html_of_listed_elements(text: str) -> None:
    """Every element is in the list and closed in its place, and a browser's HTML repair changes nothing."""
    html = str(render_markdown(text))
    read(html)
    repaired = nh3.clean(html, tags=DERIVED_PREFIX, attributes=KNOWN, link_rel=None, strip_comments=False)
    assert (read(repaired).seen, read(repaired).words) == (read(html).seen, read(html).words)


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[click](javascript:alert(1))",
        "![x](javascript:alert(1))",
        '[x](https://a.example/"onmouseover="alert(1))',
        '<div class="code"><button data-copy>',
    ],
)
def test_markdown_never_becomes_active_content(text: str) -> None:
    html = str(render_markdown(text))
    for harm in ("<script", "<img", "<b ", 'href="javascript:', ' onmouseover="', "<div", "<button"):
        assert harm not in html


def test_remote_images_become_links() -> None:
    html = render_markdown("![a chart](https://example.com/chart.png)")
    assert "<img" not in html
    assert ">a chart</a>" in html


def test_links_open_in_a_new_tab_without_a_referrer() -> None:
    html = render_markdown("[docs](https://example.com/)")
    assert 'target="_blank"' in html
    assert 'rel="noopener noreferrer"' in html


def test_code_gets_its_language_a_copy_button_and_the_keyboard() -> None:
    html = render_markdown("```python\nprint('<b>')\n```")
    assert "<span>python</span>" in html
    assert "data-copy" in html
    assert '<pre tabindex="0"><code>' in html
    assert "&lt;b&gt;" in html


@pytest.mark.parametrize("language", ["a:b", "python:src/main.py", "{.haskell", "<b", "питон", "c++", "objective-c&"])
def test_a_code_block_has_its_wrapper_for_any_language_name(language: str) -> None:
    """The block has one wrapper and one label, and the label is the text as written."""
    html = str(render_markdown(f"```{language} title\nx\n```"))
    assert html.count('<div class="code"') == 1
    assert read(html).words[:2] == [language, "Copy"]


def test_table_cells_are_aligned_without_a_style() -> None:
    html = render_markdown("| a |\n|--:|\n| 1 |")
    assert '<td align="right">1</td>' in html
    assert "style" not in html


@pytest.mark.parametrize(
    "formula",
    [
        r"\(a_1 + b_1\)",
        r"\(\frac{a}{b} * c * d\)",
        r"\[x = \{1, 2\}\]",
        "$a_1$ and $b_1$",
        r"$\{x\}$",
        "$$a*b*c$$",
        "$$\na_1 \\\\\n+ b_1\n$$",
        "\\[\nx = a\n+ b\n= c\n- d\n\\]",
        "\\begin{aligned}\na &= b \\\\\n- c &= d\n\\end{aligned}",
    ],
)
@pytest.mark.parametrize("around", ["{}", "It is\n{}", "- as\n  {indented}", "> {quoted}", "{}\n\nnext"])
def test_formulas_are_shown_as_typed(formula: str, around: str) -> None:
    """Backslashes, underscores and asterisks of a formula are shown; its lines start no list and no heading."""
    quoted, indented = formula.replace("\n", "\n> "), formula.replace("\n", "\n  ")
    html = str(render_markdown(around.format(formula, quoted=quoted, indented=indented)))
    assert formula in "".join(read(html).words)
    assert not any(tag in html for tag in ("<em>", "<h1", "<h2"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("It costs $5, or **$10** for two", "It costs $5, or $10 for two"),
        ("from $5 for *one* to $9", "from $5 for one to $9"),
        (r"\(not closed *at* all", "(not closed at all"),
        (r"`\(code\)`", r"\(code\)"),
        ("$$ alone, *and* more", "$$ alone, and more"),
        (r"C:\\(x)", r"C:\(x)"),
        ("$ *x* $", "$ x $"),
    ],
)
def test_single_dollars_and_brackets_are_no_formula(text: str, shown: str) -> None:
    """Prices, shell variables and single brackets are no formulas; the Markdown around them is rendered."""
    words = "".join(read(str(render_markdown(text))).words)
    assert words.strip() == shown
    assert 'class="math"' not in render_markdown(text)


def test_each_block_has_the_direction_of_its_text() -> None:
    """Hebrew in one paragraph, English in the next; code and formulas are left to right in both."""
    html = render_markdown("שלום\n\nHello\n\n- אחת\n\n```\nx\n```\n\n$$x$$")
    assert html.count('dir="auto"') == 3
    assert '<div class="code" dir="ltr">' in html
    assert '<p class="math" dir="ltr">' in html


def test_the_cache_of_rendered_texts_is_limited() -> None:
    """The limit counts texts with their HTML; the least recently used entry is dropped first."""
    kept = HtmlCache(limit=8)
    kept.put("a", "AAA")
    kept.put("b", "BBB")
    assert kept.get("a") == "AAA"
    kept.put("c", "CCC")
    assert [kept.get(text) for text in "abc"] == ["AAA", None, "CCC"]
    kept.put("long", "LONGER")
    assert [kept.get(text) for text in ("a", "c", "long")] == [None, None, None]


@given(st.lists(st.tuples(st.sampled_from(PIECES), st.booleans()), max_size=40))
@example([("\\[\nx = a\n", True), ("+ b\n", True), ("\\]\n", True), ("\nafter", True)])
@example([("1. a\n\n", True), ("2", True), (". b", True)])
@example([("a\r", True), ("\nb\r\n\r\nc", True), ("d", True)])
def test_an_answer_that_grew_renders_like_the_whole(pieces: list[tuple[str, bool]]) -> None:
    """Finished blocks never change, and with the rest they are the HTML of the whole text, however it was split."""
    incremental, text, finished = IncrementalHtml(pace=0, pause_factor=0), "", ()
    for piece, looked_at in pieces:
        text += piece
        if looked_at:
            look = incremental.update(lambda: text)  # noqa: B023
            assert look.finished[: len(finished)] == finished
            finished = look.finished
    assert incremental.complete(text) in (None, html_of(text))


@given(TEXTS)
def test_rendering_in_parts_equals_rendering_at_once(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_once = html_of(text)
        patch.setattr("blueprints.markdown.rendering.PART", 8)
        assert html_of(text) == at_once


def test_finished_blocks_are_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer in many pieces costs about as much as rendering it once, for any number of readers."""
    rendered: list[str] = []

    def counted(text: str, links: dict[str, object]) -> str:
        rendered.append(text)
        return html_of(text, links)

    monkeypatch.setattr("blueprints.markdown.rendering.html_of", counted)
    incremental, text = IncrementalHtml(pace=0, pause_factor=0), ""
    for number in range(200):
        text += f"Paragraph {number} with **bold** words.\n\n"
        for _tab in range(4):
            incremental.update(lambda: text)  # noqa: B023
    assert incremental.complete(text) == html_of(text)
    assert sum(map(len, rendered)) < 3 * len(text)


@pytest.mark.parametrize(
    "text",
    [
        "A paragraph with **bold** words.\n\n" * 500,
        "One long paragraph with **bold** words " * 400,
        "- an item with `code`\n" * 700,
        "> a quote\n" * 1500,
        "|a|b|\n|-|-|\n" + "|one **x**|two|\n" * 900,
        "[" * 15_000,
    ],
    ids=["paragraphs", "paragraph", "list", "quote", "table", "brackets"],
)
def test_rendering_a_long_text_yields_to_others(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It yields at least every few hundred characters, in every kind of block."""
    taken: list[float] = []
    monkeypatch.setattr("services.yielding.SLICE_SECONDS", 0.0)
    monkeypatch.setattr("services.yielding.time", SimpleNamespace(monotonic=time.monotonic, sleep=taken.append))
    html_of(text)
    assert len(taken) > len(text) / 500
    assert min(taken) > 0


def test_long_texts_are_rendered_one_at_a_time() -> None:
    """Two would each add their slices to everyone's waiting time; a short text doesn't wait."""
    entered = threading.Event()

    def render() -> None:
        with breaks_module.yielding(breaks_module.LONG + 1):
            entered.set()

    other = threading.Thread(target=render)
    with breaks_module.yielding(breaks_module.LONG + 1):
        other.start()
        with breaks_module.yielding(1):
            assert not entered.is_set()
    other.join()
    assert entered.is_set()
