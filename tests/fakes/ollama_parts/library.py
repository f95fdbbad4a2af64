"""The models folder of Ollama 0.24.0: manifests under `manifests/HOST/NAMESPACE/MODEL/TAG`, blobs beside them.

A blob of weights has its declared size but no content (the file is sparse), and a digest made from its description.
The small layers are real, and so is a model's digest: the SHA-256 of its manifest's bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .settings import ModelOptions, Settings
from .wire import dumps, human_number

DEFAULT_HOST = "registry.ollama.ai"
MEDIA = "application/vnd.ollama.image."
PRUNE_AFTER = 3600.0
"""Age in seconds from which a starting server deletes an unfinished download."""
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")


class InvalidName(ValueError):
    pass


@dataclass(frozen=True)
class Name:
    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> Name:
        """`[host/][namespace/]model[:tag]`. Raises InvalidName."""
        *front, last = text.split("/")
        model, _, tag = last.partition(":")
        host, namespace = DEFAULT_HOST, "library"
        if len(front) == 2:
            host, namespace = front
        elif len(front) == 1:
            namespace = front[0]
        name = cls(host, namespace, model, tag or "latest")
        parts = (name.namespace, name.model, name.tag)
        if len(front) > 2 or not _HOST.fullmatch(host) or not all(_PART.fullmatch(part) for part in parts):
            raise InvalidName(text)
        return name

    @property
    def short(self) -> str:
        """As Ollama displays it: without the default host and namespace, always with its tag."""
        if self.host != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"
        if self.namespace != "library":
            return f"{self.namespace}/{self.model}:{self.tag}"
        return f"{self.model}:{self.tag}"

    @property
    def manifest_path(self) -> str:
        """The manifest's path at a registry."""
        return f"/v2/{self.namespace}/{self.model}/manifests/{self.tag}"


@dataclass(frozen=True)
class Layer:
    media_type: str
    digest: str
    size: int
    origin: str = ""

    @classmethod
    def of(cls, document: dict[str, Any]) -> Layer:
        return cls(document["mediaType"], document["digest"], document["size"], document.get("from", ""))

    def document(self) -> dict[str, object]:
        document: dict[str, object] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        return document | ({"from": self.origin} if self.origin else {})

    @property
    def file_name(self) -> str:
        return self.digest.replace(":", "-")


@dataclass(frozen=True)
class Manifest:
    config: Layer
    layers: tuple[Layer, ...]

    @classmethod
    def read(cls, data: bytes) -> Manifest:
        document = json.loads(data)
        return cls(Layer.of(document["config"]), tuple(Layer.of(layer) for layer in document["layers"]))

    def data(self) -> bytes:
        document = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": self.config.document(),
            "layers": [layer.document() for layer in self.layers],
        }
        return dumps(document).encode()

    @property
    def all_layers(self) -> tuple[Layer, ...]:
        """The layers in the order of a pull: as listed, the configuration last."""
        return (*self.layers, self.config)

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.all_layers)

    @property
    def weights(self) -> Layer | None:
        return self.layer("model")

    def layer(self, kind: str) -> Layer | None:
        return next((layer for layer in self.layers if layer.media_type == MEDIA + kind), None)


@dataclass(frozen=True)
class Package:
    """A manifest with the contents of its small layers by digest; weights have no content."""

    manifest: Manifest
    contents: dict[str, bytes]


