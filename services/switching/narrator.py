"""Tells how a job goes: as seed 001's events to those who follow it, and as the switch on the board to everyone.

Overall percent of a switch: 0 checking memory, 0-20 downloading, 20-50 unloading, then the load mapped onto the rest:
by the time it took over the time it is forecast to take, without a forecast by its stages.
It never falls, and 100 is said only when the model is ready.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from services.engines.port import Usage
from services.switching.events import LoadView, SwitchStage, SwitchView, Unloading
from services.switching.fleet import Fleet
from services.switching.jobs import Ending, Job, Outcome, SwitchError
from services.switching.mailbox import Mailbox
from services.switching.member import Member
from services.switching.plan import Plan, say_gb
from services.switching.progress import Estimate
from services.text import running_again

UNLOADING_FROM, LOADING_FROM = 20, 50
_LOAD_STAGES: dict[str, SwitchStage] = {"warming_up": "warming_up"}


class Narrator:
    """The story of one job. Methods are called by its greenlet, in the order in which things happen."""

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
        self._job.tell("stage", stage="checking_memory", progress=0)

    def fetching(self, estimate: Estimate) -> None:
        """What the target needs is being fetched to this machine; nobody has made room for it yet."""
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
        self._load_began = self._job.scheduler.now()
        if self._rolling_back:
            self._show(detail=model_id, eta_seconds=usual_seconds)
            return
        self._show(stage="loading", percent=self._load_from, eta_seconds=usual_seconds, detail=None)
        self._job.tell(
            "stage", stage="loading_target", progress=self.view.percent, model=model_id, eta=_eta(usual_seconds)
        )

    def observed(self, member: Member, estimate: Estimate, usage: Usage | None, pid: int | None) -> None:
        """A fresh look at the load under way; told only when it says something new."""
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

    def _share(self, load: LoadView) -> float:
        """How much of the load is done: the time it took over its forecast, so that percent and time left agree.

        Without a forecast it is what its stage says.
        """
        if load.eta_seconds is None:
            return load.percent / 100
        elapsed = self._job.scheduler.now() - self._load_began
        return min(0.99, elapsed / (elapsed + load.eta_seconds)) if elapsed + load.eta_seconds > 0 else 0.0

    def rolling_back(self, models: Sequence[str]) -> None:
        self._rolling_back = True
        self._show(stage="rolling_back", detail=models[-1], basis=None, eta_seconds=None)
        self._job.tell("stage", stage="rolling_back", progress=self.view.percent, reloading=list(models))

    def ready(self) -> Ending:
        """The target answers."""
        job = self._job
        job.load_seconds = job.seconds
        self._advance(stage="ready", finished_at=self._time(), percent=100, detail=None, eta_seconds=0.0)
        job.tell(
            "complete",
            status="success",
            model=job.target,
            total_time_seconds=round(job.seconds, 2),
            unloaded_models=list(job.unloaded),
        )
        return Ending("success", None, self.view)

    def end(
        self,
        outcome: Outcome,
        error: SwitchError,
        *,
        active: str | None,
        restored: Sequence[str] = (),
        missing: Mapping[str, str] | None = None,
    ) -> Ending:
        """The job did not do what was asked: say the first cause, and what is running now.

        `missing` are the models that were unloaded and are not back, each with the reason.
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
        self._job.tell("error", error=error.code, message=told.message, **memory_figures(error))
        return Ending(outcome, told, self.view)

    def _show(self, **changes: object) -> None:
        self._advance(**changes)
        ends = self._job.cancelled and not self._job.superseded and not self._rolling_back
        self._mailbox.post(self._fleet.show, cancelling(self.view) if ends else self.view)

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


def requested(job: Job) -> SwitchView:
    """A switch that has its turn, before anything of it was done."""
    return SwitchView(
        id=job.id,
        to_model=job.target,
        from_model=job.chain.active,
        requested_by=job.request.requested_by,
        started_at=job.scheduler.time(),
    )


def cancelling(view: SwitchView) -> SwitchView:
    """A switch that was cancelled and isn't over yet: what it was at says nothing any more."""
    return replace(view, stage="cancelling", detail=None, basis=None, eta_seconds=None)


def _eta(seconds: float | None) -> int | None:
    return None if seconds is None else math.ceil(seconds)


def _same(a: LoadView, b: LoadView) -> bool:
    return (a.percent, a.stage, a.detail, _eta(a.eta_seconds)) == (b.percent, b.stage, b.detail, _eta(b.eta_seconds))


def _lost(missing: Mapping[str, str]) -> str:
    """What was unloaded for nothing, and why it is not back."""
    return " ".join(f"{model} was unloaded and is not back: {_sentence(why)}" for model, why in missing.items())


def _running(restored: Sequence[str], active: str | None) -> str:
    """What runs now, for those who read this one message; the pages say it from the status."""
    if restored:
        return running_again(restored)
    return f"{active} is still running." if active else ""


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
