"""One vLLM server in a container: created or reused, followed through its log, warmed up, stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog

from services.cancellation import Cancelled, CancelToken
from services.engines import out_of_memory
from services.engines.containers.port import (
    Container,
    ContainerError,
    ContainerGone,
    ContainerRuntime,
    ContainerSpec,
    NameTaken,
    RuntimeDown,
    RuntimeHangs,
    Stream,
)
from services.engines.port import (
    HOST_DEVICE,
    Endpoint,
    EngineError,
    Evidence,
    Exit,
    LoadFailed,
    Model,
    OnExit,
    Report,
    SleepFootprint,
    Usage,
)
from services.engines.vllm.facts import footprint
from services.engines.vllm.log import VllmLog
from services.engines.vllm.server import VllmServer, server_in
from services.engines.vllm.spec import SLEEP_FLAG
from services.http import FetchError

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.05
MEASURE_SECONDS = 2.0
TAIL_LINES = 60
RETRY_SECONDS = 0.5
SIGKILLED = 137
KEPT_ASLEEP = 2 * 2**30
"""GPU memory that a sleeping model keeps, until measured: 1 to 2 GiB (vLLM 0.11 to 0.33)."""


GpuHeld = Callable[[str, Collection[int]], int]
"""Maps (device id, pids) to the bytes those processes hold there, measured now; 0 if the driver doesn't report it."""


