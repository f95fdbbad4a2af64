"""Engine `vllm`: one container for each model listed in the settings, run by a container runtime.

Containers are polled in the background: a runtime that hangs must block neither a page nor the switcher.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import structlog

from services.cancellation import CancelToken
from services.engines.containers.port import Container, ContainerError, ContainerRuntime, ContainerSpec
from services.engines.port import (
    ADOPT_TIMEOUT,
    HOST_DEVICE,
    EngineError,
    Evidence,
    Model,
    Need,
    NotResponding,
    OnExit,
    Report,
)
from services.engines.vllm.instance import Found, GpuHeld, InstanceContext, VllmInstance
from services.engines.vllm.server import Condition, server_in
from services.engines.vllm.spec import DEFAULT_SHARE, OWNER_LABEL, VllmSettings, required_bytes, share_of, spec_of
from services.memory.ledger import Reading
from services.periodic import Periodic
from services.sizes import format_part, format_size

log = structlog.get_logger(__name__)

POLL_SECONDS = 2.0
CLOSE_SECONDS = 2.0
FIRST_POLL_SECONDS = 2.0

Run = tuple[str, float | None]
"""One run of a container: its id and start time. A container can be started again."""


@dataclass(slots=True)
class Orphan:
    """A container that an earlier run of the app left running, until it is adopted or ended."""

    refused: bool = False
    silent_since: float | None = None

    def is_over(self, condition: Condition, now: float) -> bool:
        """Return whether to end it, after a poll that found it not ready.

        A silent one may be busy, and gets ADOPT_TIMEOUT seconds. One that refuses connections was still loading: vLLM
        listens once its engine is up, and nobody has followed its log. That has to be seen twice, because a port can
        also be reset while Docker itself starts.
        """
        if condition == "silent":
            self.refused = False
            self.silent_since = now if self.silent_since is None else self.silent_since
            return now - self.silent_since > ADOPT_TIMEOUT
        before, self.refused, self.silent_since = self.refused, True, None
        return before


def run_of(container: Container) -> Run:
    return container.id, container.started_at


class Weights(Protocol):
    """Fetches a model's weights to where its container expects them."""

    def size_bytes(self, model: Model) -> int | None:
        """Return their size if they are on this disk, else None. Never raises."""

    def shard_bytes(self, model: Model) -> Sequence[int]:
        """Return the sizes of the files in vLLM's loading order, as last seen; empty if unknown. No I/O."""

    def fetches(self, model: Model) -> bool:
        """Return whether `fetch` would fetch anything. No network; never raises."""

    def fetch(self, model: Model, environment: Mapping[str, str], report: Report, token: CancelToken) -> None:
        """Block until they are on this disk.

        `environment` is the container's. Raises LoadFailed, and Cancelled when `token` is cancelled.
        """


