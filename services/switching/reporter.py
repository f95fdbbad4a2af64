"""Reports a job's progress: as events to its followers, and as the switch on the board.

Overall percent of a switch: 0 while checking memory, 0-20 downloading, 20-50 unloading, and the load is mapped onto
what remains, by elapsed time over forecast time, or by its stages without a forecast. Percent never falls, and reaches
100 only when the model is ready.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from services.engines.port import Usage
from services.sizes import format_size, gigabytes
from services.switching.events import LoadView, SwitchStage, SwitchView, Unloading
from services.switching.fleet import Fleet
from services.switching.jobs import Job, JobResult, Outcome, SwitchError
from services.switching.mailbox import Mailbox
from services.switching.member import Member
from services.switching.plan import Limit, Plan
from services.switching.progress import Estimate
from services.text import running_again

UNLOADING_FROM, LOADING_FROM = 20, 50
_LOAD_STAGES: dict[str, SwitchStage] = {"warming_up": "warming_up"}


class JobReporter:
    """Reports one job. Its methods are called by the job's greenlet, in the order of events."""

    def __init__(self, job: Job, mailbox: Mailbox, fleet: Fleet) -> None:
        self._job = job
        self._mailbox = mailbox
        self._fleet = fleet
        self._time = job.scheduler.time
        self._load_from = 0
        self._load_began = job.scheduler.now()
        self._steps_done = 0
        self._load_seconds: float | None = None
        self._rolling_back = False
        self._fetched: LoadView | None = None
        self._observed: tuple[str, LoadView, Usage | None] | None = None
        self.view = requested(job)

    def begin(self) -> None:
        self._show(stage="checking_memory")
        self._job.publish("stage", stage="checking_memory", progress=0)

    def fetching(self, estimate: Estimate) -> None:
        """Report the progress of a fetch; no memory has been freed for the target yet."""
        load = LoadView(estimate.percent, estimate.stage, estimate.detail, estimate.basis, estimate.eta_seconds)
        if self._fetched is not None and _same(self._fetched, load):
            return
        self._fetched = load
        self._show(
            stage="downloading",
            percent=estimate.percent,
            detail=estimate.detail,
            basis=estimate.basis,
            eta_seconds=estimate.eta_seconds,
        )
        self._publish_progress("downloading", self._job.target, load)

    def planned(self, plan: Plan) -> None:
        self._load_seconds = plan.estimated_seconds
        if not plan.unload:
            return
        self._load_from = LOADING_FROM
        reason = f"to make room for {plan.target}, which needs {format_size(plan.required_bytes)}"
        self._show(
            percent=UNLOADING_FROM,
            eta_seconds=plan.estimated_seconds,
            unloads=tuple(Unloading(u.model, reason, u.sleeps) for u in plan.unload),
        )
        self._job.publish(
            "stage", stage="unloading_models", progress=UNLOADING_FROM, unloading=[u.model for u in plan.unload]
        )

    def step(self, stage: SwitchStage, model_id: str) -> None:
        """Report that one step of freeing memory has begun, for one model."""
        steps = 2 * len(self.view.unloads) + 1
        self._steps_done += 1
        percent = UNLOADING_FROM + (LOADING_FROM - UNLOADING_FROM) * self._steps_done // (steps + 1)
        self._show(stage=stage, percent=percent, detail=model_id if stage != "waiting_for_memory" else None)
        self._job.publish(
            "progress", stage=stage, progress=self.view.percent, model=model_id, eta=_eta(self._load_seconds)
        )

    def loading(self, model_id: str, usual_seconds: float | None) -> None:
        self._load_began = self._job.scheduler.now()
        if self._rolling_back:
            self._show(detail=model_id, eta_seconds=usual_seconds)
            return
        self._show(stage="loading", percent=self._load_from, eta_seconds=usual_seconds, detail=None)
        self._job.publish(
            "stage", stage="loading_target", progress=self.view.percent, model=model_id, eta=_eta(usual_seconds)
        )

    def observed(self, member: Member, estimate: Estimate, usage: Usage | None, pid: int | None) -> None:
        """Report an update of the load under way, if it says something new."""
        load = LoadView(estimate.percent, estimate.stage, estimate.detail, estimate.basis, estimate.eta_seconds)
        before, self._observed = self._observed, (member.model.id, load, usage)
        if before is not None and before[0] == member.model.id and _same(before[1], load) and before[2] == usage:
            return
        self._mailbox.post(self._fleet.observe, member, load, usage, pid)
        if self._rolling_back:
            self._show(eta_seconds=load.eta_seconds)
            return
        if before is not None and before[0] == member.model.id and _same(before[1], load):
            return
        percent = self._load_from + int((100 - self._load_from) * self._share(load))
        stage = _LOAD_STAGES.get(load.stage, "loading")
        self._show(stage=stage, percent=percent, detail=load.detail, basis=load.basis, eta_seconds=load.eta_seconds)
        self._publish_progress(stage, member.model.id, load)

    def _publish_progress(self, stage: SwitchStage, model_id: str, load: LoadView) -> None:
        """Publish how a load stands to those who follow the job, with the percentage of the switch as a whole."""
        self._job.publish(
            "progress",
            stage=stage,
            phase=load.stage,
            progress=self.view.percent,
            model=model_id,
            eta=_eta(load.eta_seconds),
            detail=load.detail,
            basis=load.basis,
        )

    def _share(self, load: LoadView) -> float:
        """Return the fraction of the load that is done.

        It is elapsed time over forecast time, so that percent and time left agree; without a forecast, the percentage
        of the load's stage.
        """
        if load.eta_seconds is None:
            return load.percent / 100
        elapsed = self._job.scheduler.now() - self._load_began
        return min(0.99, elapsed / (elapsed + load.eta_seconds)) if elapsed + load.eta_seconds > 0 else 0.0

    def rolling_back(self, models: Sequence[str]) -> None:
        self._rolling_back = True
        self._show(stage="rolling_back", detail=models[-1], basis=None, eta_seconds=None)
        self._job.publish("stage", stage="rolling_back", progress=self.view.percent, reloading=list(models))

    def ready(self) -> JobResult:
        """Report that the target answers."""
        job = self._job
        job.load_seconds = job.seconds
        self._advance(stage="ready", finished_at=self._time(), percent=100, detail=None, eta_seconds=0.0)
        job.publish(
            "complete",
            status="success",
            model=job.target,
            total_time_seconds=round(job.seconds, 2),
            unloaded_models=list(job.unloaded),
        )
        return JobResult("success", None, self.view)

    def end(
        self,
        outcome: Outcome,
        error: SwitchError,
        *,
        active: str | None,
        restored: Sequence[str] = (),
        missing: Mapping[str, str] | None = None,
    ) -> JobResult:
        """Report that the job failed or was cancelled: the first cause, and what is running now.

        `missing` maps each model that was unloaded and could not be restored to the reason.
        """
        message = f"{_sentence(error.message)} {_lost(missing or {})}".strip()
        told = SwitchError(error.code, f"{message} {_running(restored, active)}".strip(), **error.details)
        stage: SwitchStage = "cancelled" if outcome == "cancelled" else "rolled_back" if restored else "failed"
        if error.code in ("insufficient_memory", "confirmation_required"):
            stage = "refused"
        log_tail = str(error.details.get("log_tail", ""))
        self._advance(
            stage=stage,
            finished_at=self._time(),
            error=error.code,
            message=message,
            log_tail=log_tail,
            restored=tuple(restored),
            eta_seconds=None,
        )
        self._job.publish("error", error=error.code, message=told.message, **memory_figures(error))
        return JobResult(outcome, told, self.view)

    def _show(self, **changes: object) -> None:
        self._advance(**changes)
        ends = self._job.cancelled and not self._job.superseded and not self._rolling_back
        self._mailbox.post(self._fleet.show, cancelling(self.view) if ends else self.view)

    def _advance(self, **changes: object) -> None:
        percent = max(self.view.percent, int(str(changes.pop("percent", 0))))
        self.view = replace(self.view, percent=percent, **changes)  # type: ignore[arg-type]


