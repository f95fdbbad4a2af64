"""Engine `ollama`: an Ollama server on this machine or elsewhere, shared with other clients.

What is loaded is what Ollama reports, polled each second. Other clients may load, evict or change anything; that is
shown, never reverted. Loads carry no options, because requests over `/v1` carry none, and a request with different
options would make Ollama load the model again.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from services.cancellation import CancelToken
from services.engines.llamacpp.gguf import GGUFError, estimate_bytes, read_header
from services.engines.ollama.api import Installed, OllamaError, Running, unreachable
from services.engines.ollama.instance import OllamaInstance, Server, ServerProcess
from services.engines.ollama.inventory import DERIVED_PREFIX, LIST_TIMEOUT, derived_name
from services.engines.ollama.names import full_name, other_names
from services.engines.ollama.runners import models_folder_of
from services.engines.ollama.watch import Listing, OllamaWatch
from services.engines.port import HOST_DEVICE, EngineError, GpuBytes, Model, Need, OnExit, Report
from services.http import ConnectionRefused
from services.native_threads import run_in_thread

OVERHEAD_BYTES = 64_000_000
OVERHEAD_SHARE = 0.15
"""Memory beyond the file's size if the file can't be read: an empty runner holds 57 MB, the share is for the cache."""


class Ollama:
    """Engine `ollama`: the server that `watch` polls, from `prepare` to `close`.

    `process` returns the process of a local server, `failure_cause` why one failed, `gpus` the ids of this machine's
    GPUs. `context_length` is the context for models on a server that we did not start; None leaves it to the server.
    """

    name = "ollama"
    outlives_app = True
    adopts_from_others = True

    def __init__(
        self,
        watch: OllamaWatch,
        *,
        local: bool,
        process: Callable[[], ServerProcess | None] = lambda: None,
        failure_cause: Callable[[], str | None] = lambda: None,
        gpus: Callable[[], Sequence[str]] = lambda: (),
        gpu_bytes: GpuBytes = lambda _device, _pid: None,
        context_length: int | None = None,
    ) -> None:
        self._api = watch.api
        self._watch = watch
        self._inventory = watch.inventory
        self._server = Server(self._api, self._watch, self._inventory, local, process, failure_cause, gpu_bytes)
        self._gpus = gpus
        self._context_length = context_length
        self._lock = threading.Lock()
        self._instances: weakref.WeakSet[OllamaInstance] = weakref.WeakSet()
        self._estimates: dict[tuple[str, int], int] = {}
        watch.on_listing(self._note)

    def discover(self) -> Sequence[Model]:
        found = [n for n in self._installed_now() if not n.startswith(DERIVED_PREFIX)]
        return [self.describe(Model(id=name, engine=self.name, source=name)) for name in found]

    def describe(self, model: Model) -> Model:
        source = full_name(model.source)
        model = replace(model, source=source)
        installed = self._installed_now().get(source)
        if installed is None:
            known = self._inventory.known
            return replace(model, fault=f"Ollama has no model {source}. Download it first." if known else None)
        if self._inventory.serving:
            self._inventory.show(installed.name, installed.digest)
        return replace(
            model,
            size_bytes=installed.size_bytes,
            description=model.description or installed.about,
            aliases=_aliases(model.id, source),
            digest=installed.digest,
            held_as=self._held_as(replace(model, digest=installed.digest)),
        )

    def estimate(self, model: Model) -> Need:
        if not self._server.local:
            return Need(HOST_DEVICE, 0, "estimated")  # it takes no memory of this machine
        return Need(self._device(model), self._estimate_bytes(model), "estimated")

    def settings_key(self, model: Model) -> str:
        place = "here" if self._server.local else self._api.base_url
        return f"{place} ctx={self._context(model)} device={self._device(model)} {model.digest}"

    def fetch(self, _model: Model, _report: Report, _abort: CancelToken, /) -> None:
        """Do nothing: models are downloaded by jobs of their own."""

    def launch(self, model: Model, on_exit: OnExit) -> OllamaInstance:
        if model.fault:
            raise EngineError(model.fault)
        installed = self._inventory.list(fresh=True).get(model.source)
        if not self._inventory.known or self._watch.refresh().reachable is False:
            raise unreachable(self._api.base_url, ConnectionRefused("nothing listens there"))
        if installed is None:
            raise EngineError(f"Ollama has no model {model.source} any more. Download it again.")
        self._inventory.show(installed.name, installed.digest)
        return self._instance(replace(model, digest=installed.digest), self._served_name(model, installed), on_exit)

    def loaded(self, models: Sequence[Model], /) -> Collection[Model]:
        """Return every model that a listed entry serves, under whichever of its names Ollama lists it.

        If nothing is known about the weights in memory, the listed name counts: of two models with that source, the
        first.
        """
        listed = list(self._watch.latest.models.values())
        return list({model.id: model for entry in listed for model in self._served_by(entry, models)}.values())

    def adopt(self, model: Model, on_exit: OnExit, /) -> OllamaInstance | None:
        for entry in list(self._watch.latest.models.values()):  # no I/O: see `loaded`
            if self._served_by(entry, [model]):
                name = self._name_beside(entry, model) or entry.name
                return self._instance(model, name, on_exit, ready=True)
        return None

    def remove(self, model: Model, _keep: Collection[str], /) -> None:
        base = model.source
        installed = self._inventory.list(fresh=True)
        for name in [n for n in installed if n.startswith(DERIVED_PREFIX) and self._inventory.source_of(n) == base]:
            with suppress(OllamaError):
                self._api.delete(name)
        try:
            self._api.delete(base)
        except OllamaError as error:
            if error.status != 404:
                raise
        self._inventory.list(fresh=True)

    def installed(self) -> Sequence[Installed]:
        """Return what is on the server's disk as last listed, without derived names. No I/O."""
        return [entry for name, entry in self._inventory.latest.items() if not name.startswith(DERIVED_PREFIX)]

    def models_folder(self) -> Path | None:
        """Return where a server on this machine keeps its files; None if unknown."""
        if not self._server.local:
            return None
        blob = self._inventory.any_blob()
        if blob is not None:
            return Path(blob).parent.parent
        process = self._server.process()
        return models_folder_of(process.pid) if process is not None else None

    def _installed_now(self) -> Mapping[str, Installed]:
        """Return what is installed, as last polled. Queries the server until the watch polls it."""
        if not self._watch.polling:
            return self._inventory.list()
        self._watch.wait_polled(LIST_TIMEOUT)
        return self._inventory.latest

    def prepare(self) -> None:
        """Start to poll the server."""
        self._inventory.serving = True
        self._watch.start()

    def close(self) -> None:
        self._watch.stop()

    def _note(self, look: Listing) -> None:
        with self._lock:
            instances = list(self._instances)
        for instance in instances:
            instance.note(look)

    def _instance(self, model: Model, name: str, on_exit: OnExit, *, ready: bool = False) -> OllamaInstance:
        instance = OllamaInstance(self._server, model, name, self._device(model), on_exit, ready=ready)
        with self._lock:
            self._instances.add(instance)
        return instance

    def _served_by(self, entry: Running, models: Sequence[Model]) -> list[Model]:
        """Return which of these models the listed `entry` serves."""
        same = [model for model in models if self._name_beside(entry, model) is not None]
        source = self._inventory.source_of(entry.name)
        return same or [model for model in models if model.source == source][:1]

    def _name_beside(self, entry: Running, model: Model) -> str | None:
        """Return the name to request a model by if `entry` has the same weights and options in memory, else None.

        Names of the same weights may differ in other respects, such as the system prompt, so each model is requested by
        its own name.
        """
        held_as = self._inventory.held_as(entry.name, entry.digest)
        if held_as is None or model.held_as != held_as:
            return None
        if self._inventory.source_of(entry.name) == model.source:
            return entry.name
        names = self._inventory.names_of(model.source)
        return next((name for name in names if self._inventory.held_as(name) == held_as), None)

    def _held_as(self, model: Model) -> str | None:
        shown, context = self._inventory.shown(model.digest), self._context(model)
        return shown.held_as({} if context is None else {"num_ctx": context}) if shown is not None else None

    def _served_name(self, model: Model, installed: Installed) -> str:
        """Return the name to load a model by: its own, or a derived one with the requested context built in.

        `/v1` has no parameter for the context length, so another one than the server's default has to be part of the
        model.
        """
        context = self._context(model)
        if context is None:
            return model.source
        name = derived_name(installed, context)
        if name not in self._inventory.latest:
            try:
                self._api.derive(name, model.source, context)
            except OllamaError as error:
                raise EngineError(f"Ollama can't give {model.id} a context of {context} tokens: {error}.") from None
        return name

    def _context(self, model: Model) -> int | None:
        """Return the context length set for a model, at most what it was trained for; None leaves it to the server."""
        asked = model.options.get("context_length")
        if not isinstance(asked, int):
            process = self._server.process()
            asked = None if process is not None and process.ours else self._context_length
        shown = self._inventory.shown(model.digest)
        return min(asked, shown.context_length) if asked and shown and shown.context_length else asked

    def _device(self, model: Model) -> str:
        asked = model.options.get("device")
        if asked is not None:
            return str(asked)
        return next(iter(self._gpus()), HOST_DEVICE) if self._server.local else HOST_DEVICE

    def _estimate_bytes(self, model: Model) -> int:
        shown = self._inventory.shown(model.digest)
        context = self._context(model) or 4096
        if shown is not None and shown.blob is not None:
            key = (shown.blob, context)
            if key not in self._estimates:
                with suppress(TimeoutError):  # a slow disk: asked again next time
                    self._estimates[key] = run_in_thread(_estimate_of_file, Path(shown.blob), context)
            if estimate := self._estimates.get(key):
                return estimate
        return int((model.size_bytes or 0) * (1 + OVERHEAD_SHARE)) + OVERHEAD_BYTES if model.size_bytes else 0


def _aliases(model_id: str, source: str) -> tuple[str, ...]:
    short = source.removesuffix(":latest")
    names = (short, *other_names(source))
    return tuple(name for name in names if name not in (source, model_id))


def _estimate_of_file(blob: Path, context: int) -> int:
    """Estimate llama.cpp's memory from the file's header; 0 if this process can't read the file."""
    try:
        header = read_header(blob)
    except (GGUFError, OSError):
        return 0
    # Ollama reads weights instead of mapping them (`UseMmap:false` in its log), so none are held twice.
    return estimate_bytes(header, min(context, header.context_length or context), 1, repack=False)
