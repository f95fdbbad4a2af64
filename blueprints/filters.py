"""Jinja filters: the formats of figures, times and names on every page."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from datetime import datetime

from flask import Blueprint
from markupsafe import Markup

from blueprints.markdown import FORMAT_LIMIT, PLAIN_EXCERPT, render_markdown
from services.engines.port import Basis
from services.sizes import format_part, format_size, format_speed
from services.text import join_names

bp = Blueprint("filters", __name__)

UNKNOWN = "–"
HUES = 10
"""Number of model colours; `static/css/memory.css` defines as many."""

_BASIS_WORDS: dict[str, str] = {
    "measured": "measured",
    "learned": "measured last time",
    "declared": "declared",
    "estimated": "estimated",
}


@bp.app_template_filter()
def size(value: float | None) -> str:
    """Format bytes: decimal GB with one digit, MB below 1 GB."""
    return UNKNOWN if value is None else format_size(value)


@bp.app_template_filter()
def part_of(done: float, total: float) -> str:
    """Format how many bytes of how many are here, in the unit of the whole."""
    return format_part(done, total)


@bp.app_template_filter()
def sized(value: float | None, basis: Basis | None) -> str:
    """Format a size, marked as approximate if it is an estimate."""
    return f"≈ {size(value)}" if value is not None and basis == "estimated" else size(value)


@bp.app_template_filter()
def basis_words(basis: Basis | None) -> str:
    """Say where a figure comes from."""
    return _BASIS_WORDS.get(basis or "", "")


@bp.app_template_filter()
def duration(seconds: float | None) -> str:
    """Format seconds as "45 s", "1 min 20 s", "2 h 5 min"."""
    if seconds is None:
        return UNKNOWN
    if seconds < 1:
        return "under 1 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return _pair(whole // 60, "min", whole % 60, "s")
    return _pair(whole // 3600, "h", whole % 3600 // 60, "min")


@bp.app_template_filter()
def about(seconds: float | None) -> str:
    """Format an estimated duration: "about 45 s", to the nearest 5 s above a minute."""
    if seconds is None:
        return UNKNOWN
    if seconds < 1:
        return duration(seconds)
    return f"about {duration(seconds if seconds < 60 else 5 * round(seconds / 5))}"


@bp.app_template_filter()
def took(seconds: float | None) -> str:
    """Format a measured duration: one digit below 10 s, "0.8 s"."""
    if seconds is not None and seconds < 0.05:
        return "under 0.1 s"
    return f"{seconds:.1f} s" if seconds is not None and seconds < 9.95 else duration(seconds)


@bp.app_template_filter()
def span(seconds: float | None) -> str:
    """Format a duration in its largest unit: "12 min", "3 days"."""
    if seconds is None:
        return UNKNOWN
    for length, unit in ((86400, "day"), (3600, "h"), (60, "min")):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}s" if unit == "day" and count > 1 else f"{count} {unit}"
    return f"{int(seconds)} s"


@bp.app_template_filter()
def ago(moment: float | datetime | None, now: float | None = None) -> str:
    """Format the age of a time: "just now", "5 min ago"; the date after a week."""
    if moment is None:
        return UNKNOWN
    past = (time.time() if now is None else now) - _timestamp(moment)
    if past < 10:
        return "just now"
    return f"{span(past)} ago" if past < 7 * 86400 else f"{_local(moment):%-d %b %Y}"


@bp.app_template_global()
def now() -> float:
    """Return the server's time, from which ages are computed: a browser's clock may be off by minutes."""
    return time.time()


@bp.app_template_filter()
def moment(value: float | datetime | None) -> str:
    """Format a time in full, for tooltips."""
    return UNKNOWN if value is None else f"{_local(value):%-d %b %Y, %H:%M:%S}"


@bp.app_template_filter()
def iso(value: float | datetime) -> str:
    """Format a time for a `datetime` attribute."""
    return _local(value).isoformat(timespec="seconds")


@bp.app_template_filter()
def rate(tokens_per_second: float | None) -> str:
    """Format tokens per second, with one digit below 100."""
    if tokens_per_second is None:
        return UNKNOWN
    return f"{tokens_per_second:,.{0 if tokens_per_second >= 100 else 1}f} tokens/s"


@bp.app_template_filter()
def speed(bytes_per_second: float | None) -> str:
    """Format a transfer's bytes per second; "stalled" for none."""
    if bytes_per_second is None:
        return UNKNOWN
    if bytes_per_second < 1:
        return "stalled"
    return format_speed(bytes_per_second)


@bp.app_template_filter()
def names(ids: Sequence[str]) -> str:
    """Join names for a sentence: "a, b and c"."""
    return join_names(ids)


@bp.app_template_filter()
def hue(model_id: str) -> int:
    """Return a model's colour, the same on every page and after every restart."""
    return zlib.crc32(model_id.encode()) % HUES


@bp.app_template_filter()
def dom_id(model_id: str) -> str:
    """Return a model id for use in an HTML id."""
    return f"{zlib.crc32(model_id.encode()):08x}"


@bp.app_template_filter()
def markdown(text: str) -> Markup:
    """Render Markdown as safe HTML."""
    return render_markdown(text)


@bp.app_template_test()
def too_long(text: str) -> bool:
    """Whether a text is shown unformatted, because formatting would take too long."""
    return len(text) > FORMAT_LIMIT


@bp.app_template_filter()
def excerpt(text: str) -> str:
    """Return the part of such a text that a page shows."""
    return text[:PLAIN_EXCERPT]


def _pair(large: int, large_unit: str, small: int, small_unit: str) -> str:
    return f"{large} {large_unit} {small} {small_unit}" if small else f"{large} {large_unit}"


def _timestamp(value: float | datetime) -> float:
    return value.timestamp() if isinstance(value, datetime) else value


def _local(value: float | datetime) -> datetime:
    return datetime.fromtimestamp(_timestamp(value)).astimezone()
