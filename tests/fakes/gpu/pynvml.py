"""A fake of NVIDIA's driver library (the parts that Switchyard uses) for a machine with one GPU of 80 GB.

Its folder comes first on a console's PYTHONPATH. FAKE_GPU names the GPU, so that two test runs don't share one. A
process holds the bytes that a fake vLLM has written to `/tmp/gpu_NAME` in its container, read through `/proc`: they
are freed when the process ends, like real GPU memory. While another process holds a lock on the file that
FAKE_GPU_HANG names, the driver hangs.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

UUID = "GPU-5ca1ab1e-0000-4000-8000-000000000001"
TOTAL_BYTES = 80_000_000_000
NAME = os.environ.get("FAKE_GPU", "")
HANG = os.environ.get("FAKE_GPU_HANG")


class NVMLError(Exception):
    """The base of the library's errors."""


class NVMLError_LibraryNotFound(NVMLError):
    """No driver."""


def nvmlInit() -> None: ...


def nvmlDeviceGetCount() -> int:
    if HANG is not None:
        with open(HANG, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # blocks in the kernel, as a driver does
    return 1


def nvmlDeviceGetHandleByIndex(index: int) -> int:
    return index


def nvmlDeviceGetUUID(_handle: int) -> str:
    return UUID


def nvmlDeviceGetName(_handle: int) -> str:
    return "Fake GPU"


def nvmlDeviceGetMemoryInfo(_handle: int) -> SimpleNamespace:
    used = sum(size for _, size in held_on(NAME))
    return SimpleNamespace(total=TOTAL_BYTES, used=used, free=TOTAL_BYTES - used)


def nvmlDeviceGetComputeRunningProcesses(_handle: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in held_on(NAME)]


def nvmlDeviceGetGraphicsRunningProcesses(_handle: int) -> list[SimpleNamespace]:
    return []


def held_on(gpu: str) -> Iterator[tuple[int, int]]:
    """The processes that hold some of this GPU's memory, with their bytes."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            program = (process / "cmdline").read_bytes().split(b"\0")
            if b"/usr/local/bin/vllm" in program[:2]:  # not the container's init, which has the same root
                yield int(process.name), int((process / "root" / "tmp" / f"gpu_{gpu}").read_text())
        except (OSError, ValueError):  # the process has ended, or holds nothing yet
            continue
