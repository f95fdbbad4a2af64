"""The format of sizes in texts, JSON messages and pages: decimal GB with one digit, MB below 1 GB."""

from __future__ import annotations

KB = 1_000
MB = 1_000_000
GB = 1_000_000_000
KIB, MIB, GIB, TIB = (1024**power for power in (1, 2, 3, 4))
"""Binary units, in which drivers and engines count; never shown."""
_ROUNDS_TO_GB = 999_500_000
"""Bytes from which a rounded MB figure would be 1000."""
_ONE_DIGIT = 9_950_000
"""Bytes below which MB have one digit."""
_ROUNDS_TO_NO_MB = 50_000
"""Bytes below which MB with one digit would read 0.0."""


def format_size(size: float) -> str:
    """Format bytes: "1.9 GB", "512 MB" or "4.5 MB"; a few kB or bytes where that would read 0.0 MB."""
    if 0 < size < _ROUNDS_TO_NO_MB:
        return f"{size:.0f} bytes" if size < KB else f"{size / KB:.0f} kB"
    scale, unit, digits = _unit(size)
    return f"{size / scale:,.{digits}f} {unit}"


def format_part(done: float, total: float) -> str:
    """Format a part in the unit of the total: "12.4 of 33.1 GB"; a very small one in its own: "22 MB of 4.0 GB"."""
    scale, unit, digits = _unit(total)
    if done < scale / 2 / 10**digits:  # the figure would read 0
        return f"{format_size(done) if done else 0} of {format_size(total)}"
    return f"{done / scale:,.{digits}f} of {total / scale:,.{digits}f} {unit}"


def format_speed(bytes_per_second: float) -> str:
    """Format a speed: "14 MB/s", and "48 kB/s" below 1 MB/s."""
    if bytes_per_second < 950_000:
        return f"{max(bytes_per_second / KB, 1):.0f} kB/s"
    return f"{format_size(bytes_per_second)}/s"


def gigabytes(size: int) -> float:
    """Convert bytes to decimal gigabytes with three digits, so that a model of 1 MB isn't 0."""
    return round(size / GB, 3)


def _unit(size: float) -> tuple[int, str, int]:
    """Return the unit for a size: its bytes, its name, and the number of digits."""
    if size >= _ROUNDS_TO_GB:
        return GB, "GB", 1
    return MB, "MB", 1 if 0 < size < _ONE_DIGIT else 0
