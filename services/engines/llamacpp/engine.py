"""The embedded engine `llamacpp`: llama.cpp's server, one child process per model.

`server.py` runs `xllamacpp` (that server in a wheel); a native `llama-server` can be configured instead. Both answer on
a loopback port and require a key that only this app knows.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from services.cancellation import CancelToken
from services.engines.llamacpp.folder import ModelFolder, all_paths_of
from services.engines.llamacpp.gguf import (
    GGUFHeader,
    estimate_bytes,
    is_projector,
    parts_here,
)
from services.engines.llamacpp.instance import LlamaCppInstance, endpoint_of, is_ready
from services.engines.llamacpp.launch import (
    EmbeddedLauncher,
    Launcher,
    LoadRequest,
    NativeLauncher,
    OnEnd,
    ServerHandle,
)
from services.engines.port import (
    ADOPT_TIMEOUT,
    HOST_DEVICE,
    Endpoint,
    EngineError,
    GpuBytes,
    LoadFailed,
    Model,
    Need,
    NotResponding,
    OnExit,
    Report,
)
from services.engines.processes import GroupLeader, ProcessRecord, ProcessRegistry
from services.model_ids import may_be_in_id
from services.native_threads import NativeThreadPool

REPACKED_SHARE = 0.1
"""Share of repacked weights from which a file is read instead of mapped (see `_mapped`)."""
ADOPT_SECONDS = 2.0
"""Time limit of each probe of a process left by an earlier run."""
REMOVE_SECONDS = 30.0
"""Time limit for deleting a model's files; large files take a while."""


@dataclass(slots=True)
class Orphan:
    """A process with a loaded model that an earlier run left, until it is adopted or ended."""

    record: ProcessRecord
    silent_since: float | None = None

    def is_over(self, now: float) -> bool:
        """Return whether to end it, after a probe it did not answer. A busy one gets ADOPT_PATIENCE seconds."""
        self.silent_since = now if self.silent_since is None else self.silent_since
        return now - self.silent_since > ADOPT_TIMEOUT


