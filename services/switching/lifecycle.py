"""What a job does to one instance: fetch, launch or wake it, see it through its first token, drain, put to sleep, stop.

Straight-line blocking code in the job's own greenlet. What it learns it tells the fleet by messages. A cancel reaches
it through the job's token, which has the instance stopped: every step is left by the exception that it raises then.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import Protocol

import structlog

from services.abort import Abort, Aborted
from services.engines.port import Engine, EngineError, Evidence, Exit, Instance, LoadFailed, Model, Need
from services.scheduling import Scheduler
from services.store.records import LoadRecord
from services.switching.context import SwitchingContext
from services.switching.fleet import Fleet
from services.switching.jobs import Job
from services.switching.learning import Learned, load_key
from services.switching.mailbox import Mailbox
from services.switching.member import Member, read
from services.switching.narrator import Narrator
from services.switching.planner import Planner
from services.switching.progress import Progress

log = structlog.get_logger(__name__)

OBSERVE_SECONDS = 0.2
"""How often a load's figures are refreshed while nothing new is reported."""


class Slot(Protocol):
    """The right to change what is loaded, which one job has at a time."""

    def release(self, job: Job) -> None:
        """Let others go first while this one only fetches."""

    def acquire(self, job: Job) -> None:
        """Wait until it is this one's turn again."""


class Lifecycle:
    """What is done to single instances, for one job after another."""

    def __init__(
        self,
        context: SwitchingContext,
        mailbox: Mailbox,
        fleet: Fleet,
        planner: Planner,
        learned: Learned,
        on_exit: Callable[[Instance, Exit], None],
    ) -> None:
        self._settings = context.settings
        self._scheduler = context.scheduler
        self._mailbox = mailbox
        self._fleet = fleet
        self._planner = planner
        self._learned = learned
        self._engines = context.engines
        self._on_exit = on_exit

    def fetch(self, job: Job, model: Model, story: Narrator, slot: Slot) -> bool:
        """Have what the load takes fetched to this machine; whether anything had to be.

        Others may change what is loaded meanwhile. Raises EngineError and Aborted.
        """
        engine = self._engines[model.engine]
        progress = Progress(self._planner.history(model))
        began = self._scheduler.now()
        fetched = False

        def report(seen: Evidence) -> None:
            nonlocal fetched
            if not fetched:
                fetched = True
                slot.release(job)
                job.mark_started()
            story.fetching(progress.advance(seen, self._scheduler.now() - began))

        try:
            engine.fetch(model, report, job.token)
            seconds = self._scheduler.now() - began
        except EngineError as error:
            self._mailbox.call(self._fleet.fail, model.id, str(error), "")
            raise
        finally:
            if fetched:
                slot.acquire(job)
        job.token.check()
        size = model.fetch_bytes or engine.describe(model).size_bytes
        if fetched and size:
            device = self._planner.need(model).device
            self._learned.record_fetch(model, engine, size, seconds, device=device, at=self._scheduler.time())
        return fetched

    def load(self, model: Model, story: Narrator, token: Abort, on_started: Callable[[], None] = lambda: None) -> None:
        """Load a model and see it through its first token; then, and only then, requests are routed to it.

        One that sleeps is woken; if it can't be, it is stopped and loaded anew. Raises EngineError and Aborted; nothing
        of the load is left then.
        """
        token.check()
        engine = self._engines[model.engine]
        need, history = self._planner.need(model), self._planner.history(model)
        story.loading(model.id, history.total_seconds)
        member = self._mailbox.call(self._fleet.begin_wake, model.id, need.bytes)
        waking = member is not None
        if member is None:
            member = self._launch(model, engine, need)
        on_started()
        follower = _Follower(self._scheduler, Progress(history), member, story)
        try:
            self._see_through(member, follower, token, waking=waking)
        except LoadFailed as error:
            self._give_up(member)
            if token.requested:
                raise Aborted from None
            if waking:
                log.warning("a model did not wake, so it is loaded anew", model=model.id, cause=error.cause)
                self.load(model, story, token)
                return
            self._mailbox.call(self._fleet.fail, model.id, error.cause, error.log_tail)
            log.warning("a load failed", model=model.id, cause=error.cause)
            raise
        except BaseException:
            self._give_up(member)
            raise
        self._remember(member, load_key(model, engine, waking=waking), follower)

    def unload(self, model_id: str, token: Abort, *, sleeps: bool = False, on_drained: Callable[[], None]) -> bool:
        """Let a model finish its answers, then stop it or put it to sleep; False when it was gone by itself.

        Raises Aborted while it drains (it goes on serving), and EngineError when it won't go (likewise).
        """
        longest = self._settings.drain_timeout_seconds
        member = self._mailbox.call(self._fleet.begin_drain, model_id, longest)
        if member is None:
            return False
        try:
            drained = member.traffic.wait_idle(longest, token)
        except Aborted:
            self._mailbox.call(self._fleet.resume, member)
            raise
        if self._mailbox.call(self._fleet.held, model_id) is not member:
            return False
        on_drained()
        if sleeps and drained:  # put to sleep while it answers, vLLM breaks (its issues 45520 and 28714)
            self._put_to_sleep(member)
        else:
            self.stop(member)
        return True

    def stop(self, member: Member) -> None:
        """Stop an instance whatever it is doing; when this returns it is gone.

        Raises EngineError when a loaded one won't go; then it goes on as it was.
        """
        before = self._mailbox.call(self._fleet.begin_unload, member)
        try:
            member.instance.stop(self._settings.unload_timeout_seconds)
        except Exception as error:
            if self._mailbox.call(self._fleet.refuse_unload, member, before):
                raise _as_engine_error(member, error) from error
            log.exception("a load that was given up did not go", model=member.model.id)
        self._mailbox.call(self._fleet.gone, member)

    def _launch(self, model: Model, engine: Engine, need: Need) -> Member:
        instance: Instance | None = None

        def ended(exit: Exit) -> None:
            if instance is not None:  # else `wait_ready` says so
                self._on_exit(instance, exit)

        try:
            instance = engine.launch(model, ended)
        except EngineError as error:
            self._mailbox.call(self._fleet.fail, model.id, str(error), "")
            raise
        try:
            return self._mailbox.call(self._fleet.begin_load, model, engine, instance, need.device, need.bytes)
        except BaseException:  # nobody would know of it
            instance.stop(self._settings.unload_timeout_seconds)
            raise

    def _see_through(self, member: Member, follower: _Follower, token: Abort, *, waking: bool) -> None:
        instance = member.instance
        with follower, token.acting(lambda: self._stop_beside(instance)):
            come_up = instance.wake if waking else instance.wait_ready
            endpoint = come_up(follower.report, self._settings.load_timeout_seconds)
            follower.report(Evidence("warming_up"))
            instance.warm_up(self._settings.warm_up_timeout_seconds)
        token.check()
        self._mailbox.call(self._fleet.ready, member, endpoint, read(instance))

    def _stop_beside(self, instance: Instance) -> None:
        """Stop a load from outside, in a greenlet of its own: whoever cancels must not wait for it."""

        def stop() -> None:
            try:
                instance.stop(self._settings.unload_timeout_seconds)
            except Exception as error:
                log.warning("a load could not be stopped yet", model=instance.model.id, reason=str(error))

        self._scheduler.spawn("stop-load", stop)

    def _give_up(self, member: Member) -> None:
        """Put away what was being loaded. One more name of an instance that serves others is only forgotten."""
        if member.shares is not None:
            self._mailbox.call(self._fleet.drop_name, member)
        else:
            self.stop(member)

    def _put_to_sleep(self, member: Member) -> None:
        """Let it go on in its sleep, for less memory; one that can't is stopped. Raises EngineError like that."""
        self._mailbox.call(self._fleet.begin_unload, member)
        try:
            member.instance.sleep(self._settings.sleep_timeout_seconds)
        except Exception as error:
            log.warning("a model can't sleep, so it is stopped", model=member.model.id, reason=str(error))
            self._mailbox.call(self._fleet.refuse_unload, member, "running")
            self.stop(member)
            return
        self._mailbox.call(self._fleet.asleep, member, read(member.instance))

    def _remember(self, member: Member, key: str, follower: _Follower) -> None:
        total = follower.seconds
        self._learned.record(
            LoadRecord(
                model=member.model.id,
                engine=member.engine.name,
                settings_key=key,
                outcome="ready",
                total_seconds=total,
                stage_seconds=follower.stage_seconds(total),
                memory_bytes=member.usage.bytes if member.usage and member.shares is None else None,
                device=member.device,
                at=self._scheduler.time(),
            )
        )
        log.info("model ready", model=member.model.id, seconds=round(total, 3))


