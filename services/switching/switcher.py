"""The single writer of all lifecycle state.

One greenlet (a thread where nothing is patched) takes messages from a mailbox and carries out one job at a time.
Whatever blocks runs in a worker while the mailbox goes on being served, so a cancel or a crash is noticed at once.
Everyone else sends a message, or reads the snapshot on the board.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from services.catalog import Catalog
from services.config import Settings, Strategy
from services.engines.port import Engine, Exit, Instance
from services.switching.events import Board
from services.switching.fleet import Fleet, Member, Notes
from services.switching.jobs import Cancelled, Job, Replace, Request, SwitchError
from services.switching.learning import Learned
from services.switching.lifecycle import Lifecycle
from services.switching.plan import Plan
from services.switching.planner import Planner
from services.switching.procedure import Procedure

log = structlog.get_logger(__name__)

T = TypeVar("T")
REPLY_SECONDS = 10.0
HOUSEKEEPING_SECONDS = 1.0


@dataclass(frozen=True)
class _Submit:
    request: Request
    replace: Replace
    reply: Future[Job]


@dataclass(frozen=True)
class _Cancel:
    reply: Future[Job | None]
    reason: str


@dataclass(frozen=True)
class _Exited:
    instance: Instance
    exit: Exit


@dataclass(frozen=True)
class _Dismiss:
    reply: Future[None]


class _Tick:
    """Something to look at: a worker's result, a new observation."""


@dataclass(frozen=True)
class _Close:
    """No more jobs. `for_good`: whatever needs the app goes too."""

    for_good: bool


_Message = _Submit | _Cancel | _Exited | _Dismiss | _Tick | _Close