def memory_figures(error: SwitchError) -> dict[str, object]:
    """Return the figures of a memory refusal, in GB; empty for other errors."""
    plan = error.details.get("plan")
    if not isinstance(plan, Plan):
        return {}
    return {
        "required_gb": gigabytes(plan.required_bytes),
        "available_gb": gigabytes(plan.available_bytes),
        "can_free_gb": gigabytes(plan.freeable_bytes),
        "freed_gb": 0,
        "total_available_gb": gigabytes(plan.available_bytes + plan.freeable_bytes),
        "limits": limit_figures(plan.limits),
    }


def limit_figures(limits: Sequence[Limit]) -> list[dict[str, object]]:
    """Return the limits that keep a model out, for JSON: what each allows or holds, and how much more is needed."""
    return [
        {
            "limit": limit.kind,
            "gb": gigabytes(limit.bytes),
            "short_gb": None if limit.short_bytes is None else gigabytes(limit.short_bytes),
            "programs": [{"name": p.name, "pids": list(p.pids), "gb": gigabytes(p.bytes)} for p in limit.programs],
        }
        for limit in limits
    ]


def requested(job: Job) -> SwitchView:
    """Return the view of a switch that got the slot and has done nothing yet."""
    return SwitchView(
        id=job.id,
        to_model=job.target,
        from_model=job.chain.active,
        requested_by=job.request.requested_by,
        started_at=job.scheduler.time(),
    )


def cancelling(view: SwitchView) -> SwitchView:
    """Return the view of a switch that was cancelled and has not ended: its detail and figures no longer apply."""
    return replace(view, stage="cancelling", detail=None, basis=None, eta_seconds=None)


def _eta(seconds: float | None) -> int | None:
    return None if seconds is None else math.ceil(seconds)


def _same(a: LoadView, b: LoadView) -> bool:
    return (a.percent, a.stage, a.detail, _eta(a.eta_seconds)) == (b.percent, b.stage, b.detail, _eta(b.eta_seconds))


def _lost(missing: Mapping[str, str]) -> str:
    """Say which models were unloaded and are not back, and why."""
    return " ".join(f"{model} was unloaded and is not back: {_sentence(why)}" for model, why in missing.items())


def _running(restored: Sequence[str], active: str | None) -> str:
    """Say what runs now, for readers of this one message; pages show it from the status."""
    if restored:
        return running_again(restored)
    return f"{active} is still running." if active else ""


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
