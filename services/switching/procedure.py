"""How one job is carried out, step by step: plan, drain, unload, wait for memory, load, warm up, or undo.

Straight-line code that runs in the switcher's greenlet. Everything that blocks goes through `Hub.await_worker`, where
a cancel is noticed; so each step can be left by `Cancelled`, and what it had begun is undone on the way out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import structlog

from services.catalog import Catalog
from services.config import Settings
from services.engines.port import Engine, EngineError, Exit, Instance, LoadFailed, Model
from services.switching.fleet import Fleet, Member
from services.switching.jobs import Cancelled, Job, SwitchError
from services.switching.lifecycle import Hub, Lifecycle
from services.switching.narrator import Narrator, memory_figures
from services.switching.plan import Plan, Unload, refusal, say_gb
from services.switching.planner import Planner

log = structlog.get_logger(__name__)

MEMORY_LOOK_SECONDS = 0.05
LAST_ANSWERS_SECONDS = 3.0
ADOPT_SECONDS = 2.0


class Procedure:
    """Carries out jobs, one after another."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        planner: Planner,
        lifecycle: Lifecycle,
        catalog: Catalog,
        engines: Mapping[str, Engine],
        hub: Hub,
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._planner = planner
        self._lifecycle = lifecycle
        self._catalog = catalog
        self._engines = engines
        self._hub = hub

    def carry_out(self, job: Job) -> None:
        """Do what the job asks and finish it, whatever happens."""
        story = Narrator(job, self._fleet)
        try:
            if job.request.kind == "stop":
                self._stop(job)
            elif job.request.kind == "remove":
                self._remove(job)
            else:
                self._switch(job, story)
        except Cancelled:
            self._undo(job, story, SwitchError("cancelled", job.cancel_reason or "It was cancelled."))
        except SwitchError as error:
            self._undo(job, story, error)
        except LoadFailed as error:
            self._undo(job, story, SwitchError("load_failed", str(error), log_tail=error.log_tail))
        except EngineError as error:
            self._undo(job, story, SwitchError("engine_error", str(error)))

    def refuses(self, job: Job) -> bool:
        """Whether the target can't be made ready even if the load under way gave way; the job is finished then.

        Asked before a running switch is called off for it: a target that is refused must not cost the one that works.
        """
        try:
            model = self._usable(job.target)
            plan = self._planner.plan(model, job.request.strategy, job.request.auto_unload, loads_give_way=True)
            if plan.feasible:
                return False
            raise SwitchError("insufficient_memory", refusal(plan), plan=plan)
        except EngineError as error:
            reason = SwitchError("engine_error", str(error))
        except SwitchError as error:
            reason = error
        job.tell("error", error=reason.code, message=reason.message, **memory_figures(reason))
        job.finish("failed", reason)
        return True

    def abandon(self, job: Job) -> None:
        """End a job after an error nobody foresaw, and put away what it was loading."""
        error = SwitchError("internal_error", "Switchyard failed to carry this out; its log has the details.")
        for member in [m for m in self._fleet if m.state in ("loading", "unloading")]:
            self._lifecycle.put_away(member)
        Narrator(job, self._fleet).end("failed", error)

    def stop_all(self, *, for_good: bool = True) -> None:
        """Stop every instance that needs the app, which is going away. Answers under way get a moment to end.

        Unless it goes `for_good` the app is back at once, and finds those that are loaded.
        """
        for member in self._fleet:
            stays = member.engine.outlives_app or not for_good
            if stays and member.state in ("running", "asleep"):
                continue
            self._hub.await_worker(lambda m=member: m.traffic.drain(LAST_ANSWERS_SECONDS), cancellable=False)  # type: ignore[misc]
            with suppress(EngineError):
                self._lifecycle.put_away(member)

    def adopt_found(self) -> bool:
        """Take in the models that engines have loaded though nobody here asked for it; whether there were any.

        So a restart of the app finds what it left, and what another client of an engine did is seen, not fought.
        """
        listed = list(self._catalog.models.values())
        found = [
            (engine, model)
            for engine in self._engines.values()
            for model in engine.loaded([m for m in listed if m.engine == engine.name])
            if self._fleet.get(model.id) is None
        ]
        adopted = [self._adopt(engine, model) for engine, model in found]
        return any(adopted)

    def _adopt(self, engine: Engine, model: Model) -> bool:

        instance: Instance | None = None

        def ended(exit: Exit) -> None:
            if instance is not None:
                self._hub.report_exit(instance, exit)

        instance = engine.adopt(model, ended)
        if instance is None:
            return False
        member = Member(model, engine, instance, self._planner.need(model).device, 0, "running")
        member.loaded_at = time.time()
        if instance.asleep:
            member.state = "asleep"
        else:
            try:
                member.endpoint = instance.wait_ready(lambda _: None, ADOPT_SECONDS)
            except LoadFailed as error:
                log.warning("a model that was found loaded is gone", model=model.id, reason=str(error))
                return False
        self._fleet.take_in(member)
        log.info("found a model loaded", model=model.id, engine=engine.name, state=member.state)
        return True

    def _switch(self, job: Job, story: Narrator) -> None:
        restart = job.request.kind == "restart"
        if not restart and self._already_there(job):
            return
        story.begin()
        model = self._usable(job.target)
        plan = self._make_plan(job, model)
        asleep = not restart and self._fleet.held(model.id) is not None
        brought = not asleep and self._lifecycle.bring(job, model, story)
        if restart:
            self._unload_for_restart(job)
        if brought or restart:  # a while later a model's size is known, and much may have changed
            self._hub.await_worker(self._catalog.refresh)
            model = self._usable(job.target)
            plan = self._make_plan(job, model)
        story.planned(plan)
        for unload in plan.unload:
            self._unload(job, story, unload)
        if plan.unload:
            self._wait_for_room(story, plan)
        member = self._lifecycle.load(model, story, job)
        if job.request.activate:  # asked now: a second click may have joined meanwhile
            self._fleet.activate(member.model.id)
        elif self._fleet.active is None:
            self._fleet.fall_to(member.model.id)
        story.ready()

    def _already_there(self, job: Job) -> bool:
        member = self._fleet.running(job.target)
        if member is None:
            return False
        if job.request.activate:
            self._fleet.activate(job.target)
        self._fleet.publish()
        job.finish("already_loaded")
        return True

    def _usable(self, model_id: str) -> Model:
        model = self._catalog.get(model_id)
        if model.fault:
            raise SwitchError("model_unusable", f"{model.id} can't be loaded: {model.fault}")
        return model

    def _make_plan(self, job: Job, model: Model) -> Plan:
        self._fleet.measure()
        self._fleet.publish()
        plan = self._planner.plan(
            model, job.request.strategy, job.request.auto_unload, instead_of=job.request.instead_of
        )
        job.plan = plan
        if not plan.feasible:
            raise SwitchError("insufficient_memory", refusal(plan), plan=plan)
        if plan.unload and self._settings.confirm_before_unload and not job.request.confirm:
            names = ", ".join(u.model for u in plan.unload)
            raise SwitchError(
                "confirmation_required", f"Loading {model.id} would unload {names}. Confirm it.", plan=plan
            )
        return plan

    def _unload(self, job: Job, story: Narrator, unload: Unload) -> None:
        """Drain one instance, then stop it or put it to sleep. Called off while draining, it goes on serving."""
        self._hub.check_cancelled()
        member = self._fleet.held(unload.model)
        if member is None:
            return  # it ended by itself meanwhile
        story.step("draining", unload.model)
        try:
            drained = self._hub.await_worker(lambda: member.traffic.drain(self._settings.drain_timeout_seconds))
        except Cancelled:
            if member.state == "running":
                member.traffic.reopen()
            raise
        story.step("unloading", unload.model)
        if unload.sleeps and drained:  # put to sleep while it answers, vLLM breaks (its issues 45520 and 28714)
            self._lifecycle.put_to_sleep(member)
        else:
            self._lifecycle.put_away(member)
        job.unloaded.append(unload.model)

    def _wait_for_room(self, story: Narrator, plan: Plan) -> None:
        """Until there is room for the target. Models that keep too much of it in their sleep are stopped after all."""
        try:
            self._wait_for_memory(story, plan)
        except SwitchError:
            sleepers = [m for m in (self._fleet.held(u.model) for u in plan.unload) if m and m.state == "asleep"]
            if not sleepers:
                raise
            for member in sleepers:
                log.warning("a model keeps too much in its sleep, so it is stopped", model=member.model.id)
                self._lifecycle.put_away(member)
            self._wait_for_memory(story, plan)

    def _wait_for_memory(self, story: Narrator, plan: Plan) -> None:
        """Until the device *measures* free: an engine's exit and the driver's account of it can lie apart."""
        story.step("waiting_for_memory", plan.target)
        deadline = time.monotonic() + self._settings.memory_timeout_seconds
        while (
            ledger := self._planner.account(plan.device, self._fleet.holdings())
        ).available_bytes < plan.required_bytes:
            if time.monotonic() > deadline:
                raise SwitchError(
                    "memory_not_freed",
                    f"{say_gb(plan.required_bytes)} should be free on {ledger.name} by now, but only "
                    f"{say_gb(ledger.available_bytes)} are: other programs hold {say_gb(ledger.other_bytes)}.",
                    plan=plan,
                )
            self._hub.await_worker(lambda: time.sleep(MEMORY_LOOK_SECONDS))

    def _stop(self, job: Job) -> None:
        self._fleet.forgive(job.target)
        member = self._fleet.held(job.target)
        if member is not None:
            self._lifecycle.drain_and_put_away(member)
            job.unloaded.append(job.target)
        self._fleet.publish()
        job.finish("success")

    def _remove(self, job: Job) -> None:
        """Unload a model if it is loaded, then delete its files. Here, so that nothing loads it meanwhile."""
        model = self._catalog.get(job.target)
        self._fleet.forgive(model.id)
        member = self._fleet.held(model.id)
        if member is not None:
            self._lifecycle.drain_and_put_away(member)
            job.unloaded.append(model.id)
        engine = self._engines[model.engine]
        self._hub.await_worker(lambda: engine.remove(model), cancellable=False)
        self._hub.await_worker(self._catalog.refresh, cancellable=False)
        self._fleet.publish()
        job.finish("success")

    def _unload_for_restart(self, job: Job) -> None:
        """Make way for the same model; it becomes the active one again only if it was."""
        job.request = replace(job.request, activate=self._fleet.active == job.target)
        member = self._fleet.held(job.target)
        if member is not None:
            self._lifecycle.drain_and_put_away(member)

    def _undo(self, job: Job, story: Narrator, error: SwitchError) -> None:
        """Bring back what was unloaded, unless another switch is coming; then say how it ended."""
        if job.request.kind in ("stop", "remove"):
            self._fleet.note(job.target, error.message)
            self._fleet.publish()
            job.finish("failed", error)
            return
        restored = []
        if job.unloaded and not job.superseded:
            restored = self._reload(job, story)
        story.end("cancelled" if error.code == "cancelled" else "failed", error, restored)

    def _reload(self, job: Job, story: Narrator) -> list[str]:
        story.rolling_back(job.unloaded)
        job.cancel_reason = None  # undoing can be called off too, by the next switch
        restored = []
        for model_id in reversed(job.unloaded):
            if job.superseded:
                break
            with suppress(LoadFailed, EngineError, SwitchError, Cancelled):
                model = self._catalog.get(model_id)
                plan = self._planner.plan(model, auto_unload=False)
                if plan.feasible:
                    self._lifecycle.load(model, story)
                    restored.append(model_id)
        if story.view.from_model in restored:
            self._fleet.activate(story.view.from_model)
        return restored
