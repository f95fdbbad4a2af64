"""Measures this machine's memory: host RAM through the kernel, GPUs through NVIDIA's driver (NVML).

The driver can hang for as long as the machine runs. A caller waits for it at most DRIVER_SECONDS, and not at all while
it hangs: then it gets the last readings, marked as stale.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import psutil
import structlog

from services.engines.port import HOST_DEVICE
from services.memory.ledger import Reading
from services.memory.programs import Program, largest_programs
from services.native_threads import NativeThreadPool, SharedCall
from services.periodic import Periodic

log = structlog.get_logger(__name__)

DRIVER_SECONDS = 2.0
NVML = "libnvidia-ml.so.1"
STOP_SECONDS = 2.0
PROGRAMS_SECONDS = 2.0
SETTLE_SECONDS = 5.0
SETTLE_POLL_SECONDS = 0.25
SETTLED_BYTES = 64 * 2**20
"""A smaller change between two readings counts as none."""


class DeviceMonitor:
    """Samples every device each `interval` seconds. GPUs come first, the host last.

    `budget_bytes` caps the host's total memory. `nvml` replaces the `pynvml` module.
    """

    def __init__(
        self,
        budget_bytes: int | None,
        interval: float = 1.0,
        *,
        nvml: Any = None,
        driver_seconds: float = DRIVER_SECONDS,
    ) -> None:
        self._budget_bytes = budget_bytes
        self._gpus = _Gpus(nvml, driver_seconds)
        self._look_for_programs = NativeThreadPool(1, PROGRAMS_SECONDS)
        self._readings: tuple[Reading, ...] = ()
        self._stopping = threading.Event()
        self._sampling = Periodic("device-monitor", self.sample, interval)

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The latest readings. The first access takes them and may block; later ones never do."""
        return self._readings or self.sample()

    def sample(self) -> tuple[Reading, ...]:
        """Read every device now.

        GPUs that the driver doesn't report in time keep their last readings, marked as stale.
        """
        readings = (*self._gpus.current(), _host(self._budget_bytes))
        self._readings = readings
        return readings

    def settle(self, device: str, timeout: float = SETTLE_SECONDS) -> None:
        """Block until a device's free memory is stable, at most `timeout` seconds.

        A driver goes on freeing memory after a process has ended, and vLLM refuses to start when free memory grows
        while it profiles ("Error in memory profiling").
        """
        deadline = time.monotonic() + timeout
        before = self._free(device)
        while time.monotonic() < deadline:
            self._stopping.wait(SETTLE_POLL_SECONDS)
            now = self._free(device)
            if before is not None and now is not None and abs(now - before) < SETTLED_BYTES:
                return
            before = now

    def _free(self, device: str) -> int | None:
        """Return the free bytes of a device; None if the driver doesn't answer, 0 for an unknown device."""
        reading = next((r for r in self.sample() if r.id == device), None)
        if reading is None:
            return 0
        return None if reading.stale else reading.free_bytes

    def programs(self, device: str, ours: Collection[int]) -> tuple[Program, ...]:
        """Return the programs that hold most of a device, without this app and the processes `ours`.

        Empty if they can't be determined within PROGRAMS_SECONDS.
        """
        reading = next((r for r in self.readings if r.id == device), None)
        if reading is None:
            return ()
        try:
            return self._look_for_programs(largest_programs, reading, {os.getpid(), *ours})
        except Exception as error:
            log.warning("the other programs can't be looked for", device=device, error=str(error))
            return ()

    def start(self) -> None:
        """Start to sample periodically."""
        self._sampling.start()

    def stop(self) -> None:
        self._stopping.set()
        self._sampling.stop(STOP_SECONDS)


def _host(budget_bytes: int | None) -> Reading:
    memory = psutil.virtual_memory()
    return Reading(
        id=HOST_DEVICE,
        name="System memory",
        kind="host",
        total_bytes=memory.total if budget_bytes is None else min(memory.total, budget_bytes),
        free_bytes=memory.available,
        budget_bytes=budget_bytes,
        installed_bytes=memory.total,
        measured_at=time.time(),
    )


