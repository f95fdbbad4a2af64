"""When memory runs out the kernel kills a process: an engine rather than the console, and people are told what it was.

Linux alone; elsewhere nothing is set, and nothing is known.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

ADDED_SCORE = 200
"""How much sooner an engine is killed than Switchyard, as if it held another 20 % of the memory.

Enough to outweigh whatever the console holds. No more: another program that eats all memory should be killed before
an engine that merely is large.
"""
HIGHEST_SCORE = 1000
SCORE = Path("/proc/self/oom_score_adj")
VMSTAT = Path("/proc/vmstat")
WHAT_HELPS = "unload another model, or choose a smaller one or a shorter context"
BY_KERNEL = f"was ended by the kernel (SIGKILL), because memory ran out: {WHAT_HELPS}"


def engine_score() -> int:
    """The `oom_score_adj` of an engine: higher than that of this process."""
    try:
        return min(HIGHEST_SCORE, int(SCORE.read_text()) + ADDED_SCORE)
    except (OSError, ValueError):
        return ADDED_SCORE


def prefer(pid: int) -> None:
    """Have the kernel kill this child, and all that it starts from now on, before this process."""
    with suppress(OSError):  # it has ended already, or there is no such thing here
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(engine_score()))


def kills() -> int | None:
    """How many processes the kernel has killed for memory since this machine started; None where it doesn't say.

    Those that hit the limit of a container are among them.
    """
    with suppress(OSError, ValueError):
        for line in VMSTAT.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def killed_since(kills_before: int | None) -> bool:
    """Whether the kernel is known to have killed a process for memory since `kills` said `kills_before`."""
    now = kills()
    return now is not None and kills_before is not None and now > kills_before


def say_killed(kills_before: int | None) -> str:
    """How a process ended by a SIGKILL that nobody here sent, to follow its name.

    `kills_before` is what `kills` said when it was started.
    """
    if kills_before is None:
        return f"was ended by SIGKILL, as the kernel does when memory runs out: {WHAT_HELPS}"
    if killed_since(kills_before):
        return BY_KERNEL
    return "was ended by SIGKILL, though the kernel did not run out of memory: somebody or some program killed it"


def is_killed(exit_code: int | None) -> bool:
    """Whether an exit code, as subprocess or as a shell and Docker count, stands for SIGKILL."""
    return exit_code in (-9, 137)
