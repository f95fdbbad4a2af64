"""A soak from its start to its end: rounds of operations by all clients at once, and a look at rest after each."""

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

from tests.soak.client import Client, Lost
from tests.soak.faults import FAULTS, FULL_DISK, LONGEST_SECONDS, Fault
from tests.soak.operations import OPERATIONS, look
from tests.soak.oracle import Figures, Oracle
from tests.soak.record import Record, say_times
from tests.soak.world import World
from tests.support.console import wait_until

CLIENTS = 6
LOOK_SECONDS = 0.25
"""How often the status is asked for beside the operations, as a tab does."""
RESTART_SECONDS = 60.0
LONGEST_OPERATION = 5.0
"""In the mean; a soak that takes longer than that for each has got stuck."""

Middle = Callable[[World, Record], None]


@dataclass(frozen=True)
class Round:
    """A share of the operations. `middle` happens when half of it is done, `fault` is there until then."""

    name: str
    middle: Middle | None = None
    fault: Fault | None = None


def soak(
    folder: Path, operations: int, seed: int, say: Callable[[str], None], faults: Sequence[Fault] = FAULTS
) -> Record:
    """Do them, `say` what is seen at each rest, and return the record; whatever happened, nothing is left running."""
    record = Record()
    world = World(folder)
    try:
        world.start()
        _all_rounds(world, record, choose_rounds(world, faults, say), operations, seed, say)
        oracle = Oracle(world, record)
        oracle.check_survival("restart-api", lambda: _restart(world, record, asks_first=False))
        oracle.check_survival("kill -9", lambda: _kill_worker(world, record))
        oracle.check_end()
    finally:
        world.close()
    return record


def choose_rounds(world: World, faults: Sequence[Fault], say: Callable[[str], None]) -> list[Round]:
    """Four without a fault around the app, then one for each."""
    rounds = [Round("all is well"), Round("a restart", _restart), Round("kill -9", _kill_worker), Round("all is well")]
    for fault in faults:
        if fault.name == FULL_DISK and not world.faults.can_fill_disk:
            say(f"{fault.name} is left out: a disk of its own takes root")
        else:
            rounds.append(Round(fault.name, fault=fault))
    return rounds


def _all_rounds(
    world: World, record: Record, rounds: Sequence[Round], operations: int, seed: int, say: Callable[[str], None]
) -> None:
    """Each of them with its share of the operations, and a look at rest after it."""
    steps = [choose(seed, number, operations) for number in range(CLIENTS)]
    before: Figures | None = None
    for number, one in enumerate(rounds):
        mine = [own[len(own) * number // len(rounds) : len(own) * (number + 1) // len(rounds)] for own in steps]
        began, asked, done = time.monotonic(), len(record.status_seconds), record.done
        _round(world, record, mine, one)
        figures = Oracle(world, record).look()
        seconds = time.monotonic() - began
        held = "the console can't be asked"
        if figures is not None:
            same = before is not None and before.pid == figures.pid
            held = figures.since(before) if same and before is not None else str(figures)
            grown = figures.grown(before) if same and before is not None else None
            if grown is not None:
                record.breach(f"{one.name} left the worker with {grown}")
            before = before if same else figures
        say(
            f"{one.name}: {record.done - done} operations, {seconds:.0f} s, {len(record.broken)} promises broken so "
            f"far; at rest: {held}; status: {say_times(record.status_seconds[asked:])}"
        )


Step = tuple[str, random.Random]


def choose(seed: int, client: int, operations: int) -> list[Step]:
    """What one client does, with dice of its own for each, so that how one goes changes none of the others."""
    chance = random.Random(f"{seed}/{client}")
    times = operations // CLIENTS + (client < operations % CLIENTS)
    names = chance.choices(list(OPERATIONS), [weight for weight, _ in OPERATIONS.values()], k=times)
    return [(name, random.Random(f"{seed}/{client}/{number}")) for number, name in enumerate(names)]


def _round(world: World, record: Record, steps: list[list[Step]], one: Round) -> None:
    """All clients at once."""
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
        except Lost:
            pass
        except Exception:
            record.breach(f"{client.doing}: {traceback.format_exc()}")
        record.finish(client.doing)
    client.close()


def _watch(world: World, record: Record, over: threading.Event) -> None:
    """A tab: what it shows never goes back."""
    client = Client(world, record)
    client.doing = "(a tab)"
    shown: dict[str, Any] = {}
    while not over.wait(LOOK_SECONDS):
        began = time.monotonic()
        try:
            now = look(client)
        except Lost:
            continue
        if now is not None:
            if shown and not record.disturbed_since(began - LOOK_SECONDS):
                _compare(shown, now, record)
            shown = now
    client.close()


def _compare(before: dict[str, Any], now: dict[str, Any], record: Record) -> None:
    """Two looks at the status, one after the other, at the same run of the app."""
    if now["version"] < before["version"]:
        record.breach(f"the status went back from version {before['version']} to {now['version']}")
    then, switch = before["switch"], now["switch"]
    if switch is None:
        return
    if switch["progress"] >= 100 or (
        then is not None and then["switch_id"] == switch["switch_id"] and switch["progress"] < then["progress"]
    ):
        record.breach(f"the progress of a switch went from {then} to {switch}")


def _restart(world: World, record: Record, *, asks_first: bool = True) -> None:
    """Have the app start anew with another setting. A switch under way is cancelled for it."""
    world.ask_first(asks_first)
    client = Client(world, record)
    client.doing = "(restart-api)"
    before = world.worker.pid
    deadline = time.monotonic() + RESTART_SECONDS
    with record.disturbance():
        while client.post("/api/restart-api").status_code != 200:
            client.ask("DELETE", "/v1/models/switch")
            assert time.monotonic() < deadline, "the app was never free for a restart"
        wait_until(lambda: _back(world, before), "the app to be back after restart-api", RESTART_SECONDS)
    client.close()


def _kill_worker(world: World, record: Record) -> None:
    world.ask_first(False)
    before = world.worker
    with record.disturbance():
        before.kill()
        wait_until(lambda: _back(world, before.pid), "the app to be back after kill -9", RESTART_SECONDS)


def _back(world: World, before: int) -> bool:
    """Whether another worker than before serves."""
    client = Client(world, Record())
    try:
        return client.get("/readyz").status_code == 200 and world.worker.pid != before
    except (Lost, IndexError):
        return False
    finally:
        client.close()
