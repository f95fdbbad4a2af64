"""One model on an Ollama server: loading, warming up, watching, unloading."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog

from services.engines import out_of_memory
from services.engines.child_logs import tail
from services.engines.ollama.api import FOR_EVER, OllamaApi, OllamaError, OllamaUnreachable, Running
from services.engines.ollama.inventory import Inventory
from services.engines.ollama.load import LoadObserver
from services.engines.ollama.log import first_cause
from services.engines.ollama.runners import end_runner, resident, runner_of
from services.engines.ollama.watch import Listing, OllamaWatch
from services.engines.port import (
    HOST_DEVICE,
    Endpoint,
    EngineError,
    Exit,
    GpuBytes,
    LoadFailed,
    Model,
    NoSleepMixin,
    OnExit,
    Report,
    Usage,
)
from services.http import HttpRequest

log = structlog.get_logger(__name__)

OBSERVE_SECONDS = 0.05
GONE_POLL_SECONDS = 0.02
EVICTED = "Ollama unloaded it: another program asked for that, or for room"
RUNNER_KILLED = "signal: killed"
"""Ollama's message about a runner that another process, or the kernel, has killed."""


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """The process of a local server. `log_path` is known for one that we started (`ours`)."""

    pid: int
    ours: bool = False
    log_path: Path | None = None


@dataclass(frozen=True, slots=True)
class StopRecord:
    """An unload requested here; `at` is monotonic seconds."""

    model_id: str
    at: float


@dataclass(frozen=True, slots=True)
class Server:
    """What all instances on one Ollama server share.

    `process` returns None for a remote server, and for one whose process can't be accessed. `local`: its memory is this
    machine's. `failure_cause` says why a server failed, None if it was stopped.
    """

    api: OllamaApi
    watch: OllamaWatch
    inventory: Inventory
    local: bool
    process: Callable[[], ServerProcess | None]
    failure_cause: Callable[[], str | None]
    gpu_bytes: GpuBytes
    stops: dict[str, StopRecord] = field(default_factory=dict)
    """The latest unload requested here, by key of the weights in memory (`held_as`)."""


