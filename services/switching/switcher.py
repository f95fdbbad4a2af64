"""The single writer of all lifecycle state.

Its mailbox owns the fleet, the queue and the board; each message is a short method that neither waits nor asks an
engine. A job runs beside it, one at a time, in a greenlet of its own, and tells it what happened. Everyone else sends a
message, or reads the snapshot on the board. A slow load, a hanging driver or a failing database delays nobody else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import structlog

from services.catalog import UnknownModel
from services.config import Strategy
from services.engines.port import Exit, Instance
from services.switching.agenda import Agenda, Turn
from services.switching.context import SwitchingContext
from services.switching.fleet import Fleet, Notes
from services.switching.jobs import SWITCH_DEFAULTS, Ending, Job, Replace, Request, SwitchError, SwitchOptions
from services.switching.learning import Learned
from services.switching.lifecycle import Lifecycle
from services.switching.mailbox import Mailbox, MailboxClosed
from services.switching.narrator import cancelling, memory_figures, requested
from services.switching.plan import Plan
from services.switching.planner import Planner
from services.switching.procedure import Procedure, as_switch_error
from services.switching.reconciler import Reconciler
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
        self._agenda = Agenda()
        self._ended: list[tuple[Job, Ending]] = []
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
        """Begin to take requests, and to look at what the engines have loaded."""
        self._started = True
        self._scheduler.spawn("switcher", self._mailbox.run)
        self._reconciler.start()
        self._watchdog.start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._mailbox.open and not self._closing

    @property
    def looked(self) -> bool:
        """Whether the first look at what the engines have loaded is over."""
        return self._reconciler.looked

    def wait_looked(self, timeout: float) -> bool:
        """Wait for the first look at what the engines have loaded, at most `timeout` seconds; whether it is over."""
        return self._reconciler.wait_looked(timeout)

    def switch(
        self,
        model_id: str,
        *,
        requested_by: str,
        replace: Replace = "cancel",
        options: SwitchOptions = SWITCH_DEFAULTS,
    ) -> Job:
        """Ask for a model to be made ready; returns the job, which may be one under way for the same model.

        Raises UnknownModel, and SwitchError `switch_in_progress` when `replace` is "refuse" and one is.
        """
        model_id = self._catalog.get(model_id).id
        request = Request("switch", model_id, requested_by, options)
        objection = None
        if replace == "cancel" and (current := self.job()) is not None and current.target != model_id:
            objection = self._procedure.refusal(Job(request, self._scheduler))
        return self._call(self._accept, request, replace, objection)

    def withdraw(self, job: Job) -> None:
        """A client that asked for a switch has left: it ends if nobody else wants it and it has touched nothing."""
        self._mailbox.post(self._withdraw, job)

    def stop(self, model_id: str, *, requested_by: str) -> Job:
        """Ask for a model to be unloaded; a load of it under way is cancelled. Raises UnknownModel."""
        return self._submit(Request("stop", self._catalog.get(model_id).id, requested_by))

    def restart(self, model_id: str, *, requested_by: str) -> Job:
        """Ask for a model to be unloaded and loaded again. Raises UnknownModel."""
        return self._submit(Request("restart", self._catalog.get(model_id).id, requested_by))

    def remove(self, model_id: str, *, requested_by: str) -> Job:
        """Ask for a model's files to be deleted, unloading it first. Raises UnknownModel."""
        return self._submit(Request("remove", self._catalog.get(model_id).id, requested_by))

    def cancel(self, reason: str = "It was cancelled.", *, switch_id: str | None = None) -> Job | None:
        """Cancel the latest switch, or only the one with `switch_id`; returns it, None when there is none such."""
        return self._call(self._cancel, reason, switch_id)

    def unload_now(self, model_id: str) -> None:
        """Wait no longer for the answers of a model that is being unloaded. Raises UnknownModel."""
        self._call(self._fleet.cut_short, self._catalog.get(model_id).id)

    def dismiss(self) -> None:
        """Forget the last switch, or that a model has ended by itself: people have read of it."""
        self._call(self._fleet.dismiss)

    def plan(self, model_id: str, strategy: Strategy | None = None, *, loads_give_way: bool = False) -> Plan:
        """What switching to a model would do now. Changes nothing. Raises UnknownModel, and SwitchError.

        With `loads_give_way` a load under way counts as something that could be unloaded.
        """
        model = self._catalog.get(model_id)
        try:
            return self._planner.plan(model, strategy, loads_give_way=loads_give_way)
        except Exception as error:
            raise as_switch_error(Job(Request("switch", model.id, "plan"), self._scheduler), error) from error

    def job(self) -> Job | None:
        """The job under way."""
        return self._agenda.current

    def close(self, timeout: float = 30.0, *, for_good: bool = True) -> None:
        """Cancel what is under way, stop every instance, and return after at most `timeout` seconds.

        Unless the app goes `for_good`, what is loaded stays: the next run takes it over.
        """
        if not self._started:  # the app's start failed: nobody would answer
            self._mailbox.close()
            return
        deadline = self._scheduler.now() + timeout
        try:
            self._mailbox.call(self._begin_to_close)
            self._wait_idle(deadline, lambda: self._agenda.idle)
            self._procedure.stop_all(for_good=for_good)
            leaving = [m for m in self._fleet.members() if for_good and not m.engine.outlives_app]
            self._wait_idle(deadline, lambda: all(self._fleet.get(m.model.id) is not m for m in leaving))
        except MailboxClosed:
            return
        finally:
            self._watchdog.stop()
            self._reconciler.stop()
            self._mailbox.close()

    # The slot, which the running job may leave to others while it only fetches.

    def release(self, job: Job) -> None:
        self._mailbox.call(self._release, job)

    def acquire(self, job: Job) -> None:
        self._mailbox.call(self._want_turn, job).wait()

    # Messages. Short, and without waiting.

    def _accept(self, request: Request, replace: Replace, objection: SwitchError | None) -> Job:
        if self._closing:
            raise SwitchError("stopping", "Switchyard is stopping.")
        current = self.job()
        for same in self._agenda.all:
            if same.join(request):
                return self._counted(same, request)
        if current is not None and current.request.kind == "switch" and current.target == request.model:
            replace = replace if current.cancelled or current.restoring else "queue"  # it is about to end by itself
        if current is not None and replace == "refuse":
            raise _in_progress(current)
        job = Job(request, self._scheduler)
        if objection is not None and current is not None and replace == "cancel":
            self._end(job, Ending("failed", objection))
            return job
        if replace == "cancel":
            self._supersede(job)
        elif request.kind in ("stop", "remove"):
            self._cancel_loads(request)
        self._agenda.waiting.append(job)
        self._advance()
        return self._counted(job, request)

    def _counted(self, job: Job, request: Request) -> Job:
        if not request.options.lasting:
            job.askers += 1
        return job

    def _supersede(self, job: Job) -> None:
        """Make way for a switch: cancel the one under way and those that wait, and inherit what they owe."""
        reason = f"It was replaced by a switch to {job.target}."
        current = self.job()
        if current is not None and current.request.switches:
            current.cancel(reason, superseded=True)
            job.chain = current.chain
        for waiting in self._agenda.waiting_switches():
            self._agenda.waiting.remove(waiting)
            waiting.superseded = True
            if waiting.chain.unloaded and not job.chain.begun:
                job.chain = waiting.chain
            self._end(waiting, Ending("cancelled", SwitchError("cancelled", reason)))

    def _cancel_loads(self, request: Request) -> None:
        """A model is to be unloaded, or deleted: no load of it goes on, and no switch brings it back."""
        reason = f"{request.model} is to be {'unloaded' if request.kind == 'stop' else 'deleted'}."
        for job in self._agenda.all:
            if job.request.switches:
                for name in self._catalog.names_of(request.model):
                    job.chain.strike(name)
                if job.target == request.model:
                    self._cancel_job(job, reason)

    def _cancel(self, reason: str, switch_id: str | None) -> Job | None:
        job = self._agenda.latest_switch() if switch_id is None else self._agenda.switch_with(switch_id)
        if job is not None:
            self._cancel_job(job, reason)
        return job

    def _cancel_job(self, job: Job, reason: str) -> None:
        """Cancel a job. One that waits ends at once, unless it owes something to those a job before it unloaded."""
        if job in self._agenda.waiting and not self._agenda.owes(job):
            self._agenda.waiting.remove(job)
            self._end(job, Ending("cancelled", SwitchError("cancelled", reason)))
            return
        job.cancel(reason)
        view = self._fleet.switch
        if view is not None and view.id == job.id and not job.restoring:
            self._fleet.show(cancelling(view))  # whoever asked sees it from the answer on

    def _withdraw(self, job: Job) -> None:
        job.askers -= 1
        if job.askers <= 0 and not job.request.options.lasting and not job.done and not job.touched:
            self._cancel_job(job, "Nobody waits for it any more.")

    def _advance(self) -> None:
        """Give the slot to the next job, if it is free."""
        job = self._agenda.next()
        if job is not None:
            job.chain.begin(self._fleet.active)
            if job.request.switches and self._fleet.standing(job.target) != "running":
                self._fleet.show(requested(job))  # whoever asked sees it from the answer on
            self._scheduler.spawn(f"job-{job.id}", lambda: self._run(job))

    def _release(self, job: Job) -> None:
        self._agenda.release(job, self._scheduler.condition())
        self._advance()

    def _want_turn(self, job: Job) -> Turn:
        turn = self._agenda.want(job)
        self._advance()
        return turn

    def _finish(self, job: Job, ending: Ending) -> None:
        """A job's greenlet is done with it."""
        self._agenda.finish(job)
        if ending.view is not None:
            self._fleet.end_switch(ending.view)
        elif self._fleet.switch is not None and self._fleet.switch.id == job.id:
            self._fleet.show(None)
        self._end(job, ending)
        self._advance()

    def _end(self, job: Job, ending: Ending) -> None:
        """Note how a job has ended. One that never ran has nobody who told those who follow it."""
        if ending.error is not None and ending.view is None:
            job.tell("error", error=ending.error.code, message=ending.error.message, **memory_figures(ending.error))
        self._ended.append((job, ending))

    def _note_exit(self, instance: Instance, exit: Exit, log_tail: str) -> None:
        lost = self._fleet.exited(instance, exit, log_tail)
        if lost is None:
            return
        log.warning("a model ended by itself", model=lost.model.id, cause=exit.cause)
        job = self.job()
        if exit.released and job is not None and job.request.switches and lost.model.id != job.target:
            # An engine may make room by itself for the load under way. If that fails, what it evicted comes back too:
            # Ollama evicts the working model before it finds out that the new one can't be loaded (seen with 0.24.0).
            job.chain.add(lost.model.id)
            job.unloaded.append(lost.model.id)

    def _begin_to_close(self) -> None:
        self._closing = True
        current = self.job()
        if current is not None:
            current.cancel("Switchyard is stopping.", superseded=True)
        while self._agenda.waiting:
            self._end(
                self._agenda.waiting.popleft(), Ending("cancelled", SwitchError("cancelled", "Switchyard is stopping."))
            )

    def _after_each(self) -> None:
        """After every message: publish what it changed, and only then tell those who follow a job that it ended."""
        queued = self._agenda.queued
        if self._fleet.changed or queued != self._board.current.queued:
            self._fleet.changed = False
            self._board.publish(**self._fleet.snapshot(), queued=queued)
        ended, self._ended = self._ended, []
        for job, ending in ended:
            job.finish(ending.outcome, ending.error)
        with self._idle:
            self._idle.notify_all()

    # In greenlets of their own.

    def _run(self, job: Job) -> None:
        try:
            ending = self._procedure.carry_out(job)
        except Exception as error:
            ending = Ending("failed", as_switch_error(job, error))
        self._mailbox.post(self._finish, job, ending)

    def _report_exit(self, instance: Instance, exit: Exit) -> None:
        """An instance ended by itself; called from wherever that is noticed."""
        try:
            log_tail = instance.log_tail()
        except Exception as error:
            log_tail = f"Its log can't be read: {error}."
        self._mailbox.post(self._note_exit, instance, exit, log_tail)

    def _load_again(self, model_id: str, activate: bool) -> None:
        """Load a model that was ended because it did not respond, where nothing has to be unloaded for it."""
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
