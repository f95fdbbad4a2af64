"""What happened in a soak test: counts of responses, injected faults, violated invariants. Shared by all clients."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

FAULT_SECONDS = 3.0
"""How long after a fault was injected an error may still be caused by it."""
SHOWN = 40


@dataclass
class Record:
    """Times are seconds of the monotonic clock."""

    operations: Counter[str] = field(default_factory=Counter)
    answers: dict[str, Counter[str]] = field(default_factory=dict)
    status_seconds: list[float] = field(default_factory=list)
    faults: list[tuple[float, str, str]] = field(default_factory=list)
    """Time, kind of fault, and model."""
    violations: list[str] = field(default_factory=list)
    _disturbances: list[tuple[float, float]] = field(default_factory=list)
    _standing: list[tuple[float, frozenset[str]]] = field(default_factory=list)
    """Faults of the environment: when each ended, and the codes that it explains."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def done(self) -> int:
        """Number of finished operations."""
        with self._lock:
            return self.operations.total()

    def finish(self, operation: str) -> None:
        with self._lock:
            self.operations[operation] += 1

    def count(self, operation: str, answer: str) -> None:
        with self._lock:
            self.answers.setdefault(operation, Counter())[answer] += 1

    def violation(self, words: str) -> None:
        """Record the violation of an invariant."""
        with self._lock:
            self.violations.append(words)

    def inject_fault(self, what: str, model: str) -> None:
        with self._lock:
            self.faults.append((time.monotonic(), what, model))

    def faulty_since(self, began: float, model: str | None) -> bool:
        """Whether a fault of this model (of any, for None) may affect a request that began then."""
        with self._lock:
            return any(at > began - FAULT_SECONDS and model in (None, of) for at, _, of in self.faults)

    @contextmanager
    def standing_fault(self, codes: frozenset[str], *, breaks: bool) -> Iterator[None]:
        """Record a fault of the environment, which explains these errors and, with `breaks`, violations connections."""
        with self._lock:
            self._standing.append((float("inf"), codes))
        try:
            with self.disturbance() if breaks else nullcontext():
                yield
        finally:
            with self._lock:
                self._standing[-1] = (time.monotonic(), codes)

    def explained(self, code: str, began: float) -> bool:
        """Whether a fault of the environment explains an error of a request that began then."""
        with self._lock:
            return any(ended > began - FAULT_SECONDS and code in codes for ended, codes in self._standing)

    @contextmanager
    def disturbance(self) -> Iterator[None]:
        """Record that the app is being restarted or killed: connections may break."""
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
        """The counts as a table, the times of the status request, and every violation."""
        faults = Counter(what for _, what, _ in self.faults)
        lines = [f"{'operation':<28}{'times':>6}  answers"]
        for name, times in sorted(self.operations.items()):
            lines.append(f"{name:<28}{times:>6}  {_listed(self.answers.get(name, Counter()))}")
        lines.append(f"{'all':<28}{self.operations.total():>6}  {_listed(self._by_status())}")
        lines.append(f"faults injected: {_listed(faults) or 'none'}")
        lines.append(f"GET /v1/models/status: {say_times(self.status_seconds)}")
        if self.violations:
            lines.append(f"VIOLATIONS: {len(self.violations)}")
            lines += [f"  {words}" for words in self.violations[:SHOWN]]
        else:
            lines.append("violations: none")
        return "\n".join(lines)

    def _by_status(self) -> Counter[str]:
        of_all: Counter[str] = Counter()
        for answers in self.answers.values():
            for answer, times in answers.items():
                of_all[answer.split()[0] if answer[0].isdigit() else answer] += times
        return of_all


def say_times(seconds: list[float]) -> str:
    """Percentiles of durations, in milliseconds."""
    if not seconds:
        return "no requests"
    ordered = sorted(seconds)

    def at(share: float) -> str:
        return f"{ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000:.1f} ms"

    return f"{len(ordered)} times, p50 {at(0.5)}, p99 {at(0.99)}, longest {at(1.0)}"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{what} × {times}" for what, times in sorted(counts.items()))
