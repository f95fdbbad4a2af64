"""The environment of a console that is to find the fake NVIDIA driver (`tests/fakes/gpu`)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from services.memory.devices import NVML

FAKE_DRIVER = Path(__file__).parents[1] / "fakes" / "gpu"


def fake_driver(*folders: Path) -> dict[str, str]:
    """Return the variables that put the fake pynvml, after `folders`, and a library with NVML's name in place.

    The library is the C library: it is only there to be found.
    """
    folder = Path(tempfile.mkdtemp(prefix="fake-nvml-"))
    (folder / NVML).symlink_to(_c_library())
    return {
        "PYTHONPATH": os.pathsep.join(str(path) for path in (*folders, FAKE_DRIVER)),
        "LD_LIBRARY_PATH": str(folder),
    }


def _c_library() -> str:
    maps = Path("/proc/self/maps").read_text().split()
    return next(
        word for word in maps if word.startswith("/") and Path(word).name.startswith(("libc.so", "libc-", "ld-musl"))
    )
