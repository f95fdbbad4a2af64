"""Readings of this machine's devices, with a fake driver library."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import psutil
import pytest

from services.engines.port import HOST_DEVICE
from services.memory.devices import DeviceMonitor
from services.native_threads import run_in_thread
from tests.support.console import wait_until
from tests.support.stopwatch import Stopwatch

GB = 10**9


class FakeError(Exception):
    """A fake pynvml.NVMLError."""


class FakeLibraryNotFound(FakeError):
    """A fake pynvml.NVMLError_LibraryNotFound."""


@dataclass
class FakeGpu:
    uuid: str
    compute: list[tuple[int, int | None]] = field(default_factory=list)
    graphics: list[tuple[int, int | None]] = field(default_factory=list)
    broken: bool = False
    tells_processes: bool = True
    used: list[int] = field(default_factory=lambda: [4 * GB])
    """The readings in order; the last one repeats."""


class FakeNvml:
    """The parts of pynvml that the app uses, over a list of GPUs that tests may change."""

    NVMLError = FakeError
    NVMLError_LibraryNotFound = FakeLibraryNotFound

    def __init__(self, gpus: list[FakeGpu], init_error: FakeError | None = None) -> None:
        self.gpus = gpus
        self.init_error = init_error
        self.count_error: FakeError | None = None
        self.inits = 0

    def nvmlInit(self) -> None:
        self.inits += 1
        if self.init_error:
            raise self.init_error

    def nvmlDeviceGetCount(self) -> int:
        if self.count_error:
            raise self.count_error
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        if self.gpus[index].broken:
            raise FakeError("GPU is lost")
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetName(self, _gpu: FakeGpu) -> str:
        return "Fake GPU"

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> SimpleNamespace:
        used = gpu.used.pop(0) if len(gpu.used) > 1 else gpu.used[0]
        return SimpleNamespace(total=24 * GB, free=24 * GB - used, used=used)

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: FakeGpu) -> list[SimpleNamespace]:
        if not gpu.tells_processes:
            raise FakeError("Not Supported")
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in gpu.compute]

    def nvmlDeviceGetGraphicsRunningProcesses(self, gpu: FakeGpu) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in gpu.graphics]


def ids(monitor: DeviceMonitor) -> list[str]:
    return [reading.id for reading in monitor.sample()]


def test_two_gpus_come_before_the_host() -> None:
    """GPUs are listed by their UUID with total and free memory, the host's RAM last."""
    monitor = DeviceMonitor(None, nvml=FakeNvml([FakeGpu("GPU-a"), FakeGpu("GPU-b")]))
    first, second, host = monitor.sample()
    assert (first.id, second.id, host.id) == ("GPU-a", "GPU-b", HOST_DEVICE)
    assert (first.kind, first.name, first.total_bytes, first.free_bytes) == ("gpu", "Fake GPU", 24 * GB, 20 * GB)
    assert host.kind == "host"


def test_a_failing_gpu_does_not_hide_the_others() -> None:
    """A GPU that can't be read is left out, and listed again once it answers."""
    lost = FakeGpu("GPU-a", broken=True)
    monitor = DeviceMonitor(None, nvml=FakeNvml([lost, FakeGpu("GPU-b")]))
    assert ids(monitor) == ["GPU-b", HOST_DEVICE]
    lost.broken = False
    assert ids(monitor) == ["GPU-a", "GPU-b", HOST_DEVICE]


def test_a_gpu_that_vanishes_is_dropped() -> None:
    """The list follows the driver's list."""
    nvml = FakeNvml([FakeGpu("GPU-a"), FakeGpu("GPU-b")])
    monitor = DeviceMonitor(None, nvml=nvml)
    monitor.sample()
    nvml.gpus.pop()
    assert ids(monitor) == ["GPU-a", HOST_DEVICE]


