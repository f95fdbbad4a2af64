#!/usr/bin/env python3
"""A fake of `services/local_servers/flux_service.py`: its interface, with pictures that cost nothing.

A picture's colours depend on its prompt and seed alone. `faults.py` lists the faults that FAKE_FLUX_FAULT may name.
"""

from __future__ import annotations

import hashlib
import signal
import struct
import zlib

from faults import FakeModel, Faults  # first: it makes the servers' own modules importable

# isort: split
from image_api import MAX_BODY_BYTES, ImageRequest, image_routes
from program import arguments, leave, serve
from work import Job

STRIPES = 8


class FakeFlux(FakeModel):
    """Paints stripes."""

    name = "flux"
    max_body_bytes = MAX_BODY_BYTES
    default_steps = 4

    def __init__(self, model: str, faults: Faults) -> None:
        super().__init__(model, faults, 12_000_000_000)
        self.routes = image_routes(self)

    def paint(self, request: ImageRequest, job: Job) -> bytes:
        self.work(request.prompt, request.steps, job)
        if self.faults.applies("no-image", request.prompt):
            return b"<html><body>This is not a picture.</body></html>"
        return striped_png(request.width, request.height, f"{request.seed} {request.steps} {request.prompt}")


def striped_png(width: int, height: int, text: str) -> bytes:
    """Return a PNG with vertical stripes whose colours are taken from the text's hash."""
    digest = hashlib.sha256(text.encode()).digest()
    row = b"\0" + b"".join(digest[3 * (x * STRIPES // width) :][:3] for x in range(width))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of red, green and blue, not interlaced
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(row * height, 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def main() -> int:
    parser = arguments("A fake image server.", 8001, "black-forest-labs/FLUX.1-schnell")
    given = parser.parse_args()
    faults = Faults("FAKE_FLUX_FAULT")
    signals = [signal.SIGINT] if "ignore-sigterm" in faults else [signal.SIGINT, signal.SIGTERM]
    if "ignore-sigterm" in faults:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return serve(FakeFlux(given.model, faults), given.host, given.port, signals)


if __name__ == "__main__":
    leave(main())
