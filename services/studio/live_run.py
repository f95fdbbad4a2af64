"""One run while it is under way: its current state, and the log of its events, which any number of clients follow.

The log is the only buffer: a follower holds nothing but its place in it, so a slow one costs no memory. The bounds of a
request, and of what a run waits for, bound its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from services.providers.ports import Capability
from services.scheduling import Scheduler
from services.store.records import RunState, StudioCandidate, StudioRun
from services.studio.ranking import ranked, with_ranks
from services.studio.request import Phase

EventName = Literal["providers", "phase", "candidate", "wait", "note", "result"]

HEARTBEAT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Activity:
    """What a run does now: which calls of which iteration, by whom, and how many are done.

    `making_ready`: the provider's model is being loaded for them.
    """

    phase: Phase
    iteration: int
    provider: str
    model: str | None
    making_ready: bool
    done: int
    total: int
    switching_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """A provider asked to be left alone until `until` (Unix seconds), for a reason in its words."""

    provider: str
    seconds: float
    until: float
    message: str


@dataclass(frozen=True, slots=True)
class RunView:
    """A run and its candidates at one moment. `version` grows with every change; 0 if the run was read from the store.

    `activity` and `wait` are None when there is nothing to say, as after the end.
    """

    run: StudioRun
    candidates: tuple[StudioCandidate, ...]
    activity: Activity | None = None
    wait: Wait | None = None
    cancelling: bool = False
    version: int = 0

    @property
    def ranking(self) -> tuple[StudioCandidate, ...]:
        """The scored candidates, the best first."""
        return tuple(ranked(self.candidates))

    def candidate(self, number: int) -> StudioCandidate | None:
        return next((c for c in self.candidates if c.number == number), None)


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One event of a run, numbered from 1. `value` is the state that it tells about."""

    number: int
    name: EventName
    value: RunView | Activity | StudioCandidate | Wait | str


class LiveRun:
    """A run under way. The job changes it, clients read and follow it. Thread-safe.

    `on_change` is called after each change that is worth keeping, with the numbers of the changed candidates.
    It must not block.
    """

    def __init__(self, run: StudioRun, scheduler: Scheduler, on_change: Callable[[set[int]], object]) -> None:
        self._scheduler = scheduler
        self._on_change = on_change
        self._changed = scheduler.condition()
        self._candidates: dict[int, StudioCandidate] = {}
        self._view = RunView(run, (), version=1)
        self._events: list[RunEvent] = [RunEvent(1, "providers", self._view)]

    @property
    def view(self) -> RunView:
        return self._view

    def put(self, *candidates: StudioCandidate) -> None:
        """Add candidates, or replace them by their newer states."""
        with self._changed:
            self._candidates.update((c.number, c) for c in candidates)
            self._publish(saving={c.number for c in candidates}, candidates=tuple(self._candidates.values()))
            for candidate in candidates:
                self._append("candidate", candidate)

    def begin(self, activity: Activity) -> None:
        """Tell that a phase begins, or that its provider is ready."""
        with self._changed:
            self._publish(activity=activity)
            self._append("phase", activity)

    def step(self) -> None:
        """Count one more of the current phase's calls as done."""
        with self._changed:
            activity = self._view.activity
            if activity is not None:
                self._publish(activity=replace(activity, done=activity.done + 1))

    def waits(self, wait: Wait) -> None:
        """Tell that a provider has to be waited for."""
        with self._changed:
            self._publish(wait=wait)
            self._append("wait", wait)

    def waited(self) -> None:
        """Tell that the wait is over."""
        with self._changed:
            if self._view.wait is not None:
                self._publish(wait=None)

    def note(self, sentence: str) -> None:
        """Tell what did not go as it should, and keep it."""
        with self._changed:
            self._publish(saving=set(), run=replace(self._view.run, notes=(*self._view.run.notes, sentence)))
            self._append("note", sentence)

    def count_call(self, phase: Phase) -> int:
        """Count a call; return how many of its phase there were."""
        with self._changed:
            calls = dict(self._view.run.calls)
            calls[phase] = calls.get(phase, 0) + 1
            self._publish(run=replace(self._view.run, calls=calls))
            return calls[phase]

    def served_by(self, capability: str, names: Mapping[Capability, Mapping[str, str | None]], seconds: float) -> None:
        """Note which models serve, and the seconds that making one of them ready took."""
        with self._changed:
            run = self._view.run
            spent = {**run.switching_seconds, capability: run.switching_seconds.get(capability, 0.0) + seconds}
            self._publish(
                saving=set(),
                run=replace(
                    run,
                    providers={str(capability): served for capability, served in names.items()},
                    switching_seconds=spent,
                ),
            )

    def cancelling(self) -> None:
        """Tell that the run is being cancelled."""
        with self._changed:
            if not self._view.run.final:
                self._publish(cancelling=True)

    def finish(self, state: RunState, error: str | None = None, message: str | None = None) -> None:
        """End the run, unless it has ended: rank what has a score, tell the result."""
        with self._changed:
            if self._view.run.final:
                return
            self._candidates = {c.number: c for c in with_ranks(self._view.candidates)}
            self._publish(
                saving=set(self._candidates),
                run=replace(
                    self._view.run, state=state, error=error, message=message, finished_at=self._scheduler.time()
                ),
                candidates=tuple(self._candidates.values()),
                activity=None,
                wait=None,
                cancelling=False,
            )
            self._append("result", self._view)

    def wait_final(self, timeout: float) -> bool:
        """Wait for the end, at most `timeout` seconds; return whether it has come."""
        with self._changed:
            return self._changed.wait_for(lambda: self._view.run.final, timeout)

    def follow(self, after: int = 0, heartbeat: float = HEARTBEAT_SECONDS) -> Iterator[RunEvent | None]:
        """Yield every event numbered above `after`, until the result; None after `heartbeat` seconds without one."""
        seen = after
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._events) > seen or self._view.run.final, heartbeat)  # noqa: B023
                fresh, final = self._events[seen:], self._view.run.final
            yield from fresh
            seen += len(fresh)
            if final and not fresh:
                return
            if not fresh:
                yield None

    def _publish(self, saving: set[int] | None = None, **changes: object) -> None:
        """Replace the view. What is worth keeping names the candidates that have changed (`saving`)."""
        self._view = replace(self._view, version=self._view.version + 1, **changes)  # type: ignore[arg-type]
        if saving is not None:
            self._on_change(saving)
        self._changed.notify_all()

    def _append(self, name: EventName, value: RunView | Activity | StudioCandidate | Wait | str) -> None:
        self._events.append(RunEvent(len(self._events) + 1, name, value))
        self._changed.notify_all()


def replayed(view: RunView) -> Iterator[RunEvent]:
    """Yield the events of a run that is over, as far as the store has them: providers, notes, candidates, result."""
    yield RunEvent(1, "providers", view)
    values: list[tuple[EventName, str | StudioCandidate]] = [("note", note) for note in view.run.notes]
    values += [("candidate", candidate) for candidate in view.candidates]
    for number, (name, value) in enumerate(values, 2):
        yield RunEvent(number, name, value)
    yield RunEvent(len(values) + 2, "result", view)