class _Gpus:
    """NVIDIA GPUs through NVML. A missing driver is normal; an error of one GPU doesn't hide the others.

    Everything below `_read` runs in a native thread, one call at a time. It stores its result even after the caller has
    timed out, so that the readings of a driver that is always too slow are still used.
    """

    def __init__(self, nvml: Any, timeout: float) -> None:
        self._nvml = nvml
        self._timeout = timeout
        self._call = SharedCall(self._read)
        self._latest: tuple[float, tuple[Reading, ...]] = (float("-inf"), ())
        """Start of the latest completed read (monotonic seconds), and its readings."""
        self._initialised = False
        self._absent = False
        self._hangs = False
        self._errors: deque[tuple[str, Exception]] = deque()
        self._logged: set[str] = set()

    def current(self) -> tuple[Reading, ...]:
        """Return fresh readings, or the last ones marked as stale if the driver doesn't answer in time."""
        asked = time.monotonic()
        if not self._absent:
            self._refresh()
            self._log_errors()
        began, known = self._latest
        return known if self._absent or began >= asked else tuple(replace(r, stale=True) for r in known)

    def _refresh(self) -> None:
        try:
            self._call(self._timeout)
        except TimeoutError:
            if not self._hangs:
                log.warning("NVIDIA's driver hangs; GPU readings are stale", seconds=self._timeout)
            self._hangs = True
            return
        if self._hangs:
            log.info("NVIDIA's driver answers again")
        self._hangs = False

    def _log_errors(self) -> None:
        """Log each error once.

        Done here and not in the native thread, because the log's locks belong to gevent's thread.
        """
        while self._errors:
            what, error = self._errors.popleft()
            if what not in self._logged:
                self._logged.add(what)
                log.warning(what, error=str(error))

    def _read(self) -> None:
        began = time.monotonic()
        self._latest = (began, tuple(self._read_all()))

    def _read_all(self) -> list[Reading]:
        if not self._connect():
            return []
        try:
            count = self._nvml.nvmlDeviceGetCount()
        except self._nvml.NVMLError as error:
            self._initialised = False  # the driver may have been reloaded: initialise again next time
            self._queue_error("the GPUs can't be counted", error)
            return []
        readings = (self._read_one(index) for index in range(count))
        return [reading for reading in readings if reading is not None]

    def _connect(self) -> bool:
        """Initialise NVML and return whether it is available.

        Done in the process that uses it: NVML does not survive a fork.
        """
        if self._initialised or self._absent:
            return self._initialised
        if self._nvml is None:
            if not _has_nvml():
                self._absent = True
                return False
            import pynvml

            self._nvml = pynvml
        try:
            self._nvml.nvmlInit()
            self._initialised = True
        except self._nvml.NVMLError_LibraryNotFound:
            self._absent = True
        except self._nvml.NVMLError as error:
            self._queue_error("NVIDIA's driver doesn't answer", error)
        return self._initialised

    def _read_one(self, index: int) -> Reading | None:
        nvml = self._nvml
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            return Reading(
                id=nvml.nvmlDeviceGetUUID(handle),
                name=nvml.nvmlDeviceGetName(handle),
                kind="gpu",
                total_bytes=memory.total,
                free_bytes=memory.free,
                process_bytes=self._process_bytes(handle),
                measured_at=time.time(),
            )
        except nvml.NVMLError as error:
            self._queue_error(f"GPU {index} can't be read", error)
            return None

    def _process_bytes(self, handle: Any) -> Mapping[int, int]:
        found: dict[int, int] = {}
        for process in (*self._compute(handle), *self._graphics(handle)):
            if process.usedGpuMemory is not None:
                # A process that computes and draws is in both lists, with the same total.
                found[process.pid] = max(found.get(process.pid, 0), process.usedGpuMemory)
        return found

    def _compute(self, handle: Any) -> Sequence[Any]:
        with suppress(self._nvml.NVMLError):  # not supported by every driver
            return list(self._nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        return ()

    def _graphics(self, handle: Any) -> Sequence[Any]:
        with suppress(self._nvml.NVMLError):
            return list(self._nvml.nvmlDeviceGetGraphicsRunningProcesses(handle))
        return ()

    def _queue_error(self, what: str, error: Exception) -> None:
        self._errors.append((what, error))


def _has_nvml() -> bool:
    """Return whether NVIDIA's library is installed. Without it pynvml is not imported: that takes 20 ms and 3 MB."""
    import ctypes

    try:
        ctypes.CDLL(NVML)
    except OSError:
        return False
    return True
