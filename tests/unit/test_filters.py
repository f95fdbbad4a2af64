"""Formatting of figures and times."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from blueprints import filters

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


def test_only_an_estimated_size_is_marked_as_approximate() -> None:
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


def test_an_estimate_is_rounded_beyond_a_minute() -> None:
    assert filters.about(25.2) == "about 25 s"
    assert filters.about(61) == "about 1 min"
    assert filters.about(83) == "about 1 min 25 s"
    assert filters.about(0.2) == "under 1 s"


def test_a_short_measured_time_has_a_digit() -> None:
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


@pytest.mark.parametrize(
    ("names", "words"),
    [((), ""), (("a",), "a"), (("a", "b"), "a and b"), (("a", "b", "c"), "a, b and c")],
)
def test_names_in_a_sentence(names: tuple[str, ...], words: str) -> None:
    assert filters.names(names) == words


def test_a_model_keeps_its_colour_and_its_html_id() -> None:
    assert filters.hue("gpt-oss-20b") == filters.hue("gpt-oss-20b") < filters.HUES
    assert filters.dom_id("Qwen/Qwen2.5-0.5B:q4").isalnum()
