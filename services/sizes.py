"""The format of sizes in texts, JSON messages and pages: decimal GB with one digit, MB below 1 GB."""

from __future__ import annotations

GB = 1_000_000_000
MB = 1_000_000
_ROUNDS_TO_GB = 999_500_000
"""Bytes from which a rounded MB figure would be 1000."""
_SMALL = 9_950_000
"""Bytes below which MB have one digit."""


def format_size(size: float) -> str:
    """Format bytes as "1.9 GB", "512 MB" or "4.5 MB"."""
    scale, unit, digits = _unit(size)
    return f"{size / scale:,.{digits}f} {unit}"


def format_part(done: float, total: float) -> str:
    """Format a part in the unit of the total: "12.4 of 33.1 GB"."""
    scale, unit, digits = _unit(total)
    return f"{done / scale:,.{digits}f} of {total / scale:,.{digits}f} {unit}"


def gigabytes(size: int) -> float:
    """Convert bytes to decimal gigabytes with three digits, so that a model of 1 MB isn't 0."""
    return round(size / GB, 3)


def _unit(size: float) -> tuple[int, str, int]:
    """Return the unit for a size: its bytes, its name, and the number of digits."""
    if size >= _ROUNDS_TO_GB:
        return GB, "GB", 1
    return MB, "MB", 1 if 0 < size < _SMALL else 0
