"""Counts of what the switcher has done since the app started, for `/metrics`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from services.switching.jobs import Job, JobResult, Outcome


@dataclass(eq=False)
class Tally:
    """Switches and restarts by outcome, their seconds from the request to the end, and loads that failed by model.

    The switcher's messages alone write to it; anyone may read it.
    """

    switches: Counter[Outcome] = field(default_factory=Counter)
    seconds: dict[Outcome, float] = field(default_factory=dict)
    failed_loads: Counter[str] = field(default_factory=Counter)

    def note(self, job: Job, result: JobResult) -> None:
        """Count a job that has ended."""
        if not job.request.switches:
            return
        self.switches[result.outcome] += 1
        self.seconds[result.outcome] = self.seconds.get(result.outcome, 0.0) + job.seconds
        if result.error is not None and result.error.code == "load_failed":
            self.failed_loads[job.target] += 1
