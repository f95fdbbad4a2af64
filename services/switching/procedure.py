"""How one job is carried out, step by step: plan, drain, unload, wait for memory, load, warm up, or restore.

Straight-line blocking code in a greenlet of its own. It reads snapshots, tells the fleet what happened by messages, and
asks anew where a model stands after each step that takes time: another client, or a crash, may have changed that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import structlog

from services.abort import Abort, Aborted
from services.catalog import UnknownModel
from services.engines.port import EngineError, LoadFailed, Model
from services.scheduling import pause
from services.switching.context import SwitchingContext
from services.switching.fleet import Fleet
from services.switching.jobs import Ending, Job, Outcome, SwitchError
from services.switching.lifecycle import Lifecycle, Slot
from services.switching.mailbox import Mailbox
from services.switching.member import Member, Standing
from services.switching.narrator import Narrator
from services.switching.plan import Plan, Unload, refusal, say_gb
from services.switching.planner import Planner
from services.switching.reconciler import Reconciler

log = structlog.get_logger(__name__)

MEMORY_LOOK_SECONDS = 0.05
LAST_ANSWERS_SECONDS = 3.0


class Procedure:
    """Carries out jobs, one after another. `check_state` raises SwitchError when the app's state can't be written."""

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

    def carry_out(self, job: Job) -> Ending:
        """Do what the job asks, or undo what was done for it; whatever happens, it ends."""
        story = Narrator(job, self._mailbox, self._fleet)
        try:
            job.token.check()
            if job.request.kind == "stop":
                return self._stop(job)
            if job.request.kind == "remove":
                return self._remove(job)
            return self._switch(job, story)
        except Exception as error:
            return self._undo(job, story, as_switch_error(job, error))

    def refusal(self, job: Job) -> SwitchError | None:
        """Why the target can't be made ready even if the load under way gave way; None when it can.

        Asked before a running switch is cancelled for it: a target that is refused must not cost the one that works.
        """
        try:
            model = self._usable(job.target)
            if self._board.current.instances.get(model.id) is None:
                self._make_plan(job, model, loads_give_way=True)
        except Exception as error:
            return as_switch_error(job, error)
        return None

    def stop_all(self, *, for_good: bool = True) -> None:
        """Stop every instance that needs the app, which is going away, side by side.

        Answers under way get a moment to end. Unless it goes `for_good` the app is back at once, and finds those that
        are loaded.
        """
        for member in self._mailbox.call(self._fleet.members):
            stays = member.engine.outlives_app or not for_good
            if not (stays and member.held) and member.shares is None:
                self._scheduler.spawn("last-stop", lambda member=member: self._stop_last(member))  # type: ignore[misc]

    def _stop_last(self, member: Member) -> None:
        member.traffic.close()
        member.traffic.wait_idle(LAST_ANSWERS_SECONDS, Abort())
        try:
            self._lifecycle.stop(member)
        except Exception as error:
            log.warning("a model could not be unloaded", model=member.model.id, reason=str(error))
            self._mailbox.call(self._fleet.gone, member)

    # A switch, or a restart.

    def _switch(self, job: Job, story: Narrator) -> Ending:
        restart = job.request.kind == "restart"
        if not restart and self._already_there(job):
            return Ending("already_loaded")
        story.begin()
        inherited = list(job.chain.unloaded)
        self._check_state()
        model = self._usable(job.target)
        plan = self._make_plan(job, model)
        missing = restart or self._standing(model) == "absent"
        if missing and self._lifecycle.fetch(job, model, story, self._slot):
            model, plan = self._look_again(job)
        if restart:
            self._unload_for_restart(job, story)
            model, plan = self._look_again(job)
        story.planned(plan)
        self._make_room(job, story, plan)
        if self._standing(model) != "running":
            job.touch()
            self._lifecycle.load(model, story, job.token, job.mark_started)
        job.seal()
        self._mailbox.call(self._use, job)
        here = self._board.current.instances
        job.unloaded[:0] = [m for m in inherited if m not in here and m not in job.unloaded]
        return story.ready()

    def _already_there(self, job: Job) -> bool:
        """Whether the target answers already, and nothing else was asked for; it is the active one then, if wanted."""
        model = self._catalog.get(job.target)
        if self._standing(model) != "running" or self._displaced(job) is not None:
            return False
        job.seal()
        self._mailbox.call(self._use, job)
        return True

    def _use(self, job: Job) -> None:
        """A message: the target answers; whether it is the active one is asked now, since others may have joined."""
        if job.request.options.activate:
            self._fleet.activate(job.target)
        else:
            self._fleet.fall_to(job.target)

    def _displaced(self, job: Job) -> str | None:
        """The model that is to go for the target in any case, if it is loaded."""
        instead_of = job.request.options.instead_of
        view = self._board.current.instances.get(instead_of) if instead_of != job.target and instead_of else None
        return view.model if view is not None else None

    def _standing(self, model: Model) -> Standing:
        """Where a model stands, once what its engine has loaded by now is taken in."""
        self._reconciler.look_for(model)
        return self._mailbox.call(self._fleet.standing, model.id)

    def _look_again(self, job: Job) -> tuple[Model, Plan]:
        """A while later a model's size is known, it may have left the catalogue, and much else may have changed."""
        self._catalog.refresh()
        model = self._usable(job.target)
        return model, self._make_plan(job, model)

    def _usable(self, model_id: str) -> Model:
        model = self._catalog.get(model_id)
        if model.fault and model_id not in self._board.current.instances:
            raise SwitchError("model_unusable", f"{model.id} can't be loaded: {model.fault}")
        return model

    def _make_plan(self, job: Job, model: Model, *, loads_give_way: bool = False) -> Plan:
        """What has to be done; made anew when somebody joins who may do more. Raises SwitchError."""
        while True:
            request = job.request
            options = request.options
            self._reconciler.measure()
            plan = self._planner.plan(
                model,
                options.strategy,
                options.auto_unload,
                instead_of=options.instead_of,
                loads_give_way=loads_give_way,
            )
            job.plan = plan
            error = self._objection(job, plan)
            if error is None:
                return plan
            if job.seal(request):
                raise error

    def _objection(self, job: Job, plan: Plan) -> SwitchError | None:
        if not plan.feasible:
            return SwitchError("insufficient_memory", refusal(plan), plan=plan)
        if plan.unload and self._settings.confirm_before_unload and not job.request.options.confirm:
            names = ", ".join(u.model for u in plan.unload)
            words = f"Loading {plan.target} would unload {names}. Confirm it."
            return SwitchError("confirmation_required", words, plan=plan)
        return None

    def _unload_for_restart(self, job: Job, story: Narrator) -> None:
        """Make way for the same model; it becomes the active one again only if it was."""
        options = replace(job.request.options, activate=job.chain.active == job.target)
        job.request = replace(job.request, options=options)
        if self._standing(self._catalog.get(job.target)) == "absent":
            return
        self._drain_and_unload(job, story, job.target)

    def _make_room(self, job: Job, story: Narrator, plan: Plan) -> None:
        for unload in plan.unload:
            self._unload(job, story, unload)
        if plan.unload:
            self._wait_for_room(job, story, plan)

    def _unload(self, job: Job, story: Narrator, unload: Unload) -> None:
        if self._drain_and_unload(job, story, unload.model, sleeps=unload.sleeps):
            job.unloaded.append(unload.model)

    def _drain_and_unload(self, job: Job, story: Narrator, model_id: str, *, sleeps: bool = False) -> bool:
        job.touch()
        story.step("draining", model_id)
        owed = self._names_of(model_id)

        def drained() -> None:
            for name in owed:  # written down before it is done: a failure in between must not lose them
                job.chain.add(name)
            story.step("unloading", model_id)

        return self._lifecycle.unload(model_id, job.token, sleeps=sleeps, on_drained=drained)

    def _names_of(self, model_id: str) -> list[str]:
        """A model, and the others that are served by the same instance."""
        views = self._board.current.instances
        owner = view.shares or model_id if (view := views.get(model_id)) is not None else model_id
        others = [v.model for v in views.values() if v.model == owner or v.shares == owner]
        return [model_id, *(other for other in others if other != model_id)]

    def _wait_for_room(self, job: Job, story: Narrator, plan: Plan) -> None:
        """Until there is room for the target. Models that keep too much of it in their sleep are stopped after all."""
        try:
            self._wait_for_memory(job, story, plan)
        except SwitchError:
            sleepers = [self._mailbox.call(self._fleet.held, u.model) for u in plan.unload]
            asleep = [m for m in sleepers if m is not None and m.state == "asleep"]
            if not asleep:
                raise
            for member in asleep:
                log.warning("a model keeps too much in its sleep, so it is stopped", model=member.model.id)
                self._lifecycle.stop(member)
            self._wait_for_memory(job, story, plan)

    def _wait_for_memory(self, job: Job, story: Narrator, plan: Plan) -> None:
        """Until the device *measures* free: an engine's exit and the driver's account of it can lie apart."""
        story.step("waiting_for_memory", plan.target)
        deadline = self._scheduler.now() + self._settings.memory_timeout_seconds
        while True:
            holdings = self._mailbox.call(self._fleet.holdings)
            ledger = self._planner.account(plan.device, holdings)
            if ledger.available_bytes >= plan.required_bytes:
                return
            if self._scheduler.now() > deadline:
                raise SwitchError(
                    "memory_not_freed",
                    f"{say_gb(plan.required_bytes)} should be free on {ledger.name} by now, but only "
                    f"{say_gb(ledger.available_bytes)} are: other programs hold {say_gb(ledger.other_bytes)}.",
                    plan=plan,
                )
            pause(self._scheduler, MEMORY_LOOK_SECONDS, job.token)

    # Jobs that are no switches.

    def _stop(self, job: Job) -> Ending:
        self._mailbox.call(self._fleet.forgive, job.target)
        if self._lifecycle.unload(job.target, job.token, on_drained=lambda: None):
            job.unloaded.append(job.target)
            self._catalog.refresh()  # what was listed only because it was loaded goes now
        return Ending("success")

    def _remove(self, job: Job) -> Ending:
        """Unload a model if it is loaded, then delete its files, but for those that others use.

        Here, so that nothing loads it meanwhile.
        """
        self._catalog.refresh()  # who uses them now
        model = self._catalog.get(job.target)
        self._mailbox.call(self._fleet.forgive, model.id)
        if self._lifecycle.unload(model.id, job.token, on_drained=lambda: None):
            job.unloaded.append(model.id)
        sharers = self._catalog.sharers_of(model)
        self._engines[model.engine].remove(model, {file for m in sharers for file in (*m.files, *m.companions)})
        self._catalog.forget(model)
        return Ending("success")

    # When it did not work out.

    def _undo(self, job: Job, story: Narrator, error: SwitchError) -> Ending:
        """Restore what the chain of switches unloaded, unless the next switch inherits that; then say how it ended."""
        job.seal()
        outcome: Outcome = "cancelled" if error.code == "cancelled" else "failed"
        if not job.request.switches:
            self._mailbox.call(self._fleet.note, job.target, error.message)
            return Ending(outcome, error)
        restored: list[str] = []
        missing: dict[str, str] = {}
        if job.chain.unloaded and not job.superseded:
            failed = job.target if error.code == "load_failed" else None
            restored, missing = self._restore(job, story, failed)
        return story.end(outcome, error, active=self._board.current.active_model, restored=restored, missing=missing)

    def _restore(self, job: Job, story: Narrator, failed: str | None) -> tuple[list[str], dict[str, str]]:
        """Load what the chain unloaded, the latest first. Each by itself: one that can't come back costs no other.

        `failed` is the model that could not be loaded just now, which is not tried once more. Returns what is back, and
        what is not with the reason. What a superseding switch leaves undone stays in the chain, which it inherits.
        """
        token = job.begin_restoring()
        story.rolling_back(job.chain.unloaded)
        restored: list[str] = []
        missing: dict[str, str] = {}
        for model_id in reversed(list(job.chain.unloaded)):
            if job.superseded:
                break
            try:
                if model_id == failed:
                    raise SwitchError("load_failed", "it could not be loaded again")
                self._restore_one(model_id, story, token)
                restored.append(model_id)
                job.chain.strike(model_id)
            except Aborted:
                break
            except Exception as error:
                reason = as_switch_error(job, error)
                log.warning("a model is not back after a switch that failed", model=model_id, reason=reason.message)
                missing[model_id] = reason.message
        self._mailbox.call(self._reactivate, job)
        if job.superseded:  # its successor tries once more, and says what then is missing
            return restored, {}
        for model_id in missing:
            job.chain.strike(model_id)
        return restored, missing

    def _restore_one(self, model_id: str, story: Narrator, token: Abort) -> None:
        model = self._catalog.get(model_id)
        if self._standing(model) == "running":
            return
        plan = self._planner.plan(model, auto_unload=False)
        if not plan.feasible:
            raise SwitchError("insufficient_memory", refusal(plan), plan=plan)
        self._lifecycle.load(model, story, token)

    def _reactivate(self, job: Job) -> None:
        """A message: requests that name no model go where they went before the chain, if that answers."""
        active = job.chain.active
        if active is not None and self._fleet.standing(active) == "running":
            self._fleet.activate(active)


def as_switch_error(job: Job, error: Exception) -> SwitchError:
    """Whatever ended a job, in the contract's terms. An unexpected exception is logged and told as that."""
    if isinstance(error, SwitchError):
        return error
    if isinstance(error, Aborted):
        return SwitchError("cancelled", job.cancel_reason or "It was cancelled.")
    if isinstance(error, LoadFailed):
        return SwitchError("load_failed", str(error), log_tail=error.log_tail)
    if isinstance(error, EngineError):
        return SwitchError("engine_error", str(error))
    if isinstance(error, UnknownModel):
        return SwitchError("model_not_found", str(error))
    log.error("a job failed with an unexpected error", model=job.target, exc_info=error)
    return SwitchError("internal_error", "Switchyard failed to carry this out; its log has the details.")
