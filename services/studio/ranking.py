"""Which candidates are better. Pure, and the same for the same scores, whatever the order of arrival."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from services.providers.ports import Score
from services.store.records import StudioCandidate


def flaw(score: Score) -> str | None:
    """Return what makes a score unusable, as a sentence; None if it is usable."""
    for name, value in (("alignment", score.alignment), ("aesthetic", score.aesthetic), ("total", score.total)):
        if not math.isfinite(value):
            return f"Its score is unusable: {name} is no number."
        if not 0.0 <= value <= 1.0:
            return f"Its score is unusable: {name} is {value:g}, not between 0 and 1."
    return None


def ranked(candidates: Iterable[StudioCandidate]) -> list[StudioCandidate]:
    """Return the scored candidates, the best first: by total, then alignment, then aesthetic, then the earlier one."""
    return sorted((c for c in candidates if c.state == "scored"), key=_key)


def with_ranks(candidates: Iterable[StudioCandidate]) -> list[StudioCandidate]:
    """Return all candidates in the same order, those with a score with their rank."""
    candidates = list(candidates)
    ranks = {candidate.number: rank for rank, candidate in enumerate(ranked(candidates), 1)}
    return [replace(candidate, rank=ranks.get(candidate.number)) for candidate in candidates]


def _key(candidate: StudioCandidate) -> tuple[float, float, float, int]:
    return -(candidate.total or 0.0), -(candidate.alignment or 0.0), -(candidate.aesthetic or 0.0), candidate.number
