"""All operations on the heart, and the invariants that hold after each of them.

Driven by hypothesis in `test_invariants.py`, and by a random walk in `simulate.py`. The stubs behave as configured;
the invariants are about the real switcher, procedure, fleet, router and relay.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from services.catalog import UnknownModel
from services.engines.port import HOST_DEVICE
from services.switching.jobs import Job, JobResult, Replace, SwitchError
from tests.heart.relay_invariants import check_relay, check_rest
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
"""Codes that a job may end with; `internal_error` would be an unexpected exception."""
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
class ChainRecord:
    """The models that ran when a chain of superseding switches began, to compare with the state after it."""

    running: frozenset[str]
    excused: set[str] = field(default_factory=set)
    """Models that were unloaded, or need not come back, for another reason than the chain."""


class Operations:
    """One heart and the operations on it."""

    def __init__(self, seed: int) -> None:
        self.heart = Heart(seed, **SETTINGS)
        self.heart.on_stop = self._check_stop
        self.jobs: list[Job] = []
        self.ended: dict[str, int] = {}
        self.chain: ChainRecord | None = None
        self.inherited: ChainRecord | None = None
        """The chain that a superseded switch leaves to its successor."""
        self.may_stop: set[str] = set()
        """Preserved models that a request unloads, restarts or deletes, so that stopping them is allowed."""
        self.stop_requested: set[str] = set()
        """Models that a request unloads, restarts or deletes since the last rest; it may take effect later."""
        self.violations: list[str] = []
        """Violations found inside a greenlet, where a failing assertion would not reach the test."""
        self._watch_jobs()

    # Requests of people and programs.

    def switch(self, model_id: str, replace: Replace, **options: Any) -> None:
        try:
            job = self.heart.switch(model_id, replace=replace, **options)
        except SwitchError as error:
            if (error.code, replace) != ("switch_in_progress", "refuse"):
                raise
            return
        except UnknownModel:
            return
        self._remember(job)

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
        self.may_stop.add(model_id)
        held_as = next(m.held_as for m in MODELS if m.id == model_id)
        self.stop_requested.update(m.id for m in MODELS if m.id == model_id or (held_as and m.held_as == held_as))
        self._remember(job)

    def cancel(self) -> None:
        job = self.heart.switcher.cancel()
        if job is not None and not job.restoring:
            self.may_stop.update([job.target])

    def unload_now(self, model_id: str) -> None:
        """Cut off the last answers of a model that is being unloaded."""
        with suppress(UnknownModel):
            self.heart.switcher.unload_now(model_id)

    def request(self, model_id: str, act: str, seconds: float, leaves_after: float | None) -> None:
        """Send a request to the gateway; the engine behaves as the act says once the request is admitted."""
        self.heart.ask(model_id, act, seconds, leaves_after)

    def disconnect(self, newest: bool = False) -> None:
        """Disconnect the client that has waited longest, or the newest."""
        there = [request for request in self.heart.requests if request.outcome is None and not request.gone]
        if there:
            there[-1 if newest else 0].disconnect()

    # Events from outside.

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
        """Let other programs take memory, as far as there is any, or give it back."""
        free = 10 * GB - self.heart.machine.ours(device) - (self._reserved() if device == HOST_DEVICE else 0)
        self.heart.machine.others[device] = max(0, min(gigabytes * GB, free))

    def set_fault(self, model_id: str, fault: str, value: float | bool) -> None:
        found = next(m for m in MODELS if m.id == model_id)
        setattr(self.heart.engines[found.engine].faults(found), fault, value)

    def slow_driver(self, seconds: float) -> None:
        self.heart.machine.slow_seconds = seconds

    def delay_freed_memory(self, seconds: float) -> None:
        """Let the driver report the memory of ended processes as used for so long."""
        self.heart.machine.lag_seconds = seconds

    def slow_network(self, dial_seconds: float, keep_alive: float) -> None:
        """Set how long engines take to accept a connection, and how long they keep an idle one."""
        self.heart.wire.slow_dial, self.heart.wire.keep_alive = dial_seconds, keep_alive

    def break_store(self, broken: bool) -> None:
        self.heart.store.failing = broken

    def fill_disk(self, full: bool) -> None:
        self.heart.state_error = "The state folder can't be written: the disk is full." if full else None

    def remove_file(self, model_id: str) -> None:
        """Delete a model's file without telling the app."""
        found = next(m for m in MODELS if m.id == model_id)
        self.heart.engines[found.engine].listed.pop(model_id, None)
        self._excuse(model_id)
        self.heart.catalog.refresh()

    def restore_files(self) -> None:
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

    # The invariants.

    def check(self) -> None:
        """Check what holds at any moment."""
        heart = self.heart
        heart.scheduler.settle()
        assert heart.scheduler.failures == [], heart.scheduler.failures
        assert self.violations == [], self.violations
        for device in (HOST_DEVICE, GPU):
            assert heart.machine.ours(device) <= 10 * GB, f"over budget on {device}: {heart.machine.held}"
        active = heart.now.instances.get(heart.now.active_model or "")
        assert active is None or active.entry.kind == "text", f"{active.model} can't answer requests that name no model"
        waiting = tuple(job.target for job in heart.switcher._queue.waiting)
        assert heart.now.queued == waiting, "the queue equals what waits"
        check_relay(heart, EXPECTED_ERRORS)
        for job in self.jobs:
            assert job.error is None or job.error.code in EXPECTED_ERRORS, (job.target, job.error.code, job.error)

    def check_rest(self) -> None:
        """Let everything end (no wait is unbounded), then check that the snapshot equals the engines' state."""
        heart = self.heart
        heart.machine.slow_seconds = 0.0
        ended = heart.scheduler.run_until(self._at_rest, 20_000)
        assert ended, f"something waits without a bound: {self._under_way()}"
        heart.scheduler.pause(6)  # engines are polled each second, idle connections every five
        if not self._at_rest():
            return self.check_rest()
        if self.inherited is not None:  # its successor ended before it began
            self._check_restored(self.inherited, "a superseded switch without a successor", "")
            self.inherited = None
        heart.catalog.refresh()  # as its scanner does: it lists what was adopted while its file was deleted
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
        self.may_stop.clear()
        self.stop_requested.clear()
        return None

    def _at_rest(self) -> bool:
        switcher = self.heart.switcher
        idle = switcher.job() is None and not switcher._queue.waiting
        return idle and all(request.outcome is not None for request in self.heart.requests)

    def _under_way(self) -> object:
        switcher = self.heart.switcher
        return (
            switcher.job(),
            list(switcher._queue.waiting),
            [a.number for a in self.heart.requests if a.outcome is None],
        )

    def _remember(self, job: Job) -> None:
        if job not in self.jobs:
            self.jobs.append(job)

    def _model(self, model_id: str) -> Any:
        return next((m for e in self.heart.engines.values() for m in e.listed.values() if m.id == model_id), None)

    def _reserved(self) -> int:
        """Memory that a load under way will still take. Other programs leave it free here, or loads would fail."""
        views = self.heart.now.instances.values()
        on_host = [v for v in views if v.device == HOST_DEVICE and v.state == "loading" and v.shares is None]
        target = self.heart.switcher.job()
        coming = self._model(target.target) if target is not None else None
        planned = coming.required_bytes if coming is not None else 0
        return max([planned, *(v.reserved_bytes - (v.usage.bytes if v.usage else 0) for v in on_host)])

    # Observing jobs and engines from inside.

    def _watch_jobs(self) -> None:
        procedure = self.heart.switcher._procedure
        run = procedure.run

        def watched(job: Job) -> JobResult:
            self._begins(job)
            result = run(job)
            self._ends(job, result)
            return result

        procedure.run = watched  # type: ignore[method-assign]
        mailbox = self.heart.switcher._mailbox
        after_each = mailbox._after_each

        def checked() -> None:
            try:
                after_each()
            except Exception as error:  # the mailbox would log it and continue
                self.violations.append(f"publishing after a message failed: {error}")

        mailbox._after_each = checked

    def _begins(self, job: Job) -> None:
        """A switch begins: it continues the chain that it superseded, or starts one."""
        if job.request.switches:
            states = self.heart.states()
            running = frozenset(m for m, state in states.items() if state == "running")
            self.chain, self.inherited = self.inherited or ChainRecord(running), None

    def _ends(self, job: Job, result: JobResult) -> None:
        """After a failed or cancelled chain, what ran before runs again, or the error says why not."""
        self.ended[job.id] = self.ended.get(job.id, 0) + 1
        if self.ended[job.id] > 1:
            self.violations.append(f"job {job.id} ended more than once")
        if not job.request.switches:
            return
        watched, self.chain = self.chain, None
        if job.superseded:
            self.inherited = watched
        elif watched is not None and result.error is not None:
            self._check_restored(watched, f"{job.target}, and: {result.error.message}", result.error.message)

    def _check_restored(self, watched: ChainRecord, after: str, said: str) -> None:
        for model_id in watched.running - watched.excused - self.stop_requested:
            back = self.heart.states().get(model_id) in ("running", "loading")
            if not back and f"{model_id} was unloaded and is not back" not in said:
                self.violations.append(f"{model_id} is lost after {after}")

    def _check_stop(self, instance: StubInstance) -> None:
        """Check that an engine may be told to stop an instance that was ready."""
        model_id = instance.model.id
        view = self.heart.now.instances.get(model_id)
        if view is None:
            return
        if model_id == PRESERVED and model_id not in self.may_stop and view.state != "loading":
            self.violations.append(f"{model_id} is preserved, but was unloaded")
        if view.traffic.enter():
            view.traffic.leave()
            self.violations.append(f"{model_id} is stopped while it admits requests")

    def _excuse(self, model_id: str) -> None:
        for watched in (self.chain, self.inherited):
            if watched is not None:
                watched.excused.add(model_id)

    def _excuse_all_of(self, held_as: str | None, model_id: str) -> None:
        for one in MODELS:
            if one.id == model_id or (held_as is not None and one.held_as == held_as):
                self._excuse(one.id)

    def _forget_jobs(self) -> None:
        """Forget the jobs of an app that has ended."""
        self.jobs.clear()
        self.chain = self.inherited = None
        self.may_stop.clear()
        self.stop_requested.clear()