@dataclass(frozen=True, slots=True)
class InstanceContext:
    """What all instances share: the container runtime and the device's measurements.

    `settle` waits until a device's free memory is stable; `on_end` is called with a container whose run has ended.
    `kept_asleep` maps model ids to the GPU bytes measured while asleep. `shard_bytes` returns the sizes of a model's
    files in loading order, empty if unknown.
    """

    runtime: ContainerRuntime
    gpu_bytes: GpuHeld
    settle: Callable[[str], None]
    on_end: Callable[[Container], None]
    kept_asleep: MutableMapping[str, int]
    shard_bytes: Callable[[Model], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Found:
    """A container of ours that is ready, and whether its model sleeps."""

    container: Container
    asleep: bool


class VllmInstance:
    """A model loading, loaded or being unloaded in its container; with `found`, in one that already runs."""

    def __init__(
        self,
        context: InstanceContext,
        model: Model,
        spec: ContainerSpec,
        device: str,
        on_exit: OnExit,
        found: Found | None = None,
    ) -> None:
        self.model = model
        self._runtime = context.runtime
        self._spec = spec
        self._device = device
        self._on_exit = on_exit
        self._gpu_bytes = context.gpu_bytes
        self._settle = context.settle
        self._on_end = context.on_end
        self._token = CancelToken()
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._oom_kills = out_of_memory.oom_kills()
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        self._log = VllmLog(shard_bytes=context.shard_bytes(model))
        self._news: list[Evidence] = []
        self._container = found.container if found is not None else None
        self._stream: Stream[bytes] | None = None
        self._server: VllmServer | None = None
        self._usage: Usage | None = None
        self._tail = ""
        self._asleep = found is not None and found.asleep
        self._kept_asleep = context.kept_asleep
        if found is not None:
            self._server = server_in(found.container, model.id)
            threading.Thread(target=self._watch_adopted, name="vllm-adopted", daemon=True).start()

    @property
    def container_id(self) -> str | None:
        return self._container.id if self._container is not None else None

    @property
    def pid(self) -> int | None:
        return self._container.pid if self._container is not None else None

    def wait_ready(self, report: Report, timeout: float) -> Endpoint:
        deadline = time.monotonic() + timeout
        if self._server is not None:
            return self._server.endpoint
        try:
            return self._follow(self._bring_up(), report, deadline)
        except Cancelled:
            raise LoadFailed("It was stopped while loading.", self.log_tail()) from None
        except ContainerError as error:
            self._fail_if_stopped()
            raise LoadFailed(str(error), self.log_tail()) from None

    def warm_up(self, timeout: float) -> None:
        assert self._server is not None, "wait_ready comes first"
        try:
            refusal = self._server.first_token(timeout)
        except FetchError as error:
            self._fail_if_stopped()
            raise LoadFailed(f"It did not answer its first request: {error}.", self.log_tail()) from None
        if refusal is not None:
            raise LoadFailed(f"Its first answer was an error: {refusal}", self.log_tail())

    def responds(self, timeout: float) -> bool | None:
        assert self._server is not None, "wait_ready comes first"
        return self._server.generates(timeout)

    def usage(self) -> Usage | None:
        return self._usage

    def stop(self, grace: float) -> None:
        self._stopping.set()
        self._token.cancel()
        with self._starting:  # wait for a concurrent start, then stop the container
            container_id, stream = self.container_id, self._stream
        if container_id is None:
            return
        try:
            self._runtime.stop(container_id, grace)
        except ContainerGone:
            pass
        except ContainerError:
            if self._server is not None and not self._ended.is_set():
                self._stopping.clear()  # it goes on serving, so a later exit has to be reported
            raise
        assert self._container is not None
        self._on_end(self._container)
        self._ended.set()
        if stream is not None:
            stream.close()

    @property
    def asleep(self) -> bool:
        return self._asleep

    def sleep_footprint(self) -> SleepFootprint | None:
        weights = self._log.facts.weights_bytes or self.model.size_bytes
        if SLEEP_FLAG not in self._spec.command or not weights:
            return None
        return SleepFootprint(self._kept_asleep.get(self.model.id, KEPT_ASLEEP), weights)

    def sleep(self, timeout: float) -> None:
        assert self._server is not None
        if not self._server.sleep(timeout):
            raise EngineError(f"{self.model.id} did not go to sleep.")
        self._asleep = True
        kept = self._measure()
        if kept is not None:  # a measurement from before it slept would be wrong
            self._kept_asleep[self.model.id] = kept.bytes

    def wake(self, report: Report, timeout: float) -> Endpoint:
        assert self._server is not None
        report(Evidence("loading_weights", None, "waking up"))
        woken = self._server.wake(timeout)
        self._fail_if_stopped()
        if not woken:
            raise LoadFailed("It did not wake up.", self.log_tail())
        self._asleep = False
        self._measure()
        return self._server.endpoint

    def log_tail(self) -> str:
        if self._container is not None and not self._tail:
            with suppress(ContainerError):
                return self._runtime.logs_tail(self._container.id, TAIL_LINES)
        return self._tail

    def warning(self) -> str | None:
        return None

    def _bring_up(self) -> str:
        """Create the container, or reuse the existing one, attach to its output, and start it; return its id.

        A container of an older spec is replaced. Raises ContainerError and Cancelled, and removes what it created.
        """
        self._token.check()
        there = self._existing()
        container_id = there or self._create()
        stream: Stream[bytes] | None = None
        try:
            self._container = self._runtime.inspect(container_id)
            stream = self._runtime.attach(container_id)
            if self._device != HOST_DEVICE:
                self._settle(self._device)
            self._start(container_id, stream)
        except BaseException:
            if stream is not None:
                stream.close()  # the stream of a container that never starts would never end
            if there is None:
                with suppress(ContainerError):
                    self._runtime.remove(container_id)  # a `stop` during its creation did not know its id
            raise
        self._container = self._runtime.inspect(container_id)
        return container_id

    def _start(self, container_id: str, stream: Stream[bytes]) -> None:
        """Start the container unless `stop` was called. A concurrent `stop` waits, and then finds it to stop it."""
        with self._starting:
            self._token.check()
            self._runtime.start(container_id)
            self._stream = stream
            threading.Thread(target=self._read_log, args=(stream,), name="vllm-log", daemon=True).start()

    def _existing(self) -> str | None:
        """Return our container if it has the same spec; remove it if not."""
        found = self._runtime.by_name(self._spec.name)
        if found is None:
            return None
        if not found.managed:
            raise NameTaken(
                f"A container named {self._spec.name} exists that Switchyard did not make, so it is left alone. "
                "Remove or rename it, then try again.",
                found,
            )
        if found.spec_hash != self._spec.spec_hash or found.state not in ("created", "exited"):
            self._runtime.remove(found.id)
            return None
        return found.id

    def _create(self) -> str:
        for mount in self._spec.mounts:
            if mount.source.startswith("/") and not mount.read_only:  # Docker would create it, owned by root
                with suppress(OSError):
                    Path(mount.source).mkdir(parents=True, exist_ok=True)
        return self._runtime.create(self._spec)

    def _follow(self, container_id: str, report: Report, deadline: float) -> Endpoint:
        """Wait until the server is healthy and lists the model. Raises LoadFailed with the first cause in its log."""
        report(Evidence("loading_weights", None, "starting vLLM"))
        assert self._container is not None
        server = server_in(self._container, self.model.id)
        while True:
            with self._lock:
                news, self._news = self._news, []
            for evidence in news:
                report(evidence)
            self._fail_if_stopped()
            if self._ended.is_set():
                raise self._failure(container_id)
            if time.monotonic() > deadline:
                raise LoadFailed("It was not ready in time. Its log says how far it came.", self.log_tail())
            if server is not None and server.is_ready():
                self._server = server
                self._measure()
                threading.Thread(target=self._keep_measuring, name="vllm-memory", daemon=True).start()
                return server.endpoint
            self._ended.wait(POLL_SECONDS)

    def _read_log(self, stream: Stream[bytes]) -> None:
        """Read the container's output until it ends, or the runtime does."""
        try:
            for data in stream:
                news = self._log.feed(data)
                with self._lock:
                    self._news += news
        except ContainerError as error:
            log.warning("a container's output broke off", model=self.model.id, error=str(error))
        finally:
            stream.close()
        self._after_the_end()

    def _watch_adopted(self) -> None:
        """Watch a container that was found running; its earlier log isn't read."""
        assert self._container is not None
        self._measure()
        threading.Thread(target=self._keep_measuring, name="vllm-memory", daemon=True).start()
        self._after_the_end()

    def _after_the_end(self) -> None:
        """Find out how the container ended. After a mere restart of the runtime it may still be running."""
        assert self._container is not None
        code: int | None = None
        while not self._stopping.is_set():
            try:
                code = self._runtime.wait(self._container.id, RETRY_SECONDS)
                if code is not None:
                    break
            except ContainerGone:
                self._report_exit(Exit("Its container was removed"))
                return
            except (RuntimeDown, RuntimeHangs):
                if self._gone_with_its_runtime():
                    break
                self._stopping.wait(RETRY_SECONDS)
            except ContainerError as error:
                log.warning("a container can't be inspected", model=self.model.id, error=str(error))
                self._stopping.wait(RETRY_SECONDS)
        self._keep_tail()
        failure = self._log.failure
        if self._core_ran_out_of_memory():
            self._report_exit(Exit(f"Its engine {out_of_memory.BY_KERNEL}"))
        elif failure is not None:
            self._report_exit(Exit(failure.words.rstrip(".")))
        else:
            gone = "Docker went away, and the container with it"
            self._report_exit(Exit(gone if code is None else self._describe_end(code)))

    def _describe_end(self, code: int) -> str:
        """Describe how a ready container ended.

        One that is removed by force is killed first, and disappears a moment later.
        """
        assert self._container is not None
        if code == SIGKILLED:
            self._stopping.wait(RETRY_SECONDS)
        try:
            ended = self._runtime.inspect(self._container.id)
        except ContainerGone:
            return "Its container was removed"
        except ContainerError:
            return self._describe_exit(code)
        return f"Its container {out_of_memory.BY_KERNEL}" if ended.oom_killed else self._describe_exit(code)

    def _describe_exit(self, code: int) -> str:
        """Describe an exit code. Code 0 is not a success, because the exit was not requested."""
        if code == SIGKILLED:
            return f"Its container {out_of_memory.describe_sigkill(self._oom_kills)}"
        return f"Its container ended {'by itself, as if all were well' if code == 0 else f'with exit code {code}'}"

    def _gone_with_its_runtime(self) -> bool:
        """Return whether the server doesn't answer while the runtime can't say what became of its container."""
        return self._server is None or not self._server.is_ready()

    def _report_exit(self, exit: Exit) -> None:
        assert self._container is not None
        self._on_end(self._container)
        self._ended.set()
        if not self._stopping.is_set() and self._server is not None:
            self._on_exit(exit)

    def _failure(self, container_id: str) -> LoadFailed:
        """Return why the container ended before it was ready."""
        failure = self._log.failure
        if failure is not None and failure.code != "engine_failed":
            return LoadFailed(failure.words, self.log_tail())
        try:
            container = self._runtime.inspect(container_id)
        except ContainerError as error:
            return LoadFailed(str(error), self.log_tail())
        if container.oom_killed or self._core_ran_out_of_memory():  # vLLM's log shows only consequences
            return LoadFailed(f"Its engine {out_of_memory.BY_KERNEL}.", self.log_tail())
        if failure is not None:
            return LoadFailed(failure.words, self.log_tail())
        return LoadFailed(f"{self._describe_exit(container.exit_code or 0)} while loading", self.log_tail())

    def _core_ran_out_of_memory(self) -> bool:
        """Return whether the kernel killed vLLM's engine process; the log only says that it is gone."""
        failure = self._log.failure
        gone = failure is not None and failure.code == "engine_failed"
        return gone and out_of_memory.killed_since(self._oom_kills)

    def _fail_if_stopped(self) -> None:
        if self._stopping.is_set():
            raise LoadFailed("It was stopped while loading.", self.log_tail())

    def _keep_tail(self) -> None:
        if self._container is not None:
            with suppress(ContainerError):
                self._tail = self._runtime.logs_tail(self._container.id, TAIL_LINES)

    def _keep_measuring(self) -> None:
        while not self._ended.wait(MEASURE_SECONDS):
            self._measure()

    def _logged_footprint(self) -> int:
        """Memory by its log, if the driver doesn't report processes (WSL, MIG, another pid namespace)."""
        return KEPT_ASLEEP if self._asleep else footprint(self._log.facts) or 0

    def _measure(self) -> Usage | None:
        """Measure what its processes hold; done here so that `usage` never waits for Docker.

        Returns None if unknown; the last measurement stays.
        """
        if self._container is None:
            return None
        try:
            pids = self._runtime.pids(self._container.id)
        except ContainerError:
            return None
        if self._device == HOST_DEVICE:
            held = sum(_resident(pid) for pid in pids)
        else:
            held = self._gpu_bytes(self._device, pids) or self._logged_footprint()
        if not held:
            return None
        spilled = sum(map(_resident, pids)) if self._asleep else 0  # asleep, its weights are in host RAM
        self._usage = usage = Usage(self._device, held, spilled_bytes=spilled)
        return usage


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0