class OllamaInstance(NoSleepMixin):
    """A model loading, loaded or being unloaded.

    `name` is its name in Ollama. It counts as loaded while Ollama lists that name, or another one of the same weights.
    """

    def __init__(
        self,
        server: Server,
        model: Model,
        name: str,
        device: str,
        on_exit: OnExit,
        *,
        ready: bool,
    ) -> None:
        self._model = model
        self.name = name
        self._server = server
        self._device = device
        self._on_exit = on_exit
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._ended = False
        self._began = time.monotonic()
        self._ready_at: float | None = self._began if ready else None
        self._listed_as: str | None = None
        self._load: HttpRequest | None = None
        self._runner: int | None = None
        self._generates = True

    @property
    def model(self) -> Model:
        held_as = self._held_as
        if held_as != self._model.held_as and held_as is not None:
            self._model = replace(self._model, held_as=held_as)
        return self._model

    @property
    def pid(self) -> int | None:
        return self._find_runner()

    def wait_ready(self, report: Report, timeout: float) -> Endpoint:
        if self._ready_at is None:
            self._load_it(report, self._began + timeout)
        return Endpoint(self._server.api.base_url, model=self.name)

    def warm_up(self, timeout: float) -> None:
        """Generate a token with the options of a chat request; others would make Ollama load the model again."""
        if self._generates:
            hello = {"role": "user", "content": "Hello"}
            path, body = "/v1/chat/completions", {"model": self.name, "messages": [hello], "max_tokens": 1}
        else:
            path, body = "/v1/embeddings", {"model": self.name, "input": "Hello"}
        self._ask(self._server.api.request(path, body, timeout), "It did not answer its first request")
        self._server.watch.refresh()

    def responds(self, _timeout: float) -> bool | None:
        """Return None: a request of ours would queue behind the requests in flight."""
        return None

    def usage(self) -> Usage | None:
        seen = self._find_listed(self._server.watch.latest)
        if self._ended or not self._server.local:
            return None  # it holds nothing here; its runner may serve another model by now
        runner = self._find_runner()
        held = resident(runner) if runner is not None else None
        on_gpu = self._on_gpu(seen, runner)
        if on_gpu is not None:
            spilled = max(0, seen.size_bytes - seen.vram_bytes) if seen else 0
            return Usage(self._device, on_gpu, spilled_bytes=spilled)
        if held is not None:
            return _on_host(self._device, held[0], held[1])
        return None if seen is None else _on_host(self._device, seen.size_bytes, 0)

    def stop(self, grace: float) -> None:
        self._stopping.set()
        with self._lock:
            load = self._load
            if self._ended:
                return  # its name may stand for another client's runner with other options by now
        if load is not None:
            load.cancel()
        held_as = self._held_as
        if held_as is not None:
            self._server.stops[held_as] = StopRecord(self._model.id, time.monotonic())
        try:
            self._unload(grace)
        except EngineError:
            self._stopping.clear()  # it goes on serving, so a later exit has to be reported
            self._server.stops.pop(held_as or "", None)
            raise
        with self._lock:
            self._ended = True

    def _unload(self, grace: float) -> None:
        """Request an unload by the listed name, and wait until it is done. Raises EngineError if it fails."""
        deadline = time.monotonic() + grace
        try:
            gone = not self._ask_to_unload() or self._wait_gone(deadline) or self._end_by_force(grace)
        except OllamaUnreachable as error:
            if not error.refused:
                raise
            gone = True
        except OllamaError as error:
            raise EngineError(f"Ollama refuses to unload {self._model.id}: {error}.") from None
        if not gone:
            raise EngineError(
                f"Ollama did not unload {self._model.id} within {grace:.0f} s: another program may be using it. "
                "It goes on serving; try again later."
            )

    def _ask_to_unload(self) -> bool:
        """Return False if Ollama knows none of its names: when all files are deleted, the model is gone too."""
        listed = self._find_listed(self._server.watch.latest)
        names = [self.name] if listed is None else [listed.name, self.name]
        for name in dict.fromkeys(names):
            try:
                self._server.api.unload(name)
                return True
            except OllamaError as error:
                if error.status != 404:
                    raise
        return False

    def log_tail(self) -> str:
        path = self._log_path()
        return tail(path) if path is not None else ""

    def warning(self) -> str | None:
        seen = self._find_listed(self._server.watch.latest)
        if seen is None:
            return None
        words = []
        if self._server.local and self._device != HOST_DEVICE and seen.vram_bytes < seen.size_bytes:
            share = 100 * seen.vram_bytes // seen.size_bytes if seen.size_bytes else 0
            words.append(f"Only {share} % of it fit on the GPU; the rest runs on the processor, which is slower.")
        if self._server.watch.latest.reachable is None:
            words.append("Ollama is slow to answer.")
        elif seen.expires_at is not None:
            at = datetime.fromtimestamp(seen.expires_at).strftime("%H:%M")
            words.append(f"Another program set it to be unloaded at {at} once it has had no request.")
        return " ".join(words) or None

    def note(self, look: Listing) -> None:
        """Take in a listing. A model that is no longer listed was unloaded by another client."""
        if self._ready_at is None or look.at <= self._ready_at or look.reachable is None or self._find_listed(look):
            return
        with self._lock:
            if self._ended or self._stopping.is_set():
                return
            self._ended = True
        failure_cause = None if look.reachable else self._server.failure_cause()
        if look.reachable:
            self._on_exit(Exit(self._unloaded_with() or EVICTED, released=True))
        elif failure_cause is None:
            self._on_exit(Exit("Ollama was stopped, and with it everything it had loaded", released=True))
        else:
            self._on_exit(Exit(failure_cause.rstrip(".")))

    def _load_it(self, report: Report, deadline: float) -> None:
        body: dict[str, Any] = {"model": self.name, "keep_alive": FOR_EVER, "stream": False}
        left = max(1.0, deadline - time.monotonic())
        try:
            self._load_with("/api/generate", body, report, left)
        except LoadFailed as error:
            if "does not support generate" not in error.cause:
                raise
            self._generates = False  # a model for embeddings only
            self._load_with("/api/embed", {**body, "input": "Hello"}, report, left)
        look = self._server.watch.refresh()
        if self._find_listed(look) is None:
            self._listed_as = self._find_other_name(look)
        self._ready_at = look.at

    def _load_with(self, path: str, body: dict[str, Any], report: Report, timeout: float) -> None:
        request = self._server.api.request(path, body, timeout)
        done = threading.Event()
        failure: list[LoadFailed] = []

        def ask() -> None:
            try:
                self._ask(request, "Ollama could not load it")
            except LoadFailed as error:
                failure.append(error)
            finally:
                done.set()

        observer = LoadObserver(self._log_path(), self._resident, self._model.size_bytes, report)
        threading.Thread(target=ask, name="ollama-load", daemon=True).start()
        while not done.wait(OBSERVE_SECONDS):
            observer.update()
        if failure:
            self._server.watch.refresh()  # it may have evicted others before it failed
            raise failure[0]

    def _ask(self, request: HttpRequest, trouble: str) -> None:
        """Send a long request that `stop` can cancel. Raises LoadFailed with the first cause."""
        kills = out_of_memory.oom_kills()
        with self._lock:
            self._load = request
        try:
            if self._stopping.is_set():
                raise LoadFailed("It was stopped while loading.", self.log_tail())
            self._server.api.answer(request)
        except (OllamaError, OllamaUnreachable) as error:
            if self._stopping.is_set():
                raise LoadFailed("It was stopped while loading.", self.log_tail()) from None
            cause = first_cause(str(error)) if isinstance(error, OllamaError) else str(error)
            if RUNNER_KILLED in str(error):
                cause = f"its process {out_of_memory.describe_sigkill(kills)}"
            raise LoadFailed(f"{trouble}: {cause}", self.log_tail()) from None
        finally:
            with self._lock:
                self._load = None

    def _wait_gone(self, deadline: float) -> bool:
        """Return whether it left the list, and its process ended, before the deadline."""
        runner = self._find_runner()
        while time.monotonic() < deadline:
            listed = self._find_listed(self._server.watch.refresh())
            if listed is None and (runner is None or resident(runner) is None):
                return True
            time.sleep(GONE_POLL_SECONDS)
        return False

    def _end_by_force(self, grace: float) -> bool:
        """Kill its runner if the server is ours; return whether it is gone then."""
        process, runner = self._server.process(), self._find_runner()
        if process is None or not process.ours or runner is None:
            return False
        log.warning("Ollama did not unload a model, ending its runner", model=self._model.id, pid=runner)
        end_runner(runner)
        return self._wait_gone(time.monotonic() + grace)

    def _log_path(self) -> Path | None:
        process = self._server.process()
        return process.log_path if process is not None else None

    def _resident(self) -> int | None:
        """Bytes of RAM that its process holds; None for a model whose weights go to a GPU, or if unknown."""
        runner = self._find_runner() if self._device == HOST_DEVICE else None
        held = resident(runner) if runner is not None else None
        return held[0] if held is not None else None

    @property
    def _held_as(self) -> str | None:
        return self._server.inventory.held_as(self.name, self._model.digest)

    def _find_listed(self, look: Listing) -> Running | None:
        """Return its entry in a listing, under its own name or one by which another client loaded the same weights."""
        listed = look.models.get(self.name) or look.models.get(self._listed_as or "")
        held_as = self._held_as
        if listed is not None or held_as is None:
            return listed
        inventory = self._server.inventory
        return next((r for r in look.models.values() if inventory.held_as(r.name, r.digest) == held_as), None)

    def _find_other_name(self, look: Listing) -> str:
        """Return the name under which Ollama lists a model that it reported as loaded. Raises LoadFailed without one.

        Explicit options can equal the server's defaults, which are unknown here. Then the files identify it, because
        Ollama has one runner for them.
        """
        inventory = self._server.inventory
        for running in look.models.values():
            inventory.show(running.name, running.digest)
        mine = inventory.shown(self._model.digest)
        for running in look.models.values():
            shown = inventory.shown(running.digest)
            if mine is not None and shown is not None and mine.blobs and mine.blobs == shown.blobs:
                return running.name
        raise LoadFailed("Ollama said that it is loaded, but does not list it. Try again.", self.log_tail())

    def _unloaded_with(self) -> str | None:
        """Return why it is gone, if another name of the same weights was unloaded from here."""
        stop = self._server.stops.get(self._held_as or "")
        if stop is None or self._ready_at is None or stop.at < self._ready_at:
            return None
        return f"It was unloaded together with {stop.model_id}: they are one in Ollama's memory"

    def _find_runner(self) -> int | None:
        if self._runner is not None and resident(self._runner) is not None:
            return self._runner
        process = self._server.process() if self._server.local else None
        shown = self._server.inventory.shown(self._model.digest)
        blob = shown.blob if shown is not None else None
        self._runner = runner_of(process.pid, blob) if process is not None and blob is not None else None
        return self._runner

    def _on_gpu(self, seen: Running | None, runner: int | None) -> int | None:
        """Return its bytes on the GPU, measured by the driver or reported by Ollama; None for a model on the CPU."""
        if self._device == HOST_DEVICE:
            return None
        measured = self._server.gpu_bytes(self._device, runner) if runner is not None else None
        return measured if measured is not None else seen.vram_bytes if seen else None


def _on_host(device: str, held: int, mapped: int) -> Usage:
    """Usage of a model on the CPU; one that was meant for a GPU holds nothing there."""
    if device == HOST_DEVICE:
        return Usage(HOST_DEVICE, held, mapped_bytes=mapped)
    return Usage(device, 0, spilled_bytes=held)
