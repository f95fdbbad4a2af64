"""The single writer of all lifecycle state.

Its mailbox owns the fleet, the queue and the board. Each message is a short method that neither blocks nor calls an
engine. Jobs run beside it, one at a time, each in a greenlet of its own, and report by messages. Everyone else sends a
message or reads the snapshot on the board, so a slow load, a hanging driver or a failing database delays nobody else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import structlog

from services.catalog import UnknownModel
from services.config import Strategy
from services.engines.port import Exit, Instance
from services.notes import Notes
from services.switching.context import SwitchingContext
from services.switching.fleet import Fleet
from services.switching.job_queue import FetchingJob, JobQueue
from services.switching.jobs import SWITCH_DEFAULTS, Job, JobResult, Replace, Request, SwitchError, SwitchOptions
from services.switching.learning import Learned
from services.switching.lifecycle import Lifecycle
from services.switching.mailbox import Mailbox, MailboxClosed
from services.switching.plan import Plan
from services.switching.planner import Planner
from services.switching.procedure import Procedure, as_switch_error
from services.switching.reconciler import Reconciler
from services.switching.reporter import cancelling, memory_figures, requested
from services.switching.tally import Tally
from services.switching.watchdog import Watchdog

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Switcher:
    """Makes target models ready. Every public method may be called from any thread."""

    def __init__(
        self,
        context: SwitchingContext,
        planner: Planner,
        learned: Learned,
        notes: Notes,
        check_state: Callable[[], None] = lambda: None,
    ) -> None:
        self._scheduler = context.scheduler
        self._board = context.board
        self._catalog = context.catalog
        self._planner = planner
        self._fleet = Fleet(self._scheduler, notes)
        self._mailbox = Mailbox(self._scheduler, self._after_each)
        self._queue = JobQueue()
        self._ended: list[tuple[Job, JobResult]] = []
        self.tally = Tally()
        self._closing = False
        self._started = False
        self._idle = self._scheduler.condition()
        self._reconciler = Reconciler(context, self._mailbox, self._fleet, planner, self._report_exit)
        self._watchdog = Watchdog(
            self._scheduler,
            self._mailbox,
            self._fleet,
            context.settings.unresponsive_seconds,
            self._report_exit,
            self._load_again,
        )
        lifecycle = Lifecycle(context, self._mailbox, self._fleet, planner, learned, self._report_exit)
        self._procedure = Procedure(
            context, self._mailbox, self._fleet, planner, lifecycle, self._reconciler, self, check_state
        )

    def start(self) -> None:
        """Start to accept requests and to poll the engines."""
        self._started = True
        self._scheduler.spawn("switcher", self._mailbox.run)
        self._reconciler.start()
        self._watchdog.start()

    @property
    def alive(self) -> bool:
        """Whether it accepts requests."""
        return self._mailbox.open and not self._closing

    @property
    def first_pass_done(self) -> bool:
        """Whether every engine was polled once for what it has loaded, or that took too long."""
        return self._reconciler.first_pass_done

    def wait_first_pass(self, timeout: float) -> bool:
        """Wait until every engine was polled once, at most `timeout` seconds; return whether that is done."""
        return self._reconciler.wait_first_pass(timeout)

    def switch(
        self,
        model_id: str,
        *,
        requested_by: str,
        replace: Replace = "cancel",
        options: SwitchOptions = SWITCH_DEFAULTS,
    ) -> Job:
        """Request that a model be made ready; return the job, which may be an existing one for the same model.

        A job whose requests all lack `SwitchOptions.lasting` is cancelled once all its requesters have called
        `withdraw`. Raises UnknownModel, and SwitchError `switch_in_progress` if `replace` is "refuse" and another
        switch is under way.
        """
        model_id = self._catalog.get(model_id).id
        request = Request("switch", model_id, requested_by, options)
        objection = None
        if replace == "cancel" and (current := self.job()) is not None and current.target != model_id:
            objection = self._procedure.refusal(Job(request, self._scheduler))
        return self._call(self._accept, request, replace, objection)

    def withdraw(self, job: Job) -> None:
        """Note that a waiting client disconnected.

        Cancels the job if nobody waits for it and it has changed nothing yet.
        """
        self._mailbox.post(self._withdraw, job)

    def stop(self, model_id: str, *, requested_by: str) -> Job:
        """Request that a model be unloaded; a load of it under way is cancelled. Raises UnknownModel."""
        return self._submit(Request("stop", self._catalog.get(model_id).id, requested_by))

    def restart(self, model_id: str, *, requested_by: str) -> Job:
        """Request that a model be unloaded and loaded again. Raises UnknownModel."""
        return self._submit(Request("restart", self._catalog.get(model_id).id, requested_by))

    def remove(self, model_id: str, *, requested_by: str) -> Job:
        """Request that a model be unloaded and its files deleted. Raises UnknownModel."""
        return self._submit(Request("remove", self._catalog.get(model_id).id, requested_by))

    def cancel(self, reason: str = "It was cancelled.", *, switch_id: str | None = None) -> Job | None:
        """Cancel the latest switch, or the one with `switch_id`; return it, or None if there is none."""
        return self._call(self._cancel, reason, switch_id)

    def unload_now(self, model_id: str) -> None:
        """Stop waiting for the requests in flight of a model that is being unloaded. Raises UnknownModel."""
        self._call(self._fleet.cut_drain_short, self._catalog.get(model_id).id)

    def dismiss(self) -> None:
        """Clear the messages about the last switch and the last loss, because somebody has read them."""
        self._call(self._fleet.dismiss)

    def plan(self, model_id: str, strategy: Strategy | None = None, *, preempt_loads: bool = False) -> Plan:
        """Return what switching to a model would do now. Changes nothing. Raises UnknownModel and SwitchError.

        With `preempt_loads` a load under way counts as a candidate for unloading.
        """
        model = self._catalog.get(model_id)
        try:
            return self._planner.plan(model, strategy, preempt_loads=preempt_loads)
        except Exception as error:
            raise as_switch_error(Job(Request("switch", model.id, "plan"), self._scheduler), error) from error

    def job(self) -> Job | None:
        """Return the job under way."""
        return self._queue.current

    def close(self, timeout: float = 30.0, *, for_good: bool = True) -> None:
        """Cancel the job under way, stop every instance, and return after at most `timeout` seconds.

        Unless `for_good`, loaded instances stay for the next run to adopt.
        """
        if not self._started:  # the app failed to start: the mailbox is not running
            self._mailbox.close()
            return
        deadline = self._scheduler.now() + timeout
        try:
            self._mailbox.call(self._begin_to_close)
            self._wait_idle(deadline, lambda: self._queue.idle)
            self._procedure.stop_all(for_good=for_good)
            leaving = [m for m in self._fleet.members() if for_good and not m.engine.outlives_app]
            self._wait_idle(deadline, lambda: all(self._fleet.get(m.model.id) is not m for m in leaving))
        except MailboxClosed:
            return
        finally:
            self._watchdog.stop()
            self._reconciler.stop()
            self._mailbox.close()

    # The slot, which the running job gives up while it only fetches.

    def release(self, job: Job) -> None:
        self._mailbox.call(self._release, job)

    def acquire(self, job: Job) -> None:
        self._mailbox.call(self._request_slot, job).wait()

    # Messages: short, and never blocking.

    def _accept(self, request: Request, replace: Replace, objection: SwitchError | None) -> Job:
        if self._closing:
            raise SwitchError("stopping", "Switchyard is stopping.")
        current = self.job()
        for same in self._queue.all:
            if same.join(request):
                return self._add_waiter(same, request)
        if current is not None and current.request.kind == "switch" and current.target == request.model:
            replace = replace if current.cancelled or current.restoring else "queue"  # sealed: about to end
        if current is not None and replace == "refuse":
            raise _in_progress(current)
        job = Job(request, self._scheduler)
        if objection is not None and current is not None and replace == "cancel":
            self._end(job, JobResult("failed", objection))
            return job
        if replace == "cancel":
            self._supersede(job)
        elif request.kind in ("stop", "remove"):
            self._cancel_loads(request)
        self._queue.waiting.append(job)
        self._advance()
        return self._add_waiter(job, request)

    def _add_waiter(self, job: Job, request: Request) -> Job:
        if not request.options.lasting:
            job.waiters += 1
        return job

    def _supersede(self, job: Job) -> None:
        """Cancel the switch under way and all waiting ones, and inherit the chain of what they have unloaded."""
        reason = f"It was replaced by a switch to {job.target}."
        current = self.job()
        if current is not None and current.request.switches:
            current.cancel(reason, superseded=True)
            job.chain = current.chain
        for waiting in self._queue.waiting_switches():
            self._queue.waiting.remove(waiting)
            waiting.superseded = True
            if waiting.chain.unloaded and not job.chain.begun:
                job.chain = waiting.chain
            self._end(waiting, JobResult("cancelled", SwitchError("cancelled", reason)))

    def _cancel_loads(self, request: Request) -> None:
        """Cancel loads of a model that is to be unloaded or deleted, and keep chains from restoring it."""
        reason = f"{request.model} is to be {'unloaded' if request.kind == 'stop' else 'deleted'}."
        for job in self._queue.all:
            if job.request.switches:
                for name in self._catalog.names_of(request.model):
                    job.chain.discard(name)
                if job.target == request.model:
                    self._cancel_job(job, reason)

    def _cancel(self, reason: str, switch_id: str | None) -> Job | None:
        job = self._queue.latest_switch() if switch_id is None else self._queue.switch_with(switch_id)
        if job is not None:
            self._cancel_job(job, reason)
        return job

    def _cancel_job(self, job: Job, reason: str) -> None:
        """Cancel a job. A waiting one ends at once, unless it has to run to restore models (`JobQueue.must_run`)."""
        if job in self._queue.waiting and not self._queue.must_run(job):
            self._queue.waiting.remove(job)
            self._end(job, JobResult("cancelled", SwitchError("cancelled", reason)))
            return
        job.cancel(reason)
        view = self._fleet.switch
        if view is not None and view.id == job.id and not job.restoring:
            self._fleet.show(cancelling(view))  # visible by the time the caller gets its answer

    def _withdraw(self, job: Job) -> None:
        job.waiters -= 1
        if job.waiters <= 0 and not job.request.options.lasting and not job.done and not job.has_changes:
            self._cancel_job(job, "No request waits for it any more.")

    def _advance(self) -> None:
        """Give the slot to the next job, if it is free."""
        job = self._queue.next()
        if job is not None:
            job.chain.begin(self._fleet.active)
            if job.request.switches and self._fleet.state_of(job.target) != "running":
                self._fleet.show(requested(job))  # visible by the time the caller gets its answer
            self._scheduler.spawn(f"job-{job.id}", lambda: self._run(job))

    def _release(self, job: Job) -> None:
        self._queue.release(job, self._scheduler.condition())
        self._advance()

    def _request_slot(self, job: Job) -> FetchingJob:
        fetching = self._queue.request_slot(job)
        self._advance()
        return fetching

    def _finish(self, job: Job, result: JobResult) -> None:
        """Message: a job's greenlet has returned."""
        self._queue.finish(job)
        if result.view is not None:
            self._fleet.end_switch(result.view)
        elif self._fleet.switch is not None and self._fleet.switch.id == job.id:
            self._fleet.show(None)
        self._end(job, result)
        self._advance()

    def _end(self, job: Job, result: JobResult) -> None:
        """Queue a job's result for its followers. A job that never ran gets its error event here."""
        if result.error is not None and result.view is None:
            job.publish("error", error=result.error.code, message=result.error.message, **memory_figures(result.error))
        self._ended.append((job, result))
        self.tally.note(job, result)

    def _note_exit(self, instance: Instance, exit: Exit, log_tail: str) -> None:
        lost = self._fleet.record_exit(instance, exit, log_tail)
        if lost is None:
            return
        log.warning("a model ended by itself", model=lost.model.id, cause=exit.cause)
        job = self.job()
        if exit.released and job is not None and job.request.switches and lost.model.id != job.target:
            # The engine evicted this model to make room for the load under way. It joins the chain, so that it is
            # restored if the load fails: Ollama evicts before it knows whether the new model loads (seen with 0.24.0).
            job.chain.add(lost.model.id)
            job.unloaded.append(lost.model.id)

    def _begin_to_close(self) -> None:
        self._closing = True
        current = self.job()
        if current is not None:
            current.cancel("Switchyard is stopping.", superseded=True)
        while self._queue.waiting:
            self._end(
                self._queue.waiting.popleft(),
                JobResult("cancelled", SwitchError("cancelled", "Switchyard is stopping.")),
            )

    def _after_each(self) -> None:
        """Publish what a message changed; only then tell the followers of a job that it has ended.

        In this order a client that sees the end of its job also sees the state that it led to.
        """
        queued = self._queue.queued
        if self._fleet.changed or queued != self._board.current.queued:
            self._fleet.changed = False
            self._board.publish(**self._fleet.snapshot(), queued=queued)
        ended, self._ended = self._ended, []
        for job, result in ended:
            job.finish(result.outcome, result.error)
        with self._idle:
            self._idle.notify_all()

    # In other greenlets.

    def _run(self, job: Job) -> None:
        try:
            result = self._procedure.run(job)
        except Exception as error:
            result = JobResult("failed", as_switch_error(job, error))
        self._mailbox.post(self._finish, job, result)

    def _report_exit(self, instance: Instance, exit: Exit) -> None:
        """Report that an instance ended unasked. Callable from any thread."""
        try:
            log_tail = instance.log_tail()
        except Exception as error:
            log_tail = f"Its log can't be read: {error}."
        self._mailbox.post(self._note_exit, instance, exit, log_tail)

    def _load_again(self, model_id: str, activate: bool) -> None:
        """Load a model that was ended because it did not respond, without unloading others for it."""
        try:
            options = SwitchOptions(auto_unload=False, activate=activate)
            self.switch(model_id, requested_by="watchdog", replace="queue", options=options)
        except (SwitchError, UnknownModel) as error:
            log.warning("a model can't be loaded again", model=model_id, reason=str(error))

    def _submit(self, request: Request) -> Job:
        return self._call(self._accept, request, "queue", None)

    def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return self._mailbox.call(function, *args, **kwargs)
        except MailboxClosed as error:
            raise SwitchError("stopping", str(error)) from None

    def _wait_idle(self, deadline: float, condition: Callable[[], bool]) -> None:
        with self._idle:
            self._idle.wait_for(condition, max(0.0, deadline - self._scheduler.now()))


def _in_progress(current: Job) -> SwitchError:
    return SwitchError(
        "switch_in_progress",
        f"A switch to {current.target} began {current.seconds:.0f} s ago and is still under way. "
        "Wait for it, or cancel it.",
        model=current.target,
        switch_id=current.id,
    )
