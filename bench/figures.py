"""A measured figure with its target, and the Markdown table of all figures. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

Values = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `values` holds the raw figures for the JSON; `met` is None if that can't be judged."""

    figure: str
    measured: str
    target: str
    met: bool | None = None
    values: Values = field(default_factory=dict)


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| figure | measured | target |", "|---|---|---|"]
    lines += [f"| {row.figure} | {row.measured} | {row.target}{_verdict(row.met)} |" for row in rows]
    return "\n".join(lines)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile. `samples` must not be empty."""
    ranked = sorted(samples)
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)]


def spread(samples: Sequence[float], form: str = ".0f", scale: float = 1.0) -> str:
    """`median (min..max)`."""
    middle, low, high = median(samples) * scale, min(samples) * scale, max(samples) * scale
    return f"{middle:{form}} ({low:{form}}..{high:{form}})"


def _verdict(met: bool | None) -> str:
    return "" if met is None else " ✓" if met else " ✗ missed"
