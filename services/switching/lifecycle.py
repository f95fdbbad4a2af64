"""What is done to one instance: brought, launched or woken, seen through its first token, put to sleep, put away.

Straight-line code that runs in the switcher's greenlet, as the procedure that calls it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import structlog

from services.abort import Abort, Aborted
from services.config import Settings
from services.engines.port import Engine, EngineError, Evidence, Exit, Instance, LoadFailed, Model
from services.store.records import LoadRecord
from services.switching.fleet import Fleet, Member
from services.switching.jobs import Cancelled, Job
from services.switching.learning import Learned, load_key
from services.switching.narrator import Narrator
from services.switching.planner import Planner
from services.switching.progress import Progress

log = structlog.get_logger(__name__)

T = TypeVar("T")
OBSERVE_SECONDS = 0.2
"""How often a load's figures are refreshed while nothing new is reported."""


class Hub(Protocol):
    """What needs the switcher that runs it: a worker for whatever blocks, in which a cancel is noticed."""

    def await_worker(
        self,
        function: Callable[[], T],
        *,
        cancellable: bool = True,
        interval: float | None = None,
        on_tick: Callable[[], None] = ...,
    ) -> T: ...

    def check_cancelled(self) -> None: ...

    def wake(self) -> None: ...

    def report_exit(self, instance: Instance, exit: Exit) -> None: ...


