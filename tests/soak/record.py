"""What happened in a soak: answers counted, faults that were ordered, promises found broken. Shared by all clients."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

FAULT_SECONDS = 3.0
"""How long after a fault was ordered an error can still come of it: until it is noticed."""
SHOWN = 40


@dataclass
class Record:
    """Times are seconds of the monotonic clock."""

    operations: Counter[str] = field(default_factory=Counter)
    answers: dict[str, Counter[str]] = field(default_factory=dict)
    status_seconds: list[float] = field(default_factory=list)
    faults: list[tuple[float, str, str]] = field(default_factory=list)
    """When, what was done, and to which model."""
    broken: list[str] = field(default_factory=list)
    _disturbances: list[tuple[float, float]] = field(default_factory=list)
    _standing: list[tuple[float, frozenset[str]]] = field(default_factory=list)
    """Faults around the app: when each was over, and the codes that it explains."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def done(self) -> int:
        """Operations that are over."""
        with self._lock:
            return self.operations.total()

    def finish(self, operation: str) -> None:
        with self._lock:
            self.operations[operation] += 1

    def count(self, operation: str, answer: str) -> None:
        with self._lock:
            self.answers.setdefault(operation, Counter())[answer] += 1

    def breach(self, words: str) -> None:
        """A promise is broken."""
        with self._lock:
            self.broken.append(words)

    def order_fault(self, what: str, model: str) -> None:
        with self._lock:
            self.faults.append((time.monotonic(), what, model))

    def faulty_since(self, began: float, model: str | None) -> bool:
        """Whether a fault of a model, or of any for None, can be met by a request that began then."""
        with self._lock:
            return any(at > began - FAULT_SECONDS and model in (None, of) for at, _, of in self.faults)

    @contextmanager
    def standing_fault(self, codes: frozenset[str], *, breaks: bool) -> Iterator[None]:
        """Something is wrong around the app: these errors are explained by it, and connections that break."""
        with self._lock:
            self._standing.append((float("inf"), codes))
        try:
            with self.disturbance() if breaks else nullcontext():
                yield
        finally:
            with self._lock:
                self._standing[-1] = (time.monotonic(), codes)

    def explained(self, code: str, began: float) -> bool:
        """Whether a fault around the app explains an error of a request that began then."""
        with self._lock:
            return any(ended > began - FAULT_SECONDS and code in codes for ended, codes in self._standing)

    @contextmanager
    def disturbance(self) -> Iterator[None]:
        """The app is being restarted or killed: connections may break."""
        with self._lock:
            self._disturbances.append((time.monotonic(), float("inf")))
        try:
            yield
        finally:
            with self._lock:
                began, _ = self._disturbances.pop()
                self._disturbances.append((began, time.monotonic()))

    def disturbed_since(self, began: float) -> bool:
        with self._lock:
            return any(ended > began for _, ended in self._disturbances)

    def summary(self) -> str:
        """The counts as a table, the times of the status, and every broken promise."""
        faults = Counter(what for _, what, _ in self.faults)
        lines = [f"{'operation':<28}{'times':>6}  answers"]
        for name, times in sorted(self.operations.items()):
            lines.append(f"{name:<28}{times:>6}  {_listed(self.answers.get(name, Counter()))}")
        lines.append(f"{'all':<28}{self.operations.total():>6}  {_listed(self._by_status())}")
        lines.append(f"faults ordered: {_listed(faults) or 'none'}")
        lines.append(f"GET /v1/models/status: {say_times(self.status_seconds)}")
        if self.broken:
            lines.append(f"BROKEN PROMISES: {len(self.broken)}")
            lines += [f"  {words}" for words in self.broken[:SHOWN]]
        else:
            lines.append("broken promises: none")
        return "\n".join(lines)

    def _by_status(self) -> Counter[str]:
        of_all: Counter[str] = Counter()
        for answers in self.answers.values():
            for answer, times in answers.items():
                of_all[answer.split()[0] if answer[0].isdigit() else answer] += times
        return of_all


def say_times(seconds: list[float]) -> str:
    """Percentiles of some durations, in milliseconds."""
    if not seconds:
        return "never asked"
    ordered = sorted(seconds)

    def at(share: float) -> str:
        return f"{ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000:.1f} ms"

    return f"{len(ordered)} times, p50 {at(0.5)}, p99 {at(0.99)}, longest {at(1.0)}"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{what} × {times}" for what, times in sorted(counts.items()))
