"""Whose turn it is: the jobs that wait, the one that may change what is loaded, and the one that only fetches.

Part of the switcher's state, and changed by its messages alone. No I/O, and nothing waits here but a job for its turn.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from services.scheduling import Condition
from services.switching.jobs import Job


@dataclass(eq=False)
class Turn:
    """A job that only fetches, and whether it wants to go on with what changes others."""

    job: Job
    changed: Condition
    wanted: bool = False
    granted: bool = False

    def grant(self) -> None:
        with self.changed:
            self.granted = True
            self.changed.notify_all()

    def wait(self) -> None:
        """Wait for it. Bounded by the jobs that were let in between, each of which is."""
        with self.changed:
            self.changed.wait_for(lambda: self.granted)


@dataclass(eq=False)
class Agenda:
    """One slot, which `running` holds; `fetching` has given it up for a while."""

    waiting: deque[Job] = field(default_factory=deque)
    running: Job | None = None
    fetching: Turn | None = None

    @property
    def current(self) -> Job | None:
        """The job under way: the one that fetches, even while another one is let in between."""
        return self.fetching.job if self.fetching is not None else self.running

    @property
    def idle(self) -> bool:
        return self.running is None and self.fetching is None

    @property
    def all(self) -> list[Job]:
        """The job under way and those that wait, in order."""
        current = self.current
        return [*([current] if current is not None else []), *self.waiting]

    @property
    def queued(self) -> tuple[str, ...]:
        return tuple(job.target for job in self.waiting)

    def waiting_switches(self) -> list[Job]:
        return [job for job in self.waiting if job.request.switches]

    def latest_switch(self) -> Job | None:
        """The switch that people mean: the one under way, or the one that supersedes it."""
        current = self.current if self.current is not None and self.current.request.switches else None
        if current is not None and not current.superseded:
            return current
        waiting = self.waiting_switches()
        heirs = [w for w in waiting if current is not None and w.chain is current.chain]
        return next(iter(heirs or waiting), current)

    def switch_with(self, switch_id: str) -> Job | None:
        return next((job for job in self.all if job.id == switch_id and job.request.switches), None)

    def owes(self, job: Job) -> bool:
        """Whether it has to run even if cancelled: to restore what a switch before it has unloaded, or may yet."""
        current = self.current
        return bool(job.chain.unloaded) or (current is not None and job.chain is current.chain)

    def next(self) -> Job | None:
        """Give the slot, if it is free, to the next job; returns it if it has to be started.

        That is the one that has fetched what it needs, else the first that waits. While one fetches, which may take
        hours, the first that only unloads another model.
        """
        if self.running is not None:
            return None
        turn = self.fetching
        if turn is not None and turn.wanted:
            self.fetching, self.running = None, turn.job
            turn.grant()
            return None
        self.running = next((job for job in self.waiting if turn is None or _fits_between(job, turn)), None)
        if self.running is not None:
            self.waiting.remove(self.running)
        return self.running

    def release(self, job: Job, changed: Condition) -> None:
        """The running job only fetches from now on."""
        assert self.running is job, "only the running job gives up the slot"
        self.running, self.fetching = None, Turn(job, changed)

    def want(self, job: Job) -> Turn:
        """It wants the slot again; the turn says when it has it."""
        assert self.fetching is not None, "only a job that gave up the slot wants it again"
        assert self.fetching.job is job, "only a job that gave up the slot wants it again"
        self.fetching.wanted = True
        return self.fetching

    def finish(self, job: Job) -> None:
        if self.running is job:
            self.running = None


def _fits_between(job: Job, turn: Turn) -> bool:
    return job.request.kind == "stop" and job.target != turn.job.target
