"""Sizes are written in one form, by one module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.sizes import format_part, format_size, format_speed, gigabytes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 MB"),
        (1, "1 bytes"),
        (512, "512 bytes"),
        (43_000, "43 kB"),
        (49_999, "50 kB"),
        (50_000, "0.1 MB"),
        (860_000, "0.9 MB"),
        (12_000_000, "12 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.0 GB"),
        (85_000_000_000, "85.0 GB"),
        (1_234_500_000_000, "1,234.5 GB"),
    ],
)
def test_sizes_are_decimal_gb_and_mb_below_one(size: int, words: str) -> None:
    """Where that would say 0.0 MB of something, smaller units."""
    assert format_size(size) == words


@pytest.mark.parametrize(
    ("done", "total", "words"),
    [
        (12_400_000_000, 33_100_000_000, "12.4 of 33.1 GB"),
        (400_000_000, 1_100_000_000, "0.4 of 1.1 GB"),
        (128_000_000, 512_000_000, "128 of 512 MB"),
        (600_000, 1_200_000, "0.6 of 1.2 MB"),
        (22_000_000, 4_000_000_000, "22 MB of 4.0 GB"),
        (50_000_000, 4_000_000_000, "0.1 of 4.0 GB"),
        (3_000, 20_000_000, "3 kB of 20 MB"),
        (0, 4_000_000_000, "0 of 4.0 GB"),
        (0, 0, "0 of 0 MB"),
    ],
)
def test_a_part_is_told_in_the_unit_of_the_whole(done: int, total: int, words: str) -> None:
    """So that the two can be compared at a glance; but a part that is there never reads as none."""
    assert format_part(done, total) == words


@pytest.mark.parametrize(
    ("speed", "words"),
    [(300, "1 kB/s"), (48_300, "48 kB/s"), (2_040_000, "2.0 MB/s"), (14_200_000, "14 MB/s"), (1.25e9, "1.2 GB/s")],
)
def test_speeds_are_sizes_per_second(speed: float, words: str) -> None:
    """A slow one in kB, since 0.0 MB/s would look like none."""
    assert format_speed(speed) == words


@given(st.integers(0, 10**16))
def test_a_size_that_is_there_never_reads_as_none(size: int) -> None:
    """And figures for JSON agree with words."""
    assert (re.sub(r"[^0-9]", "", format_size(size)).strip("0") == "") == (size == 0)
    if size >= 10**9:
        assert float(format_size(size).removesuffix(" GB").replace(",", "")) == pytest.approx(
            gigabytes(size), abs=0.051
        )


def test_nothing_else_writes_sizes() -> None:
    """A unit right behind a figure, in Python or in a template, is a second form of the same number.

    The local servers are programs of their own, which import nothing of the app.
    """
    unit = re.compile(r"\}\}? ?(?:[kKMGT]i?B)\b")
    sources = [path for folder in ("blueprints", "services", "templates") for path in (ROOT / folder).rglob("*.*")]
    sources = [path for path in sources if path.suffix in (".py", ".html") and path.name != "sizes.py"]
    sources = [path for path in sources if path.parent.name != "local_servers"]
    assert len(sources) > 100
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources
        for line in path.read_text(encoding="utf-8").splitlines()
        if unit.search(line) and "re.compile" not in line and 'rf"' not in line
    ]
    assert found == []
