"""What is known of the image server and the vision server before they run: names, models, sizes, first requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.engines.port import HOST_DEVICE, Kind
from services.sizes import GB

TINY_PNG = "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAEElEQVR42mNgGAWjYBTAAAADEAAB1y2EYwAAAABJRU5ErkJggg=="
"""A black square of 16 x 16 pixels, in base64."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Memory and disk that a known model takes.

    `download_bytes` are the files that its server loads, `host_bytes` what it takes on the CPU. On a GPU it takes
    `gpu_bytes` whole; a GPU with less in all gets the first of the smaller figures that fits it (`offloaded_bytes`),
    because the server keeps in RAM what it doesn't need at the moment.
    """

    download_bytes: int
    host_bytes: int
    gpu_bytes: int
    offloaded_bytes: tuple[int, ...] = ()

    def needed_on(self, device: str, total_bytes: int) -> int:
        """Return what the model takes on a device that has `total_bytes` in all (0: unknown)."""
        if device == HOST_DEVICE:
            return self.host_bytes
        fitting = (size for size in (self.gpu_bytes, *self.offloaded_bytes) if size <= total_bytes)
        return next(fitting, self.gpu_bytes) if total_bytes else self.gpu_bytes


@dataclass(frozen=True, slots=True)
class About:
    """One kind of server.

    `names` maps short names to what the server is given as `--model`. `model_id` is the id of the model that it serves
    without an entry in the settings, None to derive it from its source. `path` and `body` are the request that warms it
    up.
    """

    name: str
    title: str
    kind: Kind
    script: str
    description: str
    address_setting: str
    path: str
    body: Mapping[str, object]
    names: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, Sizes] = field(default_factory=dict)

    def source_of(self, name: str) -> str:
        """Return what the server is given as `--model` for a name of the settings."""
        return self.names.get(name, name)


FLUX_SCHNELL = "black-forest-labs/FLUX.1-schnell"
CLIP = "openai/clip-vit-large-patch14"

FLUX = About(
    name="flux",
    title="Flux",
    kind="image",
    script="flux_service.py",
    description="Draws pictures",
    address_setting="flux_api_url",
    path="/generate",
    body={"prompt": "A grey square", "width": 64, "height": 64, "steps": 1, "seed": 0},
    names={"flux-schnell": FLUX_SCHNELL},
    sizes={
        # The files of the repository in 16 bits: transformer 23.8 GB, T5 9.5 GB, CLIP 0.25 GB, VAE 0.17 GB; and 3 GB to
        # work with, as the server itself reckons (`services/local_servers/memory.py`). With whole components offloaded,
        # the transformer alone is on the GPU; with single layers, 1 GB of weights is.
        FLUX_SCHNELL: Sizes(int(33.7 * GB), 37 * GB, 37 * GB, (27 * GB, 4 * GB)),
    },
)
VISION_MODEL = "clip-aesthetic"
VISION = About(
    name="vision",
    title="Vision",
    kind="vision",
    script="vision_service.py",
    description="Judges pictures",
    address_setting="local_vision_api_url",
    path="/score",
    body={"image": TINY_PNG, "prompt": "A black square"},
    names={"clip-aesthetic": CLIP},
    # The file of the weights in float32, and on top of it what PyTorch takes in RAM and on a GPU.
    sizes={CLIP: Sizes(int(1.7 * GB), int(2.6 * GB), int(2.3 * GB))},
)
