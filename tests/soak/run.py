"""A whole soak test: rounds of operations by all clients at once, with a check at rest after each."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.soak.client import Client, ConnectionLost
from tests.soak.faults import FAULTS, FULL_DISK, LONGEST_SECONDS, Fault
from tests.soak.operations import OPERATIONS, timed_status
from tests.soak.oracle import Figures, Oracle
from tests.soak.record import Record, say_times
from tests.soak.world import World
from tests.support.console import wait_until

CLIENTS = 6
LOOK_SECONDS = 0.25
"""Interval at which one more client requests the status beside the operations, like a tab."""
RESTART_SECONDS = 60.0
LONGEST_OPERATION = 5.0
"""Seconds, on average; a soak test that needs more per operation is stuck."""

Middle = Callable[[World, Record], None]


@dataclass(frozen=True)
class Round:
    """A share of the operations. `middle` runs when half of them are done, `fault` lasts until then."""

    name: str
    middle: Middle | None = None
    fault: Fault | None = None


def soak(
    folder: Path, operations: int, seed: int, report: Callable[[str], None], faults: Sequence[Fault] = FAULTS
) -> Record:
    """Run all rounds, `report` a line after each, and return the record. Everything started is ended in any case."""
    record = Record()
    world = World(folder)
    try:
        world.start()
        _all_rounds(world, record, choose_rounds(world, faults, report), operations, seed, report)
        oracle = Oracle(world, record)
        oracle.check_survival("restart-api", lambda: _restart(world, record, confirm=False))
        oracle.check_survival("kill -9", lambda: _kill_worker(world, record))
        oracle.check_end()
    finally:
        world.close()
    return record


def choose_rounds(world: World, faults: Sequence[Fault], report: Callable[[str], None]) -> list[Round]:
    """Four rounds without a fault of the environment, then one per fault."""
    rounds = [Round("no fault"), Round("restart", _restart), Round("kill -9", _kill_worker), Round("no fault")]
    for fault in faults:
        if fault.name == FULL_DISK and not world.faults.can_fill_disk:
            report(f"{fault.name} is skipped: a separate file system needs root")
        else:
            rounds.append(Round(fault.name, fault=fault))
    return rounds


def _all_rounds(
    world: World, record: Record, rounds: Sequence[Round], operations: int, seed: int, report: Callable[[str], None]
) -> None:
    """Run each round with its share of the operations, then check the console at rest."""
    steps = [choose(seed, number, operations) for number in range(CLIENTS)]
    before: Figures | None = None
    for number, one in enumerate(rounds):
        mine = [own[len(own) * number // len(rounds) : len(own) * (number + 1) // len(rounds)] for own in steps]
        began, asked, done = time.monotonic(), len(record.status_seconds), record.done
        _round(world, record, mine, one)
        figures = Oracle(world, record).check_rest()
        seconds = time.monotonic() - began
        held = "the console does not answer"
        if figures is not None:
            same = before is not None and before.pid == figures.pid
            held = figures.since(before) if same and before is not None else str(figures)
            grown = figures.grown(before) if same and before is not None else None
            if grown is not None:
                record.violation(f"{one.name} left the worker with {grown}")
            before = before if same else figures
        report(
            f"{one.name}: {record.done - done} operations, {seconds:.0f} s, {len(record.violations)} violations so "
            f"far; at rest: {held}; status: {say_times(record.status_seconds[asked:])}"
        )


Step = tuple[str, random.Random]


def choose(seed: int, client: int, operations: int) -> list[Step]:
    """The operations of one client, each with its own random numbers, so that one doesn't change the next."""
    chance = random.Random(f"{seed}/{client}")
    times = operations // CLIENTS + (client < operations % CLIENTS)
    names = chance.choices(list(OPERATIONS), [weight for weight, _ in OPERATIONS.values()], k=times)
    return [(name, random.Random(f"{seed}/{client}/{number}")) for number, name in enumerate(names)]


