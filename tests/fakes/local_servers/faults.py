"""The faults that the fake servers show on demand, and what both have in common.

An environment variable (FAKE_FLUX_FAULT, FAKE_VISION_FAULT) lists faults as NAME[:VALUE][@TEXT], separated by commas.
With TEXT, a fault of a request happens only to those whose prompt contains it.

Loading:

    slow-load:SECONDS      the load takes that long (5), with progress in bytes
    download:BYTES         a slow load that reports `downloading`, with that many bytes in all (12 GB, 600 MB)
    die-loading            the load fails: a traceback on stderr, `failed` in /health, then exit code 1
    load-oom               the same, because memory is short

Health and life:

    hang-health            /health accepts and never answers
    ignore-sigterm         keeps running after SIGTERM
    hold:MB                allocates that much memory while it loads; /health reports it
    needs:MB               /health reports that as needed (50)

Requests:

    slow:SECONDS           each step (a score has one) takes that long (1)
    stuck                  the work never ends, and no cancel ends it
    oom                    507 with figures
    fail                   500
    die-generating         the process exits with code 3 in the middle of the work
    no-image               flux: the answer has the form of a picture, and is none
    nan                    vision: the scores are NaN, which is not even JSON
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "services" / "local_servers"))

from errors import OutOfMemoryError, RequestError
from memory import resident_bytes
from serving import Progress
from work import Job

MB = 1_000_000
FOREVER = 10**6
PARTS = 20


class Faults:
    """The faults in an environment variable."""

    def __init__(self, variable: str) -> None:
        self._faults: dict[str, tuple[str, str]] = {}
        for entry in filter(None, os.environ.get(variable, "").split(",")):
            fault, _, wanted = entry.partition("@")
            name, _, value = fault.partition(":")
            self._faults[name] = (value, wanted)

    def __contains__(self, name: str) -> bool:
        return name in self._faults

    def applies(self, name: str, prompt: str) -> bool:
        return name in self._faults and self._faults[name][1] in prompt

    def value(self, name: str, default: float) -> float:
        return float(self._faults.get(name, ("", ""))[0] or default)


class FakeModel:
    """The load and the health of a fake, and the faults of its requests."""

    def __init__(self, model: str, faults: Faults, download_bytes: int) -> None:
        self.model = model
        self.faults = faults
        self._download_bytes = download_bytes
        self._held = b""

    def load(self, report: Callable[[Progress], None]) -> None:
        self._held = os.urandom(1) * int(self.faults.value("hold", 0) * MB)
        slow = "slow-load" in self.faults or "download" in self.faults
        seconds = self.faults.value("slow-load", 5) if slow else 0.0
        total = int(self.faults.value("download", self._download_bytes))
        for part in range(PARTS if slow else 1):
            report(Progress("downloading" if "download" in self.faults else "loading", total * part // PARTS, total))
            time.sleep(seconds / PARTS)
        if "load-oom" in self.faults:
            raise OutOfMemoryError("cpu", 2_000 * MB, 12_000 * MB)
        if "die-loading" in self.faults:
            raise RuntimeError("The file transformer/model.safetensors is damaged")

    def health(self) -> Mapping[str, object]:
        if "hang-health" in self.faults:
            time.sleep(FOREVER)
        needed = int(self.faults.value("needs", 50) * MB)
        return {"device": "cpu", "memory_bytes": resident_bytes(), "needed_bytes": needed}

    def work(self, prompt: str, steps: int, job: Job) -> None:
        """Do the steps of one request, with the faults that apply to its prompt."""
        for step in range(1, steps + 1):
            if self.faults.applies("stuck", prompt):
                time.sleep(FOREVER)
            if self.faults.applies("slow", prompt):
                time.sleep(self.faults.value("slow", 1))
            if self.faults.applies("die-generating", prompt):
                os._exit(3)
            if self.faults.applies("oom", prompt):
                raise OutOfMemoryError("cpu", 2_000 * MB, 12_000 * MB)
            if self.faults.applies("fail", prompt):
                raise RequestError(500, "failed", "RuntimeError: The fake was told to fail")
            job.step(step, steps)
