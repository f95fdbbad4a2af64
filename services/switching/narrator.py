"""Tells how a job goes: as seed 001's events to those who follow it, and as the switch on the board to everyone.

Overall percent of a switch: 0 checking memory, 0-20 downloading, 20-50 unloading, then the load's own percentage mapped
onto the rest.
It never falls, and 100 is said only when the model is ready.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

from services.switching.events import LoadView, SwitchStage, SwitchView, Unloading
from services.switching.fleet import Fleet, Member
from services.switching.jobs import Job, Outcome, SwitchError
from services.switching.plan import Plan, say_gb
from services.switching.progress import Estimate

UNLOADING_FROM, LOADING_FROM = 20, 50
_LOAD_STAGES: dict[str, SwitchStage] = {"warming_up": "warming_up"}


class Narrator:
    """The story of one job. Methods are called in the order in which things happen."""

    def __init__(self, job: Job, fleet: Fleet) -> None:
        self._job = job
        self._fleet = fleet
        self._load_from = 0
        self._steps_done = 0
        self._load_seconds: float | None = None
        self._rolling_back = False
        self._brought: LoadView | None = None
        self.view = SwitchView(
            id=job.id,
            to_model=job.target,
            from_model=fleet.active,
            requested_by=job.request.requested_by,
            started_at=time.time(),
        )

    def begin(self) -> None:
        self._show(stage="checking_memory")
        self._job.tell("stage", stage="checking_memory", progress=0)

    def bringing(self, estimate: Estimate) -> None:
        """What the target needs is being brought to this machine; nobody has made room for it yet."""
        load = LoadView(estimate.percent, estimate.stage, estimate.detail, estimate.basis, estimate.eta_seconds)
        if self._brought is not None and _same(self._brought, load):
            return
        self._brought = load
        self._show(
            stage="downloading",
            percent=estimate.percent,
            detail=estimate.detail,
            basis=estimate.basis,
            eta_seconds=estimate.eta_seconds,
        )
        self._job.tell(
            "progress",
            stage="downloading",
            phase=estimate.stage,
            progress=self.view.percent,
            model=self._job.target,
            eta=_eta(estimate.eta_seconds),
            detail=estimate.detail,
            basis=estimate.basis,
        )

    def planned(self, plan: Plan) -> None:
        self._load_seconds = plan.estimated_seconds
        if not plan.unload:
            return
        self._load_from = LOADING_FROM
        reason = f"to make room for {plan.target}, which needs {say_gb(plan.required_bytes)}"
        self._show(
            percent=UNLOADING_FROM,
            eta_seconds=plan.estimated_seconds,
            unloads=tuple(Unloading(u.model, reason, u.sleeps) for u in plan.unload),
        )
        self._job.tell(
            "stage", stage="unloading_models", progress=UNLOADING_FROM, unloading=[u.model for u in plan.unload]
        )

    def step(self, stage: SwitchStage, model_id: str) -> None:
        """One step on the way to free memory has begun, for one model."""
        steps = 2 * len(self.view.unloads) + 1
        self._steps_done += 1
        percent = UNLOADING_FROM + (LOADING_FROM - UNLOADING_FROM) * self._steps_done // (steps + 1)
        self._show(stage=stage, percent=percent, detail=model_id if stage != "waiting_for_memory" else None)
        self._job.tell(
            "progress", stage=stage, progress=self.view.percent, model=model_id, eta=_eta(self._load_seconds)
        )

    def loading(self, model_id: str, usual_seconds: float | None) -> None:
        if self._rolling_back:
            self._show(detail=model_id, eta_seconds=usual_seconds)
            return
        self._show(stage="loading", percent=self._load_from, eta_seconds=usual_seconds, detail=None)
        self._job.tell(
            "stage", stage="loading_target", progress=self.view.percent, model=model_id, eta=_eta(usual_seconds)
        )

    def observed(self, member: Member, estimate: Estimate) -> None:
        """A fresh look at the load under way; told only when it says something new."""
        load = LoadView(estimate.percent, estimate.stage, estimate.detail, estimate.basis, estimate.eta_seconds)
        if member.load is not None and _same(member.load, load):
            return
        member.load = load
        if self._rolling_back:
            self._show(eta_seconds=load.eta_seconds)
            return
        percent = self._load_from + (100 - self._load_from) * load.percent // 100
        stage = _LOAD_STAGES.get(load.stage, "loading")
        self._show(stage=stage, percent=percent, detail=load.detail, basis=load.basis, eta_seconds=load.eta_seconds)
        self._job.tell(
            "progress",
            stage=stage,
            phase=load.stage,
            progress=self.view.percent,
            model=member.model.id,
            eta=_eta(load.eta_seconds),
            detail=load.detail,
            basis=load.basis,
        )

    def rolling_back(self, models: Sequence[str]) -> None:
        self._rolling_back = True
        self._show(stage="rolling_back", detail=models[-1], basis=None, eta_seconds=None)
        self._job.tell("stage", stage="rolling_back", progress=self.view.percent, reloading=list(models))

    def ready(self) -> None:
        self._job.load_seconds = self._job.seconds
        self._close("ready", percent=100, detail=None, eta_seconds=0.0)
        self._job.tell(
            "complete",
            status="success",
            model=self._job.target,
            total_time_seconds=round(self._job.seconds, 2),
            unloaded_models=list(self._job.unloaded),
        )
        self._job.finish("success")

    def end(self, outcome: Outcome, error: SwitchError, restored: Sequence[str] = ()) -> None:
        """The job did not do what was asked: say the first cause, and what is running now."""
        message = f"{_sentence(error.message)} {self._lost(restored)}".strip()
        told = SwitchError(error.code, f"{message} {self._running(restored)}".strip(), **error.details)
        stage: SwitchStage = "cancelled" if outcome == "cancelled" else "rolled_back" if restored else "failed"
        if error.code in ("insufficient_memory", "confirmation_required"):
            stage = "refused"
        log_tail = str(error.details.get("log_tail", ""))
        self._close(stage, error=error.code, message=message, log_tail=log_tail, eta_seconds=None)
        self._job.tell("error", error=error.code, message=told.message, **memory_figures(error))
        self._job.finish(outcome, told)

    def _lost(self, restored: Sequence[str]) -> str:
        """What was unloaded for nothing; a switch that takes this one's place decides about that itself."""
        lost = [m for m in self._job.unloaded if m not in restored]
        return f"{' and '.join(lost)} was unloaded and is not back." if lost and not self._job.superseded else ""

    def _running(self, restored: Sequence[str]) -> str:
        """What runs now, for those who read this one message; the pages say it from the status."""
        if restored:
            return f"{' and '.join(restored)} is running again."
        return f"{self._fleet.active} is still running." if self._fleet.active else ""

    def _close(self, stage: SwitchStage, **changes: object) -> None:
        self._advance(stage=stage, finished_at=time.time(), **changes)
        self._fleet.publish(switch=None, last_switch=self.view)

    def _show(self, **changes: object) -> None:
        self._advance(**changes)
        self._fleet.publish(switch=self.view)

    def _advance(self, **changes: object) -> None:
        percent = max(self.view.percent, int(str(changes.pop("percent", 0))))
        self.view = replace(self.view, percent=percent, **changes)  # type: ignore[arg-type]


def memory_figures(error: SwitchError) -> dict[str, object]:
    """The figures that go with a refusal, in GB; empty for errors that are not about memory."""
    plan = error.details.get("plan")
    if not isinstance(plan, Plan):
        return {}
    return {
        "required_gb": gb(plan.required_bytes),
        "available_gb": gb(plan.available_bytes),
        "can_free_gb": gb(plan.freeable_bytes),
        "freed_gb": 0,
        "total_available_gb": gb(plan.available_bytes + plan.freeable_bytes),
    }


def gb(size: int) -> float:
    """Bytes as decimal gigabytes with three digits, so that a model of 1 MB isn't 0."""
    return round(size / 1e9, 3)


def _eta(seconds: float | None) -> int | None:
    return None if seconds is None else math.ceil(seconds)


def _same(a: LoadView, b: LoadView) -> bool:
    return (a.percent, a.stage, a.detail, _eta(a.eta_seconds)) == (b.percent, b.stage, b.detail, _eta(b.eta_seconds))


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