class Switcher:
    """Makes target models ready. Every public method may be called from any thread."""

    def __init__(
        self,
        settings: Settings,
        board: Board,
        catalog: Catalog,
        engines: Mapping[str, Engine],
        planner: Planner,
        learned: Learned,
        notes: Notes,
    ) -> None:
        self._catalog = catalog
        self._mailbox: queue.Queue[_Message] = queue.Queue()
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        self._closing = False
        self._for_good = True
        self._looked = threading.Event()
        self._fleet = Fleet(board, notes)
        self._planner = planner
        lifecycle = Lifecycle(settings, self._fleet, planner, learned, engines, self)
        self._procedure = Procedure(settings, self._fleet, planner, lifecycle, catalog, engines, self)
        self._thread = threading.Thread(target=self._run, name="switcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    def switch(
        self,
        model_id: str,
        *,
        requested_by: str,
        replace: Replace = "cancel",
        strategy: Strategy | None = None,
        confirm: bool | None = None,
        auto_unload: bool | None = None,
        activate: bool = True,
        instead_of: str | None = None,
    ) -> Job:
        """Ask for a model to be made ready; returns the job, which may be one under way for the same model.

        `instead_of` names a model to unload for it even where there is room for both.

        Raises UnknownModel, and SwitchError `switch_in_progress` when `replace` is "refuse" and one is.
        """
        model_id = self._catalog.get(model_id).id
        request = Request("switch", model_id, requested_by, strategy, confirm, auto_unload, activate, instead_of)
        return self._submit(request, replace)

    def stop(self, model_id: str, *, requested_by: str) -> Job:
        """Ask for a model to be unloaded; a load of it under way is cancelled. Raises UnknownModel."""
        return self._submit(Request("stop", self._catalog.get(model_id).id, requested_by), "queue")

    def restart(self, model_id: str, *, requested_by: str) -> Job:
        """Ask for a model to be unloaded and loaded again. Raises UnknownModel."""
        return self._submit(Request("restart", self._catalog.get(model_id).id, requested_by), "queue")

    def remove(self, model_id: str, *, requested_by: str) -> Job:
        """Ask for a model's files to be deleted, unloading it first. Raises UnknownModel."""
        return self._submit(Request("remove", self._catalog.get(model_id).id, requested_by), "queue")

    def cancel(self, reason: str = "It was cancelled.") -> Job | None:
        """Call off the switch under way; returns it, None when there is none."""
        reply: Future[Job | None] = Future()
        self._mailbox.put(_Cancel(reply, reason))
        return reply.result(REPLY_SECONDS)

    def dismiss(self) -> None:
        """Forget the last switch: people have read how it ended."""
        reply: Future[None] = Future()
        self._mailbox.put(_Dismiss(reply))
        reply.result(REPLY_SECONDS)

    def plan(self, model_id: str, strategy: Strategy | None = None, *, loads_give_way: bool = False) -> Plan:
        """What switching to a model would do now. Changes nothing. Raises UnknownModel.

        With `loads_give_way` a load under way counts as something that could be unloaded.
        """
        return self._planner.plan(self._catalog.get(model_id), strategy, loads_give_way=loads_give_way)

    def job(self) -> Job | None:
        """The job under way."""
        return self._current

    def close(self, timeout: float = 30.0, *, for_good: bool = True) -> None:
        """Call off what is under way, stop every instance, and return.

        Unless the app goes `for_good`, what is loaded stays: the next run takes it over.
        """
        if self._thread.is_alive():
            self._mailbox.put(_Close(for_good))
            self._thread.join(timeout)

    # What the procedure needs while it runs in the switcher's greenlet.

    def await_worker(
        self,
        function: Callable[[], T],
        *,
        cancellable: bool = True,
        interval: float | None = None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> T:
        """Run something that blocks in a worker and serve the mailbox until it is done.

        `on_tick` is called after every message, and every `interval` seconds. Raises what `function` raised, and
        Cancelled (leaving the worker to itself) as soon as the current job is called off.
        """
        outcome: Future[T] = Future()

        def work() -> None:
            try:
                outcome.set_result(function())
            except BaseException as error:
                outcome.set_exception(error)
            self._mailbox.put(_Tick())

        threading.Thread(target=work, name="switcher-worker", daemon=True).start()
        while not outcome.done():
            self._serve(interval or HOUSEKEEPING_SECONDS)
            on_tick()
            if cancellable and not outcome.done():
                self.check_cancelled()
        return outcome.result()

    def check_cancelled(self) -> None:
        """Raises Cancelled when the current job has been called off."""
        if self._current is not None and self._current.cancel_reason is not None:
            raise Cancelled

    def wake(self) -> None:
        """Have `on_tick` called soon: there is something new to see."""
        self._mailbox.put(_Tick())

    def report_exit(self, instance: Instance, exit: Exit) -> None:
        """An instance ended without having been asked to."""
        self._mailbox.put(_Exited(instance, exit))

    def queued(self) -> tuple[str, ...]:
        return tuple(job.target for job in self._waiting)

    def _submit(self, request: Request, replace: Replace) -> Job:
        reply: Future[Job] = Future()
        self._mailbox.put(_Submit(request, replace, reply))
        return reply.result(REPLY_SECONDS)

    def wait_looked(self, timeout: float) -> bool:
        """Whether the first look at what the engines have loaded is over, after at most `timeout` seconds."""
        return self._looked.wait(timeout)

    def _run(self) -> None:
        try:
            self._look_around()
        except Exception:
            log.exception("the first look at the engines failed")
        self._looked.set()
        while not self._closing:
            try:
                self._next()
            except Exception:  # whatever it was, the next wish has to find the switcher alive
                log.exception("the switcher failed")
        for job in self._waiting:
            job.finish("cancelled", SwitchError("cancelled", "Switchyard is stopping."))
        self._procedure.stop_all(for_good=self._for_good)

    def _next(self) -> None:
        if not self._waiting:
            self._serve(HOUSEKEEPING_SECONDS)
            return
        self._current = job = self._waiting.popleft()
        try:
            self._carry_out(job)
        finally:
            self._current = None

    def _carry_out(self, job: Job) -> None:
        try:
            self._procedure.carry_out(job)
        except Exception:
            log.exception("a job ended in a way nobody foresaw", model=job.target)
            self._procedure.abandon(job)

    def _serve(self, timeout: float) -> None:
        """Take one message, or measure what is loaded when none comes."""
        try:
            message = self._mailbox.get(timeout=timeout)
        except queue.Empty:
            self._look_around()
            return
        match message:
            case _Submit():
                self._accept(message)
            case _Cancel():
                message.reply.set_result(self._call_off(message.reason))
            case _Exited():
                self._note_exit(message)
            case _Dismiss():
                self._fleet.publish(last_switch=None)
                message.reply.set_result(None)
            case _Close():
                self._closing, self._for_good = True, message.for_good
                self._call_off("Switchyard is stopping.", superseded=True)

    def _look_around(self) -> None:
        """Measure what is loaded, and take in what somebody else had an engine load."""
        adopted = self._procedure.adopt_found()
        if self._fleet.measure() or adopted:
            self._fleet.publish()

    def _accept(self, message: _Submit) -> None:
        request, current = message.request, self._current
        if self._closing:
            message.reply.set_exception(SwitchError("stopping", "Switchyard is stopping."))
            return
        same = self._same_job(request)
        if same is not None:
            if request.activate and not same.request.activate:
                same.request = replace(same.request, activate=True)
            message.reply.set_result(same)
            return
        if current is not None and message.replace == "refuse":
            message.reply.set_exception(_in_progress(current))
            return
        job = Job(request)
        if current is not None and message.replace == "cancel" and self._procedure.refuses(job):
            message.reply.set_result(job)
            return
        if message.replace == "cancel":
            self._supersede(request.model)
        elif request.kind in ("stop", "remove") and current is not None and current.target == request.model:
            self._call_off(f"{request.model} is to be {'unloaded' if request.kind == 'stop' else 'deleted'}.")
        if current is not None and current.bringing and self._goes_between(request, current):
            message.reply.set_result(job)
            self._carry_out(job)
            return
        self._waiting.append(job)
        if current is not None:
            self._fleet.publish(queued=self.queued())
        message.reply.set_result(job)

    def _goes_between(self, request: Request, current: Job) -> bool:
        """Whether something can be done at once while a download is under way, which may take hours."""
        member = self._fleet.held(request.model)
        return request.kind == "stop" and request.model != current.target and member is not None

    def _supersede(self, model_id: str) -> None:
        """Make way for a switch to `model_id`: call off the one under way, and those that wait."""
        self._call_off(f"It was replaced by a switch to {model_id}.", superseded=True)
        for waiting in [j for j in self._waiting if j.request.kind == "switch"]:
            self._waiting.remove(waiting)
            waiting.finish("cancelled", SwitchError("cancelled", f"It was replaced by a switch to {model_id}."))

    def _same_job(self, request: Request) -> Job | None:
        """The job that already does what is asked, so that a double click or a second tab joins it."""
        under_way = [self._current] if self._current and self._current.cancel_reason is None else []
        for job in [*under_way, *self._waiting]:
            if (job.request.kind, job.request.model) == (request.kind, request.model) and not job.done:
                return job
        return None

    def _call_off(self, reason: str, *, superseded: bool = False) -> Job | None:
        job = self._current
        if job is None:
            return None
        job.superseded = job.superseded or superseded
        if job.cancel_reason is None:
            job.cancel_reason = reason
        return job

    def _note_exit(self, message: _Exited) -> None:
        member = next((m for m in self._fleet if m.instance is message.instance), None)
        if member is not None and member.state not in ("running", "asleep"):
            member.exit = message.exit
            return
        if member is None:
            return  # a load that fails is told by its worker, an unload is wanted
        log.warning("a model ended by itself", model=member.model.id, cause=message.exit.cause)
        self._lose(member, message.exit)

    def _lose(self, member: Member, exit: Exit) -> None:
        self._fleet.lose(member, exit)
        if exit.released:
            self._blame_current(member.model.id)
        self._fleet.publish()

    def _blame_current(self, model_id: str) -> None:
        """An engine may make room by itself for the load under way: if that fails, what it evicted comes back too.

        Ollama evicts the working model before it finds out that the new one can't be loaded (seen with 0.24.0).
        """
        job = self._current
        if job is not None and job.request.kind in ("switch", "restart") and model_id != job.target:
            job.unloaded.append(model_id)


def _in_progress(current: Job) -> SwitchError:
    return SwitchError(
        "switch_in_progress",
        f"A switch to {current.target} began {current.seconds:.0f} s ago and is still under way. "
        "Wait for it, or cancel it.",
        model=current.target,
        switch_id=current.id,
    )
