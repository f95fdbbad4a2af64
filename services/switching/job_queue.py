"""The switcher's queue: jobs that wait, the one that may change what is loaded, and the one that only fetches.

Part of the switcher's state: changed by messages in its mailbox only. No I/O, and nothing here blocks except
`FetchingJob.wait`, which runs in the job's own greenlet.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from services.scheduling import Condition
from services.switching.jobs import Job


@dataclass(eq=False)
class FetchingJob:
    """A job that gave up its slot while it only fetches files, and whether it wants the slot back."""

    job: Job
    changed: Condition
    wants_slot: bool = False
    granted: bool = False

    def grant(self) -> None:
        with self.changed:
            self.granted = True
            self.changed.notify_all()

    def wait(self) -> None:
        """Block until the slot is granted. Bounded, because each job that runs in between is bounded."""
        with self.changed:
            self.changed.wait_for(lambda: self.granted)


@dataclass(eq=False)
class JobQueue:
    """The waiting jobs and a single slot, held by `running`. `fetching` gave it up while it only fetches."""

    waiting: deque[Job] = field(default_factory=deque)
    running: Job | None = None
    fetching: FetchingJob | None = None

    @property
    def current(self) -> Job | None:
        """The job under way. A fetching job stays current while another one runs in between."""
        return self.fetching.job if self.fetching is not None else self.running

    @property
    def idle(self) -> bool:
        return self.running is None and self.fetching is None

    @property
    def all(self) -> list[Job]:
        """The current job, then the waiting ones in order."""
        current = self.current
        return [*([current] if current is not None else []), *self.waiting]

    @property
    def queued(self) -> tuple[str, ...]:
        return tuple(job.target for job in self.waiting)

    def waiting_switches(self) -> list[Job]:
        return [job for job in self.waiting if job.request.switches]

    def latest_switch(self) -> Job | None:
        """Return the switch that a cancel without an id means: the current one, or the one that supersedes it."""
        current = self.current if self.current is not None and self.current.request.switches else None
        if current is not None and not current.superseded:
            return current
        waiting = self.waiting_switches()
        heirs = [w for w in waiting if current is not None and w.chain is current.chain]
        return next(iter(heirs or waiting), current)

    def switch_with(self, switch_id: str) -> Job | None:
        return next((job for job in self.all if job.id == switch_id and job.request.switches), None)

    def must_run(self, job: Job) -> bool:
        """Return whether a waiting job has to run even when cancelled.

        It has to when its chain has unloaded models that must be restored, or when the current job, which shares its
        chain, may still unload some.
        """
        current = self.current
        return bool(job.chain.unloaded) or (current is not None and job.chain is current.chain)

    def next(self) -> Job | None:
        """Give the slot, if it is free, to the next job; return that job if the caller has to start it.

        The next job is the fetching one once it wants the slot back, else the first that waits. While a job fetches,
        which may take hours, only jobs that stop another model run in between.
        """
        if self.running is not None:
            return None
        fetching = self.fetching
        if fetching is not None and fetching.wants_slot:
            self.fetching, self.running = None, fetching.job
            fetching.grant()
            return None
        self.running = next((job for job in self.waiting if fetching is None or _fits_between(job, fetching)), None)
        if self.running is not None:
            self.waiting.remove(self.running)
        return self.running

    def release(self, job: Job, changed: Condition) -> None:
        """Take the slot from the running job, which only fetches from now on."""
        assert self.running is job, "only the running job gives up the slot"
        self.running, self.fetching = None, FetchingJob(job, changed)

    def request_slot(self, job: Job) -> FetchingJob:
        """Note that the fetching job wants the slot back; wait on the returned object for it."""
        assert self.fetching is not None, "only a job that gave up the slot wants it again"
        assert self.fetching.job is job, "only a job that gave up the slot wants it again"
        self.fetching.wants_slot = True
        return self.fetching

    def finish(self, job: Job) -> None:
        if self.running is job:
            self.running = None


def _fits_between(job: Job, fetching: FetchingJob) -> bool:
    return job.request.kind == "stop" and job.target != fetching.job.target
