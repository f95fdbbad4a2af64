"""Has the kernel's out-of-memory killer prefer engines to the console, and recognises its kills.

Linux only. On other systems nothing is set, and kills are unknown.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

ADDED_SCORE = 200
"""Added to an engine's OOM score, as if it held another 20 % of the memory. Enough to outweigh the console's own
memory. Not more, because a different program that fills the memory should still be killed before an engine that is
merely large."""
HIGHEST_SCORE = 1000
SCORE = Path("/proc/self/oom_score_adj")
VMSTAT = Path("/proc/vmstat")
WHAT_HELPS = "unload another model, or choose a smaller one or a shorter context"
BY_KERNEL = f"was ended by the kernel (SIGKILL), because memory ran out: {WHAT_HELPS}"


def engine_score() -> int:
    """Return an engine's `oom_score_adj`: higher than this process's."""
    try:
        return min(HIGHEST_SCORE, int(SCORE.read_text()) + ADDED_SCORE)
    except (OSError, ValueError):
        return ADDED_SCORE


def raise_score(pid: int) -> None:
    """Raise the OOM score of a child and of all processes it starts later."""
    with suppress(OSError):  # the process has ended, or this is not Linux
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(engine_score()))


def oom_kills() -> int | None:
    """Return the number of OOM kills since boot, container limits included; None if the kernel doesn't report it."""
    with suppress(OSError, ValueError):
        for line in VMSTAT.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def killed_since(kills_before: int | None) -> bool:
    """Return whether the kernel is known to have killed a process for memory since `kills` returned `kills_before`."""
    now = oom_kills()
    return now is not None and kills_before is not None and now > kills_before


def describe_sigkill(kills_before: int | None) -> str:
    """Describe the end of a process by a SIGKILL that this app did not send; the text follows the process's name.

    `kills_before` is what `kills` returned when the process was started.
    """
    if kills_before is None:
        return f"was ended by SIGKILL, as the kernel does when memory runs out: {WHAT_HELPS}"
    if killed_since(kills_before):
        return BY_KERNEL
    return "was ended by SIGKILL, though the kernel did not run out of memory: a user or another program killed it"


def is_killed(exit_code: int | None) -> bool:
    """Return whether an exit code means SIGKILL, in the convention of subprocess or of shells and Docker."""
    return exit_code in (-9, 137)
