"""A Docker registry with one image on loopback, where Docker requires no TLS."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar.gzip"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
PIECE_BYTES = 65_536


class ImageRegistry(ThreadingHTTPServer):
    """Serves `image`, of layers with `layer_bytes` each. While `flow` is cleared, blobs stop after one piece."""

    daemon_threads = True

    def __init__(self, layers: int, layer_bytes: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.image = f"127.0.0.1:{self.server_port}/tiny:1"
        self.flow = threading.Event()
        self.flow.set()
        self.begun = threading.Event()
        tars = [_tar(number, layer_bytes) for number in range(layers)]
        layer_blobs = [gzip.compress(tar, 1) for tar in tars]
        rootfs = {"type": "layers", "diff_ids": [_digest(tar) for tar in tars]}
        config = json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}).encode()
        self.blobs = {_digest(blob): blob for blob in (config, *layer_blobs)}
        self.size = sum(len(blob) for blob in layer_blobs)
        self.manifest = json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "config": _entry(CONFIG_TYPE, config),
                "layers": [_entry(LAYER_TYPE, blob) for blob in layer_blobs],
            }
        ).encode()


class _Handler(BaseHTTPRequestHandler):
    server: ImageRegistry

    def do_GET(self) -> None:
        kind, _, name = self.path.removeprefix("/v2/").removeprefix("tiny/").partition("/")
        if self.path == "/v2/":
            self._send(b"{}", "application/json")
        elif kind == "manifests" and name in ("1", _digest(self.server.manifest)):
            self._send(self.server.manifest, MANIFEST_TYPE)
        elif kind == "blobs" and name in self.server.blobs:
            self._send(self.server.blobs[name], "application/octet-stream")
        else:
            unknown = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}
            self._send(json.dumps(unknown).encode(), "application/json", 404)

    do_HEAD = do_GET

    def _send(self, data: bytes, kind: str, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Docker-Content-Digest", _digest(data))
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(data), PIECE_BYTES):
            self.wfile.write(data[start : start + PIECE_BYTES])
            if len(data) > PIECE_BYTES:
                self.server.begun.set()
                self.server.flow.wait()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextmanager
def image_registry(layers: int = 2, layer_bytes: int = 3_000_000) -> Iterator[ImageRegistry]:
    registry = ImageRegistry(layers, layer_bytes)
    thread = threading.Thread(target=registry.serve_forever, daemon=True)
    thread.start()
    try:
        yield registry
    finally:
        registry.flow.set()
        registry.shutdown()
        registry.server_close()
        thread.join()


def _tar(number: int, size: int) -> bytes:
    """A layer with one incompressible file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        entry = tarfile.TarInfo(f"layer-{number}")
        entry.size = size
        tar.addfile(entry, io.BytesIO(random.Random(number).randbytes(size)))
    return file.getvalue()


def _entry(kind: str, blob: bytes) -> dict[str, object]:
    return {"mediaType": kind, "size": len(blob), "digest": _digest(blob)}


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
