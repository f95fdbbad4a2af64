"""A scheduler with a virtual clock: greenlets run in an order drawn from a seed, and time passes only when all of them
wait. The same seed gives the same run."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from types import TracebackType

from greenlet import GreenletExit, getcurrent, greenlet

EPOCH = 1_800_000_000.0
"""The value of `time()` at the beginning."""
TURNS_AT_ONCE = 20_000
"""More turns than this without time passing mean that a greenlet loops without waiting."""


class VirtualScheduler:
    """Implements `services.scheduling.Scheduler`. The greenlet that created it drives it: others run while it waits."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._driver = getcurrent()
        self._now = 0.0
        self._ready: list[greenlet] = []
        self._timers: list[tuple[float, int, greenlet]] = []
        self._waits: dict[greenlet, int] = {}
        """The current wait of each greenlet: the timer of an earlier wait is ignored."""
        self._order = itertools.count()
        self._alive: set[greenlet] = set()
        self.dead = False
        self.failures: list[BaseException] = []
        """Exceptions that escaped from greenlets; tests assert that there are none."""

    def now(self) -> float:
        return self._now

    def time(self) -> float:
        return EPOCH + self._now

    def condition(self) -> VirtualCondition:
        return VirtualCondition(self)

    def spawn(self, name: str, function: Callable[[], object]) -> None:
        def run() -> None:
            try:
                function()
            except GreenletExit:
                pass
            except BaseException as error:
                error.add_note(f"in greenlet {name}")
                self.failures.append(error)
            finally:
                self._alive.discard(getcurrent())

        if not self.dead:
            started = greenlet(run, parent=self._driver)
            self._alive.add(started)
            self._ready.append(started)

    def pause(self, seconds: float) -> None:
        """Let other greenlets run for so long."""
        self.condition().wait_for(lambda: False, seconds)

    def run_until(self, predicate: Callable[[], bool], timeout: float) -> bool:
        """Let greenlets run, and time pass, until `predicate` holds or `timeout` virtual seconds are over."""
        assert getcurrent() is self._driver, "only the driver lets time pass"
        deadline = self._now + timeout
        turns = 0
        while not predicate():
            if self._ready:
                turns += 1
                assert turns < TURNS_AT_ONCE, f"{self._ready[:3]} loop without waiting"
                self._take_turn()
            elif self._timers and self._timers[0][0] <= deadline:
                at, number, sleeper = heapq.heappop(self._timers)
                if self._waits.get(sleeper) == number:
                    turns = 0 if at > self._now else turns
                    self._now = max(self._now, at)
                    self.wake(sleeper)
            else:
                self._now = deadline
                return predicate()
        return True

    def settle(self) -> None:
        """Run all greenlets that can run without time passing."""
        while self._ready:
            self._take_turn()

    def begin_wait(self, deadline: float | None) -> None:
        """Register that the current greenlet waits, until the deadline at the latest."""
        self._waits[getcurrent()] = number = next(self._order)
        if deadline is not None:
            heapq.heappush(self._timers, (deadline, number, getcurrent()))

    def end_wait(self) -> None:
        self._waits.pop(getcurrent(), None)

    def wait(self) -> None:
        """Wait until the current greenlet is woken."""
        assert getcurrent() is not self._driver
        if self.dead:
            raise GreenletExit
        self._driver.switch()
        if self.dead:
            raise GreenletExit

    def wake(self, sleeper: greenlet) -> None:
        if not sleeper.dead and sleeper not in self._ready:
            self._ready.append(sleeper)

    def kill(self) -> None:
        """End every greenlet where it is, as the death of a process does."""
        self.dead = True
        for one in list(self._alive):
            one.throw(GreenletExit)
        self._ready.clear()
        self._timers.clear()
        self._waits.clear()

    @property
    def driven(self) -> bool:
        return getcurrent() is self._driver

    def _take_turn(self) -> None:
        index = self._random.randrange(len(self._ready))
        self._ready[index], self._ready[-1] = self._ready[-1], self._ready[index]
        self._ready.pop().switch()


class VirtualCondition:
    """The parts of `threading.Condition` that the app uses. Greenlets are never preempted: no lock is needed."""

    def __init__(self, scheduler: VirtualScheduler) -> None:
        self._scheduler = scheduler
        self._waiting: list[greenlet] = []

    def __enter__(self) -> VirtualCondition:
        return self

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _b: TracebackType | None) -> None:
        return None

    def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        if self._scheduler.driven:
            return self._scheduler.run_until(predicate, 1e6 if timeout is None else timeout)
        if predicate():
            return True
        deadline = None if timeout is None else self._scheduler.now() + timeout
        current = getcurrent()
        self._waiting.append(current)
        self._scheduler.begin_wait(deadline)
        try:
            while not predicate():
                if deadline is not None and self._scheduler.now() >= deadline:
                    return False
                self._scheduler.wait()
        finally:
            self._scheduler.end_wait()
            self._waiting.remove(current)
        return True

    def notify_all(self) -> None:
        for waiting in list(self._waiting):
            self._scheduler.wake(waiting)
