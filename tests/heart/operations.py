"""Everything that can happen to the heart, as operations, and the promises that hold after each of them.

Driven by hypothesis in `test_promises.py`, and by a plain random walk in `simulate.py`. The stubs do what they are
told; the promises are about what the real switcher, procedure, fleet and router make of it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from services.catalog import UnknownModel
from services.engines.port import HOST_DEVICE
from services.switching.jobs import Job, JobResult, Replace, SwitchError
from tests.heart.relay_promises import check_relay, check_rest
from tests.heart.rig import MODELS, Heart
from tests.heart.stub import GB, GPU, StubInstance

PRESERVED = "small"
EXPECTED_ERRORS = frozenset(
    {
        "cancelled",
        "confirmation_required",
        "engine_error",
        "insufficient_memory",
        "load_failed",
        "memory_not_freed",
        "model_not_found",
        "model_unusable",
        "state_unwritable",
        "stopping",
    }
)
"""What a job may end with; `internal_error` says that something was not foreseen."""
FAULTS = (
    "crash_loading",
    "hang_loading",
    "refuse_first_token",
    "crash_when_ready",
    "refuse_launch",
    "refuse_unload",
    "refuse_sleep",
    "refuse_wake",
    "refuse_fetch",
)
SLOWNESS = ("slow_stop", "fetch_seconds")
SETTINGS: dict[str, Any] = {
    "preserve_models": (PRESERVED,),
    "drain_timeout_seconds": 5,
    "unload_timeout_seconds": 3,
    "memory_timeout_seconds": 4,
    "load_timeout_seconds": 20,
    "queue_timeout_seconds": 200,
    "queue_limit": 8,
    "upstream_timeout_seconds": 40,
}


@dataclass
class Watched:
    """What a chain of superseding switches found when it began, to compare with what it leaves."""

    running: frozenset[str]
    excused: set[str] = field(default_factory=set)
    """Models that went, or were not to come back, for a reason that is not the chain's."""