def test_settling_waits_until_two_readings_agree() -> None:
    """Readings repeat until two agree, but not beyond the timeout."""
    gpu = FakeGpu("GPU-a", used=[20 * GB, 9 * GB, 5 * GB, 4 * GB, 4 * GB])
    monitor = DeviceMonitor(None, nvml=FakeNvml([gpu]))
    monitor.settle("GPU-a")
    assert gpu.used == [4 * GB]
    restless = FakeGpu("GPU-b", used=[GB, 2 * GB] * 50)
    began, watch = time.monotonic(), Stopwatch()
    DeviceMonitor(None, nvml=FakeNvml([restless])).settle("GPU-b", timeout=0.6)
    assert time.monotonic() - began > 0.5
    assert watch.waited < 5


def test_no_driver_is_normal() -> None:
    """Without NVIDIA's library only the host is listed, and the library is not searched for again."""
    nvml = FakeNvml([], init_error=FakeLibraryNotFound("NVML Shared Library Not Found"))
    monitor = DeviceMonitor(None, nvml=nvml)
    assert ids(monitor) == [HOST_DEVICE]
    assert ids(monitor) == [HOST_DEVICE]
    assert nvml.inits == 1


def test_a_driver_that_comes_back_is_used_again() -> None:
    """After a failure the driver is initialised again, and the GPUs are listed again."""
    nvml = FakeNvml([FakeGpu("GPU-a")])
    monitor = DeviceMonitor(None, nvml=nvml)
    monitor.sample()
    nvml.count_error = FakeError("Uninitialized")
    assert ids(monitor) == [HOST_DEVICE]
    nvml.count_error = None
    assert ids(monitor) == ["GPU-a", HOST_DEVICE]
    assert nvml.inits == 2


def test_bytes_per_process() -> None:
    """Compute and graphics processes are merged: one listed twice counts once, an unknown figure is ignored."""
    gpu = FakeGpu("GPU-a", compute=[(1, 3 * GB), (2, None)], graphics=[(1, 3 * GB), (3, GB)])
    reading = DeviceMonitor(None, nvml=FakeNvml([gpu])).sample()[0]
    assert reading.process_bytes == {1: 3 * GB, 3: GB}


def test_a_driver_that_does_not_tell_processes() -> None:
    """The GPU is listed, with the processes that the driver reports."""
    gpu = FakeGpu("GPU-a", compute=[(1, GB)], graphics=[(3, GB)], tells_processes=False)
    assert DeviceMonitor(None, nvml=FakeNvml([gpu])).sample()[0].process_bytes == {3: GB}


