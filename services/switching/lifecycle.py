"""Operations on a single instance: fetch, launch or wake, warm up, drain, put to sleep, stop.

Blocking code that runs in the job's greenlet and reports to the fleet by messages. Cancelling the job's token stops the
instance from another greenlet; the step in progress then raises.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from types import TracebackType
from typing import Protocol

import structlog

from services.cancellation import Cancelled, CancelToken
from services.engines.port import Engine, EngineError, Evidence, Exit, Instance, LoadFailed, Model, Need
from services.scheduling import Scheduler
from services.store.records import LoadRecord
from services.switching.context import SwitchingContext
from services.switching.fleet import Fleet
from services.switching.jobs import Job
from services.switching.learning import Learned, load_key
from services.switching.mailbox import Mailbox
from services.switching.member import Member, measure
from services.switching.planner import Planner
from services.switching.progress import Progress
from services.switching.reporter import JobReporter

log = structlog.get_logger(__name__)

OBSERVE_SECONDS = 0.2
"""Interval between updates of a load's figures while the engine reports nothing."""


class Slot(Protocol):
    """The right to change what is loaded. One job holds it at a time."""

    def release(self, job: Job) -> None:
        """Give up the slot, because this job only fetches for now."""

    def acquire(self, job: Job) -> None:
        """Block until this job holds the slot again."""


class Lifecycle:
    """Operations on instances, on behalf of one job after another."""

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

    def fetch(self, job: Job, model: Model, reporter: JobReporter, slot: Slot) -> bool:
        """Fetch the files that the load needs; return whether any were missing.

        The job gives up its slot meanwhile. Raises EngineError and Cancelled.
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
            reporter.fetching(progress.advance(seen, self._scheduler.now() - began))

        try:
            engine.fetch(model, report, job.token)
            seconds = self._scheduler.now() - began
        except EngineError as error:
            self._mailbox.call(self._fleet.record_failure, model.id, str(error), "")
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

    def load(
        self, model: Model, reporter: JobReporter, token: CancelToken, on_started: Callable[[], None] = lambda: None
    ) -> None:
        """Load a model, or wake it if it sleeps, and route requests to it once it has generated a token.

        A sleeping instance that can't be woken is stopped and loaded anew. Raises EngineError and Cancelled; nothing of
        the load remains then.
        """
        token.check()
        engine = self._engines[model.engine]
        need, history = self._planner.need(model), self._planner.history(model)
        reporter.loading(model.id, history.total_seconds)
        member = self._mailbox.call(self._fleet.begin_wake, model.id, need.bytes)
        waking = member is not None
        if member is None:
            member = self._launch(model, engine, need)
        on_started()
        monitor = _LoadMonitor(self._scheduler, Progress(history), member, reporter)
        try:
            self._wait_until_ready(member, monitor, token, waking=waking)
        except LoadFailed as error:
            self._abandon(member)
            if token.cancelled:
                raise Cancelled from None
            if waking:
                log.warning("a model did not wake; loading it anew", model=model.id, cause=error.cause)
                self.load(model, reporter, token)
                return
            self._mailbox.call(self._fleet.record_failure, model.id, error.cause, error.log_tail)
            log.warning("a load failed", model=model.id, cause=error.cause)
            raise
        except BaseException:
            self._abandon(member)
            raise
        self._record_load(member, load_key(model, engine, waking=waking), monitor)

    def unload(
        self, model_id: str, token: CancelToken, *, sleeps: bool = False, on_drained: Callable[[], None]
    ) -> bool:
        """Drain a model, then stop it or put it to sleep. Return False if it ended by itself.

        Raises Cancelled during the drain and EngineError if the engine refuses; the model goes on serving in both
        cases.
        """
        longest = self._settings.drain_timeout_seconds
        member = self._mailbox.call(self._fleet.begin_drain, model_id, longest)
        if member is None:
            return False
        try:
            drained = member.traffic.wait_idle(longest, token)
        except Cancelled:
            self._mailbox.call(self._fleet.cancel_drain, member)
            raise
        if self._mailbox.call(self._fleet.loaded_member, model_id) is not member:
            return False
        on_drained()
        if sleeps and drained:  # vLLM breaks when put to sleep while it answers (its issues 45520 and 28714)
            self._put_to_sleep(member)
        else:
            self.stop(member)
        return True

    def stop(self, member: Member) -> None:
        """Stop an instance, whatever it is doing, and return when it is gone.

        Raises EngineError if a loaded one can't be stopped; it goes on serving then.
        """
        before = self._mailbox.call(self._fleet.begin_unload, member)
        try:
            member.instance.stop(self._settings.unload_timeout_seconds)
        except Exception as error:
            if self._mailbox.call(self._fleet.undo_unload, member, before):
                raise _as_engine_error(member, error) from error
            log.exception("an abandoned load could not be stopped", model=member.model.id)
        self._mailbox.call(self._fleet.mark_unloaded, member)

    def _launch(self, model: Model, engine: Engine, need: Need) -> Member:
        instance: Instance | None = None

        def ended(exit: Exit) -> None:
            if instance is not None:  # before that, `wait_ready` reports the exit
                self._on_exit(instance, exit)

        try:
            instance = engine.launch(model, ended)
        except EngineError as error:
            self._mailbox.call(self._fleet.record_failure, model.id, str(error), "")
            raise
        try:
            return self._mailbox.call(self._fleet.begin_load, model, engine, instance, need.device, need.bytes)
        except BaseException:  # no member refers to the instance, so nothing else would stop it
            instance.stop(self._settings.unload_timeout_seconds)
            raise

    def _wait_until_ready(self, member: Member, monitor: _LoadMonitor, token: CancelToken, *, waking: bool) -> None:
        instance = member.instance
        with monitor, token.cancelling(lambda: self._stop_in_background(instance)):
            wait = instance.wake if waking else instance.wait_ready
            endpoint = wait(monitor.report, self._settings.load_timeout_seconds)
            monitor.report(Evidence("warming_up"))
            instance.warm_up(self._settings.warm_up_timeout_seconds)
        token.check()
        self._mailbox.call(self._fleet.mark_ready, member, endpoint, measure(instance))

    def _stop_in_background(self, instance: Instance) -> None:
        """Stop a load in a greenlet of its own, so that cancelling does not block."""

        def stop() -> None:
            try:
                instance.stop(self._settings.unload_timeout_seconds)
            except Exception as error:
                log.warning("a load could not be stopped yet", model=instance.model.id, reason=str(error))

        self._scheduler.spawn("stop-load", stop)

    def _abandon(self, member: Member) -> None:
        """Stop an instance whose load failed; one that shares another model's instance is only removed."""
        if member.shares is not None:
            self._mailbox.call(self._fleet.remove_member, member)
        else:
            self.stop(member)

    def _put_to_sleep(self, member: Member) -> None:
        """Put an instance to sleep to free memory, or stop it if it can't sleep. Raises EngineError as `stop` does."""
        self._mailbox.call(self._fleet.begin_unload, member)
        try:
            member.instance.sleep(self._settings.sleep_timeout_seconds)
        except Exception as error:
            log.warning("a model can't be put to sleep; stopping it", model=member.model.id, reason=str(error))
            self._mailbox.call(self._fleet.undo_unload, member, "running")
            self.stop(member)
            return
        self._mailbox.call(self._fleet.mark_asleep, member, measure(member.instance))

    def _record_load(self, member: Member, key: str, monitor: _LoadMonitor) -> None:
        total = monitor.seconds
        self._learned.record(
            LoadRecord(
                model=member.model.id,
                engine=member.engine.name,
                settings_key=key,
                outcome="ready",
                total_seconds=total,
                stage_seconds=monitor.stage_seconds(total),
                memory_bytes=member.usage.bytes if member.usage and member.shares is None else None,
                device=member.device,
                at=self._scheduler.time(),
            )
        )
        log.info("model ready", model=member.model.id, seconds=round(total, 3))