def package(name: str, options: ModelOptions, parameters: dict[str, object] | None = None, system: str = "") -> Package:
    """The model that `options` describe: weights, a template, parameters and a configuration."""
    config = {
        "model_format": "gguf",
        "model_family": options.family,
        "model_families": [options.family],
        "model_type": options.parameter_size or human_number(options.size // 2),
        "file_type": options.quantization_level,
    }
    if options.cloud:
        config |= {"model_format": "", "remote_host": "https://ollama.com:443", "remote_model": name.partition(":")[0]}
    small = [
        _small("template", b"{{ .Prompt }}".ljust(102)),
        _small("params", dumps(parameters or {"stop": ["</s>"]}).encode().ljust(59)),
        *([_small("system", system.encode())] if system else []),
    ]
    described, content = _small("config", dumps(config).encode().ljust(416))
    described = Layer("application/vnd.docker.container.image.v1+json", described.digest, described.size)
    layers = [layer for layer, _ in small]
    rest = sum(layer.size for layer in layers) + described.size
    if not options.cloud:
        description = f"{name} version {options.version}, {options.size} bytes"
        layers.insert(0, Layer(MEDIA + "model", digest_of(description.encode()), max(1, options.size - rest)))
    contents = {layer.digest: data for layer, data in small} | {described.digest: content}
    return Package(Manifest(described, tuple(layers)), contents)


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _small(kind: str, data: bytes) -> tuple[Layer, bytes]:
    return Layer(MEDIA + kind, digest_of(data), len(data)), data


@dataclass(frozen=True)
class Installed:
    """A model in the folder. `options` configure how the fake makes it behave."""

    name: Name
    manifest: Manifest
    digest: str
    modified_ns: int
    config: dict[str, Any]
    parameters: dict[str, Any]
    options: ModelOptions
    system: str = ""

    @property
    def details(self) -> dict[str, object]:
        weights = self.manifest.weights
        return {
            "parent_model": weights.origin if weights else "",
            "format": self.config["model_format"],
            "family": self.config["model_family"],
            "families": self.config["model_families"],
            "parameter_size": self.config["model_type"],
            "quantization_level": self.config["file_type"],
        }


class Library:
    """The folder and its content; every method may be called from any thread."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.blobs = folder / "blobs"
        self._manifests = folder / "manifests"
        self._settings = settings
        self._lock = threading.RLock()
        self.blobs.mkdir(parents=True, exist_ok=True)

    def install_configured(self) -> None:
        """Add the configuration's models to the folder; one that was deleted since isn't added again."""
        note = self.folder / "fake-installed.json"
        known = json.loads(note.read_text()) if note.exists() else []
        for text, options in self._settings.models().items():
            if text not in known:
                name = Name.parse(text)
                made = package(name.short, options)
                for layer in made.manifest.all_layers:
                    self.write_blob(layer, made.contents.get(layer.digest))
                self.write_manifest(name, made.manifest)
        note.write_text(json.dumps(sorted({*known, *self._settings.models()})))

    def prune(self) -> int:
        """Clean up as a server does at its start: delete old unfinished downloads and unused blobs."""
        if os.environ.get("OLLAMA_NOPRUNE", "") not in {"", "0", "false"}:
            return 0
        for path in self.blobs.glob("*-partial*"):
            if time.time() - path.stat().st_mtime > PRUNE_AFTER:
                path.unlink()
        return self.remove_unused()

    def remove_unused(self) -> int:
        with self._lock:
            used = {layer.file_name for model in self.models() for layer in model.manifest.all_layers}
            unused = [path for path in self.blobs.iterdir() if "-partial" not in path.name and path.name not in used]
            for path in unused:
                path.unlink()
            return len(unused)

    def models(self) -> list[Installed]:
        """Every installed model, newest first."""
        with self._lock:
            found = [self._read(path) for path in self._manifests.glob("*/*/*/*")]
        return sorted(found, key=lambda model: model.modified_ns, reverse=True)

    def find(self, text: str) -> Installed | None:
        """The installed model of that name. Raises InvalidName."""
        wanted = Name.parse(text).short.lower()
        return next((model for model in self.models() if model.name.short.lower() == wanted), None)

    def delete(self, model: Installed) -> None:
        with self._lock:
            self._path(model.name).unlink()
            self.remove_unused()

    def write_manifest(self, name: Name, manifest: Manifest) -> None:
        with self._lock:
            path = self._path(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(manifest.data())
            # So that two models installed within one clock tick still have an order.
            os.utime(path, ns=(time.time_ns(), time.time_ns()))

    def has_blob(self, layer: Layer) -> bool:
        return (self.blobs / layer.file_name).exists()

    def write_blob(self, layer: Layer, content: bytes | None = None) -> None:
        with open(self.blobs / layer.file_name, "wb") as file:
            if content is None:
                file.truncate(layer.size)
            else:
                file.write(content)

    def copy(self, source: Installed, name: Name) -> None:
        """Add another name for the same model, with the same digest, as `cp` does."""
        self.write_manifest(name, source.manifest)

    def derive(self, name: Name, parent: Installed, parameters: dict[str, object], system: str = "") -> Manifest:
        """Create a model with another's weights but its own system prompt and parameters, as `create` does."""
        made = package(parent.name.short, parent.options, {**parent.parameters, **parameters}, system)
        weights = parent.manifest.weights
        layers = list(made.manifest.layers)
        if weights is not None:
            layers[0] = Layer(weights.media_type, weights.digest, weights.size, weights.origin or parent.name.short)
        manifest = Manifest(made.manifest.config, tuple(layers))
        for layer in manifest.all_layers:
            if not self.has_blob(layer):
                self.write_blob(layer, made.contents.get(layer.digest))
        self.write_manifest(name, manifest)
        return manifest

    def _path(self, name: Name) -> Path:
        return self._manifests / name.host / name.namespace / name.model / name.tag

    def _read(self, path: Path) -> Installed:
        name = Name(*path.relative_to(self._manifests).parts)
        data = path.read_bytes()
        manifest = Manifest.read(data)
        params, system = manifest.layer("params"), manifest.layer("system")
        weights = manifest.weights
        origin = weights.origin if weights else ""
        return Installed(
            name=name,
            manifest=manifest,
            digest=hashlib.sha256(data).hexdigest(),
            modified_ns=path.stat().st_mtime_ns,
            config=self._content(manifest.config),
            parameters=self._content(params) if params else {},
            options=self._options(origin or name.short, weights),
            system=(self.blobs / system.file_name).read_text() if system else "",
        )

    def _options(self, name: str, weights: Layer | None) -> ModelOptions:
        """A copy behaves like the model whose weights it has."""
        configured = self._settings.models()
        if name not in configured and weights is not None:
            packages = ((known, package(known, options).manifest.weights) for known, options in configured.items())
            name = next((known for known, has in packages if has and has.digest == weights.digest), name)
        return self._settings.options(name)

    def _content(self, layer: Layer) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.blobs / layer.file_name).read_bytes())
        return document