def _round(world: World, record: Record, steps: list[list[Step]], one: Round) -> None:
    """Run one round with all clients at once."""
    half = record.done + sum(map(len, steps)) // 2
    over = threading.Event()
    threads = [threading.Thread(target=_act, args=(world, record, own), daemon=True) for own in steps]
    watcher = threading.Thread(target=_watch, args=(world, record, over), daemon=True)
    deadline = time.monotonic() + LONGEST_OPERATION * sum(map(len, steps)) + RESTART_SECONDS
    with ExitStack() as fault:
        if one.fault is not None:
            fault.enter_context(record.standing_fault(one.fault.codes, breaks=one.fault.breaks))
            fault.enter_context(one.fault.during(world))
        lifted = time.monotonic() + LONGEST_SECONDS
        for thread in (watcher, *threads):
            thread.start()
        while one.fault is not None and record.done < half and time.monotonic() < lifted:
            time.sleep(0.05)
    if one.middle is not None:
        wait_until(lambda: record.done >= half, "half of the operations", deadline - time.monotonic())
        one.middle(world, record)
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    over.set()
    watcher.join(RESTART_SECONDS)
    if any(thread.is_alive() for thread in threads):
        raise AssertionError(f"the clients got stuck after {record.done} operations:\n{record.summary()}")


def _act(world: World, record: Record, steps: list[Step]) -> None:
    client = Client(world, record)
    for name, dice in steps:
        _, operation = OPERATIONS[name]
        client.doing = name.replace("_", " ")
        try:
            operation(client, dice)
        except ConnectionLost:
            pass
        except Exception:
            record.violation(f"{client.doing}: {traceback.format_exc()}")
        record.finish(client.doing)
    client.close()


def _watch(world: World, record: Record, over: threading.Event) -> None:
    """Poll the status like a tab, and check that it never goes back."""
    client = Client(world, record)
    client.doing = "(a tab)"
    shown: dict[str, Any] = {}
    while not over.wait(LOOK_SECONDS):
        began = time.monotonic()
        try:
            now = timed_status(client)
        except ConnectionLost:
            continue
        if now is not None:
            if shown and not record.disturbed_since(began - LOOK_SECONDS):
                _compare(shown, now, record)
            shown = now
    client.close()


def _compare(before: dict[str, Any], now: dict[str, Any], record: Record) -> None:
    """Compare two successive statuses of the same run of the app."""
    if now["version"] < before["version"]:
        record.violation(f"the status went back from version {before['version']} to {now['version']}")
    then, switch = before["switch"], now["switch"]
    if switch is None:
        return
    if switch["progress"] >= 100 or (
        then is not None and then["switch_id"] == switch["switch_id"] and switch["progress"] < then["progress"]
    ):
        record.violation(f"the progress of a switch went from {then} to {switch}")


def _restart(world: World, record: Record, *, confirm: bool = True) -> None:
    """Restart the app with another setting, cancelling any switch that is under way."""
    world.set_confirmation(confirm)
    client = Client(world, record)
    client.doing = "(restart-api)"
    before = world.worker.pid
    deadline = time.monotonic() + RESTART_SECONDS
    with record.disturbance():
        while client.post("/api/restart-api").status_code != 200:
            client.ask("DELETE", "/v1/models/switch")
            assert time.monotonic() < deadline, "a switch was always under way, so the app could not be restarted"
        wait_until(lambda: _back(world, before), "the app to be back after restart-api", RESTART_SECONDS)
    client.close()


def _kill_worker(world: World, record: Record) -> None:
    world.set_confirmation(False)
    before = world.worker
    with record.disturbance():
        before.kill()
        wait_until(lambda: _back(world, before.pid), "the app to be back after kill -9", RESTART_SECONDS)


def _back(world: World, before: int) -> bool:
    """Whether a worker other than the one before serves requests."""
    client = Client(world, Record())
    try:
        return client.get("/readyz").status_code == 200 and world.worker.pid != before
    except (ConnectionLost, IndexError):
        return False
    finally:
        client.close()
