"""Measures memory, decides from it where a model is put, and recognizes that it has run out."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from errors import OutOfMemoryError

Offload = Literal["none", "model", "sequential"]
BYTES_PER_PARAMETER = 2
"""bfloat16, in which FLUX is published; in 32 bits, which some CPUs compute faster, it would take 67 GB."""
WORKING_BYTES = 2_000_000_000
"""An estimate of what a picture of 1024x1024 needs beside the weights.

Most of it decodes the picture: the last blocks of FLUX' autoencoder hold 128 to 256 channels per pixel in 16 bits, 0.3
to 0.5 GB for each of a handful of tensors. Larger pictures are decoded in tiles, so that they need no more.
"""
SEQUENTIAL_BYTES = 1_000_000_000
"""Weights in GPU memory with sequential offload: FLUX' largest layer has 0.2 GB, and the next is moved beside it."""

_SHORTAGES = (
    "can't allocate memory",
    "could not create a primitive",  # oneDNN, on the CPU
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
_ATTEMPT = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMG]iB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Placement:
    """`offload` says which weights wait in RAM: none, whole components (`model`) or single layers (`sequential`).

    `needed_bytes` is the need on that device, work included.
    """

    device: Literal["cuda:0", "cpu"]
    offload: Offload
    needed_bytes: int


def place(
    parameters: Mapping[str, int], gpu_free: int | None, ram_free: int | None, wanted: Offload | None = None
) -> Placement:
    """Choose the fastest placement that fits; `wanted` insists on one of those with a GPU.

    `parameters` are counts by component; the memory is in bytes, None if there is no GPU or the figure is unknown.
    Raises OutOfMemoryError, for RAM too: the kernel kills a process that takes more, without a word.
    """
    total, largest = BYTES_PER_PARAMETER * sum(parameters.values()), BYTES_PER_PARAMETER * max(parameters.values())
    if gpu_free is None:
        if ram_free is not None and total + WORKING_BYTES > ram_free:
            raise OutOfMemoryError("the CPU", ram_free, total + WORKING_BYTES)
        return Placement("cpu", "none", total + WORKING_BYTES)
    needs: dict[Offload, int] = {
        "none": total + WORKING_BYTES,
        "model": largest + WORKING_BYTES,
        "sequential": min(largest, SEQUENTIAL_BYTES) + WORKING_BYTES,
    }
    offered = {offload: need for offload, need in needs.items() if wanted in (None, offload)}
    fitting = [offload for offload, need in offered.items() if need <= gpu_free]
    if not fitting:
        raise OutOfMemoryError("the GPU", gpu_free, min(offered.values()))
    offload = fitting[0]
    in_ram = largest if offload == "none" else total
    if ram_free is not None and in_ram > ram_free:
        raise OutOfMemoryError("the CPU, through which the weights are loaded", ram_free, in_ram)
    return Placement("cuda:0", offload, needs[offload])


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether the error says that memory is short; on the CPU, torch raises a bare RuntimeError."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _SHORTAGES)


def attempted_bytes(error: BaseException) -> int:
    """Return the size of the allocation that failed, from torch's message; 0 if it doesn't say."""
    found = _ATTEMPT.search(str(error))
    return int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0


def free_bytes(device: str) -> int | None:
    """Return the free memory of `cuda:0` or the RAM."""
    if not device.startswith("cuda"):
        return free_ram()
    import torch

    return int(torch.cuda.mem_get_info(0)[0])


def held_bytes(device: str | None) -> int | None:
    """Return how much memory this process takes of a device; before it has chosen one, of the RAM."""
    if device is None or not device.startswith("cuda"):
        return resident_bytes()
    import torch

    return int(torch.cuda.memory_reserved(0))


def resident_bytes() -> int | None:
    """Return the process's resident memory in bytes; None where /proc is missing."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def free_ram() -> int | None:
    """Return how many bytes of RAM programs can still take; None where /proc is missing."""
    try:
        with open("/proc/meminfo") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
