"""The embedded default engine: llama.cpp, one child process per model.

`xllamacpp` (llama.cpp's server in a wheel) runs in `server.py`; a native `llama-server` can be named instead.
Both answer on a loopback port behind a key that only this app knows.
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

from services.abort import Abort
from services.engines.llamacpp.folder import ModelFolder, places_of
from services.engines.llamacpp.gguf import (
    GGUFHeader,
    estimate_bytes,
    is_projector,
    parts_here,
)
from services.engines.llamacpp.instance import LlamaCppInstance, answers, endpoint_of
from services.engines.llamacpp.launch import EmbeddedLauncher, Launcher, NativeLauncher, OnEnd, Order, Started
from services.engines.port import (
    ADOPT_PATIENCE,
    HOST_DEVICE,
    Endpoint,
    EngineError,
    GpuBytes,
    LoadFailed,
    Model,
    Need,
    NotYet,
    OnExit,
    Report,
)
from services.engines.processes import GroupLeader, ProcessRegistry, Record
from services.offhub import NativeThreads

REPACKED_SHARE = 0.1
ADOPT_SECONDS = 2.0
"""How long a process that was left behind may take to answer each question of one look."""
REMOVE_SECONDS = 30.0
"""How long deleting a model's files may take: a disk takes a while for many gigabytes."""


@dataclass(slots=True)
class Left:
    """A process that an earlier run of the app left loaded, as long as nobody goes on with it."""

    record: Record
    silent_since: float | None = None

    def is_over(self, now: float) -> bool:
        """Whether to end it, after a look at which it did not answer: a busy one is given time."""
        self.silent_since = now if self.silent_since is None else self.silent_since
        return now - self.silent_since > ADOPT_PATIENCE


class LlamaCpp:
    """Engine `llamacpp`. Every GGUF file in `folder` is a model by itself, its id the file's path.

    What it says of files is what the folder's last look saw: only `remove` touches them itself.
    """

    name = "llamacpp"
    outlives_app = False

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
        self._disk = NativeThreads(1, REMOVE_SECONDS)
        self._context_length = context_length
        self._parallel = parallel
        self._gpu_bytes = gpu_bytes
        self._registry = registry
        self._found: list[Record] = []
        self._left: dict[str, Left] = {}
        self._launcher: Launcher = (
            NativeLauncher(native_server, registry) if native_server else EmbeddedLauncher(registry, standby=standby)
        )

    def discover(self) -> Sequence[Model]:
        self._folder.refresh()
        found = []
        for file in self._folder.found():
            if file.header is not None and is_projector(file.header):
                continue  # the image half of another model, not one to talk to
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
            files=file.places,
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

    def fetch(self, _model: Model, _report: Report, _abort: Abort, /) -> None:
        """Its models are here: what is not is downloaded by a job of its own."""

    def launch(self, model: Model, on_exit: OnExit) -> LlamaCppInstance:
        if model.fault:
            raise LoadFailed(model.fault)
        self._end_left(model.id)  # asked for anew: two of it would not fit
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

        order = Order(
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
            order.device,
            lambda ended: self._launcher.start(order, key, ended),
            on_exit,
            self._gpu_bytes,
            note,
        )

    def loaded(self, models: Sequence[Model], /) -> Collection[Model]:
        """What an earlier run left loaded as it would be loaded now; at the first call, whatever else it left is ended.

        Reads nothing: the records were read by `prepare`, the files by the folder.
        """
        if self._found:
            found, self._found = self._found, []
            self._sort_out(found, models)
        return [model for model in models if model.id in self._left]

    def adopt(self, model: Model, on_exit: OnExit, /) -> LlamaCppInstance | None:
        left = self._left.get(model.id)
        if left is None:
            return None
        endpoint = endpoint_of(left.record.address, left.record.key)
        if answers(endpoint, ADOPT_SECONDS):
            self._left.pop(model.id, None)
            return self._take_over(model, left.record, endpoint, on_exit)
        if not self._registry.is_alive(left.record):
            self._left.pop(model.id, None)
            return None
        if left.is_over(time.monotonic()):
            self._end_left(model.id)
            return None
        raise NotYet(f"The process of {model.id} is there, but does not answer yet.")

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
        self._found = self._registry.engines()
        self._launcher.prepare()

    def close(self) -> None:
        self._launcher.close()
        for model_id in list(self._left):
            self._end_left(model_id)  # nobody would know of it any more

    def _take_over(self, model: Model, record: Record, endpoint: Endpoint, on_exit: OnExit) -> LlamaCppInstance | None:
        def find(ended: OnEnd) -> Started:
            return Started(self._registry.take_over(record, ended), record.address)

        try:
            return LlamaCppInstance(model, record.key, _device(model), find, on_exit, self._gpu_bytes, ready=endpoint)
        except psutil.NoSuchProcess:
            return None

    def _sort_out(self, found: Sequence[Record], models: Sequence[Model]) -> None:
        """Tell what can be gone on with from what nobody would load like that, which is ended."""
        specs = {model.id: self._spec(model, self._header(model)) for model in models}
        strange = []
        for record in found:
            if specs.get(record.name) == record.spec and record.name not in self._left:
                self._left[record.name] = Left(record)
            else:
                strange.append(record)
        if strange:
            threading.Thread(target=self._end_all, args=(strange,), name="llamacpp-leftovers", daemon=True).start()

    def _end_all(self, records: Sequence[Record]) -> None:
        for record in records:
            self._registry.end(record)

    def _end_left(self, model_id: str) -> None:
        """End what was left of a model, if something was, because nobody goes on with it."""
        left = self._left.pop(model_id, None)
        if left is not None and self._registry.is_alive(left.record):
            self._registry.end(left.record)

    def _spec(self, model: Model, header: GGUFHeader | None) -> str:
        return f"{self._key(model, header)} {model.source}"

    def _key(self, model: Model, header: GGUFHeader | None) -> str:
        options = sorted((key, str(value)) for key, value in model.options.items())
        context = self._context(model, header)
        return f"{self._launcher.kind} ctx={context} slots={self._slots(model)} {options} {model.size_bytes}"

    def _header(self, model: Model) -> GGUFHeader | None:
        return self._folder.file(model.source).header

    def _companions(self, model: Model) -> tuple[str, ...]:
        """Files that its arguments name: a projector, a draft model, adapters."""
        arguments = map(str, _list(model.options.get("arguments")))
        paths = [argument.rpartition("=")[2] for argument in arguments if argument.endswith(".gguf")]
        return tuple(place for path in paths for place in self._folder.file(path).places)

    def _context(self, model: Model, header: GGUFHeader | None) -> int:
        asked = _whole_number(model.options.get("context_length"), self._context_length)
        return min(asked, header.context_length) if header and header.context_length else asked

    def _slots(self, model: Model) -> int:
        return _whole_number(model.options.get("parallel"), self._parallel)


