"""How sizes are written, in texts, JSON messages and on pages alike: decimal GB with one digit, MB below 1 GB."""

from __future__ import annotations

GB = 1_000_000_000
MB = 1_000_000
_ROUNDS_TO_GB = 999_500_000
"""Bytes from which MB without digits would say 1000."""
_SMALL = 9_950_000
"""Bytes below which MB have one digit."""


def format_size(size: float) -> str:
    """Bytes as "1.9 GB", "512 MB" or "4.5 MB"."""
    scale, unit, digits = _unit(size)
    return f"{size / scale:,.{digits}f} {unit}"


def format_part(done: float, total: float) -> str:
    """How much of something is here, in the unit of the whole: "12.4 of 33.1 GB"."""
    scale, unit, digits = _unit(total)
    return f"{done / scale:,.{digits}f} of {total / scale:,.{digits}f} {unit}"


def gigabytes(size: int) -> float:
    """Bytes as decimal gigabytes with three digits, for JSON; three so that a model of 1 MB isn't 0."""
    return round(size / GB, 3)


def _unit(size: float) -> tuple[int, str, int]:
    """The bytes of the unit in which a size is written, its name, and how many digits follow the point."""
    if size >= _ROUNDS_TO_GB:
        return GB, "GB", 1
    return MB, "MB", 1 if 0 < size < _SMALL else 0
