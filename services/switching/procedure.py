"""Runs one job step by step: plan, fetch, drain, unload, wait for memory, load, warm up, or roll back.

Blocking code in a greenlet of its own. It reads snapshots, reports to the fleet by messages, and reads a model's state
again after each step that takes time: another client, or a crash, may have changed it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import structlog

from services.cancellation import Cancelled, CancelToken
from services.catalog import UnknownModel
from services.engines.port import EngineError, LoadFailed, Model
from services.scheduling import pause
from services.sizes import format_size
from services.switching.context import SwitchingContext
from services.switching.fleet import Fleet
from services.switching.jobs import Job, JobResult, Outcome, SwitchError
from services.switching.lifecycle import Lifecycle, Slot
from services.switching.mailbox import Mailbox
from services.switching.member import Member, MemberState
from services.switching.plan import Plan, Unload, other_programs, refusal
from services.switching.planner import Planner
from services.switching.reconciler import Reconciler
from services.switching.reporter import JobReporter

log = structlog.get_logger(__name__)

MEMORY_POLL_SECONDS = 0.05
"""Interval between measurements while waiting for freed memory."""
FINAL_DRAIN_SECONDS = 3.0
"""Time for requests in flight to finish when the app shuts down."""


class Procedure:
    """Runs jobs, one after another. `check_state` raises SwitchError when the state folder can't be written."""

    def __init__(
        self,
        context: SwitchingContext,
        mailbox: Mailbox,
        fleet: Fleet,
        planner: Planner,
        lifecycle: Lifecycle,
        reconciler: Reconciler,
        slot: Slot,
        check_state: Callable[[], None],
    ) -> None:
        self._settings = context.settings
        self._preferences = context.preferences
        self._pins = context.pins
        self._scheduler = context.scheduler
        self._mailbox = mailbox
        self._fleet = fleet
        self._board = context.board
        self._planner = planner
        self._lifecycle = lifecycle
        self._reconciler = reconciler
        self._catalog = context.catalog
        self._engines = context.engines
        self._slot = slot
        self._check_state = check_state

    def run(self, job: Job) -> JobResult:
        """Run a job, or roll back what was done for it. Never raises."""
        reporter = JobReporter(job, self._mailbox, self._fleet)
        try:
            job.token.check()
            if job.request.kind == "stop":
                return self._stop(job)
            if job.request.kind == "remove":
                return self._remove(job)
            return self._switch(job, reporter)
        except Exception as error:
            return self._undo(job, reporter, as_switch_error(job, error))

    def refusal(self, job: Job) -> SwitchError | None:
        """Return why the target can't be made ready, even if the load under way were cancelled; None if it can.

        Checked before a running switch is cancelled for this one: a refused target must not cost the switch that works.
        """
        try:
            model = self._usable(job.target)
            if self._board.current.instances.get(model.id) is None:
                self._make_plan(job, model, preempt_loads=True)
        except Exception as error:
            return as_switch_error(job, error)
        return None

    def stop_all(self, *, for_good: bool = True) -> None:
        """Stop every instance that depends on the app, in parallel, because the app is shutting down.

        Requests in flight get FINAL_DRAIN_SECONDS. Unless `for_good`, the app restarts at once and adopts loaded
        instances, so only unfinished ones are stopped.
        """
        for member in self._mailbox.call(self._fleet.members):
            stays = member.engine.outlives_app or not for_good
            if not (stays and member.is_loaded) and member.shares is None:
                self._scheduler.spawn("last-stop", lambda member=member: self._stop_last(member))  # type: ignore[misc]

    def _stop_last(self, member: Member) -> None:
        member.traffic.close()
        member.traffic.wait_idle(FINAL_DRAIN_SECONDS, CancelToken())
        try:
            self._lifecycle.stop(member)
        except Exception as error:
            log.warning("a model could not be unloaded", model=member.model.id, reason=str(error))
            self._mailbox.call(self._fleet.mark_unloaded, member)

    # Switch and restart.

    def _switch(self, job: Job, reporter: JobReporter) -> JobResult:
        restart = job.request.kind == "restart"
        if not restart and self._already_there(job):
            return JobResult("already_loaded")
        reporter.begin()
        inherited = list(job.chain.unloaded)
        self._check_state()
        model = self._usable(job.target)
        plan = self._make_plan(job, model)
        missing = restart or self._current_state(model) == "absent"
        if missing and self._lifecycle.fetch(job, model, reporter, self._slot):
            model, plan = self._replan(job)
        if restart:
            self._unload_for_restart(job, reporter)
            model, plan = self._replan(job)
        reporter.planned(plan)
        self._make_room(job, reporter, plan)
        if self._current_state(model) != "running":
            job.begin_changes()
            self._lifecycle.load(model, reporter, job.token, job.mark_started)
        job.seal()
        self._mailbox.call(self._activate_target, job)
        here = self._board.current.instances
        job.unloaded[:0] = [m for m in inherited if m not in here and m not in job.unloaded]
        return reporter.ready()

    def _already_there(self, job: Job) -> bool:
        """Return whether the target runs already and nothing else was requested. If so, activate it as requested."""
        model = self._catalog.get(job.target)
        if self._current_state(model) != "running" or self._model_to_replace(job) is not None:
            return False
        job.seal()
        self._mailbox.call(self._activate_target, job)
        return True

    def _activate_target(self, job: Job) -> None:
        """Message: activate the target if any request of the job asks for it.

        Read here, because others may have joined.
        """
        if job.request.options.activate:
            self._fleet.activate(job.target)
        else:
            self._fleet.activate_if_none(job.target)

    def _model_to_replace(self, job: Job) -> str | None:
        """Return the model that is to be unloaded in any case (`Request.instead_of`), if it is loaded."""
        instead_of = job.request.options.instead_of
        view = self._board.current.instances.get(instead_of) if instead_of != job.target and instead_of else None
        return view.model if view is not None else None

    def _current_state(self, model: Model) -> MemberState:
        """Return a model's state after taking in what its engine has loaded meanwhile."""
        self._reconciler.reconcile_model(model)
        return self._mailbox.call(self._fleet.state_of, model.id)

    def _replan(self, job: Job) -> tuple[Model, Plan]:
        """Refresh the catalogue and plan again: a fetch or an unload may have changed sizes and the set of models."""
        self._catalog.refresh()
        model = self._usable(job.target)
        return model, self._make_plan(job, model)

    def _usable(self, model_id: str) -> Model:
        model = self._catalog.get(model_id)
        if model.fault and model_id not in self._board.current.instances:
            raise SwitchError("model_unusable", f"{model.id} can't be loaded: {model.fault}")
        return model

    def _make_plan(self, job: Job, model: Model, *, preempt_loads: bool = False) -> Plan:
        """Return a feasible and permitted plan; plan again when a client with more permissions joins.

        Raises SwitchError.
        """
        while True:
            request = job.request
            options = request.options
            self._reconciler.measure()
            plan = self._planner.plan(
                model,
                options.strategy,
                options.auto_unload,
                instead_of=options.instead_of,
                preempt_loads=preempt_loads,
            )
            job.plan = plan
            error = self._plan_error(job, plan)
            if error is None:
                return plan
            if job.seal(request):
                raise error

    def _plan_error(self, job: Job, plan: Plan) -> SwitchError | None:
        if not plan.feasible:
            return SwitchError("insufficient_memory", refusal(plan), plan=plan)
        if plan.unload and self._preferences.current.confirm_before_unload and not job.request.options.confirm:
            names = ", ".join(u.model for u in plan.unload)
            words = f"Loading {plan.target} would unload {names}. Confirm it."
            return SwitchError("confirmation_required", words, plan=plan)
        return None

    def _unload_for_restart(self, job: Job, reporter: JobReporter) -> None:
        """Unload the target before it is loaded again; it becomes active again only if it was active before."""
        options = replace(job.request.options, activate=job.chain.active == job.target)
        job.request = replace(job.request, options=options)
        if self._current_state(self._catalog.get(job.target)) == "absent":
            return
        self._drain_and_unload(job, reporter, job.target)

    def _make_room(self, job: Job, reporter: JobReporter, plan: Plan) -> None:
        for unload in plan.unload:
            self._unload(job, reporter, unload)
        if plan.unload:
            self._wait_for_room(job, reporter, plan)

    def _unload(self, job: Job, reporter: JobReporter, unload: Unload) -> None:
        if self._drain_and_unload(job, reporter, unload.model, sleeps=unload.sleeps):
            job.unloaded.append(unload.model)

    def _drain_and_unload(self, job: Job, reporter: JobReporter, model_id: str, *, sleeps: bool = False) -> bool:
        job.begin_changes()
        reporter.step("draining", model_id)
        names = self._names_of(model_id)

        def drained() -> None:
            for name in names:  # recorded before the unload, so that a failure in between can't lose them
                job.chain.add(name)
            reporter.step("unloading", model_id)

        return self._lifecycle.unload(model_id, job.token, sleeps=sleeps, on_drained=drained)

    def _names_of(self, model_id: str) -> list[str]:
        """Return a model and the others that share its instance."""
        views = self._board.current.instances
        owner = view.shares or model_id if (view := views.get(model_id)) is not None else model_id
        others = [v.model for v in views.values() if v.model == owner or v.shares == owner]
        return [model_id, *(other for other in others if other != model_id)]

    def _wait_for_room(self, job: Job, reporter: JobReporter, plan: Plan) -> None:
        """Wait until the target fits; stop models put to sleep that turn out to keep too much memory."""
        try:
            self._wait_for_memory(job, reporter, plan)
        except SwitchError:
            sleepers = [self._mailbox.call(self._fleet.loaded_member, u.model) for u in plan.unload]
            asleep = [m for m in sleepers if m is not None and m.state == "asleep"]
            if not asleep:
                raise
            for member in asleep:
                log.warning("a sleeping model keeps too much memory; stopping it", model=member.model.id)
                self._lifecycle.stop(member)
            self._wait_for_memory(job, reporter, plan)

    def _wait_for_memory(self, job: Job, reporter: JobReporter, plan: Plan) -> None:
        """Wait until the device *measures* free: a driver may free memory only some time after the engine's exit."""
        reporter.step("waiting_for_memory", plan.target)
        deadline = self._scheduler.now() + self._settings.memory_timeout_seconds
        while True:
            holdings = self._mailbox.call(self._fleet.holdings)
            ledger = self._planner.account(plan.device, holdings)
            if ledger.available_bytes >= plan.required_bytes:
                return
            if self._scheduler.now() > deadline:
                raise SwitchError(
                    "memory_not_freed",
                    f"{format_size(plan.required_bytes)} should be free on {ledger.name} by now, but only "
                    f"{format_size(ledger.available_bytes)} are. "
                    f"{other_programs(ledger.other_bytes, self._planner.programs(plan.device))}",
                    plan=plan,
                )
            pause(self._scheduler, MEMORY_POLL_SECONDS, job.token)

    # Other kinds of jobs.

    def _refuse_pinned(self, model_id: str) -> None:
        """Raise SwitchError if a model is pinned, or another one that would go with it."""
        for name in self._names_of(model_id):
            pin = self._pins.current.get(name)
            if pin is not None:
                raise SwitchError("model_pinned", f"{name} is {pin.words}. Unpin it first.")

    def _stop(self, job: Job) -> JobResult:
        self._refuse_pinned(job.target)
        self._mailbox.call(self._fleet.clear_failure, job.target)
        if self._lifecycle.unload(job.target, job.token, on_drained=lambda: None):
            job.unloaded.append(job.target)
            self._catalog.refresh()  # drop a model that was listed only because it was loaded
        return JobResult("success")

    def _remove(self, job: Job) -> JobResult:
        """Unload a model if it is loaded, then delete its files, except those that other models use.

        This is a job of the switcher so that nothing loads the model meanwhile.
        """
        self._catalog.refresh()  # know which models share its files now
        model = self._catalog.get(job.target)
        self._refuse_pinned(model.id)
        self._mailbox.call(self._fleet.clear_failure, model.id)
        if self._lifecycle.unload(model.id, job.token, on_drained=lambda: None):
            job.unloaded.append(model.id)
        sharers = self._catalog.sharers_of(model)
        self._engines[model.engine].remove(model, {file for m in sharers for file in (*m.files, *m.companions)})
        self._catalog.forget(model)
        return JobResult("success")

    # Rollback.

    def _undo(self, job: Job, reporter: JobReporter, error: SwitchError) -> JobResult:
        """Restore what the chain unloaded, unless a superseding switch inherits the chain; then report the result."""
        job.seal()
        outcome: Outcome = "cancelled" if error.code == "cancelled" else "failed"
        if not job.request.switches:
            self._mailbox.call(self._fleet.set_notice, job.target, error.message)
            return JobResult(outcome, error)
        restored: list[str] = []
        missing: dict[str, str] = {}
        if job.chain.unloaded and not job.superseded:
            failed = job.target if error.code == "load_failed" else None
            restored, missing = self._restore(job, reporter, failed)
        return reporter.end(outcome, error, active=self._board.current.active_model, restored=restored, missing=missing)

    def _restore(self, job: Job, reporter: JobReporter, failed: str | None) -> tuple[list[str], dict[str, str]]:
        """Load what the chain unloaded, the latest first; return what is loaded again, and what is not with the reason.

        Models are restored independently: one that fails does not affect the others. `failed` is the model that could
        not be loaded just now and is not tried again. What a superseding switch leaves undone stays in the chain, which
        it inherits.
        """
        token = job.begin_restoring()
        reporter.rolling_back(job.chain.unloaded)
        restored: list[str] = []
        missing: dict[str, str] = {}
        for model_id in reversed(list(job.chain.unloaded)):
            if job.superseded:
                break
            try:
                if model_id == failed:
                    raise SwitchError("load_failed", "it could not be loaded again")
                self._restore_one(model_id, reporter, token)
                restored.append(model_id)
                job.chain.discard(model_id)
            except Cancelled:
                break
            except Exception as error:
                reason = as_switch_error(job, error)
                log.warning("a model was not restored after a failed switch", model=model_id, reason=reason.message)
                missing[model_id] = reason.message
        self._mailbox.call(self._reactivate, job)
        if job.superseded:  # the superseding switch tries again and reports what is missing
            return restored, {}
        for model_id in missing:
            job.chain.discard(model_id)
        return restored, missing

    def _restore_one(self, model_id: str, reporter: JobReporter, token: CancelToken) -> None:
        model = self._catalog.get(model_id)
        if self._current_state(model) == "running":
            return
        plan = self._planner.plan(model, auto_unload=False)
        if not plan.feasible:
            raise SwitchError("insufficient_memory", refusal(plan), plan=plan)
        self._lifecycle.load(model, reporter, token)

    def _reactivate(self, job: Job) -> None:
        """Message: make the model active again that was active before the chain, if it is running."""
        active = job.chain.active
        if active is not None and self._fleet.state_of(active) == "running":
            self._fleet.activate(active)


def as_switch_error(job: Job, error: Exception) -> SwitchError:
    """Convert the exception that ended a job to an error of the contract.

    An unexpected one is logged with its traceback.
    """
    if isinstance(error, SwitchError):
        return error
    if isinstance(error, Cancelled):
        return SwitchError("cancelled", job.cancel_reason or "It was cancelled.")
    if isinstance(error, LoadFailed):
        return SwitchError("load_failed", str(error), log_tail=error.log_tail)
    if isinstance(error, EngineError):
        return SwitchError("engine_error", str(error))
    if isinstance(error, UnknownModel):
        return SwitchError("model_not_found", str(error))
    log.error("a job failed with an unexpected error", model=job.target, exc_info=error)
    return SwitchError("internal_error", "Switchyard failed to carry this out; its log has the details.")
