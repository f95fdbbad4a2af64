"""A random walk over all operations on the heart: `make simulate STEPS=1000000 SEED=7`.

Prints its speed. If an invariant is violated it prints the seed and the last operations, and exits with code 1; the
same seed gives the same walk.
"""

from __future__ import annotations

import logging
import random
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable

import structlog

from tests.heart.operations import FAULTS, SLOWNESS, Operations
from tests.heart.rig import MODELS
from tests.heart.stub import GPU
from tests.heart.wire import ACTS

WALK = 200
"""Steps with one heart before it is replaced by a new one."""
SHOWN = 60

Step = tuple[int, str, Callable[[random.Random], tuple[object, ...]]]


def _model(chance: random.Random) -> str:
    return chance.choice(MODELS).id


SECONDS = (0.0, 0.1, 2.0, 30.0)
LEAVES_AFTER = (None, None, *SECONDS)
"""When a client disconnects: sometimes at the moment in which its answer arrives."""
STEPS: tuple[Step, ...] = (
    (20, "switch", lambda c: (_model(c), c.choice(["cancel", "cancel", "queue", "refuse"]))),
    (3, "replace_model", lambda c: (_model(c), _model(c))),
    (6, "start", lambda c: (_model(c),)),
    (10, "act", lambda c: (c.choice(["stop", "stop", "restart", "remove"]), _model(c))),
    (8, "cancel", lambda _: ()),
    (3, "unload_now", lambda c: (_model(c),)),
    (12, "request", lambda c: (_model(c), c.choice(ACTS), c.choice(SECONDS), c.choice(LEAVES_AFTER))),
    (5, "disconnect", lambda c: (c.random() < 0.5,)),
    (40, "pass_time", lambda c: (c.choice([0.0, 0.01, 0.3, 1.0, 4.0, 30.0]),)),
    (4, "crash", lambda c: (_model(c),)),
    (4, "load_by_other", lambda c: (_model(c),)),
    (4, "release_by_other", lambda c: (_model(c),)),
    (4, "take_memory", lambda c: (c.choice(["host", GPU]), c.choice([0, 0, 2, 5, 9]))),
    (6, "set_fault", lambda c: (_model(c), c.choice(FAULTS), c.choice([True, False, False]))),
    (3, "set_fault", lambda c: (_model(c), c.choice(SLOWNESS), c.choice([0.0, 1.5, 60.0]))),
    (2, "slow_driver", lambda c: (c.choice([0.0, 0.5, 5.0]),)),
    (2, "delay_freed_memory", lambda c: (c.choice([0.0, 0.3, 2.0]),)),
    (2, "slow_network", lambda c: (c.choice([0.0, 0.0, 1.0, 8.0]), c.choice([0.5, 5.0, 1e6]))),
    (2, "break_store", lambda c: (c.random() < 0.3,)),
    (2, "fill_disk", lambda c: (c.random() < 0.3,)),
    (1, "remove_file", lambda c: (_model(c),)),
    (3, "restore_files", lambda _: ()),
    (1, "crash_app", lambda _: ()),
    (1, "restart_app", lambda _: ()),
    (2, "check_rest", lambda _: ()),
)


def walk(seed: int, steps: int, done: deque[str]) -> None:
    """Do `steps` random operations on one heart; `done` keeps the last of them."""
    chance = random.Random(seed)
    operations = Operations(seed)
    for _, name, arguments in chance.choices(STEPS, [weight for weight, _, _ in STEPS], k=steps):
        given = arguments(chance)
        done.append(f"operations.{name}{given!r}")
        getattr(operations, name)(*given)
        operations.check()
    done.append("operations.check_rest()")
    operations.check_rest()
    operations.heart.close()


def main(steps: int, seed: int) -> int:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    began = time.perf_counter()
    for number in range(-(-steps // WALK)):
        done: deque[str] = deque(maxlen=SHOWN)
        try:
            walk(seed + number, WALK, done)
        except Exception:
            print(f"Violated with SEED={seed + number} STEPS={WALK}, after:")
            print("\n".join(done))
            traceback.print_exc()
            return 1
    seconds = time.perf_counter() - began
    print(f"{steps} steps from seed {seed}: every invariant held; {steps / seconds:.0f} steps/s")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