def id_of(path: Path) -> str:
    """A file's path below the models folder as a model id: `sub/Name-Q4.gguf` is `sub/Name-Q4`.

    Whatever an id may not hold becomes a dash; letters of other scripts are what it may hold. The part number of a
    split model is left out.
    """
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.with_suffix("").as_posix())
    kept = "".join(c if _may_be_in_id(c) else " " for c in unicodedata.normalize("NFC", stem))
    return re.sub(" +", "-", kept).strip("-./:@+") or "model"


def _may_be_in_id(character: str) -> bool:
    """Letters, their marks, digits, and the signs of MODEL_ID_PATTERN."""
    return character in "._:/@+-" or unicodedata.category(character)[0] in "LMN"


def _delete(path: Path, folder: Path, keep: Collection[str]) -> bool:
    """Delete a model's files, and those that they link to, but for the ones to `keep`. Raises OSError.

    False when one of them isn't in the folder: then all stay.
    """
    mine = [Path(place) for place in places_of(parts_here(path)) if place not in keep]
    home = folder.resolve()
    if not all((place.parent.resolve() / place.name).is_relative_to(home) for place in mine):
        return False
    for place in mine:
        place.unlink(missing_ok=True)
    return True


def _mapped(header: GGUFHeader) -> bool:
    """Whether to map the file. Weights that llama.cpp rearranges for the CPU are copied: mapped, they count twice.

    Measured for 808 MiB of Q4_K: 1,725 MiB resident when mapped, 1,099 MiB when read.
    """
    return header.repacked_bytes < REPACKED_SHARE * header.tensor_bytes


def _device(model: Model) -> str:
    return str(model.options.get("device", HOST_DEVICE))


def _whole_number(value: object, default: int) -> int:
    return int(value) if isinstance(value, (int, float, str)) and str(value).isdigit() else default


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, (list, tuple)) else ()