class Vllm:
    """Engine `vllm`. `readings` returns this machine's devices; `settle` waits until free memory is stable.

    `runtime` creates the container runtime when a vLLM model first needs it: importing Docker's client takes a tenth of
    the app's start, which is only spent if such a model is listed.
    """

    name = "vllm"
    outlives_app = True
    adopts_from_others = False

    def __init__(
        self,
        runtime: Callable[[], ContainerRuntime],
        settings: VllmSettings,
        weights: Weights,
        *,
        readings: Callable[[], Sequence[Reading]],
        gpu_bytes: GpuHeld = lambda _device, _pids: 0,
        settle: Callable[[str], None] = lambda _device: None,
    ) -> None:
        self._make_runtime = runtime
        self._made_runtime: ContainerRuntime | None = None
        self._making = threading.Lock()
        self._settings = settings
        self._weights = weights
        self._readings = readings
        self._gpu_bytes = gpu_bytes
        self._settle = settle
        self._models: dict[str, Model] = {}
        self._instances: weakref.WeakSet[VllmInstance] = weakref.WeakSet()
        self._found: Mapping[str, Found] = {}
        self._ended_runs: set[Run] = set()
        self._kept_asleep: dict[str, int] = {}
        self._silent: Mapping[str, Container] = {}
        self._orphans: dict[Run, Orphan] | None = None
        self._watch = Periodic("vllm-look", self._try_poll, POLL_SECONDS)

    def discover(self) -> Sequence[Model]:
        return ()  # only listed models have containers

    def describe(self, model: Model) -> Model:
        self._models[model.id] = model
        here = self._weights.size_bytes(model)
        size = model.size_bytes or here
        fetch = size if here is None and self._weights.fetches(model) else 0
        return replace(model, size_bytes=size, fetch_bytes=fetch, fault=self._fault(model))

    def estimate(self, model: Model) -> Need:
        """Estimate a model without a declared need. vLLM claims what it is told, so a declared need is exact."""
        device = self._device(model)
        if model.required_bytes:
            return Need(device, 0, "estimated")
        return Need(device, required_bytes(model) or int(DEFAULT_SHARE * self._gpu_total(device)), "estimated")

    def settings_key(self, model: Model) -> str:
        options = sorted((key, str(value)) for key, value in model.options.items())
        return (
            f"{model.options.get('image') or self._settings.image} {self._device(model)} {options} {model.size_bytes}"
        )

    def fetch(self, model: Model, report: Report, token: CancelToken, /) -> None:
        """Pull the image, then fetch the weights."""
        spec = self._spec(model)
        if not self._runtime.image_present(spec.image):
            report(Evidence("downloading", None, f"pulling the image {spec.image}"))
            self._runtime.pull(spec.image, partial(_report_image, report), token)
            report = partial(_report_second_half, report)
        self._weights.fetch(model, spec.environment, report, token)

    def launch(self, model: Model, on_exit: OnExit) -> VllmInstance:
        if model.fault:
            raise EngineError(model.fault)
        return self._instance(model, on_exit, None)

    def loaded(self, models: Sequence[Model], /) -> Collection[Model]:
        found, silent = self._found, self._silent
        return [model for model in models if model.id in found or model.id in silent]

    def adopt(self, model: Model, on_exit: OnExit, /) -> VllmInstance | None:
        found = self._found.get(model.id)
        if found is not None:
            return self._instance(model, on_exit, found)
        if model.id in self._silent:
            raise NotResponding(f"The container of {model.id} runs, but does not answer yet.")
        return None

    def remove(self, model: Model, _keep: Collection[str], /) -> None:
        raise EngineError(
            f"The files of {model.id} lie in the Hugging Face cache, which other programs share: delete them there. "
            "The model itself is listed in the settings."
        )

    def prepare(self) -> None:
        if self._models:
            self._watch.start()
            self._watch.wait_called(FIRST_POLL_SECONDS)  # know what runs before the first request

    def close(self) -> None:
        self._watch.stop(CLOSE_SECONDS)  # a poll under way would reopen the connections closed here
        if self._made_runtime is not None:
            self._made_runtime.close()

    @property
    def _runtime(self) -> ContainerRuntime:
        with self._making:
            if self._made_runtime is None:
                self._made_runtime = self._make_runtime()
            return self._made_runtime

    def _instance(self, model: Model, on_exit: OnExit, found: Found | None) -> VllmInstance:
        host = InstanceContext(
            self._runtime, self._gpu_bytes, self._settle, self._note_end, self._kept_asleep, self._weights.shard_bytes
        )
        instance = VllmInstance(host, model, self._spec(model), self._device(model), on_exit, found)
        self._instances.add(instance)
        return instance

    def _note_end(self, container: Container) -> None:
        """Note a run that was stopped, so that a poll begun before does not find it again."""
        self._ended_runs.add(run_of(container))
        self._found = self._without_ended(self._found)

    def _without_ended(self, found: Mapping[str, Found]) -> Mapping[str, Found]:
        return {model: f for model, f in found.items() if run_of(f.container) not in self._ended_runs}

    def _spec(self, model: Model) -> ContainerSpec:
        device = self._device(model)
        return spec_of(model, self._settings, device=device, share=self._share(model, device))

    def _fault(self, model: Model) -> str | None:
        device = self._device(model)
        if device == HOST_DEVICE or any(reading.id == device for reading in self._readings()):
            return None
        return f"There is no GPU {device} on this machine."

    def _device(self, model: Model) -> str:
        asked = model.options.get("device")
        if asked is not None:
            return str(asked)
        return next((reading.id for reading in self._readings() if reading.kind == "gpu"), HOST_DEVICE)

    def _share(self, model: Model, device: str) -> float | None:
        need, total = model.required_bytes or required_bytes(model), self._gpu_total(device)
        return share_of(need, total) if need and total else None

    def _gpu_total(self, device: str) -> int:
        """Return a GPU's total bytes, 0 for the host."""
        return next((r.total_bytes for r in self._readings() if r.id == device and r.kind == "gpu"), 0)

    def _try_poll(self) -> None:
        try:
            self._poll()
        except ContainerError as error:
            log.info("the containers can't be polled", reason=str(error))

    def _poll(self) -> None:
        """Find our containers that are ready, and those that may become ready; end orphans that can't be adopted."""
        ready: dict[str, Found] = {}
        silent: dict[str, Container] = {}
        running = [c for c in self._runtime.find({OWNER_LABEL: self._settings.owner}) if c.state == "running"]
        if self._orphans is None:
            made = {instance.container_id for instance in self._instances}
            self._orphans = {run_of(c): Orphan() for c in running if c.id not in made}
        for container in running:
            model = self._models.get(container.model or "")
            server = server_in(container, model.id) if model is not None else None
            condition = server.condition() if server is not None else "absent"
            if model is not None and condition in ("awake", "asleep"):
                ready[model.id] = Found(container, condition == "asleep")
                self._orphans.pop(run_of(container), None)
            elif container.id in {instance.container_id for instance in self._instances}:
                continue  # an instance is loading it, or has adopted it
            elif model is None or self._is_over(container, condition):
                self._end_orphan(container)
            elif condition == "silent":
                silent[model.id] = container
        self._found = self._without_ended(ready)
        self._silent = silent

    def _is_over(self, container: Container, condition: Condition) -> bool:
        orphan = (self._orphans or {}).get(run_of(container))
        return orphan is not None and orphan.is_over(condition, time.monotonic())

    def _end_orphan(self, container: Container) -> None:
        """Remove a container that an earlier run left running; containers that appeared since are left alone."""
        if self._orphans and self._orphans.pop(run_of(container), None) is not None:
            log.warning("removing a container that an earlier run left behind", name=container.name)
            self._runtime.remove(container.id)


def _report_image(report: Report, done: int, total: int | None) -> None:
    words = format_part(done, total) if total else format_size(done)
    report(Evidence("downloading", done / total / 2 if total else None, f"{words} of the image"))


def _report_second_half(report: Report, seen: Evidence) -> None:
    """Report the weights as the second half of the fetch, after the image: the proportion of times is unknown."""
    report(replace(seen, fraction=None if seen.fraction is None else 0.5 + seen.fraction / 2))
