"""Downloads inside the server: one transfer per blob, shared by all clients that wait for it; parts survive on disk.

No data is transferred: a blob grows at the configured speed. Its state is stored as Ollama 0.24.0 does it: a sparse
`sha256-…-partial`, and for each part of 100 MB one `-partial-N` with its completed bytes, written when the part is
done or the transfer is stopped in an orderly way. A killed server loses its unfinished parts.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException

from .library import DEFAULT_HOST, Layer, Library, Manifest, Name, Package, digest_of, package
from .settings import Settings

PART = 100_000_000
TICK = 0.01
EVENT_EVERY = 0.06
Event = dict[str, object]


class PullFailed(Exception):
    """The text is the server's error."""


class Transfer:
    """The transfer of one blob. `completed` and `error` may be read at any time."""

    def __init__(self, layer: Layer, content: bytes | None, library: Library, settings: Settings) -> None:
        self.layer = layer
        self.error: str | None = None
        self.done = threading.Event()
        self._content = content
        self._library = library
        self._settings = settings
        self._stop = threading.Event()
        self._path = library.blobs / f"{layer.file_name}-partial"
        self._parts = [min(PART, layer.size - at) for at in range(0, layer.size, PART)]
        self._has = [self._read_part(number) for number in range(len(self._parts))]
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def completed(self) -> int:
        return int(sum(self._has))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop in an orderly way, keeping what has arrived."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with open(self._path, "ab") as file:
            file.truncate(self.layer.size)
        for number in range(len(self._parts)):
            self._write_part(number, self._has[number])
        last = time.monotonic()
        while self.completed < self.layer.size and self.error is None and not self._stop.wait(TICK):
            now = time.monotonic()
            self._grow((now - last) * self._settings.bytes_per_second())
            last = now
        if self.completed < self.layer.size:
            for number, has in enumerate(self._has):
                self._write_part(number, has)
        elif not self._stop.wait(self._settings.blob_seconds()):
            self._library.write_blob(self.layer, self._content)
            for path in self._library.blobs.glob(f"{self._path.name}*"):
                path.unlink()
        self.done.set()

    def _grow(self, more: float) -> None:
        """Add `more` bytes, evenly to all unfinished parts, up to where a fault stops the transfer."""
        percent = self._hold()
        limit = self.layer.size * percent / 100 if percent is not None else 0.0
        if percent is not None:
            more = min(more, limit - sum(self._has))
        if more > 0:
            missing = [number for number, size in enumerate(self._parts) if self._has[number] < size]
            for number in missing:
                self._has[number] = min(self._has[number] + more / len(missing), self._parts[number])
                if self._has[number] == self._parts[number]:
                    self._write_part(number, self._parts[number])
        if percent is not None and sum(self._has) >= limit - 1:
            self._reached(percent)

    def _hold(self) -> float | None:
        """The percentage at which a fault stops this blob; small blobs have no fault."""
        if self.layer.size < 10_000:
            return None
        failing = self._settings.fault("pull_error_at") or {}
        found = [
            self._settings.fault("pull_stuck_at"),
            self._settings.fault("disk_full_at"),
            self._settings.fault("pull_kill_server_at"),
            failing.get("percent"),
        ]
        return min((float(percent) for percent in found if percent is not None), default=None)

    def _reached(self, percent: float) -> None:
        failing = self._settings.fault("pull_error_at") or {}
        if failing.get("percent") == percent:
            self.error = failing["error"]
        elif self._settings.fault("disk_full_at") == percent:
            self.error = f"write {self._path}: no space left on device"
        elif self._settings.fault("pull_kill_server_at") == percent:
            os.kill(os.getpid(), signal.SIGKILL)

    def _read_part(self, number: int) -> float:
        path = self._path.with_name(f"{self._path.name}-{number}")
        return float(json.loads(path.read_text())["Completed"]) if path.exists() else 0.0

    def _write_part(self, number: int, completed: float) -> None:
        document = {"N": number, "Offset": number * PART, "Size": self._parts[number], "Completed": int(completed)}
        path = self._path.with_name(f"{self._path.name}-{number}")
        draft = path.with_name(f".{path.name}")  # replaced atomically: tests read it at any moment
        draft.write_text(json.dumps(document, separators=(",", ":")))
        draft.replace(path)


