"""What goes wrong around the app, one thing after the other, while all clients go on. tests/README.md has the list.

A fault is on until half of its round's operations are done, or for LONGEST_SECONDS; the rest of them meet an app that
has to come back by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from tests.soak.world import World
from tests.support.faults import corrupt_database, few_descriptors

FULL_DISK = "a full disk"
LONGEST_SECONDS = 15.0
SPARE_DESCRIPTORS = 20
"""Fewer than six clients need."""
SLOW_SECONDS = 0.3
"""For each question about the models folder, of which one look asks a dozen."""
LOADS_FAIL = frozenset({"load_failed", "engine_error", "engine_unreachable", "memory_not_freed"})


@dataclass(frozen=True)
class Fault:
    """`codes` are the errors that it explains; with `breaks`, connections may break as well."""

    name: str
    during: Callable[[World], AbstractContextManager[None]]
    codes: frozenset[str] = frozenset()
    breaks: bool = False


@contextmanager
def _damaged(world: World) -> Iterator[None]:
    """Pages of the database are overwritten, and the app starts anew: what was said before is set aside."""
    world.forget_conversations()
    corrupt_database(world.faults.database)
    world.worker.kill()
    yield


FAULTS = (
    Fault(
        FULL_DISK,
        lambda world: world.faults.full_disk(),
        frozenset({"state_unwritable", "database_unavailable"}) | LOADS_FAIL,
    ),
    Fault(
        "a locked database",
        lambda world: world.faults.locked_database(),
        frozenset({"database_locked"}),
    ),
    Fault(
        "too few descriptors",
        lambda world: few_descriptors(world.worker, SPARE_DESCRIPTORS),
        frozenset({"state_unwritable", "database_unavailable"}) | LOADS_FAIL,
        breaks=True,
    ),
    Fault("a driver that hangs", lambda world: world.faults.hanging_driver()),
    Fault("a Docker that hangs", lambda world: world.faults.hanging_docker()),
    Fault("a slow models folder", lambda world: world.faults.slow_models(SLOW_SECONDS)),
    Fault("a damaged database", _damaged, breaks=True),
)
"""The last one starts the app anew: what it holds is compared before."""