@pytest.mark.parametrize(("budget", "total"), [(None, None), (GB // 2, GB // 2), (10**15, None)])
def test_the_budget_caps_the_host(budget: int | None, total: int | None) -> None:
    """The host's total is the machine's or the budget, whichever is less."""
    host = DeviceMonitor(budget, nvml=FakeNvml([])).sample()[-1]
    assert host.total_bytes == (total or psutil.virtual_memory().total)
    assert host.budget_bytes == budget
    assert host.free_bytes > 0


def test_readings_stay_fresh_between_start_and_stop() -> None:
    """A background thread takes new readings until it is stopped."""
    nvml = FakeNvml([FakeGpu("GPU-a")])
    sampled = threading.Semaphore(0)
    count = nvml.nvmlDeviceGetCount

    def counted() -> int:
        sampled.release()
        return count()

    nvml.nvmlDeviceGetCount = counted  # type: ignore[method-assign]
    monitor = DeviceMonitor(None, interval=0.001, nvml=nvml)
    monitor.start()
    try:
        assert all(sampled.acquire(timeout=5) for _ in range(3))
        assert monitor.readings[0].id == "GPU-a"
    finally:
        monitor.stop()
    assert "device-monitor" not in [thread.name for thread in threading.enumerate()]


def test_readings_are_available_before_the_start() -> None:
    """The first access takes readings, so that no page shows an empty machine."""
    assert [r.id for r in DeviceMonitor(None, nvml=FakeNvml([])).readings] == [HOST_DEVICE]


def test_run_in_thread_calls_directly_without_gevent() -> None:
    """In an unpatched process the call runs in its own thread, and its errors are raised."""
    assert run_in_thread(threading.get_ident) == threading.get_ident()
    with pytest.raises(ValueError, match="invalid literal"):
        run_in_thread(int, "x")


ON_GEVENT = """
from gevent import monkey; monkey.patch_all()
import time, gevent
from services.native_threads import run_in_thread
from tests.support.console import wait_until
block = monkey.get_original("time", "sleep")
ticks = []
def tick():
    while True:
        ticks.append(1)
        gevent.sleep(0.001)
gevent.spawn(tick)
run_in_thread(block, 0.2)
print(len(ticks))
try:
    run_in_thread(int, "x")
except ValueError as error:
    print(error)
"""


def test_run_in_thread_lets_other_greenlets_run() -> None:
    """With gevent a call that blocks in C blocks no greenlet; its errors are raised without a printed traceback."""
    run = subprocess.run([sys.executable, "-c", ON_GEVENT], capture_output=True, text=True, timeout=30, check=True)
    ticks, error = run.stdout.splitlines()
    assert int(ticks) > 10
    assert error == "invalid literal for int() with base 10: 'x'"
    assert run.stderr == ""


class HangingNvml(FakeNvml):
    """A driver that hangs while `working` is not set, and counts concurrent calls."""

    def __init__(self, gpus: list[FakeGpu]) -> None:
        super().__init__(gpus)
        self.working = threading.Event()
        self.working.set()
        self.entered = threading.Semaphore(0)
        self.calls = 0
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()

    def nvmlDeviceGetCount(self) -> int:
        with self._lock:
            self.calls += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        self.entered.release()
        try:
            assert self.working.wait(30)
            return super().nvmlDeviceGetCount()
        finally:
            with self._lock:
                self.at_once -= 1


@pytest.fixture
def hanging() -> Iterator[HangingNvml]:
    """A hanging driver with one GPU; released at the end, so that no thread is left."""
    nvml = HangingNvml([FakeGpu("GPU-a", used=[4 * GB, 9 * GB])])
    yield nvml
    nvml.working.set()


def test_a_hanging_driver_leaves_the_last_reading_marked_as_stale(hanging: HangingNvml) -> None:
    """A GPU keeps its last reading, marked as stale; the host is still read; no second wait; the GPU recovers."""
    monitor = DeviceMonitor(None, nvml=hanging, driver_seconds=0.2)
    before = monitor.sample()
    assert [r.stale for r in before] == [False, False]
    hanging.working.clear()
    gpu, host = monitor.sample()
    assert (gpu.id, gpu.free_bytes, gpu.stale, gpu.measured_at) == ("GPU-a", 20 * GB, True, before[0].measured_at)
    assert not host.stale
    began = time.monotonic()
    for _ in range(50):
        gpu, later = monitor.sample()
        assert gpu.stale
    assert time.monotonic() - began < 2.0, "fifty waits of 0.2 s would be ten seconds"
    assert later.measured_at is not None
    assert host.measured_at is not None
    assert later.measured_at > host.measured_at, "the host's figures are fresh"
    assert hanging.calls == 2, "one call hangs, no further one was made"
    hanging.working.set()
    wait_until(lambda: not monitor.sample()[0].stale, "the driver to answer again")
    assert monitor.readings[0].free_bytes == 15 * GB


def test_a_driver_that_hangs_from_the_start_lists_no_gpus(hanging: HangingNvml) -> None:
    """Nothing was ever read, so no GPU is listed; `readings` waits for the driver once."""
    hanging.working.clear()
    monitor = DeviceMonitor(None, nvml=hanging, driver_seconds=0.2)
    assert [r.id for r in monitor.readings] == [HOST_DEVICE]
    began = time.monotonic()
    for _ in range(1000):
        assert [r.id for r in monitor.readings] == [HOST_DEVICE]
    assert time.monotonic() - began < 1.0
    hanging.working.set()
    wait_until(lambda: ids(monitor) == ["GPU-a", HOST_DEVICE], "the GPU")


def test_late_readings_of_a_slow_driver_are_used(hanging: HangingNvml) -> None:
    """A late reading is stored for the next caller, and marked as stale."""
    monitor = DeviceMonitor(None, nvml=hanging, driver_seconds=0.05)
    hanging.working.clear()
    assert ids(monitor) == [HOST_DEVICE]
    hanging.working.set()
    wait_until(lambda: hanging.at_once == 0, "the slow call to end")
    hanging.working.clear()
    wait_until(lambda: ids(monitor) == ["GPU-a", HOST_DEVICE], "the late reading")
    assert monitor.readings[0].stale


def test_readings_are_available_at_once_during_a_measurement(hanging: HangingNvml) -> None:
    """A reader doesn't wait for a driver that has just begun to hang."""
    monitor = DeviceMonitor(None, nvml=hanging, driver_seconds=5.0)
    before = monitor.sample()
    hanging.working.clear()
    assert hanging.entered.acquire(timeout=5)
    measuring = threading.Thread(target=monitor.sample)
    measuring.start()
    assert hanging.entered.acquire(timeout=5)
    assert monitor.readings is before
    hanging.working.set()
    measuring.join(5)
    assert not measuring.is_alive()


def test_concurrent_measurements_share_one_driver_call(hanging: HangingNvml) -> None:
    """Callers during a measurement share the next one, which starts after their call; two never run at once."""
    monitor = DeviceMonitor(None, nvml=hanging, driver_seconds=10.0)
    hanging.working.clear()
    asking = [threading.Thread(target=monitor.sample) for _ in range(20)]
    for thread in asking:
        thread.start()
    assert hanging.entered.acquire(timeout=5)
    hanging.working.set()
    for thread in asking:
        thread.join(10)
    assert not any(thread.is_alive() for thread in asking)
    assert hanging.calls <= 5
    assert hanging.most_at_once == 1


def test_a_stale_device_does_not_count_as_settled(hanging: HangingNvml) -> None:
    """Two equal stale figures don't count as settled."""
    monitor = DeviceMonitor(None, nvml=hanging, driver_seconds=0.1)
    monitor.sample()
    hanging.working.clear()
    began = time.monotonic()
    monitor.settle("GPU-a", timeout=0.8)
    assert time.monotonic() - began > 0.7


HANGING_ON_GEVENT = """
from gevent import monkey; monkey.patch_all()
import gevent, sys, time
from services import native_threads
hang = monkey.get_original("threading", "Event")().wait
native_threads.CALL_SECONDS, native_threads.THREADS = 0.3, 2
shared = native_threads.SharedCall(hang)

def outcome(call):
    try:
        call()
    except TimeoutError:
        return "TimeoutError"

print({g.get() for g in [gevent.spawn(outcome, lambda: shared(0.2)) for _ in range(20)]})
print({g.get() for g in [gevent.spawn(outcome, lambda: native_threads.run_in_thread(hang)) for _ in range(20)]})
print(gevent.get_hub().threadpool.apply(len, ("the hub has its own threads",)))
print(len(gevent.get_hub().threadpool))
print(native_threads.compute_in_thread(len, "what only computes is not held up"))
"""


def test_hanging_native_calls_time_out_and_leave_the_hubs_threadpool_free() -> None:
    """With gevent each caller times out in time, host names can still be resolved, and the process can exit."""
    run = subprocess.run([sys.executable, "-c", HANGING_ON_GEVENT], capture_output=True, text=True, timeout=30)
    assert run.stdout.splitlines() == ["{'TimeoutError'}", "{'TimeoutError'}", "27", "0", "33"], run.stderr
    assert run.returncode == 0