class _Follower:
    """Follows one load: takes in evidence as it comes, and every 0.2 s that time has passed. Closed on leaving it."""

    def __init__(self, scheduler: Scheduler, progress: Progress, member: Member, story: Narrator) -> None:
        self._scheduler = scheduler
        self._progress = progress
        self._member = member
        self._story = story
        self._began = scheduler.now()
        self._over = False
        self._changed = scheduler.condition()
        self._advancing = Lock()  # held for a calculation, never for a wait
        self.seconds = 0.0

    def __enter__(self) -> _Follower:
        self._scheduler.spawn("follow-load", self._keep_looking)
        return self

    def __exit__(self, _type: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        with self._changed:
            self._over = True
            self.seconds = self._scheduler.now() - self._began
            self._changed.notify_all()

    def report(self, seen: Evidence) -> None:
        """What the engine saw of the load. Called from any greenlet."""
        self._look(seen)

    def stage_seconds(self, total: float) -> dict[str, float]:
        return {str(stage): seconds for stage, seconds in self._progress.stage_seconds(total).items()}

    def _keep_looking(self) -> None:
        while not self._wait_over():
            try:
                self._look(None)
            except Exception as error:
                log.warning("a load can't be followed", model=self._member.model.id, error=str(error))

    def _wait_over(self) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._over, OBSERVE_SECONDS)

    def _look(self, evidence: Evidence | None) -> None:
        with self._advancing:
            estimate = self._progress.advance(evidence, self._scheduler.now() - self._began)
        if not self._over:
            reading = read(self._member.instance)
            self._story.observed(self._member, estimate, reading.usage, reading.pid)


def _as_engine_error(member: Member, error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        return error
    return EngineError(f"{member.model.id} could not be unloaded: {error}.")
