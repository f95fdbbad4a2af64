"""Computes percent and time left of a load from its stages. Pure: no I/O and no clock; the caller passes elapsed time.

Percentages of the stages: downloading 0-20 (only when not cached), loading_weights 20-80, initializing_gpu 80-95,
warming_up 95-100. Percent never falls, and stays below 100 until the model is ready.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from services.engines.port import STAGE_ORDER, Basis, Evidence, Stage

STAGES: Mapping[Stage, tuple[int, int]] = {
    "downloading": (0, 20),
    "loading_weights": (20, 80),
    "initializing_gpu": (80, 95),
    "warming_up": (95, 100),
}
MAX_FRACTION_BY_TIME = 0.95
"""Largest fraction of a stage that is reported by elapsed time alone."""
MIN_FRACTION_TO_EXTRAPOLATE = 0.02
"""Smallest measured fraction from which a rate is computed."""


@dataclass(frozen=True, slots=True)
class History:
    """Seconds that earlier loads of the same (model, engine, settings) took; empty without earlier loads."""

    total_seconds: float | None = None
    stage_seconds: Mapping[Stage, float] = field(default_factory=dict)
    basis: Basis = "learned"


@dataclass(frozen=True, slots=True)
class Estimate:
    """Progress of a load: percent 0-99, the stage, the basis of the figures, seconds left (None: unknown)."""

    percent: int
    stage: Stage
    detail: str | None
    basis: Basis | None
    eta_seconds: float | None


def learn(loads: Sequence[Mapping[Stage, float]]) -> History:
    """Return the median of the latest five loads, each given as seconds per stage."""
    recent = loads[-5:]
    if not recent:
        return History()
    stages = {stage: median(load.get(stage, 0.0) for load in recent) for stage in STAGE_ORDER}
    return History(median(sum(load.values()) for load in recent), stages)


class Progress:
    """Progress of one load, fed with evidence and the seconds since the load began, in order."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._evidence = Evidence("loading_weights")  # assumed until the engine reports a stage
        self._has_evidence = False
        self._began: dict[Stage, float] = {}
        self._counted: dict[Stage, tuple[float, float]] = {}
        """Elapsed seconds and fraction at which counting began, per stage. vLLM spends 20 to 40 s in a stage before it
        counts, and a download can resume from the middle."""
        self._elapsed = 0.0
        self._percent = 0

    def advance(self, evidence: Evidence | None, elapsed: float) -> Estimate:
        """Take in new evidence, or None when only time has passed, and return the new estimate.

        Evidence of an earlier stage is ignored, because logs can repeat themselves.
        """
        self._elapsed = max(self._elapsed, elapsed)
        if evidence is not None and (not self._has_evidence or _order(evidence) >= _order(self._evidence)):
            self._evidence, self._has_evidence = evidence, True
        stage = self._evidence.stage
        self._began.setdefault(stage, self._elapsed if self._began else 0.0)
        if self._evidence.fraction is not None and stage not in self._counted:
            fresh = self._evidence.fraction <= MIN_FRACTION_TO_EXTRAPOLATE or stage == "downloading"
            self._counted[stage] = (self._elapsed, self._evidence.fraction) if fresh else (self._began[stage], 0.0)
        fraction, basis = self._fraction()
        low, high = STAGES[stage]
        self._percent = max(self._percent, min(99, int(low + (high - low) * fraction)))
        return Estimate(self._percent, stage, self._evidence.detail, basis, self._eta(fraction, basis))

    def stage_seconds(self, total: float) -> dict[Stage, float]:
        """Return the seconds spent in each stage that was seen, given that the whole load took `total`."""
        marks = sorted(self._began.items(), key=lambda mark: mark[1])
        ends = [*(began for _, began in marks[1:]), total]
        return {stage: max(0.0, end - began) for (stage, began), end in zip(marks, ends, strict=True)}

    def _fraction(self) -> tuple[float, Basis | None]:
        if self._evidence.fraction is not None:
            return min(1.0, max(0.0, self._evidence.fraction)), "measured"
        usual = self._history.stage_seconds.get(self._evidence.stage)
        if usual:
            return min(MAX_FRACTION_BY_TIME, self._in_stage() / usual), self._history.basis
        if self._history.total_seconds and not self._history.stage_seconds:
            return self._share_of_total(self._history.total_seconds), self._history.basis
        return 0.0, None

    def _share_of_total(self, total: float) -> float:
        """Return the fraction of the stage when only the total time is known: percent grows evenly over it."""
        low, high = STAGES[self._evidence.stage]
        return min(MAX_FRACTION_BY_TIME, max(0.0, (100 * self._elapsed / total - low) / (high - low)))

    def _in_stage(self) -> float:
        return self._elapsed - self._began[self._evidence.stage]

    def _eta(self, fraction: float, basis: Basis | None) -> float | None:
        history, stage = self._history, self._evidence.stage
        stages = history.stage_seconds
        later = sum(stages.get(s, 0.0) for s in STAGE_ORDER[_order(self._evidence) + 1 :])
        left = self._left_by_pace(fraction) if basis == "measured" else None
        if stage == "downloading":  # past loads say nothing about the download
            return None if left is None else left + (later or history.total_seconds or 0.0)
        if stages:
            left = stages.get(stage, 0.0) - self._in_stage() if left is None else left
            return left + later if left + later > 0 else None
        if history.total_seconds:
            left = history.total_seconds - self._elapsed
            return left if left > 0 else None
        return left or None  # 0 s left of this stage says nothing about the later ones

    def _left_by_pace(self, fraction: float) -> float | None:
        """Return the seconds left of this stage at the measured rate; None while too little was counted."""
        since, start = self._counted[self._evidence.stage]
        if fraction - start <= MIN_FRACTION_TO_EXTRAPOLATE:
            return None
        return (self._elapsed - since) * (1 - fraction) / (fraction - start)


def _order(evidence: Evidence) -> int:
    return STAGE_ORDER.index(evidence.stage)