class Operations:
    """One heart and what was done to it."""

    def __init__(self, seed: int) -> None:
        self.heart = Heart(seed, **SETTINGS)
        self.heart.on_stop = self._check_stop
        self.jobs: list[Job] = []
        self.ended: dict[str, int] = {}
        self.chain: Watched | None = None
        self.owed: Watched | None = None
        """What a superseded switch leaves to its successor."""
        self.may_go: set[str] = set()
        """Preserved models that somebody asked to unload, restart or delete, so that stopping them is right."""
        self.sent_away: set[str] = set()
        """Models that somebody asked to unload, restart or delete since the last rest; that may come to pass later."""
        self.broken: list[str] = []
        """Promises that were found broken inside a greenlet, where an assertion would reach nobody."""
        self._watch_jobs()

    # What people and programs ask for.

    def switch(self, model_id: str, replace: Replace, **options: Any) -> None:
        try:
            job = self.heart.switch(model_id, replace=replace, **options)
        except SwitchError as error:
            if (error.code, replace) != ("switch_in_progress", "refuse"):
                raise
            return
        except UnknownModel:
            return
        self._asked(job)

    def replace_model(self, model_id: str, instead_of: str) -> None:
        self.switch(model_id, "cancel", instead_of=instead_of)

    def start(self, model_id: str) -> None:
        self.switch(model_id, "queue", auto_unload=False, activate=False)

    def act(self, action: str, model_id: str) -> None:
        """Stop, restart or remove a model."""
        try:
            job = getattr(self.heart.switcher, action)(model_id, requested_by="test")
        except UnknownModel:
            return
        self.may_go.add(model_id)
        held_as = next(m.held_as for m in MODELS if m.id == model_id)
        self.sent_away.update(m.id for m in MODELS if m.id == model_id or (held_as and m.held_as == held_as))
        self._asked(job)

    def cancel(self) -> None:
        job = self.heart.switcher.cancel()
        if job is not None and not job.restoring:
            self.may_go.update([job.target])

    def unload_now(self, model_id: str) -> None:
        """Whoever waits for the last answers of a model that is being unloaded waits no longer."""
        with suppress(UnknownModel):
            self.heart.switcher.unload_now(model_id)

    def request(self, model_id: str, act: str, seconds: float, patience: float | None) -> None:
        """A client asks the gateway; the engine does as `act` says once it gets its place."""
        self.heart.ask(model_id, act, seconds, patience)

    def leave(self, newest: bool = False) -> None:
        """The client that has waited longest goes, or the one that came last."""
        there = [asking for asking in self.heart.asked if asking.outcome is None and not asking.gone]
        if there:
            there[-1 if newest else 0].leave()

    # What happens by itself.

    def pass_time(self, seconds: float) -> None:
        self.heart.scheduler.pause(seconds)

    def crash(self, model_id: str) -> None:
        found = self._model(model_id)
        if found is not None:
            self._excuse_all_of(found.held_as, model_id)
            self.heart.engines[found.engine].crash(found)

    def load_by_other(self, model_id: str) -> None:
        found = self._model(model_id)
        free = GB * 10 - self.heart.machine.ours(HOST_DEVICE) - self.heart.machine.others.get(HOST_DEVICE, 0)
        if found is not None and found.engine == "shared" and found.required_bytes <= free - self._reserved():
            self.heart.engines["shared"].load_by_other(found)

    def release_by_other(self, model_id: str) -> None:
        found = self._model(model_id)
        if found is not None and found.engine == "shared":
            self._excuse_all_of(found.held_as, model_id)
            self.heart.engines["shared"].release_by_other(found)

    def take_memory(self, device: str, gigabytes: int) -> None:
        """Other programs take memory, or give it back, as far as there is any."""
        free = 10 * GB - self.heart.machine.ours(device) - (self._reserved() if device == HOST_DEVICE else 0)
        self.heart.machine.others[device] = max(0, min(gigabytes * GB, free))

    def set_fault(self, model_id: str, fault: str, value: float | bool) -> None:
        found = next(m for m in MODELS if m.id == model_id)
        setattr(self.heart.engines[found.engine].faults(found), fault, value)

    def slow_driver(self, seconds: float) -> None:
        self.heart.machine.slow_seconds = seconds

    def slow_account(self, seconds: float) -> None:
        """How long the driver still counts what has ended."""
        self.heart.machine.lag_seconds = seconds

    def slow_network(self, dial_seconds: float, keep_alive: float) -> None:
        """How long an engine takes to accept a connection, and keeps one that is idle."""
        self.heart.wire.slow_dial, self.heart.wire.keep_alive = dial_seconds, keep_alive

    def break_store(self, broken: bool) -> None:
        self.heart.store.broken = broken

    def fill_disk(self, full: bool) -> None:
        self.heart.state_error = "The state folder can't be written: the disk is full." if full else None

    def remove_file(self, model_id: str) -> None:
        """Somebody deletes a model's file behind the app's back."""
        found = next(m for m in MODELS if m.id == model_id)
        self.heart.engines[found.engine].listed.pop(model_id, None)
        self._excuse(model_id)
        self.heart.catalog.refresh()

    def bring_files_back(self) -> None:
        for found in MODELS:
            self.heart.engines[found.engine].listed.setdefault(found.id, found)
        self.heart.catalog.refresh()

    def crash_app(self) -> None:
        self._forget_jobs()
        self.heart.crash()
        self._watch_jobs()

    def restart_app(self) -> None:
        self.heart.restart()
        self._forget_jobs()
        self._watch_jobs()

    # The promises.

    def check(self) -> None:
        """What holds at any moment."""
        heart = self.heart
        heart.scheduler.settle()
        assert heart.scheduler.failures == [], heart.scheduler.failures
        assert self.broken == [], self.broken
        for device in (HOST_DEVICE, GPU):
            assert heart.machine.ours(device) <= 10 * GB, f"over budget on {device}: {heart.machine.held}"
        waiting = tuple(job.target for job in heart.switcher._queue.waiting)
        assert heart.now.queued == waiting, "the queue equals what waits"
        check_relay(heart, EXPECTED_ERRORS)
        for job in self.jobs:
            assert job.error is None or job.error.code in EXPECTED_ERRORS, (job.target, job.error.code, job.error)

    def rest(self) -> None:
        """Let everything end: no wait is without bound. Then the snapshot equals the engines."""
        heart = self.heart
        heart.machine.slow_seconds = 0.0
        ended = heart.scheduler.run_until(self._at_rest, 20_000)
        assert ended, f"something waits without bound: {self._under_way()}"
        heart.scheduler.pause(6)  # engines are looked at each second, idle connections every five
        if not self._at_rest():
            return self.rest()
        if self.owed is not None:  # its successor ended before it began
            self._check_restored(self.owed, "a switch that nobody took over from", "")
            self.owed = None
        heart.catalog.refresh()  # as its watch does, so that it lists what was adopted while its file went
        self.check()
        for engine in heart.engines.values():
            listed = heart.catalog.models.values()
            there = {m.id for m in engine.loaded([m for m in listed if m.engine == engine.name])}
            shown = {m for m, view in heart.now.instances.items() if view.engine == engine.name}
            assert there == shown, f"the engine {engine.name} has {there}, the snapshot says {shown}"
        for view in heart.now.instances.values():
            assert view.state in ("running", "asleep"), view
            assert view.traffic.in_flight == 0, view
        check_rest(heart)
        self.jobs.clear()
        self.may_go.clear()
        self.sent_away.clear()
        return None

    def _at_rest(self) -> bool:
        switcher = self.heart.switcher
        idle = switcher.job() is None and not switcher._queue.waiting
        return idle and all(asking.outcome is not None for asking in self.heart.asked)

    def _under_way(self) -> object:
        switcher = self.heart.switcher
        return switcher.job(), list(switcher._queue.waiting), [a.number for a in self.heart.asked if a.outcome is None]

    def _asked(self, job: Job) -> None:
        if job not in self.jobs:
            self.jobs.append(job)

    def _model(self, model_id: str) -> Any:
        return next((m for e in self.heart.engines.values() for m in e.listed.values() if m.id == model_id), None)

    def _reserved(self) -> int:
        """What a load under way is still going to take: others don't take it in this world, else loads would fail."""
        views = self.heart.now.instances.values()
        on_host = [v for v in views if v.device == HOST_DEVICE and v.state == "loading" and v.shares is None]
        target = self.heart.switcher.job()
        coming = self._model(target.target) if target is not None else None
        planned = coming.required_bytes if coming is not None else 0
        return max([planned, *(v.reserved_bytes - (v.usage.bytes if v.usage else 0) for v in on_host)])

    # Watching jobs and engines from inside.

    def _watch_jobs(self) -> None:
        procedure = self.heart.switcher._procedure
        carry_out = procedure.run

        def watched(job: Job) -> JobResult:
            self._begins(job)
            result = carry_out(job)
            self._ends(job, result)
            return result

        procedure.run = watched  # type: ignore[method-assign]
        mailbox = self.heart.switcher._mailbox
        after_each = mailbox._after_each

        def checked() -> None:
            try:
                after_each()
            except Exception as error:  # the mailbox would log it, and go on
                self.broken.append(f"publishing after a message failed: {error}")

        mailbox._after_each = checked

    def _begins(self, job: Job) -> None:
        """A switch begins: it goes on for the one that it superseded, or begins a chain of its own."""
        if job.request.switches:
            states = self.heart.states()
            running = frozenset(m for m, state in states.items() if state == "running")
            self.chain, self.owed = self.owed or Watched(running), None

    def _ends(self, job: Job, result: JobResult) -> None:
        """After any failed or cancelled chain what ran before runs again, or the reason is said."""
        self.ended[job.id] = self.ended.get(job.id, 0) + 1
        if self.ended[job.id] > 1:
            self.broken.append(f"job {job.id} ended more than once")
        if not job.request.switches:
            return
        watched, self.chain = self.chain, None
        if job.superseded:
            self.owed = watched
        elif watched is not None and result.error is not None:
            self._check_restored(watched, f"{job.target}, and: {result.error.message}", result.error.message)

    def _check_restored(self, watched: Watched, after: str, said: str) -> None:
        for model_id in watched.running - watched.excused - self.sent_away:
            back = self.heart.states().get(model_id) in ("running", "loading")
            if not back and f"{model_id} was unloaded and is not back" not in said:
                self.broken.append(f"{model_id} is lost after {after}")

    def _check_stop(self, instance: StubInstance) -> None:
        """An engine is told to stop something that was ready: is that allowed?"""
        model_id = instance.model.id
        view = self.heart.now.instances.get(model_id)
        if view is None:
            return
        if model_id == PRESERVED and model_id not in self.may_go and view.state != "loading":
            self.broken.append(f"{model_id} is preserved, and was unloaded all the same")
        if view.traffic.enter():
            view.traffic.leave()
            self.broken.append(f"{model_id} is stopped while it lets requests in")

    def _excuse(self, model_id: str) -> None:
        for watched in (self.chain, self.owed):
            if watched is not None:
                watched.excused.add(model_id)

    def _excuse_all_of(self, held_as: str | None, model_id: str) -> None:
        for one in MODELS:
            if one.id == model_id or (held_as is not None and one.held_as == held_as):
                self._excuse(one.id)

    def _forget_jobs(self) -> None:
        """The app that had them is gone."""
        self.jobs.clear()
        self.chain = self.owed = None
        self.may_go.clear()
        self.sent_away.clear()
