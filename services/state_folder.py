"""Whether the app's state can be written, asked before anything is unloaded for a load that could not be recorded."""

from __future__ import annotations

import os
from pathlib import Path

PROBE_BYTES = 65_536
"""More than the record of a process and the first lines of its log take."""


class StateUnwritable(Exception):
    """The state folder can't be written. The text is for people: where, why, what to do."""


def check_writable(folder: Path) -> None:
    """Write a probe into the state folder and delete it. Raises StateUnwritable; takes a moment on a slow disk."""
    probe = folder / f"probe-{os.getpid()}"
    try:
        try:
            with probe.open("wb") as file:
                file.write(b"\0" * PROBE_BYTES)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise StateUnwritable(
            f"The state folder {folder.resolve()} can't be written: {error.strerror or error}. "
            "Nothing was unloaded. Free some space on that disk, or make the folder writable, then try again."
        ) from None
