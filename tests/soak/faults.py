"""Faults of the app's environment, one after the other, while all clients continue. tests/README.md lists them.

A fault lasts until half of its round's operations are done, LONGEST_SECONDS at most; the other half run on an app that
must recover by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from tests.soak.world import World
from tests.support.faults import corrupt_database, few_descriptors

FULL_DISK = "full disk"
LONGEST_SECONDS = 15.0
SPARE_DESCRIPTORS = 20
"""Fewer than six clients need."""
SLOW_SECONDS = 0.3
"""Per file operation in the models folder; one scan takes a dozen."""
LOADS_FAIL = frozenset({"load_failed", "engine_error", "engine_unreachable", "memory_not_freed"})


@dataclass(frozen=True)
class Fault:
    """`codes` are the errors that the fault explains; with `breaks`, connections may break too."""

    name: str
    during: Callable[[World], AbstractContextManager[None]]
    codes: frozenset[str] = frozenset()
    breaks: bool = False


@contextmanager
def _damaged(world: World) -> Iterator[None]:
    """Overwrite database pages and kill the worker; the damaged database, with all conversations, is set aside."""
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
        "locked database",
        lambda world: world.faults.locked_database(),
        frozenset({"database_locked"}),
    ),
    Fault(
        "too few descriptors",
        lambda world: few_descriptors(world.worker, SPARE_DESCRIPTORS),
        frozenset({"state_unwritable", "database_unavailable"}) | LOADS_FAIL,
        breaks=True,
    ),
    Fault("hanging driver", lambda world: world.faults.hanging_driver()),
    Fault("hanging Docker", lambda world: world.faults.hanging_docker()),
    Fault("slow models folder", lambda world: world.faults.slow_models(SLOW_SECONDS)),
    Fault("damaged database", _damaged, breaks=True),
)
"""The last one restarts the app, so the worker's resources are compared before it."""