class LlamaCpp:
    """Engine `llamacpp`. Every GGUF file in `folder` is a model, its id derived from the file's path.

    Figures about files come from the folder's last scan; only `remove` accesses the files itself.
    """

    name = "llamacpp"
    outlives_app = False
    adopts_from_others = False

    def __init__(
        self,
        folder: ModelFolder,
        registry: ProcessRegistry,
        *,
        context_length: int,
        parallel: int,
        native_server: str | None = None,
        standby: bool = True,
        gpu_bytes: GpuBytes = lambda _device, _pid: None,
    ) -> None:
        self._folder = folder
        self._disk = NativeThreadPool(1, REMOVE_SECONDS)
        self._context_length = context_length
        self._parallel = parallel
        self._gpu_bytes = gpu_bytes
        self._registry = registry
        self._recorded: list[ProcessRecord] = []
        self._orphans: dict[str, Orphan] = {}
        self._launcher: Launcher = (
            NativeLauncher(native_server, registry) if native_server else EmbeddedLauncher(registry, standby=standby)
        )

    def discover(self) -> Sequence[Model]:
        self._folder.refresh()
        found = []
        for file in self._folder.found():
            if file.header is not None and is_projector(file.header):
                continue  # the image encoder of another model
            model_id = id_of(file.path.relative_to(self._folder.path))
            found.append(self.describe(Model(id=model_id, engine=self.name, source=str(file.path))))
        return found

    def describe(self, model: Model) -> Model:
        file = self._folder.file(model.source)
        header = file.header
        return replace(
            model,
            source=str(file.path),
            size_bytes=model.size_bytes if file.size_bytes is None else file.size_bytes,
            digest=file.version,
            files=file.all_paths,
            companions=self._companions(model),
            description=model.description or (header.description if header and header.description else ""),
            fault=file.fault,
        )

    def estimate(self, model: Model) -> Need:
        header = self._header(model)
        size = 0
        if header is not None:
            size = estimate_bytes(header, self._context(model, header), self._slots(model), repack=_mapped(header))
        return Need(device=_device(model), bytes=size, basis="estimated")

    def settings_key(self, model: Model) -> str:
        return self._key(model, self._header(model))

    def fetch(self, _model: Model, _report: Report, _abort: CancelToken, /) -> None:
        """Do nothing: files are downloaded by jobs of their own."""

    def launch(self, model: Model, on_exit: OnExit) -> LlamaCppInstance:
        if model.fault:
            raise LoadFailed(model.fault)
        self._end_orphan(model.id)  # memory may not suffice for two processes with the same model
        header = self._header(model)
        key = secrets.token_urlsafe(24)

        def note(process: GroupLeader, endpoint: Endpoint) -> None:
            self._registry.note_ready(
                process.pid,
                name=model.id,
                address=endpoint.origin,
                log_path=str(process.log_path),
                spec=self._spec(model, header),
                key=key,
            )

        request = LoadRequest(
            path=model.source,
            mapped=header is None or _mapped(header),
            alias=model.id,
            context_length=self._context(model, header),
            parallel=self._slots(model),
            threads=_whole_number(model.options.get("threads"), psutil.cpu_count(logical=False) or os.cpu_count() or 1),
            device=_device(model),
            arguments=tuple(str(a) for a in _list(model.options.get("arguments"))),
        )
        return LlamaCppInstance(
            model,
            key,
            request.device,
            lambda ended: self._launcher.start(request, key, ended),
            on_exit,
            self._gpu_bytes,
            note,
        )

    def loaded(self, models: Sequence[Model], /) -> Collection[Model]:
        """Return the models that an earlier run left loaded with the same settings; the first call ends all its others.

        No I/O: `prepare` has read the records, the folder's thread the files.
        """
        if self._recorded:
            found, self._recorded = self._recorded, []
            self._classify_recorded(found, models)
        return [model for model in models if model.id in self._orphans]

    def adopt(self, model: Model, on_exit: OnExit, /) -> LlamaCppInstance | None:
        orphan = self._orphans.get(model.id)
        if orphan is None:
            return None
        endpoint = endpoint_of(orphan.record.address, orphan.record.key)
        if is_ready(endpoint, ADOPT_SECONDS):
            self._orphans.pop(model.id, None)
            return self._take_over(model, orphan.record, endpoint, on_exit)
        if not self._registry.is_alive(orphan.record):
            self._orphans.pop(model.id, None)
            return None
        if orphan.is_over(time.monotonic()):
            self._end_orphan(model.id)
            return None
        raise NotResponding(f"The process of {model.id} is there, but does not answer yet.")

    def remove(self, model: Model, keep: Collection[str], /) -> None:
        try:
            mine = self._disk(_delete, self._folder.file(model.source).path, self._folder.path, keep)
        except OSError as error:
            raise EngineError(f"The files of {model.id} can't be deleted: {error}.") from None
        if not mine:
            raise EngineError(
                f"{model.id} is not in the models folder {self._folder.path.absolute()}, so it is left alone. "
                "Delete it yourself."
            )

    def prepare(self) -> None:
        self._recorded = self._registry.engines()
        self._launcher.prepare()

    def close(self) -> None:
        self._launcher.close()
        for model_id in list(self._orphans):
            self._end_orphan(model_id)  # a later run would not find it

    def _take_over(
        self, model: Model, record: ProcessRecord, endpoint: Endpoint, on_exit: OnExit
    ) -> LlamaCppInstance | None:
        def find(ended: OnEnd) -> ServerHandle:
            return ServerHandle(self._registry.take_over(record, ended), record.address)

        try:
            return LlamaCppInstance(model, record.key, _device(model), find, on_exit, self._gpu_bytes, ready=endpoint)
        except psutil.NoSuchProcess:
            return None

    def _classify_recorded(self, found: Sequence[ProcessRecord], models: Sequence[Model]) -> None:
        """Keep the recorded processes that match a model's current settings; end the others in a thread."""
        specs = {model.id: self._spec(model, self._header(model)) for model in models}
        unusable = []
        for record in found:
            if specs.get(record.name) == record.spec and record.name not in self._orphans:
                self._orphans[record.name] = Orphan(record)
            else:
                unusable.append(record)
        if unusable:
            threading.Thread(target=self._end_all, args=(unusable,), name="llamacpp-leftovers", daemon=True).start()

    def _end_all(self, records: Sequence[ProcessRecord]) -> None:
        for record in records:
            self._registry.end(record)

    def _end_orphan(self, model_id: str) -> None:
        """End the process that an earlier run left for a model, if any, because it is not adopted."""
        orphan = self._orphans.pop(model_id, None)
        if orphan is not None and self._registry.is_alive(orphan.record):
            self._registry.end(orphan.record)

    def _spec(self, model: Model, header: GGUFHeader | None) -> str:
        return f"{self._key(model, header)} {model.source}"

    def _key(self, model: Model, header: GGUFHeader | None) -> str:
        options = sorted((key, str(value)) for key, value in model.options.items())
        context = self._context(model, header)
        return f"{self._launcher.kind} ctx={context} slots={self._slots(model)} {options} {model.size_bytes}"

    def _header(self, model: Model) -> GGUFHeader | None:
        return self._folder.file(model.source).header

    def _companions(self, model: Model) -> tuple[str, ...]:
        """Return the files that a model's arguments name: a projector, a draft model, adapters."""
        arguments = map(str, _list(model.options.get("arguments")))
        paths = [argument.rpartition("=")[2] for argument in arguments if argument.endswith(".gguf")]
        return tuple(place for path in paths for place in self._folder.file(path).all_paths)

    def _context(self, model: Model, header: GGUFHeader | None) -> int:
        asked = _whole_number(model.options.get("context_length"), self._context_length)
        return min(asked, header.context_length) if header and header.context_length else asked

    def _slots(self, model: Model) -> int:
        return _whole_number(model.options.get("parallel"), self._parallel)


