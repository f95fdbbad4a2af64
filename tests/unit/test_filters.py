"""How figures and times are written, and that Markdown can't harm whoever reads it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from blueprints import filters
from blueprints.markdown import render_markdown

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"),
        (0, "0 MB"),
        (860_000, "0.9 MB"),
        (12_000_000, "12 MB"),
        (274_302_450, "274 MB"),
        (999_400_000, "999 MB"),
        (999_600_000, "1.0 GB"),
        (85_000_000_000, "85.0 GB"),
        (1_234_500_000_000, "1,234.5 GB"),
    ],
)
def test_sizes_are_decimal_gb_and_mb_below_one(value: float | None, words: str) -> None:
    assert filters.size(value) == words


def test_only_a_size_that_nobody_measured_is_marked_as_approximate() -> None:
    assert filters.sized(18e9, "estimated") == "≈ 18.0 GB"
    assert filters.sized(18e9, "learned") == "18.0 GB"
    assert filters.sized(None, "estimated") == "–"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "–"),
        (0.3, "under 1 s"),
        (45, "45 s"),
        (59.6, "1 min"),
        (80, "1 min 20 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds: float | None, words: str) -> None:
    assert filters.duration(seconds) == words


def test_a_promise_is_round_beyond_a_minute() -> None:
    assert filters.about(25.2) == "about 25 s"
    assert filters.about(61) == "about 1 min"
    assert filters.about(83) == "about 1 min 25 s"
    assert filters.about(0.2) == "under 1 s"


def test_what_was_measured_has_a_digit_when_short() -> None:
    assert filters.took(0.84) == "0.8 s"
    assert filters.took(12.4) == "12 s"


@pytest.mark.parametrize(
    ("bytes_per_second", "words"),
    [
        (None, "–"),
        (0, "stalled"),
        (300, "1 kB/s"),
        (48_300, "48 kB/s"),
        (2_040_000, "2.0 MB/s"),
        (14_200_000, "14 MB/s"),
        (1_250_000_000, "1.2 GB/s"),
    ],
)
def test_the_speed_of_a_transfer(bytes_per_second: float | None, words: str) -> None:
    assert filters.speed(bytes_per_second) == words


@pytest.mark.parametrize(
    ("past", "words"),
    [
        (2, "just now"),
        (25, "25 s ago"),
        (300, "5 min ago"),
        (3 * 3600, "3 h ago"),
        (86400, "1 day ago"),
        (4 * 86400, "4 days ago"),
    ],
)
def test_relative_times(past: float, words: str) -> None:
    assert filters.ago(NOW - past, NOW) == words


def test_relative_times_take_datetimes_and_give_dates_after_a_week() -> None:
    assert filters.ago(datetime.fromtimestamp(NOW - 300, UTC), NOW) == "5 min ago"
    assert filters.ago(NOW - 30 * 86400, NOW) == filters.moment(NOW - 30 * 86400).split(",")[0]


def test_a_model_keeps_its_colour_and_its_html_id() -> None:
    assert filters.hue("gpt-oss-20b") == filters.hue("gpt-oss-20b") < filters.HUES
    assert filters.dom_id("Qwen/Qwen2.5-0.5B:q4").isalnum()


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[click](javascript:alert(1))",
        "![x](javascript:alert(1))",
        '[x](https://a.example/"onmouseover="alert(1))',
        "```<b onclick=alert(1)>\ncode\n```",
        '<div class="code"><button data-copy>',
    ],
)
def test_markdown_never_becomes_something_that_acts(text: str) -> None:
    html = str(render_markdown(text))
    for harm in ("<script", "<img", "<b ", 'href="javascript:', ' onmouseover="', "<div class=", "<button data-copy>"):
        assert harm not in html.replace('<div class="code"><div class="code-head">', "")


def test_pictures_from_elsewhere_become_links() -> None:
    html = render_markdown("![a chart](https://example.com/chart.png)")
    assert "<img" not in html
    assert ">a chart</a>" in html


def test_links_open_elsewhere_without_telling_where_from() -> None:
    html = render_markdown("[docs](https://example.com/)")
    assert 'target="_blank"' in html
    assert 'rel="noopener noreferrer"' in html


def test_code_gets_its_language_a_copy_button_and_the_keyboard() -> None:
    html = render_markdown("```python\nprint('<b>')\n```")
    assert "<span>python</span>" in html
    assert "data-copy" in html
    assert '<pre tabindex="0"><code>' in html
    assert "&lt;b&gt;" in html


def test_table_cells_are_aligned_without_a_style() -> None:
    html = render_markdown("| a |\n|--:|\n| 1 |")
    assert '<td align="right">1</td>' in html
    assert "style" not in html