class Puller:
    def __init__(self, library: Library, settings: Settings) -> None:
        self._library = library
        self._settings = settings
        self._lock = threading.Lock()
        self._transfers: dict[str, Transfer] = {}
        self._users: dict[str, int] = {}

    def pull(self, name: Name, insecure: bool, gone: Callable[[], bool]) -> Iterator[Event]:
        """The events of /api/pull up to `success`, in its order. Raises PullFailed; ends early if the client leaves.

        Closing the iterator stops the transfer, unless another client waits for the same blob.
        """
        yield {"status": "pulling manifest"}
        found = self._manifest(name, insecure)
        fresh: list[Layer] = []
        for layer in found.manifest.all_layers:
            event = {"status": f"pulling {layer.digest[7:19]}", "digest": layer.digest, "total": layer.size}
            if self._library.has_blob(layer):
                yield event | {"completed": layer.size}
                continue
            fresh.append(layer)
            with self._transfer(layer, found.contents.get(layer.digest)) as transfer:
                while not transfer.done.is_set() and transfer.error is None:
                    transfer.done.wait(EVENT_EVERY)
                    if gone():
                        return
                    # Go omits a number that is 0.
                    yield event | ({"completed": transfer.completed} if transfer.completed else {})
                if transfer.error is not None:
                    raise PullFailed(transfer.error)
        yield {"status": "verifying sha256 digest"}
        weights = found.manifest.weights
        if self._settings.fault("digest_mismatch") and weights in fresh and weights is not None:
            (self._library.blobs / weights.file_name).unlink()
            got = digest_of(b"something else")
            raise PullFailed(f"digest mismatch, file must be downloaded again: want {weights.digest}, got {got}")
        yield {"status": "writing manifest"}
        self._library.write_manifest(name, found.manifest)
        if os.environ.get("OLLAMA_NOPRUNE", "") in {"", "0", "false"} and self._library.remove_unused():
            yield {"status": "removing unused layers"}
        yield {"status": "success"}

    @contextmanager
    def _transfer(self, layer: Layer, content: bytes | None) -> Iterator[Transfer]:
        with self._lock:
            transfer = self._transfers.get(layer.digest)
            if transfer is None:
                transfer = self._transfers[layer.digest] = Transfer(layer, content, self._library, self._settings)
                transfer.start()
            self._users[layer.digest] = self._users.get(layer.digest, 0) + 1
        try:
            yield transfer
        finally:
            with self._lock:
                self._users[layer.digest] -= 1
                if not self._users[layer.digest]:
                    transfer.stop()
                    del self._transfers[layer.digest]

    def _manifest(self, name: Name, insecure: bool) -> Package:
        base = f"http{'' if insecure else 's'}://{name.host}"
        if self._settings.fault("registry_down"):
            reason = "dial tcp 127.0.0.1:443: connect: connection refused"
            raise PullFailed(f'pull model manifest: Get "{base}{name.manifest_path}": {reason}')
        described = self._settings.registry().get(name.short)
        if name.host != DEFAULT_HOST:
            return self._fetch(name, base, insecure)
        if (registry := self._settings.registry_url()) is not None:
            return self._fetch(name, registry, insecure=True)
        if described is None:
            raise PullFailed("pull model manifest: file does not exist")
        return package(name.short, described)

    def _fetch(self, name: Name, base: str, insecure: bool) -> Package:
        """Fetch a manifest from a registry, with the small blobs, whose content is needed."""
        url = base + name.manifest_path
        if not insecure:
            reason = "tls: first record does not look like a TLS handshake"
            raise PullFailed(f'pull model manifest: Get "{url}": {reason}')
        address = base.removeprefix("http://")
        data = self._get(address, name.manifest_path, url)
        manifest = Manifest.read(data)
        small = [layer for layer in manifest.all_layers if layer != manifest.weights]
        blobs = f"/v2/{name.namespace}/{name.model}/blobs/"
        return Package(manifest, {layer.digest: self._get(address, blobs + layer.digest, url) for layer in small})

    def _get(self, address: str, path: str, url: str) -> bytes:
        connection = HTTPConnection(address, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            data = response.read()
        except (OSError, HTTPException) as error:
            refused = isinstance(error, ConnectionRefusedError)
            reason = f"dial tcp {address}: connect: connection refused" if refused else str(error)
            raise PullFailed(f'pull model manifest: Get "{url}": {reason}') from None
        finally:
            connection.close()
        if response.status == 404:
            raise PullFailed("pull model manifest: file does not exist")
        if response.status != 200:
            raise PullFailed(f"pull model manifest: {response.status}: {data.decode(errors='replace')}")
        return data