class Lifecycle:
    """Changes the state of single instances. Called by the switcher's greenlet alone."""

    def __init__(
        self,
        settings: Settings,
        fleet: Fleet,
        planner: Planner,
        learned: Learned,
        engines: Mapping[str, Engine],
        hub: Hub,
    ) -> None:
        self._settings = settings
        self._fleet = fleet
        self._planner = planner
        self._learned = learned
        self._engines = engines
        self._hub = hub

    def bring(self, job: Job, model: Model, story: Narrator) -> bool:
        """Have what the load takes brought to this machine, while everything else goes on; whether anything had to be.

        Called off, it has ended when this is left.
        """
        engine = self._engines[model.engine]
        progress = Progress(self._planner.history(model))
        began = time.monotonic()
        evidence: deque[Evidence] = deque()
        abort = Abort()
        brought = False

        def report(seen: Evidence) -> None:
            evidence.append(seen)
            self._hub.wake()

        def look() -> None:
            nonlocal brought
            if job.cancel_reason is not None:
                abort()
            while evidence:
                story.bringing(progress.advance(evidence.popleft(), time.monotonic() - began))
                if not brought:
                    job.mark_started()
                brought = True

        job.bringing = True
        try:
            self._hub.await_worker(
                lambda: engine.bring(model, report, abort), cancellable=False, interval=OBSERVE_SECONDS, on_tick=look
            )
        except Aborted:
            raise Cancelled from None
        except EngineError as error:
            self._fleet.fail(model.id, str(error), "")
            raise
        finally:
            job.bringing = False
        self._hub.check_cancelled()
        return brought

    def load(self, model: Model, story: Narrator, job: Job | None = None) -> Member:
        """Bring a model up and see it through its first token; then, and only then, requests are routed to it.

        One that sleeps is woken. If it can't be, it is stopped and loaded anew.
        """
        self._hub.check_cancelled()
        engine = self._engines[model.engine]
        history = self._planner.history(model)
        sleeper = self._fleet.held(model.id)
        progress = Progress(history)
        began = time.monotonic()
        story.loading(model.id, history.total_seconds)
        member = self._launch(model, engine) if sleeper is None else self._begin_to_wake(sleeper)
        if job is not None:
            job.mark_started()
        evidence: deque[Evidence] = deque()

        def report(seen: Evidence) -> None:
            evidence.append(seen)
            self._hub.wake()

        def look() -> None:
            now = time.monotonic() - began
            estimate = progress.advance(evidence.popleft() if evidence else None, now)
            while evidence:
                estimate = progress.advance(evidence.popleft(), now)
            member.usage = member.instance.usage() or member.usage
            story.observed(member, estimate)

        def see_through() -> None:
            bring_up = member.instance.wait_ready if sleeper is None else member.instance.wake
            member.endpoint = bring_up(report, self._settings.load_timeout_seconds)
            report(Evidence("warming_up"))
            member.instance.warm_up(self._settings.warm_up_timeout_seconds)

        try:
            self._hub.await_worker(see_through, interval=OBSERVE_SECONDS, on_tick=look)
            if member.exit is not None:
                raise LoadFailed(f"{member.exit.cause}.", member.instance.log_tail())
        except Cancelled:
            self.put_away(member)
            raise
        except LoadFailed as error:
            self.put_away(member)
            if sleeper is not None:
                log.warning("a model did not wake, so it is loaded anew", model=model.id, cause=error.cause)
                return self.load(model, story, job)
            self._fleet.fail(model.id, error.cause, error.log_tail)
            log.warning("a load failed", model=model.id, cause=error.cause)
            raise
        total = time.monotonic() - began
        key = load_key(model, engine, waking=sleeper is not None)
        self._note_ready(member, key, progress.stage_seconds(total), total)
        return member

    def _begin_to_wake(self, member: Member) -> Member:
        self._fleet.forgive(member.model.id)
        member.state, member.reserved_bytes = "loading", self._planner.need(member.model).bytes
        self._fleet.publish()
        return member

    def _launch(self, model: Model, engine: Engine) -> Member:
        self._fleet.forgive(model.id)

        def ended(exit: Exit) -> None:
            self._hub.report_exit(instance, exit)

        try:
            instance = self._hub.await_worker(lambda: engine.launch(model, ended), cancellable=False)
        except EngineError as error:
            self._fleet.fail(model.id, str(error), "")
            raise
        need = self._planner.need(model)
        member = Member(model, engine, instance, need.device, need.bytes)
        self._fleet.add(member)
        self._fleet.publish()
        return member

    def _note_ready(self, member: Member, key: str, stages: Mapping[Any, float], total: float) -> None:
        member.state, member.load, member.reserved_bytes = "running", None, 0
        member.loaded_at = time.time()
        member.traffic.reopen()
        member.measure()
        self._fleet.publish()
        record = LoadRecord(
            model=member.model.id,
            engine=member.engine.name,
            settings_key=key,
            outcome="ready",
            total_seconds=total,
            stage_seconds=dict(stages),
            memory_bytes=member.usage.bytes if member.usage else None,
            device=member.device,
            at=member.loaded_at,
        )
        self._learned.record(record)
        log.info("model ready", model=member.model.id, seconds=round(total, 3))

    def put_to_sleep(self, member: Member) -> None:
        """Let it go on in its sleep, for less memory; one that can't is stopped. Raises EngineError like that."""
        member.state = "unloading"
        member.traffic.drain(0)
        self._fleet.publish()
        try:
            self._hub.await_worker(
                lambda: member.instance.sleep(self._settings.sleep_timeout_seconds), cancellable=False
            )
        except EngineError as error:
            log.warning("a model can't sleep, so it is stopped", model=member.model.id, reason=str(error))
            member.state = "running"
            self.put_away(member)
            return
        if member.exit is not None:
            self._fleet.lose(member, member.exit)
        else:
            member.state = "asleep"
            member.measure()
            self._fleet.retire(member)
        self._fleet.publish()

    def put_away(self, member: Member) -> None:
        """Stop an instance whatever it is doing; when this returns it is gone.

        Raises EngineError when a loaded one won't go; then it goes on as it was.
        """
        before, member.state = member.state, "unloading"
        member.traffic.drain(0)
        self._fleet.publish()
        grace = self._settings.unload_timeout_seconds
        try:
            self._hub.await_worker(lambda: member.instance.stop(grace), cancellable=False)
        except EngineError:
            if before in ("running", "asleep") and member.exit is None:
                member.state = before
                if before == "running":
                    member.traffic.reopen()
                self._fleet.publish()
                raise
            log.exception("a load that was given up did not go", model=member.model.id)
        self._fleet.remove(member)
        self._fleet.publish()

    def drain_and_put_away(self, member: Member) -> None:
        seconds = self._settings.drain_timeout_seconds
        self._hub.await_worker(lambda: member.traffic.drain(seconds), cancellable=False)
        self.put_away(member)