def id_of(path: Path) -> str:
    """Derive a model id from a file's path below the models folder: `sub/Name-Q4.gguf` gives `sub/Name-Q4`.

    Characters not allowed in an id become dashes; letters of all scripts are allowed. The part number of a split model
    is left out.
    """
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.with_suffix("").as_posix())
    kept = "".join(c if may_be_in_id(c) else " " for c in unicodedata.normalize("NFC", stem))
    return re.sub(" +", "-", kept).strip("-./:@+") or "model"


def _delete(path: Path, folder: Path, keep: Collection[str]) -> bool:
    """Delete a model's files and what they link to, except those in `keep`. Raises OSError.

    Return False, and delete nothing, if one of them is outside the folder.
    """
    mine = [Path(place) for place in all_paths_of(parts_here(path)) if place not in keep]
    home = folder.resolve()
    if not all((place.parent.resolve() / place.name).is_relative_to(home) for place in mine):
        return False
    for place in mine:
        place.unlink(missing_ok=True)
    return True


def _mapped(header: GGUFHeader) -> bool:
    """Return whether to map the file. Weights that llama.cpp repacks for the CPU are copied: mapped, they count twice.

    Measured for 808 MiB of Q4_K: 1,725 MiB resident when mapped, 1,099 MiB when read.
    """
    return header.repacked_bytes < REPACKED_SHARE * header.tensor_bytes


def _device(model: Model) -> str:
    return str(model.options.get("device", HOST_DEVICE))


def _whole_number(value: object, default: int) -> int:
    return int(value) if isinstance(value, (int, float, str)) and str(value).isdigit() else default


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else ()
