"""Stages to percent and time left. Pure: no I/O and no clock; the caller says how much time has passed.

The overall percentages are seed 001's: downloading 0-20 (only when not cached), loading_weights 20-80,
initializing_gpu 80-95, warming_up 95-100. Percent never falls, and 100 is not said before ready.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from services.engines.port import Basis, Evidence, Stage

STAGES: Mapping[Stage, tuple[int, int]] = {
    "downloading": (0, 20),
    "loading_weights": (20, 80),
    "initializing_gpu": (80, 95),
    "warming_up": (95, 100),
}
ORDER: tuple[Stage, ...] = tuple(STAGES)
ALMOST = 0.95
"""How far a stage may be said to be on the strength of its usual duration alone."""
ENOUGH_TO_EXTRAPOLATE = 0.02


@dataclass(frozen=True, slots=True)
class History:
    """What earlier loads of the same (model, engine, settings) took, in seconds; empty when there were none."""

    total_seconds: float | None = None
    stage_seconds: Mapping[Stage, float] = field(default_factory=dict)
    basis: Basis = "learned"


@dataclass(frozen=True, slots=True)
class Estimate:
    """How a load stands: percent 0-99, the stage, what it rests on, seconds left (None: no honest figure)."""

    percent: int
    stage: Stage
    detail: str | None
    basis: Basis | None
    eta_seconds: float | None


def learn(loads: Sequence[Mapping[Stage, float]]) -> History:
    """The median of past loads, each given as seconds per stage; the most recent five count."""
    recent = loads[-5:]
    if not recent:
        return History()
    stages = {stage: median(load.get(stage, 0.0) for load in recent) for stage in ORDER}
    return History(median(sum(load.values()) for load in recent), stages)


class Progress:
    """Follows one load. Give it evidence and the seconds since the load began, in order."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._evidence = Evidence("loading_weights")  # what a load without a word is taken to do
        self._heard = False
        self._began: dict[Stage, float] = {}
        self._counted: dict[Stage, tuple[float, float]] = {}
        """When counting began in a stage, and from where: much of it can have passed before (vLLM's 20 to 40 s), and a
        download can go on from the middle."""
        self._elapsed = 0.0
        self._percent = 0

    def advance(self, evidence: Evidence | None, elapsed: float) -> Estimate:
        """Take in new evidence (None: only time has passed) and say how the load stands.

        Evidence of a stage that is over already is ignored: logs can repeat themselves.
        """
        self._elapsed = max(self._elapsed, elapsed)
        if evidence is not None and (not self._heard or _order(evidence) >= _order(self._evidence)):
            self._evidence, self._heard = evidence, True
        stage = self._evidence.stage
        self._began.setdefault(stage, self._elapsed if self._began else 0.0)
        if self._evidence.fraction is not None and stage not in self._counted:
            fresh = self._evidence.fraction <= ENOUGH_TO_EXTRAPOLATE or stage == "downloading"
            self._counted[stage] = (self._elapsed, self._evidence.fraction) if fresh else (self._began[stage], 0.0)
        fraction, basis = self._fraction()
        low, high = STAGES[stage]
        self._percent = max(self._percent, min(99, int(low + (high - low) * fraction)))
        return Estimate(self._percent, stage, self._evidence.detail, basis, self._eta(fraction, basis))

    def stage_seconds(self, total: float) -> dict[Stage, float]:
        """Seconds spent in each stage that was seen, when the whole load took `total`."""
        marks = sorted(self._began.items(), key=lambda mark: mark[1])
        ends = [*(began for _, began in marks[1:]), total]
        return {stage: max(0.0, end - began) for (stage, began), end in zip(marks, ends, strict=True)}

    def _fraction(self) -> tuple[float, Basis | None]:
        if self._evidence.fraction is not None:
            return min(1.0, max(0.0, self._evidence.fraction)), "measured"
        usual = self._history.stage_seconds.get(self._evidence.stage)
        if usual:
            return min(ALMOST, self._in_stage() / usual), self._history.basis
        if self._history.total_seconds and not self._history.stage_seconds:
            return self._share_of_total(self._history.total_seconds), self._history.basis
        return 0.0, None

    def _share_of_total(self, total: float) -> float:
        """With only a total to go by, spread the percentages evenly over it."""
        low, high = STAGES[self._evidence.stage]
        return min(ALMOST, max(0.0, (100 * self._elapsed / total - low) / (high - low)))

    def _in_stage(self) -> float:
        return self._elapsed - self._began[self._evidence.stage]

    def _eta(self, fraction: float, basis: Basis | None) -> float | None:
        history, stage = self._history, self._evidence.stage
        stages = history.stage_seconds
        later = sum(stages.get(s, 0.0) for s in ORDER[_order(self._evidence) + 1 :])
        left = self._left_by_pace(fraction) if basis == "measured" else None
        if stage == "downloading":  # what is known of a load says nothing about that
            return None if left is None else left + (later or history.total_seconds or 0.0)
        if stages:
            left = stages.get(stage, 0.0) - self._in_stage() if left is None else left
            return left + later if left + later > 0 else None
        if history.total_seconds:
            left = history.total_seconds - self._elapsed
            return left if left > 0 else None
        return left or None  # 0 of this stage is no figure for those to come

    def _left_by_pace(self, fraction: float) -> float | None:
        """Seconds left of this stage at the pace that was counted so far; None while that says nothing."""
        since, start = self._counted[self._evidence.stage]
        if fraction - start <= ENOUGH_TO_EXTRAPOLATE:
            return None
        return (self._elapsed - since) * (1 - fraction) / (fraction - start)


def _order(evidence: Evidence) -> int:
    return ORDER.index(evidence.stage)