class _LoadMonitor:
    """Context manager that reports the progress of one load: on evidence, and every OBSERVE_SECONDS without any."""

    def __init__(self, scheduler: Scheduler, progress: Progress, member: Member, reporter: JobReporter) -> None:
        self._scheduler = scheduler
        self._progress = progress
        self._member = member
        self._reporter = reporter
        self._began = scheduler.now()
        self._closed = False
        self._changed = scheduler.condition()
        self._lock = Lock()  # never held while waiting
        self.seconds = 0.0

    def __enter__(self) -> _LoadMonitor:
        self._scheduler.spawn("follow-load", self._run)
        return self

    def __exit__(self, _type: type[BaseException] | None, _e: BaseException | None, _t: TracebackType | None) -> None:
        with self._changed:
            self._closed = True
            self.seconds = self._scheduler.now() - self._began
            self._changed.notify_all()

    def report(self, seen: Evidence) -> None:
        """Take in evidence from the engine. Callable from any greenlet."""
        self._update(seen)

    def stage_seconds(self, total: float) -> dict[str, float]:
        return {str(stage): seconds for stage, seconds in self._progress.stage_seconds(total).items()}

    def _run(self) -> None:
        while not self._wait_closed():
            try:
                self._update(None)
            except Exception as error:
                log.warning("the progress of a load can't be read", model=self._member.model.id, error=str(error))

    def _wait_closed(self) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._closed, OBSERVE_SECONDS)

    def _update(self, evidence: Evidence | None) -> None:
        with self._lock:
            estimate = self._progress.advance(evidence, self._scheduler.now() - self._began)
        if not self._closed:
            reading = measure(self._member.instance)
            self._reporter.observed(self._member, estimate, reading.usage, reading.pid)


def _as_engine_error(member: Member, error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        return error
    return EngineError(f"{member.model.id} could not be unloaded: {error}.")
